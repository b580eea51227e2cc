"""Finetune with prefix tuning: trained keys and values in front of every example, in each layer.

Without arguments it runs the demo. The method is lit_model/methods/prefix.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods import prefix
from lit_model.methods.prefix import Prefix


@dataclass
class Options(RunOptions):
    prefix: Prefix = field(default_factory=Prefix)
    out_dir: Path = may_differ(Path("out/prefix"))
    train: Train = field(default_factory=lambda: Train(lr=1e-2))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "prefix", options.prefix)
    if options.prefix.init == "tokens" and not options.prefix.mlp:
        prefix.init_from_base(gpt, run.tokenizer.encode(options.prefix.text))
    return fit(run, gpt, "prefix", options.prefix)


if __name__ == "__main__":
    cli(main, Options, __doc__)
