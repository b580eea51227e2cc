"""Convert a folder as Meta publishes LLaMA: params.json, consolidated.00.pth and its other slices, tokenizer.model.

python scripts/convert_meta.py path/to/Llama-2-7b checkpoints/llama-2-7b --block_size 4096
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model.cli import cli
from lit_model.convert_meta import convert_meta


@dataclass
class Options:
    """Options."""

    src_dir: Path
    """folder with params.json and consolidated.*.pth"""
    out_dir: Path
    """folder for the checkpoint"""
    dtype: Literal["same", "bfloat16", "float16", "float32"] = "same"
    """of the stored weights; same: as in the source"""
    block_size: int | None = None
    """longest context in tokens, which the files do not state: 4096 for LLaMA 2; null: 2048 for LLaMA 1, 8192 for 3,
    131072 for 3.1 and 3.2"""


def main(options: Options) -> None:
    dtype = None if options.dtype == "same" else getattr(torch, options.dtype)
    convert_meta(options.src_dir, options.out_dir, dtype, options.block_size)
    print(f"checkpoint: {options.out_dir}")


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("src_dir", "out_dir"))
