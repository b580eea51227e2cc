"""Finetune with prefix tuning: trained keys and values in front of every example, in each layer.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/prefix.py, the loop finetune/loop.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import prefix
from lit_model.cli import cli
from lit_model.prefix import Prefix


@dataclass
class Options(setup.Options):
    """Options."""

    prefix: Prefix = field(default_factory=Prefix)
    out_dir: Path = Path("out/prefix")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=1e-2))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, prefix, prefix=options.prefix)
    if options.prefix.init == "tokens" and not options.prefix.mlp:
        prefix.start(gpt, run.tokenizer.encode(options.prefix.text))
    return loop.fit(run, gpt, "prefix", options.prefix)


if __name__ == "__main__":
    cli(main, Options, __doc__)
