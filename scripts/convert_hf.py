"""Convert a Hugging Face folder (config.json, *.safetensors or *.bin, tokenizer): LLaMA and its kin, or GPT-2.

python scripts/convert_hf.py path/to/hf-folder checkpoints/my-model
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model.cli import cli
from lit_model.convert import convert_hf


@dataclass
class Options:
    """Options."""

    src_dir: Path
    """folder with config.json and *.safetensors or *.bin"""
    out_dir: Path
    """folder for the checkpoint"""
    dtype: Literal["same", "bfloat16", "float16", "float32"] = "same"
    """of the stored weights; same: as in the source"""


def main(options: Options) -> None:
    convert_hf(options.src_dir, options.out_dir, None if options.dtype == "same" else getattr(torch, options.dtype))
    print(f"checkpoint: {options.out_dir}")


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("src_dir", "out_dir"))
