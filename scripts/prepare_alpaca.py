"""Alpaca's 52,002 instructions, for finetuning: data/alpaca.json.

    python scripts/prepare_alpaca.py && python finetune/lora.py --data data/alpaca.json

Licence: CC BY-NC 4.0, for non-commercial use only (https://github.com/tatsu-lab/stanford_alpaca).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from lit_model import hub
from lit_model.cli import cli
from lit_model.data import read_rows
from lit_model.files import write_text

URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"


@dataclass
class Options:
    """Options."""

    source: str = URL
    """URL, or a file that you have"""
    out: Path = Path("data/alpaca.json")
    """file to write"""
    sha256: str | None = None
    """what the source must have; null: anything"""


def main(options: Options) -> None:
    path = hub.source_of(options.source, options.out, options.sha256)
    rows = read_rows(path)
    write_text(options.out, json.dumps(rows, indent=1, ensure_ascii=False))
    print(f"saved {options.out}: {len(rows):,} rows")


if __name__ == "__main__":
    cli(main, Options, __doc__)
