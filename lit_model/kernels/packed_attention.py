"""Attention of packed rows in Triton, for a GPU, where torch is measurably slower (docs/speed-log.md).

`packed_attention` reads the keys where they lie. Torch's variable-length attention wants the keys of every segment
gathered first, which copies a shared preamble for each example that sees it, and adds the copies' gradients up again:
with it, attention takes a sixth of a training step of LLaMA-7B; with these kernels a twelfth, and that includes RoPE's
gradient and LLaMA-Adapter's prompt, a few keys that every query sees in a softmax of its own.

Which key a query sees is two numbers in packed order (packing.py): query i sees key j if j <= i < until[j]. The work is
cut into blocks of BLOCK queries and BLOCK keys, of which `Blocks` lists those that touch. The results do not depend on
the order in which the GPU runs them, so repeats are bit-identical. The same in plain torch: `_attend_each` and
`plain_attention` in attention.py; tests/test_kernels.py compares them, on a CPU in Triton's interpreter.

The method is FlashAttention-2's (https://arxiv.org/abs/2307.08691): softmax in one pass over the keys, probabilities
recomputed in the backward pass from the saved logarithm of their sum.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_model.packing import BLOCK, Blocks
from lit_model.rope import Angles, rotate

LOG2E = tl.constexpr(math.log2(math.e))
_jit = triton.jit(do_not_specialize=("T", "S"))  # else a kernel is compiled anew for lengths that 16 divides


@triton.jit
def _load(ptr, rows, n, stride_t, stride_h, head, HS: tl.constexpr, HP: tl.constexpr):
    """Rows of one head, (BLOCK, HP); zeros for those that are not among the n, and beyond HS."""
    d = tl.arange(0, HP)[None, :]
    inside = (rows[:, None] < n) & (d < HS) if HP > HS else rows[:, None] < n
    return tl.load(ptr + (rows[:, None] * stride_t + (head * stride_h + d)), mask=inside, other=0.0)


@triton.jit
def _store(ptr, x, rows, n, head, NH: tl.constexpr, HS: tl.constexpr, HP: tl.constexpr):
    """Stores x (BLOCK, HP) as rows of one head of a tensor (n, NH, HS)."""
    d = tl.arange(0, HP)[None, :]
    inside = (rows[:, None] < n) & (d < HS) if HP > HS else rows[:, None] < n
    tl.store(ptr + ((rows[:, None] * NH + head) * HS + d), x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sees(row, q_pos, j, until, k_pos, window, WINDOW: tl.constexpr):
    """Whether queries at `row` see keys j. Queries out of range have row -1, keys out of range until 0."""
    seen = (j <= row) & (row < until)
    return seen & (q_pos - k_pos < window) if WINDOW else seen


@triton.jit
def _scores(a, b, scale, softcap, CAPS: tl.constexpr):
    """a b^T times scale, and capped, in units of log 2."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee") * scale
    return softcap * LOG2E * (1.0 - 2.0 / (tl.exp2(s * (2.0 / softcap)) + 1.0)) if CAPS else s


@triton.jit
def _uncapped(ds, s, softcap, CAPS: tl.constexpr):
    """The gradient of the scores before they were capped, from that of the capped ones, s."""
    t = s / (softcap * LOG2E)
    return ds * (1.0 - t * t) if CAPS else ds


@triton.jit
def _prompt(pk_ptr, pv_ptr, head, K, NKV: tl.constexpr, HS: tl.constexpr, KEYS: tl.constexpr):
    n = tl.arange(0, KEYS)[:, None]
    at = (n * NKV + head) * HS + tl.arange(0, HS)[None, :]
    return tl.load(pk_ptr + at, mask=n < K, other=0.0), tl.load(pv_ptr + at, mask=n < K, other=0.0)


