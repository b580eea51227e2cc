"""How a run fits into the memory of a GPU, tried before the first step; on a CPU, freed memory is kept.

The longest row of some batches goes forward and backward beside what AdamW will keep. If it does not fit, rows are
halved, at most twice; then blocks are recomputed in the backward pass, then even their inputs wait on the host
(lit_model/recompute.py).
"""

import ctypes
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from finetune.devices import highest, local
from lit_model.model import GPT
from lit_model.packing import Example, Packed

if TYPE_CHECKING:
    from finetune.run import Run

# rows differ in length from step to step: without this the memory between tensors is lost bit by bit
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

GIB = 2**30
SPARE = 0.02  # of the memory: steps with longer rows than those tried
ADVICE = "lower --train.row_tokens or --examples.max_length, or take --quantize nf4 or a smaller network"
WAYS = {"off": "", "on": ", blocks recomputed", "offload": ", blocks recomputed and their inputs kept on the host"}


def plan(run: "Run", gpt: GPT, batches: Sequence[list[Example]], share: bool) -> None:
    """Finds rows with which training fits into the memory of a GPU; sets `run.row_tokens` and `gpt.recompute`, and
    prints them. All processes call this at the same time, and agree.

    Args:
        batches: the examples of a few steps.
    Raises:
        ValueError: it does not fit; the message says what would help.
    """
    limit, wanted = _limit(run), run.row_tokens
    for way, meaning in WAYS.items():
        gpt.recompute = way
        for run.row_tokens in (wanted, wanted // 2, wanted // 4):
            rows = (row for batch in batches for row in run.rows(gpt, batch, share))
            idx, packed = max(rows, key=lambda row: len(row[1].pos))  # of this process; _peak is the highest of all
            peak = _peak(run, gpt, idx, packed)
            if peak <= (1 - SPARE) * limit:
                rows = f"rows of {len(packed.pos):,} tokens{meaning}"
                print(f"training needs {peak / GIB:.1f} GiB of {limit / GIB:.1f}: {rows}")
                return
    raise ValueError(f"{len(packed.pos):,} tokens at a time do not fit into {limit / GIB:.1f} GiB: {ADVICE}")


def _limit(run: "Run") -> float:
    """Bytes that PyTorch may use, the fewest of all processes."""
    free, total = torch.cuda.mem_get_info(run.device)
    limit, memory_gb = free + torch.cuda.memory_reserved(run.device), run.options.memory_gb
    if memory_gb is not None:
        limit = min(limit, int(memory_gb * GIB))
        torch.cuda.empty_cache()
    limit = -highest(-limit, run.device)
    if memory_gb is not None or run.world > 1:  # all processes run out of memory at the same place, or none
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), run.device)
    return limit


def _peak(run: "Run", gpt: GPT, idx: Tensor, packed: Packed) -> float:
    """Bytes that training on a row takes, the most of all processes; inf: more than there are."""
    torch.cuda.reset_peak_memory_stats()
    try:
        states = torch.empty(_states(gpt, run.device), dtype=torch.uint8, device=run.device)
        for _ in range(2):  # the second pass meets gradients
            run.fabric.backward(gpt(idx.to(run.device), packed.to(run.device)) / len(packed.targets))
        peak = torch.cuda.max_memory_allocated()
        del states
    except torch.OutOfMemoryError:
        peak = math.inf
    gpt.zero_grad()
    peak = highest(peak, run.device)
    if math.isinf(peak):
        _forget(gpt)
    return peak


def _forget(gpt: GPT) -> None:
    """After a pass that ran out of memory. FSDP is still in the middle of it."""
    torch.cuda.synchronize()
    if isinstance(gpt, FSDPModule):
        gpt._get_fsdp_state()._root_post_backward_final_callback()  # torch 2.13 also has a public name for it
    torch.cuda.empty_cache()


def _states(gpt: GPT, device: torch.device) -> int:
    """Bytes that AdamW will keep on this device from the first step on."""
    return 8 * sum(local(p).numel() for p in gpt.parameters() if p.requires_grad and local(p).device == device)


def keep_freed_memory() -> None:
    """Tells glibc to reuse large blocks instead of giving them back after every operation: on a CPU, fetching and
    clearing their pages again takes 15 % of a step with long rows and 35 % with short ones."""
    m_trim_threshold, m_mmap_threshold, gib = -1, -3, 2**30
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(m_mmap_threshold, gib)
            libc.mallopt(m_trim_threshold, gib)
