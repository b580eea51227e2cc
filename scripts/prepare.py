"""Fetches a known set, or takes a file that you have, and writes rows to finetune on.

    python scripts/prepare.py alpaca && python finetune/lora.py --data data/alpaca.json
    python scripts/prepare.py text --source my-book.txt

alpaca   52,002 instructions; CC BY-NC 4.0: for non-commercial use only (https://github.com/tatsu-lab/stanford_alpaca)
dolly    15,011 instructions; CC BY-SA 3.0 (https://huggingface.co/datasets/databricks/databricks-dolly-15k)
text     a text to learn as it is; by default the works of Shakespeare that Andrej Karpathy's char-rnn uses, 1.1 MB,
         public domain
"""

import hashlib
import http.client
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.request import Request, urlopen

from lit_model.cli import cli
from lit_model.data.rows import read_rows
from lit_model.files import reading, write_text
from lit_model.weights.demo import check_sha256

SETS = {  # name: its file here, where it comes from
    "alpaca": ("alpaca.json", "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"),
    "dolly": (
        "dolly.json",
        "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",
    ),
    "text": ("text.txt", "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
}


@dataclass
class Options:
    name: Literal["alpaca", "dolly", "text"]
    """set to fetch"""
    source: str = ""
    """URL, or a file that you have; empty: where the set comes from"""
    out: Path | None = None
    """file to write; null: alpaca.json, dolly.json or text.txt in data/"""
    sha256: str = ""
    """hash that the source must have; empty: any"""


def main(options: Options) -> None:
    file, url = SETS[options.name]
    out = options.out or Path("data") / file
    path = source_of(options.source or url, out, options.sha256)
    rows = dolly_rows(path) if options.name == "dolly" else read_rows(path)
    if options.name == "text":
        with reading(path):
            content = "\n\n".join(row["text"] for row in rows) + "\n"
    else:
        content = json.dumps(rows, indent=1, ensure_ascii=False)
    write_text(out, content)
    print(f"saved {out}: {len(rows):,} rows")


def dolly_rows(path: Path) -> list[dict[str, str]]:
    """Rows of instruction, context and response as rows of instruction, input and output."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            with reading(f"{path}, line {number}"):
                row = json.loads(line)
                rows.append(dict(instruction=row["instruction"], input=row["context"], output=row["response"]))
    return rows


def source_of(source: str, out: Path, sha256: str) -> Path:
    """The file that `out` is to be made of: fetched beside it if `source` is a URL. Raises ValueError if `out` is there
    already, FileNotFoundError if `source` is not."""
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or name another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if "://" in source:
        name = hashlib.sha256(source.encode()).hexdigest()[:8]  # another one for another URL
        return fetch_url(source, out.with_suffix(f".{name}{Path(source).suffix}"), sha256)
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} is not there")
    check_sha256(Path(source), source, sha256)
    return Path(source)


def fetch_url(url: str, path: Path, sha256: str = "") -> Path:
    """Downloads a file, unless it is there, and resumes what was cut off. Raises ValueError if the server does not give
    it, or gives something else than `sha256` says."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        have = partial.stat().st_size if partial.is_file() else 0
        request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urlopen(request, timeout=60) as answer, open(partial, "ab" if answer.status == 206 else "wb") as file:
                shutil.copyfileobj(answer, file)
                if answer.length:
                    raise ValueError(f"it ended {answer.length} bytes too early")
        except (OSError, http.client.HTTPException, ValueError) as e:
            if getattr(e, "code", None) == 416:  # nothing is left to fetch: the part is of another file, or all of it
                partial.unlink()
            raise ValueError(f"{url} cannot be fetched ({e}); try again, or name a file that you have") from None
        os.replace(partial, path)
    check_sha256(path, url, sha256, discard=True)
    return path


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("name",))