@triton.jit
def _prompt_probabilities(q, pk, scale, K, KEYS: tl.constexpr):
    s = tl.dot(q, tl.trans(pk), input_precision="ieee") * scale
    s = tl.where(tl.arange(0, KEYS)[None, :] < K, s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _rotate_back(x, cos_ptr, sin_ptr, rows, n, HS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of what RoPE rotated: x (BLOCK, HS), turned back by the angles of `rows`."""
    half = tl.arange(0, HS // 2)[None, :]
    inside = rows[:, None] < n
    cos = tl.load(cos_ptr + rows[:, None] * (HS // 2) + half, mask=inside, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + rows[:, None] * HS + HS // 2 + half, mask=inside, other=0.0).to(tl.float32)
    a, b = tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, HS // 2)), (0, 2, 1)))  # the two halves of a head
    return tl.reshape(tl.permute(tl.join(a * cos + b * sin, b * cos - a * sin), (0, 2, 1)), (BLOCK, HS))


@_jit
def _forward(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, row_ptr, until_ptr, pos_ptr, first_ptr, key_blocks_ptr, pk_ptr, pv_ptr,
    gate_ptr, scale, softcap, window, T, S, K, sqt, sqh, skt, skh, svt, svh, NH: tl.constexpr, GROUP: tl.constexpr,
    HS: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CAPS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + i, mask=i < T, other=-1)
    q_pos = tl.load(pos_ptr + row, mask=i < T, other=0) if WINDOW else row
    q = _load(q_ptr, i, T, sqt, sqh, head, HS, HP)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK, HP), tl.float32)
    for at in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        j = tl.load(key_blocks_ptr + at) * BLOCK + tl.arange(0, BLOCK)
        until = tl.load(until_ptr + j, mask=j < S, other=0)
        k_pos = tl.load(pos_ptr + j, mask=j < S, other=0) if WINDOW else j
        k = _load(k_ptr, j, S, skt, skh, head // GROUP, HS, HP)
        v = _load(v_ptr, j, S, svt, svh, head // GROUP, HS, HP)
        s = _scores(q, k, scale, softcap, CAPS)
        seen = _sees(row[:, None], q_pos[:, None], j[None, :], until[None, :], k_pos[None, :], window, WINDOW)
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # so far this query has seen no key
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        y = y * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    total = tl.where(row < 0, 1.0, total)  # those out of range have seen none
    y = y / total[:, None]
    if KEYS > 0:
        pk, pv = _prompt(pk_ptr, pv_ptr, head // GROUP, K, NH // GROUP, HS, KEYS)
        p_prompt = _prompt_probabilities(q, pk, scale, K, KEYS)
        y += tl.load(gate_ptr + head) * tl.dot(p_prompt.to(pv.dtype), pv, input_precision="ieee")
    _store(y_ptr, y, i, T, head, NH, HS, HP)
    tl.store(lse_ptr + head * T + i, top + tl.log2(total), mask=i < T)


@_jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, y_ptr, dy_ptr, lse_ptr, sum_ptr, dq_ptr, row_ptr, until_ptr, pos_ptr, first_ptr,
    key_blocks_ptr, pk_ptr, pv_ptr, gate_ptr, dpk_ptr, dpv_ptr, dgate_ptr, cos_ptr, sin_ptr, scale, softcap, window,
    T, S, K, sqt, sqh, skt, skh, svt, svh, sdt, sdh, NH: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr,
    HP: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CAPS: tl.constexpr, KEYS: tl.constexpr,
    ROPE: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + i, mask=i < T, other=-1)
    q_pos = tl.load(pos_ptr + row, mask=i < T, other=0) if WINDOW else row
    q = _load(q_ptr, i, T, sqt, sqh, head, HS, HP)
    y = _load(y_ptr, i, T, NH * HS, HS, head, HS, HP)
    dy = _load(dy_ptr, i, T, sdt, sdh, head, HS, HP)
    lse = tl.load(lse_ptr + head * T + i, mask=i < T, other=0.0)
    dy_y = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    dq = tl.zeros((BLOCK, HP), tl.float32)
    if KEYS > 0:
        pk, pv = _prompt(pk_ptr, pv_ptr, head // GROUP, K, NH // GROUP, HS, KEYS)
        gate = tl.load(gate_ptr + head)
        p_prompt = _prompt_probabilities(q, pk, scale, K, KEYS)  # (queries, KEYS)
        dp_prompt = tl.dot(dy, tl.trans(pv), input_precision="ieee")
        along = tl.sum(p_prompt * dp_prompt, 1)
        dy_y -= gate * along  # y holds the prompt's part too
        ds_prompt = gate * p_prompt * (dp_prompt - along[:, None])
        dq += tl.dot(ds_prompt.to(pk.dtype), pk, input_precision="ieee")
        dpk = tl.dot(tl.trans(ds_prompt.to(q.dtype)), q, input_precision="ieee") * (scale / LOG2E)
        dpv = tl.dot(tl.trans((gate * p_prompt).to(dy.dtype)), dy, input_precision="ieee")
        part, n = block * NH + head, tl.arange(0, KEYS)
        to = (part * K + n[:, None]) * HS + tl.arange(0, HS)[None, :]
        tl.store(dpk_ptr + to, dpk, mask=n[:, None] < K)
        tl.store(dpv_ptr + to, dpv, mask=n[:, None] < K)
        tl.store(dgate_ptr + part, tl.sum(along, 0))
    tl.store(sum_ptr + head * T + i, dy_y, mask=i < T)
    for at in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        j = tl.load(key_blocks_ptr + at) * BLOCK + tl.arange(0, BLOCK)
        until = tl.load(until_ptr + j, mask=j < S, other=0)
        k_pos = tl.load(pos_ptr + j, mask=j < S, other=0) if WINDOW else j
        k = _load(k_ptr, j, S, skt, skh, head // GROUP, HS, HP)
        v = _load(v_ptr, j, S, svt, svh, head // GROUP, HS, HP)
        s = _scores(q, k, scale, softcap, CAPS)
        seen = _sees(row[:, None], q_pos[:, None], j[None, :], until[None, :], k_pos[None, :], window, WINDOW)
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        ds = _uncapped(p * (dp - dy_y[:, None]), s, softcap, CAPS)
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    dq = dq * (scale / LOG2E)
    if ROPE:
        dq = _rotate_back(dq, cos_ptr, sin_ptr, i, T, HS, BLOCK)
    _store(dq_ptr, dq, i, T, head, NH, HS, HP)


@_jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, sum_ptr, dk_ptr, dv_ptr, part_ptr, row_ptr, until_ptr, pos_ptr, work_ptr,
    query_blocks_ptr, cos_ptr, sin_ptr, scale, softcap, window, T, S, sqt, sqh, skt, skh, svt, svh, sdt, sdh,
    NKV: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    work, head = work_ptr + tl.program_id(0) * 4, tl.program_id(1)
    j = tl.load(work) * BLOCK + tl.arange(0, BLOCK)
    first, last, slot = tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    until = tl.load(until_ptr + j, mask=j < S, other=0)
    k_pos = tl.load(pos_ptr + j, mask=j < S, other=0) if WINDOW else j
    k = _load(k_ptr, j, S, skt, skh, head, HS, HP)
    v = _load(v_ptr, j, S, svt, svh, head, HS, HP)
    dk = tl.zeros((BLOCK, HP), tl.float32)
    dv = tl.zeros((BLOCK, HP), tl.float32)
    for step in range(first * GROUP, last * GROUP):
        i = tl.load(query_blocks_ptr + step // GROUP) * BLOCK + tl.arange(0, BLOCK)
        h = head * GROUP + step % GROUP
        row = tl.load(row_ptr + i, mask=i < T, other=-1)
        q_pos = tl.load(pos_ptr + row, mask=i < T, other=0) if WINDOW else row
        q = _load(q_ptr, i, T, sqt, sqh, h, HS, HP)
        dy = _load(dy_ptr, i, T, sdt, sdh, h, HS, HP)
        lse = tl.load(lse_ptr + h * T + i, mask=i < T, other=0.0)
        dy_y = tl.load(sum_ptr + h * T + i, mask=i < T, other=0.0)
        s = _scores(k, q, scale, softcap, CAPS)  # (keys, queries)
        seen = _sees(row[None, :], q_pos[None, :], j[:, None], until[:, None], k_pos[:, None], window, WINDOW)
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(dy.dtype), dy, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
        ds = _uncapped(p * (dp - dy_y[None, :]), s, softcap, CAPS)
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    dk = dk * (scale / LOG2E)
    if slot < 0:
        if ROPE:
            dk = _rotate_back(dk, cos_ptr, sin_ptr, j, S, HS, BLOCK)
        _store(dk_ptr, dk, j, S, head, NKV, HS, HP)
        _store(dv_ptr, dv, j, S, head, NKV, HS, HP)
    else:  # one of several parts of this key block
        part = part_ptr + (slot.to(tl.int64) * 2 * NKV + head) * (BLOCK * HP)
        at = tl.arange(0, BLOCK)[:, None] * HP + tl.arange(0, HP)[None, :]
        tl.store(part + at, dk)
        tl.store(part + NKV * BLOCK * HP + at, dv)


@_jit
def _add_parts(
    dk_ptr, dv_ptr, part_ptr, shared_ptr, cos_ptr, sin_ptr, S,
    NKV: tl.constexpr, HS: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    shared, head = shared_ptr + tl.program_id(0) * 3, tl.program_id(1)
    j = tl.load(shared) * BLOCK + tl.arange(0, BLOCK)
    dk = tl.zeros((BLOCK, HP), tl.float32)
    dv = tl.zeros((BLOCK, HP), tl.float32)
    first, last = tl.load(shared + 1), tl.load(shared + 2)
    part = part_ptr + (first.to(tl.int64) * 2 * NKV + head) * (BLOCK * HP)
    at = tl.arange(0, BLOCK)[:, None] * HP + tl.arange(0, HP)[None, :]
    for _ in range(first, last):
        dk += tl.load(part + at)
        dv += tl.load(part + NKV * BLOCK * HP + at)
        part += 2 * NKV * BLOCK * HP
    if ROPE:
        dk = _rotate_back(dk, cos_ptr, sin_ptr, j, S, HS, BLOCK)
    _store(dk_ptr, dk, j, S, head, NKV, HS, HP)
    _store(dv_ptr, dv, j, S, head, NKV, HS, HP)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def _keys(prompt: Tensor | None) -> int:
    """Number of keys of the prompt, as the matrix units want it; 0: none."""
    return 0 if prompt is None else max(16, triton.next_power_of_2(len(prompt)))


def _launch(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, gate: Tensor | None, row: Tensor,
    until: Tensor, pos: Tensor, first: Tensor, key_blocks: Tensor, work: Tensor, query_blocks: Tensor, shared: Tensor,
    n_slots: int, scale: float, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, nh, hs), S, K = q.shape, len(k), 0 if pk is None else len(pk)
    if max(q.numel(), k.numel(), triton.cdiv(T, BLOCK) * nh * K * hs) >= 2**31:
        raise ValueError(f"a row of {T} tokens is too long for 32-bit offsets: lower train.row_tokens")
    y = torch.empty((T, nh, hs), dtype=q.dtype, device=q.device)
    lse = torch.empty((nh, T), dtype=torch.float32, device=q.device)
    numbers, sizes = _settings(q, k, scale, window, softcap)
    _forward[(triton.cdiv(T, BLOCK), nh)](
        q, k, v, y, lse, row, until, pos, first, key_blocks, pk, pv, gate, *numbers, T, S, K,
        *_strides(q, k, v), NH=nh, **sizes, KEYS=_keys(pk), num_warps=4 if hs <= 128 else 8,
        num_stages=3 if hs <= 128 else 2,
    )  # fmt: skip
    return y, lse


def _settings(
    q: Tensor, k: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[tuple[float, float, int], dict[str, Any]]:
    """Numbers and sizes that all kernels take."""
    hs = q.shape[-1]
    sizes = dict(GROUP=q.shape[1] // k.shape[1], HS=hs, HP=triton.next_power_of_2(hs), BLOCK=BLOCK)
    flags = dict(WINDOW=window is not None, CAPS=softcap is not None)
    return (scale * LOG2E.value, softcap or 1.0, window or 0), sizes | flags


_packed_attention = torch.library.custom_op("lit_model::packed_attention", _launch, mutates_args=())


@_packed_attention.register_fake
def _(q, *rest):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("lit_model::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, gate: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, y: Tensor, lse: Tensor, row: Tensor, until: Tensor, pos: Tensor,
    first: Tensor, key_blocks: Tensor, work: Tensor, query_blocks: Tensor, shared: Tensor, n_slots: int, scale: float,
    window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (T, nh, hs), (S, nkv, _) = q.shape, k.shape
    n_blocks, K = triton.cdiv(T, BLOCK), 0 if pk is None else len(pk)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    sums, (numbers, sizes) = torch.empty_like(lse), _settings(q, k, scale, window, softcap)
    part = torch.empty((n_slots, 2, nkv, BLOCK, sizes["HP"]), dtype=torch.float32, device=q.device)
    dpk, dpv = torch.empty((2, n_blocks, nh, K, hs), dtype=torch.float32, device=q.device)
    dgate = torch.empty((n_blocks, nh), dtype=torch.float32, device=q.device)
    ways = dict(num_warps=4 if hs <= 128 else 8, num_stages=2 if hs <= 128 else 1)
    _backward_q[(n_blocks, nh)](
        q, k, v, y, dy, lse, sums, dq, row, until, pos, first, key_blocks, pk, pv, gate, dpk, dpv, dgate, cos, sin,
        *numbers, T, S, K, *_strides(q, k, v, dy), NH=nh, **sizes, KEYS=_keys(pk), ROPE=cos is not None, **ways,
    )  # fmt: skip
    _backward_kv[(len(work), nkv)](
        q, k, v, dy, lse, sums, dk, dv, part, row, until, pos, work, query_blocks, cos, sin, *numbers, T, S,
        *_strides(q, k, v, dy), NKV=nkv, **sizes, ROPE=cos is not None, **ways,
    )  # fmt: skip
    sizes = {name: sizes[name] for name in ("HS", "HP", "BLOCK")}
    _add_parts[(len(shared), nkv)](dk, dv, part, shared, cos, sin, S, NKV=nkv, **sizes, ROPE=cos is not None)
    if pk is None:
        return dq, dk, dv, dgate.new_empty(0), dgate.new_empty(0), dgate.new_empty(0)
    dpk, dpv = (t.view(n_blocks, nkv, -1, K, hs).sum((0, 2)).transpose(0, 1) for t in (dpk, dpv))
    return dq, dk, dv, dpk.to(pk.dtype).contiguous(), dpv.to(pk.dtype).contiguous(), dgate.sum(0)


@_packed_attention_backward.register_fake
def _(dy, q, k, v, pk, pv, gate, *rest):
    return tuple(q.new_empty(0, dtype=torch.float32) if t is None else t.new_empty(t.shape)
                 for t in (q, k, v, pk, pv, gate))  # fmt: skip


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        v, pk, pv, gate, cos, sin, *lists, n_slots, scale, window, softcap = rest
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        launch = _packed_attention if torch.compiler.is_compiling() else _launch  # an op takes the host 0.2 ms
        y, lse = launch(q, k, v, pk, pv, gate, *lists, n_slots, scale, window, softcap)
        ctx.save_for_backward(q, k, v, pk, pv, gate, cos, sin, y, lse, *lists)
        ctx.numbers = n_slots, scale, window, softcap
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        dq, dk, dv, *of_prompt = _packed_attention_backward(dy, *ctx.saved_tensors, *ctx.numbers)
        return dq, dk, dv, *(of_prompt if any(ctx.needs_input_grad[3:6]) else (None,) * 3), *(None,) * 14


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    scale: float,
    rope: Angles | None = None,
    prompt: tuple[Tensor, Tensor, Tensor] | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention of the queries q (T, nh, hs) over those of the keys k, v (S, nkv, hs) that each may see.

    On a GPU; 16 bit; hs from 16 to 256.

    Args:
        scale: of the scores q k^T before the softmax.
        rope: to rotate q and k by first, which are of the same tokens then. Their gradients are turned back before
            they leave the kernel. hs must be a power of two for it, as for a prompt.
        prompt: k, v (K, nkv, hs) that every query sees in a softmax of its own, and the gate (nh,) that this is
            multiplied by before it is added: LLaMA-Adapter's.
        window, softcap: see PackedRow. The lists in `blocks` may leave out blocks that no window reaches.
    Returns: (T, nh, hs).
    """
    b = blocks
    lists = (b.row, b.until, b.pos, b.first, b.key_blocks, b.work, b.query_blocks, b.shared)
    pk, pv, gate = prompt or (None, None, None)
    if prompt:
        pk, pv, gate = pk.contiguous(), pv.contiguous(), gate.float()
    numbers = b.n_slots, scale, window, softcap
    return _PackedAttention.apply(q, k, v, pk, pv, gate, *(rope or (None, None))[:2], *lists, *numbers)
