"""Finetune some of the network: the output layer, the last blocks, biases, norms, or what a regular expression finds.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/selective.py, the loop finetune/loop.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import selective
from lit_model.cli import cli
from lit_model.selective import Selective


@dataclass
class Options(setup.Options):
    """Options."""

    selective: Selective = field(default_factory=Selective)
    cache_features: bool = False
    """compute the frozen layers below the first trained one once for all epochs, and keep what they give on the host"""
    out_dir: Path = Path("out/selective")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=1e-4))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, selective, selective=options.selective)
    if options.cache_features:
        run = setup.cache_trunk(run, gpt)
    return loop.fit(run, gpt, "selective", options.selective)


if __name__ == "__main__":
    cli(main, Options, __doc__)
