"""How a run fits into the memory of a GPU, measured before the first step; on a CPU, freed memory is kept.

The peak of a step is a straight line in the tokens of its longest row,

    needed(tokens) = fixed + per_token * tokens

fixed: weights, gradients, what the optimizer keeps; per_token: what forward leaves for backward, and working memory.
Two short rows give the line. If the rows that were asked for do not fit, shorter ones are taken, down to a quarter;
then blocks are recomputed in the backward pass, then even their inputs wait on the host (lit_model/recompute.py).
Memory comes in pages, and gaps between tensors stay unused: where it gets tight, rows are tried before promised.
"""

import ctypes
import math
import os
import sys
from collections.abc import Sequence
from itertools import accumulate, cycle, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from finetune.devices import highest, local
from lit_model.model import GPT, Linear
from lit_model.packing import Example, Packed, pack_share

if TYPE_CHECKING:
    from finetune.run import Run

# rows differ in length from step to step: without this the memory between tensors is lost bit by bit
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

GIB = 2**30
SPARE = 0.02  # of the memory: steps with longer rows than those seen
TIGHT = 0.9  # of the memory: rows that need more than this are tried
SHORTEST = 1024  # tokens of a row, and a quarter of what was asked for: shorter ones leave a GPU idle
WAYS = {"off": "", "on": ", blocks recomputed", "offload": ", blocks recomputed and their inputs kept on the host"}


