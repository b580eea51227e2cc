"""What a run would need, before it starts: memory by part, time, disk. A few steps are measured; nothing is written."""

import shutil
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from finetune.devices import local
from finetune.report import peak_memory
from finetune.setup import Run
from finetune.state import KEPT
from lit_model.model import GPT

GIB = 2**30


def report(run: Run, gpt: GPT, steps: Iterator[Any], n_steps: int) -> None:
    """Prints it. Raises ValueError if the disk has no room for what the run would keep.

    Args:
        steps: takes one step for each item that is asked for.
    """
    trained = {p: None for p in gpt.parameters() if p.requires_grad}
    numbers = sum(local(p).numel() for p in trained)
    parts = {
        "frozen weights": sum(_bytes(p) for p in set(gpt.parameters()) - trained.keys()),
        "trained weights, float32": 4 * numbers,
        "their gradients": 4 * numbers,
        "AdamW's two moments": 8 * numbers,
    }
    next(steps)  # it compiles, and fills caches
    began = time.perf_counter()
    n = sum(1 for _ in islice(steps, 2))
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / n
    peak = peak_memory(run.device) * GIB
    rest = "everything else in the process" if run.device.type == "cpu" else "activations, and working memory"
    parts[rest] = max(peak - sum(parts.values()), 0)
    train, lengths = run.options.train, [len(e.ids) for e in run.train_examples]
    share = min(1.0, n_steps * train.batch_size / max(1, len(lengths) * train.epochs))
    tokens = sum(lengths) * train.epochs * share
    print("\nwhat the run would need" + (f", of each of {run.world} processes" if run.world > 1 else ""))
    for name, size in parts.items():
        print(f"  {size / GIB:8.2f} GiB  {name}")
    print(f"  {peak / GIB:8.2f} GiB  at most, measured")
    minutes = n_steps * seconds / 60
    print(f"{n_steps} steps, about {tokens:,.0f} tokens, {1e3 * seconds:,.0f} ms a step: about {minutes:.1f} minutes")
    whole = sum(p.numel() for p in trained)
    files, states = 2 * 4 * whole, (KEPT + 1) * 12 * whole
    out_dir = run.options.out_dir.absolute()
    folder = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    print(f"{files / GIB:.2f} GiB of disk at the end, {states / GIB:.2f} more until then; {free / GIB:.1f} are free")
    if files + states > free:
        raise ValueError(f"{folder} has {free / GIB:.1f} GiB free, and the run wants {(files + states) / GIB:.1f}")


def _bytes(p: nn.Parameter) -> int:
    t = local(p)
    return t.numel() * t.element_size()
