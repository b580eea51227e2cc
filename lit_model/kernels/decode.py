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

from lit_model.quantize import NF4_LEVELS
from lit_model.rope import Angles

LOG2E = tl.constexpr(math.log2(math.e))
KEYS = 64  # that a program reads at a time
MOST_PARTS = 32  # that a sequence is cut into
_jit = triton.jit(do_not_specialize=("B", "S", "window", "shared", "M"))


@_jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, n_ptr, part_ptr, lse_ptr, scale, softcap, B, S, window, shared,
    NH: tl.constexpr, NKV: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, HP: tl.constexpr, SEQS: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr, ALL: tl.constexpr, KEYS: tl.constexpr,
    CAPS: tl.constexpr,
):  # fmt: skip
    b, kv, part = tl.program_id(0).to(tl.int64) * SEQS, tl.program_id(1), tl.program_id(2)
    if SEQS == 1:  # keys of one sequence, behind those that all share
        n = tl.load(n_ptr + b)
        start = tl.maximum(n - window, shared)
    else:
        n, start = shared, 0
    size = tl.cdiv(tl.cdiv(n - start, PARTS), KEYS) * KEYS
    low = start + part * size
    high = tl.minimum(low + size, n)
    r, d = tl.arange(0, ROWS), tl.arange(0, HP)
    row = (b + r // GROUP) * NH + kv * GROUP + r % GROUP  # of q: the heads that share a key, of several sequences
    ok, inside = (r < SEQS * GROUP) & (b + r // GROUP < B), d[None, :] < HS
    q = tl.load(q_ptr + row[:, None] * HS + d[None, :], mask=ok[:, None] & inside, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, HP), tl.float32)
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
    to = row * ALL + FIRST + part
    tl.store(part_ptr + to[:, None] * HS + d[None, :], y, mask=ok[:, None] & inside)
    lse = tl.where(is_empty, float("-inf"), top + tl.log2(tl.where(is_empty, 1.0, total)))
    tl.store(lse_ptr + to, lse, mask=ok)


@triton.jit
def _join(part_ptr, lse_ptr, y_ptr, HS: tl.constexpr, HP: tl.constexpr, ALL: tl.constexpr, AP: tl.constexpr):
    row, part, d = tl.program_id(0).to(tl.int64), tl.arange(0, AP), tl.arange(0, HP)
    ok = part < ALL
    lse = tl.load(lse_ptr + row * ALL + part, mask=ok, other=float("-inf"))
    w = tl.exp2(lse - tl.max(lse, 0))
    at = (row * ALL + part[:, None]) * HS + d[None, :]
    y = tl.load(part_ptr + at, mask=ok[:, None] & (d[None, :] < HS), other=0.0)
    y = tl.sum(y * w[:, None], 0) / tl.sum(w, 0)
    tl.store(y_ptr + row * HS + d, y.to(y_ptr.dtype.element_ty), mask=d < HS)


def attend_table(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, n: Tensor, scale: float, window: int | None, softcap: float | None,
    shared: int = 0,
) -> Tensor:  # fmt: skip
    """As `decode_attention`: q (B, nh, hs), k and v (slots, nkv, hs), table (B, S) and n (B,) -> (B, nh, hs). shared:
    length of a beginning that all lines of the table have in common: its keys are read once for many sequences."""
    (B, nh, hs), nkv, S = q.shape, k.shape[1], table.shape[1]
    group, shared = nh // nkv, 0 if window else shared
    own = _parts(B * nkv, S - shared)
    seqs = max(1, min(B, 64 // group))  # of a program that reads shared keys
    common = _parts(-(-B // seqs) * nkv, shared) if shared else 0
    part = torch.empty(B, nh, own + common, hs, device=q.device, dtype=torch.float32)
    lse = torch.empty(B, nh, own + common, device=q.device, dtype=torch.float32)
    y, sizes = torch.empty_like(q, memory_format=torch.contiguous_format), dict(HS=hs, HP=triton.next_power_of_2(hs))
    for parts, first, of in ((own, 0, 1), (common, own, seqs)):
        if parts:
            rows = max(16, triton.next_power_of_2(of * group))
            _attend[-(-B // of), nkv, parts](
                q.contiguous(), k, v, table, n, part, lse, scale, softcap or 1.0, B, S, window or S, shared, NH=nh,
                NKV=nkv, GROUP=group, SEQS=of, ROWS=rows, PARTS=parts, FIRST=first, ALL=own + common, KEYS=KEYS,
                CAPS=softcap is not None, **sizes,
            )  # fmt: skip
    _join[(B * nh,)](part, lse, y, ALL=own + common, AP=triton.next_power_of_2(own + common), **sizes)
    return y


def _parts(programs: int, length: int) -> int:
    """Into how many parts to cut keys, so that all of a GPU has work."""
    return min(MOST_PARTS, max(1, 264 // programs), max(1, -(-length // KEYS)))


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


def _two_levels() -> str:
    """PTX: 4 bytes of two codes each -> the levels of the high halves and of the low halves, float16. Four codes at a
    time choose the bytes of their levels from registers; looking them up in memory takes four times as long."""
    raw = torch.tensor(NF4_LEVELS).half().view(torch.uint8).view(16, 2).T.tolist()  # low bytes, high bytes
    low, high = ([int.from_bytes(bytes(part[i : i + 4]), "little") for i in range(0, 16, 4)] for part in raw)

    def half(shift: int, first: str, second: str) -> str:
        pick = "".join(
            f"prmt.b32 {to}, {hex(words[i])}, {hex(words[i + 1])}, t;"
            for words, names in ((low, ("al", "bl")), (high, ("ah", "bh"))) for to, i in zip(names, (0, 2))
        )  # fmt: skip
        return (
            f"shr.u32 t, $4, {shift}; and.b32 t, t, 0x0f0f0f0f; shr.u32 s, t, 4; or.b32 t, t, s;"
            f"prmt.b32 s, t, t, 0x0020; and.b32 t, s, 0x7777; {pick}"
            "and.b32 t, s, 0x8888; shr.u32 t, t, 1; or.b32 t, t, 0x3210;"  # of codes from 8 on the other bytes
            "prmt.b32 l, al, bl, t; prmt.b32 h, ah, bh, t;"
            f"prmt.b32 {first}, l, h, 0x5140; prmt.b32 {second}, l, h, 0x7362;"
        )

    return f"{{ .reg .b32 s, t, l, h, al, bl, ah, bh; {half(4, '$0', '$1')} {half(0, '$2', '$3')} }}"


TWO_LEVELS = tl.constexpr(_two_levels())


@triton.jit
def _weights(w_ptr, scale_ptr, levels_ptr, row, j, ok, K: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr):
    """Weights at the inputs j of `row` (BN, 1): of 4 bits at 2 j and 2 j + 1, with their scales; else once, without."""
    if KIND == "nf4":  # two codes a byte, the first in the high half; a scale for each 64
        codes = tl.load(w_ptr + row * (K // 2) + j, mask=ok, other=0)
        block = row * (K // 64) + j // 32 if K % 64 == 0 else (row * K + 2 * j) // 64
        scale = tl.load(scale_ptr + block, mask=ok, other=0.0)
        if PTX:
            first, second = tl.inline_asm_elementwise(
                TWO_LEVELS, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            first, second = tl.load(levels_ptr + (codes >> 4)), tl.load(levels_ptr + (codes & 15))
        first, second = first.to(tl.float32) * scale, second.to(tl.float32) * scale
    else:
        first = tl.load(w_ptr + row * K + j, mask=ok, other=0.0)
        second = first
    return first, second


@_jit
def _few_times(
    x_ptr, w_ptr, scale_ptr, levels_ptr, y_ptr, M, N, K: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, MP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, MP)
    dtype = x_ptr.dtype.element_ty
    row = n[:, None].to(tl.int64)
    STEP: tl.constexpr = 2 if KIND == "nf4" else 1
    acc = tl.zeros((BN, BK if MP == 1 else MP), tl.float32)
    for at in range(0, K // STEP, BK):
        j = at + tl.arange(0, BK)
        inside = j < K // STEP
        ok = (n[:, None] < N) & inside[None, :]
        first, second = _weights(w_ptr, scale_ptr, levels_ptr, row, j[None, :], ok, K, KIND, PTX)
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
    """x (M, n_in) of few tokens times a weight -> (M, n_out).

    Args:
        w: (n_out, n_in) in x's dtype, int8 or fp8; or with `levels`, (16,), pairs of codes (n_out, n_in / 2).
        scale: (n_out, 1) of each row; or with `levels` of each 64 weights, (n_out n_in / 64,). float32.
    """
    (M, K), N, x = x.shape, len(w), x.contiguous()
    y = x.new_empty(M, N)
    kind = "nf4" if levels is not None else "plain" if scale is None else "scaled"
    BN, BK = BLOCKS[kind, M == 1]
    MP = 1 if M == 1 else max(16, triton.next_power_of_2(M))
    how = dict(KIND=kind, BN=BN, BK=BK, MP=MP, PTX=x.is_cuda, num_warps=4, num_stages=4)
    _few_times[(triton.cdiv(N, BN),)](x, w, scale, levels, y, M, N, K=K, **how)
    return y


BLOCKS = {  # kind, whether of one token: outputs and inputs that a program takes at a time
    ("plain", True): (8, 512), ("scaled", True): (2, 1024), ("nf4", True): (4, 512),
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
