"""Merge what a finetuning run has trained into the base weights: a Hugging Face folder that needs no method folder.

    python scripts/merge.py --checkpoint_dir D --method_dir out/lora --out_dir checkpoints/merged

The sum is made in float32. Storing it in bfloat16 can lose much of a small correction, so the script says how much, and
what that does to the answers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lit_model.cli import cli
from lit_model.merge import compare, merge
from lit_model.weights import demo


@dataclass
class Options:
    method_dir: Path
    """out_dir of the finetuning run; several with commas between them act together"""
    out_dir: Path
    """folder for the merged network"""
    checkpoint_dir: Path = demo.DEMO_CHECKPOINT
    """Hugging Face folder of the base network that it was trained on"""
    dtype: Literal["same", "bfloat16", "float16", "float32"] = "same"
    """dtype of the merged weights; same: as in the base"""


def main(options: Options) -> None:
    dtype = None if options.dtype == "same" else getattr(torch, options.dtype)
    merge(options.checkpoint_dir, options.method_dir, options.out_dir, dtype)
    print(compare(options.checkpoint_dir, options.method_dir, options.out_dir))
    print(f"checkpoint: {options.out_dir}; give generate/base.py the --style that it was trained with")


if __name__ == "__main__":
    cli(main, Options, __doc__)
