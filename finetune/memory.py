"""How a run fits into the memory of a GPU, tried before the first step; on a CPU, freed memory is kept.

The longest row of some batches goes forward and backward beside what AdamW will keep. If it does not fit, rows are
halved, at most twice. Then compiled blocks keep less; then as many blocks as must be are recomputed in the backward
pass, and if all of them are not enough the inputs of as many as must be wait on the host (lit_model/recompute.py).
Where more than two thirds of them must be, longer rows with all blocks recomputed are faster, and taken if they fit.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch._functorch.config as functorch_config
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
TRIED = 8192  # tokens of a row that is tried in place of a longer one
LONG = 32768  # tokens of a row that is too long to be tried, and whose MLPs run in tiles


def plan(run: "Run", gpt: GPT, batches: Sequence[list[Example]], share: bool) -> None:
    """Finds rows with which training fits into the memory of a GPU; sets `run.row_tokens`, and what `gpt` recomputes
    and keeps on the host, and prints them. All processes call this at the same time, and agree.

    Args:
        batches: the examples of a few steps.
    Raises:
        ValueError: it does not fit; the message says what would help.
    """
    limit, wanted, most = _limit(run), run.row_tokens, len(gpt.blocks) - 1
    room = (1 - SPARE) * limit
    T, peak = _halved(run, gpt, batches, share, room)
    if peak > room:
        short, run.row_tokens, gpt.recompute = run.row_tokens, wanted, most
        long_T, long_peak = _halved(run, gpt, batches, share, room, T)
        long, run.row_tokens = run.row_tokens, short
        _keep_less(run, True)
        peak = _fewest(run, gpt, batches, share, T, room)
        if gpt.recompute > 2 / 3 * most and long_peak <= room:
            _keep_less(run, False)
            T, peak, run.row_tokens, gpt.recompute, gpt.offload = long_T, long_peak, long, most, 0
        if peak > room:
            raise ValueError(f"{T:,} tokens at a time do not fit into {limit / GIB:.1f} GiB: {ADVICE}")
    print(f"training needs {peak / GIB:.1f} GiB of {limit / GIB:.1f}: rows of {T:,} tokens{what_is_recomputed(gpt)}")


def what_is_recomputed(gpt: GPT) -> str:
    less = gpt.is_compiled and not functorch_config.ban_recompute_materialized_backward
    some = ", norms and activations recomputed" if less else ""
    some += f", {gpt.recompute} of {len(gpt.blocks)} blocks recomputed" if gpt.recompute else ""
    return some + (f", the inputs of {gpt.offload} kept on the host" if gpt.offload else "")


def _halved(
    run: "Run", gpt: GPT, batches: Sequence[list[Example]], share: bool, room: float, tried: int = 0
) -> tuple[int, float]:
    """Halves `run.row_tokens` until rows fit, at most twice, or until they have the tokens that were `tried`. Returns
    tokens of the longest row, and what it takes in bytes; inf: it does not fit, or is too long to be tried."""
    wanted, T, peak = run.row_tokens, 0, math.inf
    for run.row_tokens in (wanted, wanted // 2, wanted // 4):
        row, length = _longest(run, gpt, batches, share)
        for block in gpt.blocks:
            block.is_tiled = length > LONG
        if length in (T, tried):
            break  # one example, which is not cut
        T = length
        peak = math.inf if T > LONG else _peak(run, gpt, row)
        if peak <= room:
            break
    return T, peak


def _keep_less(run: "Run", less: bool) -> None:
    """Compiled blocks compute norms and activations again in the backward pass, and keep up to a third less; they
    unpack nf4 again, which they would do once for both passes, and keep."""
    functorch_config.ban_recompute_materialized_backward = not less
    functorch_config.cse = not (less and run.options.quantize == "nf4")
    torch._dynamo.reset()


def _fewest(run: "Run", gpt: GPT, batches: Sequence[list[Example]], share: bool, T: int, room: float) -> float:
    """Sets how many blocks are recomputed, and how many inputs are on the host: as few as must be. Returns what that
    takes in bytes; inf: all are not enough."""
    needs, most = _line(run, gpt, batches, share, T), len(gpt.blocks) - 1
    row, _ = _longest(run, gpt, batches, share)
    counts = [(n, 0) for n in range(most + 1)] + [(most, n) for n in range(3, most + 1)]
    for gpt.recompute, gpt.offload in counts:
        peak = needs(gpt.recompute, gpt.offload)
        if peak <= room and (T > LONG or (peak := _peak(run, gpt, row)) <= room):
            return peak
    return math.inf


def _longest(run: "Run", gpt: GPT, batches: Sequence[list[Example]], share: bool) -> tuple[tuple[Tensor, Packed], int]:
    """The longest row of this process, and the length of the longest of all."""
    row = max((row for batch in batches for row in run.rows(gpt, batch, share)), key=lambda row: len(row[1].pos))
    return row, int(highest(len(row[1].pos), run.device))


def _line(run: "Run", gpt: GPT, batches: Sequence[list[Example]], share: bool, T: int) -> Callable[[int, int], float]:
    """What a row of T tokens takes in bytes, with so many blocks recomputed, and of these so many inputs on the host:
    measured with shorter rows, since memory grows with the tokens, and with the blocks. The last block is never
    recomputed: the backward pass begins with it."""
    examples, tokens = sorted((e for batch in batches for e in batch), key=lambda e: -len(e.ids)), run.row_tokens
    n = len(gpt.blocks) - 1
    few, many = min(2, n - 1), min(4, n)  # not 0: the peak may lie where a block is recomputed, not where all are kept

    def measured(t: int, recompute: int, offload: int) -> tuple[int, float]:
        gpt.recompute, gpt.offload, run.row_tokens = recompute, offload, t
        row, length = _longest(run, gpt, [_cut(examples, t * run.world)], share)
        return length, _peak(run, gpt, row)

    most = min(T, 4 * TRIED if T > LONG else TRIED)
    measured(most // 2, n, n)  # compiling takes memory, too
    (short, least), (longer, most_of_all) = measured(most // 2, n, n), measured(most, n, n)
    on_gpu, with_few, with_many = (measured(most // 2, n - count, 0)[1] for count in (0, few, many))
    run.row_tokens = tokens
    of_token = (most_of_all - least) / (longer - short)
    of_input = (on_gpu - least) / short / max(1, n - 2)  # two are on their way, and on the GPU
    of_block = (with_many - with_few) / short / (many - few)

    def needs(recompute: int, offload: int) -> float:
        more = (of_block, n - recompute), (of_input, n - max(2, offload))  # inf or nan: no room even for short rows
        return least + of_token * (T - short) + T * sum(size * count for size, count in more if count)

    return needs


def _cut(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first examples, cut so that all have this many tokens."""
    lengths = np.array([len(e.ids) for e in examples])
    left = np.clip(tokens - (lengths.cumsum() - lengths), 0, lengths)
    return [Example(e.ids[:n], min(e.first_target, n - 1)) for e, n in zip(examples, left.tolist()) if n > 1]


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


def _peak(run: "Run", gpt: GPT, row: tuple[Tensor, Packed]) -> float:
    """Bytes that training on a row takes, the most of all processes; inf: more than there are."""
    idx, packed = row
    torch.cuda.reset_peak_memory_stats()
    try:
        states = torch.empty(_states(gpt, run.device), dtype=torch.uint8, device=run.device)
        for p in (p for p in gpt.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p)  # as for all rows of a step but the first
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
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # that is glibc
        libc.mallopt(m_mmap_threshold, GIB)
        libc.mallopt(m_trim_threshold, GIB)
