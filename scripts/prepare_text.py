"""A plain text, to learn as it is: data/text.txt.

    python scripts/prepare_text.py --source my-book.txt && python finetune/lora.py --data data/text.txt

Without --source: all of Shakespeare's that Andrej Karpathy's char-rnn uses, 1.1 MB, public domain.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from lit_model import hub
from lit_model.cli import cli
from lit_model.data import read_rows
from lit_model.files import write_text

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class Options:
    """Options."""

    source: str = URL
    """URL, or a file that you have"""
    out: Path = Path("data/text.txt")
    """file to write"""
    sha256: str | None = None
    """what the source must have; null: anything"""


def main(options: Options) -> None:
    path = hub.source_of(options.source, options.out, options.sha256)
    pieces = read_rows(path) if path.suffix == ".txt" else []
    if not pieces:
        raise ValueError(f"{path} is no .txt file")
    write_text(options.out, "\n\n".join(row["text"] for row in pieces) + "\n")
    print(f"saved {options.out}: {len(pieces):,} pieces of some 2,000 characters")


if __name__ == "__main__":
    cli(main, Options, __doc__)
