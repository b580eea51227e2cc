"""Finetune some of the network: the output layer, the last blocks, biases, norms, or what a regular expression finds.

Without arguments it runs the demo. The method is lit_model/methods/selective.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods.selective import Selective


@dataclass
class Options(RunOptions):
    selective: Selective = field(default_factory=Selective)
    out_dir: Path = may_differ(Path("out/selective"))
    train: Train = field(default_factory=lambda: Train(lr=1e-4))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "selective", options.selective)
    return fit(run, gpt, "selective", options.selective)


if __name__ == "__main__":
    cli(main, Options, __doc__)
