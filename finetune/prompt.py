"""Finetune with prompt tuning: trained vectors in front of every example, in the place of words.

Without arguments it runs the demo: SmolLM2-135M-Instruct on 999 Alpaca rows, both fetched once. The method is
lit_model/prompt.py, the loop finetune/loop.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import loop, setup
from lit_model import prompt
from lit_model.cli import cli
from lit_model.prompt import Prompt


@dataclass
class Options(setup.Options):
    """Options."""

    soft_prompt: Prompt = field(default_factory=Prompt)
    out_dir: Path = Path("out/prompt")
    train: setup.Train = field(default_factory=lambda: setup.Train(lr=3e-2))


def main(options: Options) -> loop.Summary:
    run = setup.start(options)
    gpt = setup.build(run, prompt, prompt=options.soft_prompt)
    prompt.start(gpt, run.tokenizer.encode(options.soft_prompt.text) if options.soft_prompt.text else [])
    return loop.fit(run, gpt, "prompt", options.soft_prompt)


if __name__ == "__main__":
    cli(main, Options, __doc__)
