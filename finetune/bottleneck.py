"""Finetune with Houlsby's adapters: a narrow trained network behind the attention and the MLP of each block.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/bottleneck.py, the loop finetune/loop.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import bottleneck
from lit_model.bottleneck import Bottleneck
from lit_model.cli import cli


@dataclass
class Options(setup.Options):
    """Options."""

    bottleneck: Bottleneck = field(default_factory=Bottleneck)
    out_dir: Path = Path("out/bottleneck")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=3e-3))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, bottleneck, bottleneck=options.bottleneck)
    return loop.fit(run, gpt, "bottleneck", options.bottleneck)


if __name__ == "__main__":
    cli(main, Options, __doc__)
