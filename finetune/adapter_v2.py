"""Finetune with LLaMA-Adapter v2: v1, a scale and a bias for each output of every linear layer, and the norms.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/adapter_v2.py, the loop finetune/loop.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import adapter_v2
from lit_model.adapter_v2 import AdapterV2
from lit_model.cli import cli


@dataclass
class Options(setup.Options):
    """Options."""

    adapter_v2: AdapterV2 = field(default_factory=AdapterV2)
    out_dir: Path = Path("out/adapter_v2")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=1e-2))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, adapter_v2, adapter_v2=options.adapter_v2)
    return loop.fit(run, gpt, "adapter_v2", options.adapter_v2)


if __name__ == "__main__":
    cli(main, Options, __doc__)
