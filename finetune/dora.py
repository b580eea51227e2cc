"""Finetune with DoRA: LoRA, with the size of each row of the weights trained apart from its direction.

Without arguments it runs the demo. The method is lit_model/methods/dora.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods import lora
from lit_model.methods.dora import DoRA


@dataclass
class Options(RunOptions):
    dora: DoRA = field(default_factory=DoRA)
    out_dir: Path = may_differ(Path("out/dora"))
    train: Train = field(default_factory=lambda: Train(lr=2e-3))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "dora", options.dora)
    lora.validate_rank(gpt)
    return fit(run, gpt, "dora", options.dora, lr_scale=lora.lr_scale(options.dora), share=not options.dora.dropout)


if __name__ == "__main__":
    cli(main, Options, __doc__)
