"""Finetune with LoRA: a trained low-rank correction beside the frozen linear layers.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/lora.py, the loop finetune/loop.py.

Rank 8, alpha 16 and the targets q and v are Alpaca-LoRA's; the learning rate 2e-3 is for a network of this size in 30
steps (2e-4 to 3e-4 on 7B), and dropout is 0 so that examples can share a preamble. DoRA, LoRA+, PiSSA, OLoRA and rsLoRA
are options of it, QLoRA is --quantize nf4.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import lora
from lit_model.cli import cli
from lit_model.lora import LoRA


@dataclass
class Options(setup.Options):
    """Options."""

    lora: LoRA = field(default_factory=LoRA)
    out_dir: Path = Path("out/lora")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=2e-3))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, lora, lora=options.lora)
    lora.start(gpt, options.lora)
    lora.check(gpt)
    return loop.fit(run, gpt, "lora", options.lora, share=not options.lora.dropout, lr_scale=lora.lr_scale)


if __name__ == "__main__":
    cli(main, Options, __doc__)
