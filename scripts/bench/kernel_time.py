"""What the time of a step goes to: how many operations it takes, its matrix products and its attention alone, and its
kernels."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_model.attention import PackedRow
from lit_model.model import GPT, Linear
from lit_model.packing import Packed

# TFLOP/s of matrix products in bf16 without sparsity, from the makers' data sheets, half of those in fp8; the first
# name that fits counts
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165,
}  # fmt: skip


def sync(device: torch.device) -> float:
    """The time now, when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def products(gpt: GPT, n_computed: float, n_targets: float) -> Iterator[tuple[Linear, float, bool, bool]]:
    """The matrix products that training on this many tokens takes, without attention scores: for each linear layer the
    number of tokens, whether it also takes one towards its input, and whether one for its weight's gradient.

    Blocks below the lowest one that is trained have no backward pass. Only the targets need the output layer and, in
    the last block, all but keys and values.
    """
    trains = [any(p.requires_grad for p in block.parameters()) for block in gpt.blocks]
    lowest = trains.index(True) if any(trains) else len(trains)  # none: only the output layer is trained
    if len(gpt.virtual_tokens) or len(gpt.virtual_keys):
        lowest = 0
    for i, block in enumerate(gpt.blocks):
        for linear in (m for m in block.modules() if isinstance(m, Linear) or hasattr(m, "n_experts")):
            in_last = i == len(gpt.blocks) - 1 and linear not in (block.attn.k_proj, block.attn.v_proj)
            is_trained = linear.weight is not None and linear.weight.requires_grad
            n = (n_targets if in_last else n_computed) * (block.mlp.n_active if hasattr(linear, "n_experts") else 1)
            yield linear, n, i >= lowest, is_trained
    yield gpt.head, n_targets, True, gpt.head.weight.requires_grad


def mfu(gpt: GPT, n_computed: int, n_targets: int, seconds: float) -> float | None:
    """The share of the GPU's peak, in the type that most products are in, that training on this many tokens makes; None
    on a CPU, or where the peak is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((tflops for gpu, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)
    if peak is None or gpt.device.type == "cpu":
        return None
    flops = sum(
        2 * (1 + backward + trained) * linear.in_features * linear.out_features * n
        for linear, n, backward, trained in products(gpt, n_computed, n_targets)
    )
    return flops / seconds / (1e12 * peak * (1 + any(hasattr(m, "codes_t") for m in gpt.modules())))  # fp8: twice


def product_seconds(gpt: GPT, device: torch.device, n_rows: int, n_computed: int, n_targets: int) -> float:
    """Time that the matrix products of this many rows with this many tokens in all take when nothing else is done."""
    shapes = Counter()
    for linear, n, backward, trained in products(gpt, n_computed, n_targets):
        shape = round(n / n_rows), linear.in_features, linear.out_features
        shapes[*shape, backward, trained, hasattr(linear, "codes_t")] += n_rows
    return sum(n * _time_products(*shape, gpt.dtype, device) for shape, n in shapes.items())


def _time_products(
    m: int, n_in: int, n_out: int, backward: bool, trained: bool, fp8: bool, dtype: torch.dtype, device: torch.device
) -> float:
    m, whole = min(m, 32768, 2**28 // max(n_in, n_out)), m  # more would be no faster, and may not fit
    x, grad, w = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, n_in), (m, n_out), (n_out, n_in)))
    if fp8:
        runs = [_fp8_product(x, w)] + [_fp8_product(grad, w.t())] * backward
    else:
        runs = [lambda: x @ w.t()] + [lambda: grad @ w] * backward + [lambda: grad.t() @ x] * trained
    return sum(_seconds(run, device, 10 if device.type == "cuda" else 2) for run in runs) * whole / m


def attention_seconds(gpt: GPT, packed: Packed, device: torch.device) -> float:
    """Time that the attention of all layers takes for a row, forward and backward, when nothing else is done."""
    seconds, T, c = 0.0, len(packed.pos), gpt.config
    rows = gpt.contexts(packed, packed.pos, packed.max_k, gpt.dtype)
    for window, n in Counter(row.window for row in rows).items():
        row = PackedRow(packed, None, None, window, c.attn_scale, c.attn_softcap)
        sizes = (T, c.n_head), (T + packed.n_virtual_keys, c.n_kv_head), (T + packed.n_virtual_keys, c.n_kv_head)
        qkv = [torch.randn(*size, c.head_size, device=device, dtype=gpt.dtype, requires_grad=True) for size in sizes]

        def run(row=row, qkv=qkv) -> None:
            y = row.over(*qkv, [])
            torch.autograd.grad(y, qkv, torch.ones_like(y))

        seconds += n * _seconds(run, device, 2)
    return seconds


def _seconds(run: Callable[[], Any], device: torch.device, n: int) -> float:
    """The mean of n runs after one."""
    run()
    start = sync(device)
    for _ in range(n):
        run()
    return (sync(device) - start) / n


def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:  # a b^T
    a, b = a.to(torch.float8_e4m3fn), b.contiguous().to(torch.float8_e4m3fn)
    scales = torch.ones(len(a), 1, device=a.device), torch.ones(1, len(b), device=b.device)
    return lambda: torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def print_kernels(work: Callable[[], Any], device: torch.device) -> None:
    """A table of the kernels that take most of the time of some work."""
    kinds, on_gpu = torch.profiler.ProfilerActivity, device.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as record:
        work()
        sync(device)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(record.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=100))
