"""What the time of a training step goes to: its matrix products alone, and every kernel of it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scripts.bench.flops import products
from lit_model import model


def sync(device: torch.device) -> float:
    """The time now, when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def product_seconds(gpt: model.GPT, device: torch.device, n_rows: int, n_tokens: float, n_targets: float) -> float:
    """Time that the matrix products of one step take when nothing else is done."""
    total, known = 0.0, {}
    for linear, n, backward, trained in products(gpt, n_tokens, n_targets):
        fp8 = hasattr(linear, "codes_t")
        key = (round(n / n_rows), linear.in_features, linear.out_features, backward, trained, fp8)
        if key not in known:
            known[key] = _time_products(*key, gpt.dtype, device)
        total += n_rows * known[key]
    return total


def _time_products(
    m: int, n_in: int, n_out: int, backward: bool, trained: bool, fp8: bool, dtype: torch.dtype, device: torch.device
) -> float:
    x, grad, w = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, n_in), (m, n_out), (n_out, n_in)))
    if fp8:

        def product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:  # a b^T
            a, b = a.to(torch.float8_e4m3fn), b.contiguous().to(torch.float8_e4m3fn)
            scale = [torch.ones(len(t), 1, device=device) for t in (a, b)]
            return lambda: torch._scaled_mm(
                a, b.t(), scale[0], scale[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True
            )

        runs = [product(x, w)] + [product(grad, w.t())] * backward
    else:
        runs = [lambda: x @ w.t()] + [lambda: grad @ w] * backward + [lambda: grad.t() @ x] * trained
    n = 10 if device.type == "cuda" else 2
    seconds = 0.0
    for run in runs:
        run()
        start = sync(device)
        for _ in range(n):
            run()
        seconds += (sync(device) - start) / n
    return seconds


def profile(step: Callable[[], Any], title: str, device: torch.device, n: int = 3) -> None:
    """Prints which kernels the time of a step goes to."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as record:
        for _ in range(n):
            step()
        sync(device)
    kernels = {}
    for e in record.key_averages():
        kernels[e.key] = (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / n, e.count // n
    total = sum(us for us, _ in kernels.values())
    names = ("nvjet", "gemm", "cutlass", "::mm", "::addmm")
    in_products = sum(us for name, (us, _) in kernels.items() if any(s in name for s in names))
    times = [e.time_range for e in record.events()]
    span = (max(t.end for t in times) - min(t.start for t in times)) / n
    share = f"{100 * in_products / total:.1f} % of it matrix products"
    print(f"{title}: {total / 1e3:.0f} ms of kernels in a step of {span / 1e3:.0f} ms, {share}")
    for name, (us, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:40]:
        print(f"{us / 1e3:9.2f} ms {100 * us / total:5.1f} % {count:6d} x  {name[:110]}")
