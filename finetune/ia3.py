"""Finetune with (IA)^3: keys, values and the inside of the MLP, each times a trained number.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/ia3.py, the loop finetune/loop.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import ia3
from lit_model.cli import cli


@dataclass
class Options(setup.Options):
    """Options."""

    out_dir: Path = Path("out/ia3")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=3e-2))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, ia3)
    return loop.fit(run, gpt, "ia3")


if __name__ == "__main__":
    cli(main, Options, __doc__)
