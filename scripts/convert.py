"""Convert a GGUF file, or a folder as Meta publishes LLaMA, into a Hugging Face folder.

python scripts/convert.py model.Q8_0.gguf checkpoints/my-model
python scripts/convert.py path/to/Llama-2-7b checkpoints/llama-2-7b --block_size 4096
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lit_model.cli import cli
from lit_model.weights.gguf import convert_gguf
from lit_model.weights.meta import convert_meta


@dataclass
class Options:
    """Options."""

    src: Path
    """a .gguf file (of several parts the first), or a folder with params.json and consolidated.*.pth"""
    out_dir: Path
    """folder for the checkpoint"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """dtype of the stored weights"""
    block_size: int | None = None
    """longest context in tokens, which Meta's files do not state: 4096 for LLaMA 2; null: 2048 for LLaMA 1, 8192 for 3,
    131072 for 3.1 and 3.2"""


def main(options: Options) -> None:
    dtype = getattr(torch, options.dtype)
    if (options.src / "config.json").is_file():
        raise ValueError(f"{options.src} is a Hugging Face folder, which needs no conversion: use it as it is")
    if options.src.is_dir():
        convert_meta(options.src, options.out_dir, dtype, options.block_size)
    else:
        convert_gguf(options.src, options.out_dir, dtype)
    print(f"checkpoint: {options.out_dir}")


if __name__ == "__main__":
    cli(main, Options, __doc__, positional=("src", "out_dir"))
