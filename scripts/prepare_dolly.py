"""Dolly's 15,011 instructions, for finetuning: data/dolly.json.

    python scripts/prepare_dolly.py && python finetune/lora.py --data data/dolly.json

Licence: CC BY-SA 3.0 (https://huggingface.co/datasets/databricks/databricks-dolly-15k).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from lit_model import hub
from lit_model.cli import cli
from lit_model.files import write_text

URL = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"


@dataclass
class Options:
    """Options."""

    source: str = URL
    """URL, or a file that you have"""
    out: Path = Path("data/dolly.json")
    """file to write"""
    sha256: str | None = None
    """what the source must have; null: anything"""


def main(options: Options) -> None:
    path = hub.source_of(options.source, options.out, options.sha256)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append(dict(instruction=row["instruction"], input=row["context"], output=row["response"]))
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{path}, line {number}: no row of instruction, context and response ({e})") from None
    write_text(options.out, json.dumps(rows, indent=1, ensure_ascii=False))
    print(f"saved {options.out}: {len(rows):,} rows")


if __name__ == "__main__":
    cli(main, Options, __doc__)
