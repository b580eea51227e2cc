"""Finetune with LLaMA-Adapter: prompt vectors in the upper layers, let in through gates that start at zero.

Without arguments it runs the demo. The method is lit_model/methods/adapter.py, the loop finetune/loop.py.

Where the defaults differ from the authors' run on LLaMA-7B (https://arxiv.org/abs/2303.16199): the learning rate 3e-2
is for a network of this size in 30 steps (theirs is 9e-3 * batch / 256: 1e-3 to 2e-3 on 7B), and it rises for a tenth
of the run, not for two of five epochs.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods.adapter import Adapter


@dataclass
class Options(RunOptions):
    adapter: Adapter = field(default_factory=Adapter)
    out_dir: Path = may_differ(Path("out/adapter"))
    train: Train = field(default_factory=lambda: Train(lr=3e-2))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "adapter", options.adapter)
    return fit(run, gpt, "adapter", options.adapter)


if __name__ == "__main__":
    cli(main, Options, __doc__)
