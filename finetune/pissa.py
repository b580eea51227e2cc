"""Finetune with PiSSA or OLoRA: a LoRA that starts from the weights that it corrects.

Without arguments it runs the demo. The method is lit_model/methods/pissa.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods import lora, pissa
from lit_model.methods.pissa import PiSSA


@dataclass
class Options(RunOptions):
    pissa: PiSSA = field(default_factory=PiSSA)
    out_dir: Path = may_differ(Path("out/pissa"))
    train: Train = field(default_factory=lambda: Train(lr=2e-3))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "pissa", options.pissa)
    lora.validate_rank(gpt)
    pissa.init_from_base(gpt, options.pissa)
    return fit(run, gpt, "pissa", options.pissa, lr_scale=lora.lr_scale(options.pissa), share=not options.pissa.dropout)


if __name__ == "__main__":
    cli(main, Options, __doc__)
