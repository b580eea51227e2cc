"""Finetune with LoRA: a trained low-rank correction beside the frozen linear layers.

Without arguments it runs the demo. The method is lit_model/methods/lora.py, the loop finetune/loop.py.

Rank 8, alpha 16 and the targets q and v are Alpaca-LoRA's; the learning rate 2e-3 is for a network of this size in 30
steps (2e-4 to 3e-4 on 7B), and dropout is 0 so that examples can share a preamble. LoRA+ and
rsLoRA are options of it, QLoRA is --quantize nf4; DoRA and PiSSA have scripts of their own.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods import lora
from lit_model.methods.lora import LoRA


@dataclass
class Options(RunOptions):
    lora: LoRA = field(default_factory=LoRA)
    out_dir: Path = may_differ(Path("out/lora"))
    train: Train = field(default_factory=lambda: Train(lr=2e-3))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "lora", options.lora)
    lora.validate_rank(gpt)
    return fit(run, gpt, "lora", options.lora, lr_scale=lora.lr_scale(options.lora), share=not options.lora.dropout)


if __name__ == "__main__":
    cli(main, Options, __doc__)
