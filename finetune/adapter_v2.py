"""Finetune with LLaMA-Adapter v2: v1, a scale and a bias for each output of every linear layer, and the norms.

Without arguments it runs the demo. The method is lit_model/methods/adapter_v2.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods.adapter_v2 import AdapterV2


@dataclass
class Options(RunOptions):
    adapter_v2: AdapterV2 = field(default_factory=AdapterV2)
    out_dir: Path = may_differ(Path("out/adapter_v2"))
    train: Train = field(default_factory=lambda: Train(lr=1e-2))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "adapter_v2", options.adapter_v2)
    return fit(run, gpt, "adapter_v2", options.adapter_v2)


if __name__ == "__main__":
    cli(main, Options, __doc__)
