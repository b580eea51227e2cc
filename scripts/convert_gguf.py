"""Convert a GGUF file of llama, qwen2 or gpt2: weights (dequantized), tokenizer and chat template.

python scripts/convert_gguf.py model.Q8_0.gguf checkpoints/my-model
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model.cli import cli
from lit_model.convert_gguf import convert_gguf


@dataclass
class Options:
    """Options."""

    src: Path
    """the .gguf file"""
    out_dir: Path
    """folder for the checkpoint"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """of the stored weights"""


def main(options: Options) -> None:
    convert_gguf(options.src, options.out_dir, getattr(torch, options.dtype))
    print(f"checkpoint: {options.out_dir}")


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("src", "out_dir"))
