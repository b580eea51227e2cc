"""Finetune with Houlsby's adapters: a narrow trained network behind the attention and the MLP of each block.

Without arguments it runs the demo. The method is lit_model/methods/bottleneck.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods.bottleneck import Bottleneck


@dataclass
class Options(RunOptions):
    bottleneck: Bottleneck = field(default_factory=Bottleneck)
    out_dir: Path = may_differ(Path("out/bottleneck"))
    train: Train = field(default_factory=lambda: Train(lr=3e-3))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "bottleneck", options.bottleneck)
    return fit(run, gpt, "bottleneck", options.bottleneck)


if __name__ == "__main__":
    cli(main, Options, __doc__)
