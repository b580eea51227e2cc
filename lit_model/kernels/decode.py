"""Decoding in Triton, for a GPU: a step reads every weight and every key once, and should wait for nothing else.

    attend_table      attention of one query for each sequence, through a table of slots; long sequences are cut, so
                      that all of a GPU reads keys of a single one; the heads that share a key read it once
    rotate_and_store  rotary positions of q and k, and k and v into their slots, in one pass
    few_times         x (M, n_in) of few tokens times a weight in 16, 8 or 4 bits, which is read as it is stored
    rms_norm          of few rows

The same in plain torch: `decode_attention` in decode.py, `Angles` in rope.py, `matmul` in quantize.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_model.rope import Angles

LOG2E = tl.constexpr(math.log2(math.e))
KEYS = 64  # that a program reads at a time
MOST_PARTS = 32  # that a sequence is cut into
MOST_TOKENS = 64  # of few_times
_jit = triton.jit(do_not_specialize=("S", "window", "M"))


@_jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, n_ptr, part_ptr, lse_ptr, scale, softcap, S, window, NH: tl.constexpr,
    NKV: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, HP: tl.constexpr, PARTS: tl.constexpr,
    KEYS: tl.constexpr, CAPS: tl.constexpr,
):  # fmt: skip
    b, kv, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    n = tl.load(n_ptr + b)
    start = tl.maximum(n - window, 0)
    size = tl.cdiv(tl.cdiv(n - start, PARTS), KEYS) * KEYS
    low = start + part * size
    high = tl.minimum(low + size, n)
    g, d = tl.arange(0, 16), tl.arange(0, HP)
    heads, inside = kv * GROUP + g, d[None, :] < HS
    q = tl.load(q_ptr + (b * NH + heads[:, None]) * HS + d[None, :], mask=(g[:, None] < GROUP) & inside, other=0.0)
    top = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    y = tl.zeros((16, HP), tl.float32)
    for at in range(low, high, KEYS):
        i = at + tl.arange(0, KEYS)
        slot = tl.load(table_ptr + b * S + i, mask=i < high, other=0).to(tl.int64)
        where = (slot[:, None] * NKV + kv) * HS + d[None, :]
        k = tl.load(k_ptr + where, mask=(i[:, None] < high) & inside, other=0.0)
        v = tl.load(v_ptr + where, mask=(i[:, None] < high) & inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPS:
            s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E) / softcap) + 1.0))
        s = tl.where(i[None, :] < high, s * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        y = y * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    is_empty = low >= high
    y = y / tl.where(is_empty, 1.0, total)[:, None]
    to = (b * NH + heads) * PARTS + part
    tl.store(part_ptr + to[:, None] * HS + d[None, :], y, mask=(g[:, None] < GROUP) & inside)
    lse = tl.where(is_empty, float("-inf"), top + tl.log2(tl.where(is_empty, 1.0, total)))
    tl.store(lse_ptr + to, lse, mask=g < GROUP)


@triton.jit
def _join(part_ptr, lse_ptr, y_ptr, HS: tl.constexpr, HP: tl.constexpr, PARTS: tl.constexpr):
    row, part, d = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, HP)
    lse = tl.load(lse_ptr + row * PARTS + part)
    w = tl.exp2(lse - tl.max(lse, 0))
    y = tl.load(part_ptr + (row * PARTS + part[:, None]) * HS + d[None, :], mask=d[None, :] < HS, other=0.0)
    y = tl.sum(y * w[:, None], 0) / tl.sum(w, 0)
    tl.store(y_ptr + row * HS + d, y.to(y_ptr.dtype.element_ty), mask=d < HS)


def attend_table(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, n: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """As `decode_attention`: q (B, nh, hs), k and v (slots, nkv, hs), table (B, S) and n (B,) -> (B, nh, hs)."""
    (B, nh, hs), nkv, S = q.shape, k.shape[1], table.shape[1]
    if nh // nkv > 16:
        raise ValueError(f"{nh // nkv} heads share a key; the kernel takes 16")
    parts = min(MOST_PARTS, triton.next_power_of_2(max(1, 264 // (B * nkv))), triton.next_power_of_2(-(-S // KEYS)))
    part = torch.empty(B, nh, parts, hs, device=q.device, dtype=torch.float32)
    lse = torch.empty(B, nh, parts, device=q.device, dtype=torch.float32)
    y, sizes = torch.empty_like(q, memory_format=torch.contiguous_format), dict(HS=hs, HP=triton.next_power_of_2(hs))
    _attend[B, nkv, parts](
        q.contiguous(), k, v, table, n, part, lse, scale, softcap or 1.0, S, window or S, NH=nh, NKV=nkv,
        GROUP=nh // nkv, PARTS=parts, KEYS=KEYS, CAPS=softcap is not None, **sizes,
    )  # fmt: skip
    _join[(B * nh,)](part, lse, y, PARTS=parts, **sizes)
    return y


@triton.jit
def _rotated(x_ptr, row, cos_ptr, sin_ptr, b, HS: tl.constexpr):
    """A head in float32, its two halves turned."""
    half = tl.arange(0, HS // 2)
    a = tl.load(x_ptr + row * HS + half).to(tl.float32)
    c = tl.load(x_ptr + row * HS + HS // 2 + half).to(tl.float32)
    cos, sin = tl.load(cos_ptr + b * (HS // 2) + half), tl.load(sin_ptr + b * HS + HS // 2 + half)
    return a * cos - c * sin, c * cos + a * sin


@triton.jit
def _rotate_and_store(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slot_ptr, to_q_ptr, keys_ptr, values_ptr, NH: tl.constexpr,
    NKV: tl.constexpr, HS: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half, d = tl.arange(0, HS // 2), tl.arange(0, HS)
    if head < NH:
        row = b * NH + head
        left, right = _rotated(q_ptr, row, cos_ptr, sin_ptr, b, HS)
        tl.store(to_q_ptr + row * HS + half, left.to(to_q_ptr.dtype.element_ty))
        tl.store(to_q_ptr + row * HS + HS // 2 + half, right.to(to_q_ptr.dtype.element_ty))
    else:
        row = b * NKV + head - NH
        to = (tl.load(slot_ptr + b) * NKV + head - NH) * HS
        left, right = _rotated(k_ptr, row, cos_ptr, sin_ptr, b, HS)
        tl.store(keys_ptr + to + half, left.to(keys_ptr.dtype.element_ty))
        tl.store(keys_ptr + to + HS // 2 + half, right.to(keys_ptr.dtype.element_ty))
        tl.store(values_ptr + to + d, tl.load(v_ptr + row * HS + d))


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, rope: Angles, slot: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """q rotated, (B, nh, hs); k (B, nkv, hs), rotated, and v go into the slots (B,) of keys and values."""
    (B, nh, hs), nkv, y = q.shape, k.shape[1], torch.empty_like(q, memory_format=torch.contiguous_format)
    cos, sin = (t.float().contiguous() for t in (rope.cos, rope.sin))
    q, k, v = (t.contiguous() for t in (q, k, v))
    _rotate_and_store[B, nh + nkv](q, k, v, cos, sin, slot, y, keys, values, NH=nh, NKV=nkv, HS=hs)
    return y


@triton.jit
def _weights(w_ptr, scale_ptr, levels, row, j, ok, K, KIND: tl.constexpr):
    """Weights at the inputs j of `row` (BN, 1): of 4 bits at 2 j and 2 j + 1, with their scales; else once, without."""
    if KIND == "nf4":  # two codes a byte, the first in the high half; a scale for each 64
        codes = tl.load(w_ptr + row * (K // 2) + j, mask=ok, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + (row * K + 2 * j) // 64, mask=ok, other=0.0)
        first, second = tl.gather(levels, codes >> 4, 1) * scale, tl.gather(levels, codes & 15, 1) * scale
    else:
        first = tl.load(w_ptr + row * K + j, mask=ok, other=0.0)
        second = first
    return first, second


@_jit
def _few_times(
    x_ptr, w_ptr, scale_ptr, levels_ptr, y_ptr, M, N, K: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, MP)
    dtype = x_ptr.dtype.element_ty
    row = n[:, None].to(tl.int64)
    STEP: tl.constexpr = 2 if KIND == "nf4" else 1
    levels = tl.zeros((BN, 16), tl.float32)
    if KIND == "nf4":
        levels += tl.load(levels_ptr + tl.arange(0, 16))[None, :]
    acc = tl.zeros((BN, BK if MP == 1 else MP), tl.float32)
    for at in range(0, K // STEP, BK):
        j = at + tl.arange(0, BK)
        inside = j < K // STEP
        first, second = _weights(w_ptr, scale_ptr, levels, row, j[None, :], (row < N) & inside[None, :], K, KIND)
        if MP == 1:
            acc += first.to(tl.float32) * tl.load(x_ptr + STEP * j, mask=inside, other=0.0).to(tl.float32)[None, :]
            if KIND == "nf4":
                x = tl.load(x_ptr + STEP * j + 1, mask=inside, other=0.0).to(tl.float32)
                acc += second * x[None, :]
        else:
            x_at = x_ptr + m[:, None] * K + STEP * j[None, :]
            some = (m[:, None] < M) & inside[None, :]
            x = tl.load(x_at, mask=some, other=0.0)
            acc = tl.dot(first.to(dtype), tl.trans(x), acc, input_precision="ieee")
            if KIND == "nf4":
                x = tl.load(x_at + 1, mask=some, other=0.0)
                acc = tl.dot(second.to(dtype), tl.trans(x), acc, input_precision="ieee")
    if MP == 1:
        acc = tl.sum(acc, 1)[:, None]
    if KIND == "scaled":
        acc = acc * tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    tl.store(y_ptr + m[None, :] * N + n[:, None], acc.to(dtype), mask=(n[:, None] < N) & (m[None, :] < M))


def few_times(x: Tensor, w: Tensor, scale: Tensor | None = None, levels: Tensor | None = None) -> Tensor:
    """x (M, n_in) of up to MOST_TOKENS tokens times a weight -> (M, n_out).

    Args:
        w: (n_out, n_in) in x's dtype, int8 or fp8; or with `levels`, (16,), pairs of codes (n_out, n_in / 2).
        scale: (n_out, 1) of each row; or with `levels` of each 64 weights, (n_out n_in / 64,). float32.
    """
    (M, K), N, x = x.shape, len(w), x.contiguous()
    y = x.new_empty(M, N)
    kind = "nf4" if levels is not None else "plain" if scale is None else "scaled"
    BN, BK = BLOCKS[kind, M == 1]
    MP = 1 if M == 1 else max(16, triton.next_power_of_2(M))
    how = dict(KIND=kind, BN=BN, BK=BK, MP=MP, num_warps=4, num_stages=4)
    _few_times[(triton.cdiv(N, BN),)](x, w, scale, levels, y, M, N, K=K, **how)
    return y


BLOCKS = {  # kind, whether of one token: outputs and inputs that a program takes at a time
    ("plain", True): (8, 512), ("scaled", True): (8, 512), ("nf4", True): (8, 256),
    ("plain", False): (32, 128), ("scaled", False): (32, 256), ("nf4", False): (32, 64),
}  # fmt: skip


@triton.jit
def _rms_norm(x_ptr, w_ptr, y_ptr, eps, C: tl.constexpr, CP: tl.constexpr):
    c = tl.arange(0, CP)
    at = tl.program_id(0).to(tl.int64) * C + c
    x = tl.load(x_ptr + at, mask=c < C, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=c < C)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; torch takes three times as long for few rows."""
    x, C = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    _rms_norm[(x.numel() // C,)](x, weight, y, eps, C=C, CP=triton.next_power_of_2(C))
    return y
