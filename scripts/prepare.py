"""Fetches a known set, or takes a file that you have, and writes rows to finetune on.

    python scripts/prepare.py alpaca && python finetune/lora.py --data data/alpaca.json
    python scripts/prepare.py text --source my-book.txt

alpaca   52,002 instructions; CC BY-NC 4.0: for non-commercial use only (https://github.com/tatsu-lab/stanford_alpaca)
dolly    15,011 instructions; CC BY-SA 3.0 (https://huggingface.co/datasets/databricks/databricks-dolly-15k)
text     a text to learn as it is; by default the works of Shakespeare that Andrej Karpathy's char-rnn uses, 1.1 MB,
         public domain
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_model.cli import cli
from lit_model.data.rows import read_rows
from lit_model.files import reading, write_text
from lit_model.weights.demo import source_of

SETS = {  # name: its file here, where it comes from
    "alpaca": ("alpaca.json", "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"),
    "dolly": (
        "dolly.json",
        "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl",
    ),
    "text": (
        "text.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
}


@dataclass
class Options:
    """Options."""

    name: Literal["alpaca", "dolly", "text"]
    """set to fetch"""
    source: str | None = None
    """URL, or a file that you have; null: where the set comes from"""
    out: Path | None = None
    """file to write; null: alpaca.json, dolly.json or text.txt in data/"""
    sha256: str | None = None
    """hash that the source must have; null: any"""


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


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("name",))
