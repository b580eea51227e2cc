"""Finetune every parameter of the network, in float32, while the activations are in bfloat16 where that is fast.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/full.py, the loop finetune/loop.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import full
from lit_model.cli import cli


@dataclass
class Options(setup.Options):
    """Options."""

    out_dir: Path = Path("out/full")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=1e-4))


def main(options: Options) -> loop.Summary:
    if options.quantize != "none":
        raise ValueError(
            "full finetuning trains the weights that --quantize would freeze; use finetune/lora.py with it"
        )
    run = setup.start(options)
    gpt = setup.build(run, full)
    return loop.fit(run, gpt, "full")


if __name__ == "__main__":
    cli(main, Options, __doc__)