def plan(run: "Run", gpt: GPT, batches: Sequence[list[Example]], share: bool) -> None:
    """Finds rows with which training fits into the memory of a GPU; sets `run.row_tokens`, `run.advice` (what would
    need less) and `gpt.recompute`, and prints them. All processes call this at the same time, and agree.

    Args:
        batches: the examples of a few steps.
    Raises:
        ValueError: it does not fit; the message says what would help, and by how much.
    """
    limit = _limit(run)
    longest = max(len(e.ids) for batch in batches for e in batch)
    usual = len(_longest_row(run, gpt, batches, run.row_tokens, share)[1].pos)
    report = f"rows of {usual:,} tokens do not fit into {limit / GIB:.1f} GiB"
    run.advice = f"{_nf4(gpt)}a smaller network needs less"
    for way, meaning in WAYS.items():
        gpt.recompute = way
        line = _measure(run, gpt, batches[0], usual, share)
        if line is None:
            continue
        fixed, per_token = line
        if way == "off":
            report = f"training needs {(fixed + per_token * usual) / GIB:.1f} GiB of {limit / GIB:.1f}"
        fewer = f"100 tokens less in --train.row_tokens or --examples.max_length save {100 * per_token / GIB:.2f} GiB"
        run.advice = f"{fewer}, {_nf4(gpt)}a smaller network needs less"
        fits = int((limit * (1 - SPARE) - fixed) / per_token)
        least = min(usual, longest if way == "offload" else max(longest, SHORTEST, usual // 4))
        tokens = min(run.row_tokens, fits)
        while fits >= least and tokens >= least // 2:  # a row of up to twice as many ends where an example ends
            rows = len(_longest_row(run, gpt, batches, tokens, share)[1].pos)
            is_roomy = fixed + per_token * rows < TIGHT * limit
            if rows <= fits and (is_roomy or _runs(run, gpt, batches, tokens, share)):
                change = f"; rows of {tokens:,} tokens instead of {usual:,}" if tokens < usual else ""
                print(f"{report}{change}{meaning}")
                run.row_tokens = tokens
                return
            tokens = min(tokens, rows) * 9 // 10
    raise ValueError(f"{report}, even with blocks recomputed and on the host: {run.advice}")


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


def _longest_row(
    run: "Run", gpt: GPT, batches: Sequence[list[Example]], row_tokens: int, share: bool
) -> tuple[Tensor, Packed]:
    """The longest row of all processes."""
    settings = row_tokens, gpt.n_virtual_tokens, gpt.n_virtual_keys, share
    ranks = range(run.world)
    rows = (row for batch in batches for rank in ranks for row in pack_share(batch, *settings, rank, run.world))
    return max(rows, key=lambda row: len(row[1].pos))[:2]


def _peak(run: "Run", gpt: GPT, idx: Tensor, packed: Packed) -> float:
    """Bytes that a pass forward and backward takes at most, the most of all processes; inf: more than there are."""
    torch.cuda.reset_peak_memory_stats()
    try:
        run.fabric.backward(gpt(idx.to(run.device), packed.to(run.device)) / len(packed.targets))
        peak = torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        peak = math.inf
    return highest(peak, run.device)


def _measure(run: "Run", gpt: GPT, batch: list[Example], usual: int, share: bool) -> tuple[float, float] | None:
    """The line's two numbers, in bytes; None if even short rows do not fit."""
    for part in (4, 8, 16, 32):  # the shorter of the two rows, of the usual one
        n = 1 + sum(accumulated < usual // part for accumulated in accumulate(len(e.ids) for e in batch))
        points = []
        for count in (n, n, 2 * n):  # the first one also compiles, and leaves the gradients that a second row meets
            examples = list(islice(cycle(batch), count))
            virtual = gpt.n_virtual_tokens, gpt.n_virtual_keys
            idx, packed, _ = pack_share(examples, 2**31, *virtual, share, 0, 1)[0]
            if math.isinf(peak := _peak(run, gpt, idx, packed)):
                break
            points.append((len(packed.pos), peak))
        gpt.zero_grad()
        if len(points) == 3:
            _, (short, low), (long, high) = points
            per_token = max(high - low, 1) / max(long - short, 1)
            return low - per_token * short + highest(_states(gpt, run.device), run.device), per_token
        _forget(gpt)
    return None


def _runs(run: "Run", gpt: GPT, batches: Sequence[list[Example]], row_tokens: int, share: bool) -> bool:
    """Whether the longest row of each batch fits in fact, beside what AdamW will keep, in all processes."""
    try:
        states = torch.empty(_states(gpt, run.device), dtype=torch.uint8, device=run.device)
    except torch.OutOfMemoryError:
        states = None
    fits = highest(float(states is None), run.device) == 0
    for batch in batches:
        fits = fits and math.isfinite(_peak(run, gpt, *_longest_row(run, gpt, [batch], row_tokens, share)))
    del states
    gpt.zero_grad()
    if not fits:
        _forget(gpt)
    return fits


def _forget(gpt: GPT) -> None:
    """After a pass that ran out of memory. FSDP is still in the middle of it."""
    torch.cuda.synchronize()
    if isinstance(gpt, FSDPModule):
        gpt._get_fsdp_state()._root_post_backward_final_callback()  # torch 2.13 also has a public name for it
    torch.cuda.empty_cache()


def _states(gpt: GPT, device: torch.device) -> int:
    """Bytes that AdamW will keep on this device from the first step on."""
    return 8 * sum(local(p).numel() for p in gpt.parameters() if p.requires_grad and local(p).device == device)


def _nf4(gpt: GPT) -> str:
    """What quantization to nf4 would save."""
    frozen = [m.weight for b in gpt.blocks for m in b.modules() if type(m) is Linear and not m.weight.requires_grad]
    saved = sum(w.numel() * (w.element_size() - 0.52) for w in frozen)
    return f"--quantize nf4 saves {saved / GIB:.1f} GiB, " if saved else ""


def keep_freed_memory() -> None:
    """Tells glibc to reuse large blocks instead of giving them back after every operation: on a CPU, fetching and
    clearing their pages again takes 15 % of a step with long rows and 35 % with short ones."""
    m_trim_threshold, m_mmap_threshold, gib = -1, -3, 2**30
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(m_mmap_threshold, gib)
            libc.mallopt(m_trim_threshold, gib)
