"""Finetune with prompt tuning: trained vectors in front of every example, in the place of words.

Without arguments it runs the demo. The method is lit_model/methods/prompt.py, the loop finetune/loop.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.loop import Summary, fit
from finetune.run import RunOptions, Train, build, may_differ, start
from lit_model.cli import cli
from lit_model.methods import prompt
from lit_model.methods.prompt import Prompt


@dataclass
class Options(RunOptions):
    prompt: Prompt = field(default_factory=Prompt)
    out_dir: Path = may_differ(Path("out/prompt"))
    train: Train = field(default_factory=lambda: Train(lr=3e-2))


def main(options: Options) -> Summary:
    run = start(options)
    gpt = build(run, "prompt", options.prompt)
    prompt.init_from_base(gpt, run.tokenizer.encode(options.prompt.text) if options.prompt.text else [])
    return fit(run, gpt, "prompt", options.prompt)


if __name__ == "__main__":
    cli(main, Options, __doc__)
