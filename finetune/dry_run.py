"""What a run would need, before it starts: memory by part, time, disk. A few steps are measured; nothing is written."""

import shutil
import time

import torch
from torch import nn

from finetune.devices import local
from finetune.loop import train_step
from finetune.report import peak_memory
from finetune.run import Run, prepare
from finetune.state import KEPT
from lit_model.model import GPT

GIB = 2**30


def dry_run(run: Run, gpt: GPT) -> None:
    """Prints it. Raises ValueError if the disk has no room for what the run would write."""
    network, optimizer = prepare(run, gpt, share=True, lr_scale=lambda name: 1.0)
    trained = {p: None for p in gpt.parameters() if p.requires_grad}
    n_local = sum(local(p).numel() for p in trained)
    parts = {
        "frozen weights": sum(_bytes(p) for p in set(gpt.parameters()) - trained.keys()),
        "trained weights, float32": 4 * n_local,
        "their gradients": 4 * n_local,
        "AdamW's two moments": 8 * n_local,
    }
    seconds = []
    for _, (step, rows) in zip(range(3), run.steps(gpt)):  # the first one compiles, and fills caches
        began = time.perf_counter()
        train_step(run, network, optimizer, step, rows)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    per_step = sum(seconds[1:]) / len(seconds[1:]) if seconds[1:] else seconds[0]
    peak = peak_memory(run.device) * GIB
    rest = "everything else in the process" if run.device.type == "cpu" else "activations, and working memory"
    parts[rest] = max(peak - sum(parts.values()), 0)
    train, lengths = run.options.train, [len(e.ids) for e in run.train_examples]
    tokens = sum(lengths) * min(train.epochs, run.n_steps * train.batch_size / len(lengths))
    print("\nwhat the run would need" + (f", in each of {run.world} processes" if run.world > 1 else ""))
    for name, size in parts.items():
        print(f"  {size / GIB:8.2f} GiB  {name}")
    print(f"  {peak / GIB:8.2f} GiB  at most, measured")
    minutes = run.n_steps * per_step / 60
    speed = f"{1e3 * per_step:,.0f} ms a step"
    print(f"{run.n_steps} steps, about {tokens:,.0f} tokens, {speed}: about {minutes:.1f} minutes")
    n_trained = sum(p.numel() for p in trained)
    files, states = 2 * 4 * n_trained, (KEPT + 1) * 12 * n_trained
    out_dir = run.options.out_dir.absolute()
    folder = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    print(f"{files / GIB:.2f} GiB of disk at the end, {states / GIB:.2f} more until then; {free / GIB:.1f} are free")
    if files + states > free:
        raise ValueError(f"{folder} has {free / GIB:.1f} GiB free, and the run wants {(files + states) / GIB:.1f}")


def _bytes(p: nn.Parameter) -> int:
    t = local(p)
    return t.numel() * t.element_size()
