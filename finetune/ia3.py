"""Finetune with (IA)^3: keys, values and the inside of the MLP, each times a trained number.

Without arguments it runs the demo. The method is lit_model/methods/ia3.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods.ia3 import IA3


@dataclass
class Options(RunOptions):
    ia3: IA3 = field(default_factory=IA3)
    out_dir: Path = may_differ(Path("out/ia3"))
    train: Train = field(default_factory=lambda: Train(lr=3e-2))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "ia3", options.ia3)
    return fit(run, gpt, "ia3", options.ia3)


if __name__ == "__main__":
    cli(main, Options, __doc__)
