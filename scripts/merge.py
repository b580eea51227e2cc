"""Merge what a finetuning run has trained into the base weights: out comes a checkpoint that needs no method folder.

    python scripts/merge.py --checkpoint_dir D --method_dir out/lora --out_dir checkpoints/merged

The sum is made in float32. Storing it in bfloat16 can lose much of a small correction, so the script says how much.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model import hub, load
from lit_model.checkpoint import (
    METHODS,
    fingerprint_of,
    is_base,
    method_header,
    read_tensors,
    save_checkpoint,
    save_tensors,
    task_in,
)
from lit_model.cli import cli
from lit_model.convert import tokenizer_files
from lit_model.files import refuse_used


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
    refuse_used(options.out_dir)
    header = method_header(options.method_dir)
    method, method_options = METHODS[header["method"]]
    gpt = load(options.checkpoint_dir, options.method_dir)
    gpt.merge()
    exact = gpt.state_dict()
    rest = {name: exact.pop(name) for name in list(exact) if not is_base(name)}
    task, only_head = task_in(header), all(name.startswith("heads.") for name in rest)
    if rest and not only_head and not hasattr(method, "unmerged"):
        raise ValueError(
            f"{header['method']} cannot be merged into the base weights; generate with --method_dir instead"
        )
    base = read_tensors(options.checkpoint_dir / "lit_model.safetensors")
    base.setdefault("lm_head.weight", base["wte.weight"])
    base |= {name: torch.zeros_like(t, dtype=base["wte.weight"].dtype) for name, t in exact.items() if name not in base}
    stored = {
        k: t.to(base[k].dtype if options.dtype == "same" else getattr(torch, options.dtype)) for k, t in exact.items()
    }
    save_checkpoint(options.out_dir, gpt.config, stored, tokenizer_files(options.checkpoint_dir))
    lost = rounding_error(exact, stored, base)
    keep = "; --dtype float32 keeps it" if lost > 0.05 else ""
    print(f"storing the sum loses {100 * lost:.3g} % of what was trained{keep}")
    if (kind := header.get("quantize", "none")) != "none":
        print(f"it was trained over {kind}, and is merged into the full weights: look at what it answers now")
    print(f"checkpoint: {options.out_dir}; give generate/base.py the --style that it was trained with")
    if rest:
        name, left = ("full", None) if only_head else method.unmerged(method_options(**json.loads(header["options"])))
        folder = options.out_dir / name
        folder.mkdir()
        save_tensors(folder / "lit_method.safetensors", rest, name, left, fingerprint_of(options.out_dir), task)
        print(f"the rest of it does not merge: give generate/base.py --method_dir {folder}, too")


def rounding_error(exact: dict[str, Tensor], stored: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """|stored - exact| / |exact - base| over all tensors that training has changed."""
    error = change = 0.0
    for name, t in exact.items():
        if (moved := (t - base[name].float()).square().sum().item()) > 0:
            change += moved
            error += (stored[name].float() - t).square().sum().item()
    return math.sqrt(error / change) if change else 0.0


if __name__ == "__main__":
    cli(main, Options, __doc__)
