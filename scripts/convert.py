"""Convert a GGUF file into a Hugging Face folder. One that you have is used as it is.

python scripts/convert.py model.Q8_0.gguf checkpoints/my-model
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lit_model.cli import cli
from lit_model.weights.gguf import convert_gguf


@dataclass
class Options:
    src: Path
    """a .gguf file, of several parts the first"""
    out_dir: Path
    """folder for the checkpoint"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """dtype of the stored weights"""


def main(options: Options) -> None:
    convert_gguf(options.src, options.out_dir, getattr(torch, options.dtype))
    print(f"checkpoint: {options.out_dir}")


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("src", "out_dir"))
