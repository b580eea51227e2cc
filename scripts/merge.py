"""Merge what a finetuning run has trained into the base weights: out comes a checkpoint that needs no method folder.

    python scripts/merge.py --checkpoint_dir D --method_dir out/lora --out_dir checkpoints/merged

The sum is made in float32. Storing it in bfloat16 can lose much of a small correction, so the script says how much.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model import hub, load
from lit_model.checkpoint import METHODS, method_header, read_tensors, save_checkpoint
from lit_model.cli import cli


@dataclass
class Options:
    """Options."""

    method_dir: Path
    """out_dir of the finetuning run"""
    out_dir: Path
    """folder for the merged checkpoint"""
    checkpoint_dir: Path = hub.DEMO_CHECKPOINT
    """folder of the base network that it was trained on"""
    dtype: Literal["same", "bfloat16", "float16", "float32"] = "same"
    """of the merged weights; same: as in the base"""


def main(options: Options) -> None:
    header = method_header(options.method_dir)
    method, _ = METHODS[header["method"]]
    if not hasattr(method, "merge"):
        raise ValueError(
            f"{header['method']} cannot be merged into the base weights; generate with --method_dir instead"
        )
    if options.out_dir.resolve() == options.checkpoint_dir.resolve():
        raise ValueError(f"{options.out_dir} is the base checkpoint itself; name another --out_dir")
    stored = read_tensors(options.checkpoint_dir / "lit_model.safetensors")
    dtype = next(iter(stored.values())).dtype if options.dtype == "same" else getattr(torch, options.dtype)
    gpt = load(options.checkpoint_dir, options.method_dir)
    error = method.merge(gpt, dtype)
    gpt.config.tie = gpt.lm_head.weight is gpt.wte.weight  # a LoRA on the head parts it from the embedding
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (options.checkpoint_dir / name).is_file():
            options.out_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(options.checkpoint_dir / name, options.out_dir / name)
    save_checkpoint(options.out_dir, gpt.config, {name: t.to(dtype) for name, t in gpt.state_dict().items()})
    print(f"storing the sum in {dtype} changes what was trained by {100 * error:.3g} %")
    print(f"checkpoint: {options.out_dir}")


if __name__ == "__main__":
    cli(main, Options, __doc__)
