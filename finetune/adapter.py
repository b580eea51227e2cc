"""Finetune with LLaMA-Adapter: prompt vectors in the upper layers, let in through gates that start at zero.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/adapter.py, the loop finetune/loop.py.

Where the defaults differ from the authors' run on LLaMA-7B (https://arxiv.org/abs/2303.16199): the learning rate 3e-2
is for a network of this size in 30 steps (theirs is 9e-3 * batch / 256: 1e-3 to 2e-3 on 7B), and it rises for a tenth
of the run, not for two of five epochs.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import adapter
from lit_model.adapter import Adapter
from lit_model.cli import cli


@dataclass
class Options(setup.Options):
    """Options."""

    adapter: Adapter = field(default_factory=Adapter)
    out_dir: Path = Path("out/adapter")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=3e-2))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, adapter, adapter=options.adapter)
    return loop.fit(run, gpt, "adapter", options.adapter)


if __name__ == "__main__":
    cli(main, Options, __doc__)
