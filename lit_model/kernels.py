"""Attention of packed rows on a GPU, in Triton: the two places where torch has no kernel that fits.

`packed_attention` reads the keys where they lie. Torch's variable-length attention wants the keys of every segment
gathered first, which copies a shared preamble for each example that sees it, and adds the copies' gradients up again:
with it, attention takes a sixth of a training step of LLaMA-7B; with these kernels a twentieth.

`prompt_attention` is LLaMA-Adapter's: every query over the same few keys, times a gate, added to what is there.

Which key a query sees is two numbers in packed order (packing.py): query i sees key j if j <= i < until[j]. The work is
cut into blocks of BLOCK queries and BLOCK keys, of which `Blocks` lists those that touch. The results do not depend on
the order in which the GPU runs them, so repeats are bit-identical. The same in plain torch: `packing._attend_each` and
`packing.plain_attention`; tests/test_kernels.py compares them, on a CPU too, with Triton's interpreter.

The method is FlashAttention-2's (https://arxiv.org/abs/2307.08691): softmax in one pass over the keys, probabilities
recomputed in the backward pass from the saved logarithm of their sum.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_model.packing import BLOCK, Blocks

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _visible(row, key, until):
    """(queries, keys) bool. Out-of-range queries have row -1, out-of-range keys have until 0."""
    return (key[None, :] <= row[:, None]) & (row[:, None] < until[None, :])


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, row_ptr, until_ptr, first_ptr, key_blocks_ptr, scale, T, S,
    sqt, sqh, skt, skh, svt, svh, NH: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HS)
    row = tl.load(row_ptr + i, mask=i < T, other=-1)
    at_q = i.to(tl.int64)[:, None]
    q = tl.load(q_ptr + at_q * sqt + head * sqh + d[None, :], mask=i[:, None] < T, other=0.0)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK, HS), tl.float32)
    for at in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        j = tl.load(key_blocks_ptr + at) * BLOCK + tl.arange(0, BLOCK)
        until = tl.load(until_ptr + j, mask=j < S, other=0)
        at_k = j.to(tl.int64)[:, None]
        k = tl.load(k_ptr + at_k * skt + (head // GROUP) * skh + d[None, :], mask=j[:, None] < S, other=0.0)
        v = tl.load(v_ptr + at_k * svt + (head // GROUP) * svh + d[None, :], mask=j[:, None] < S, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(_visible(row, j, until), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # so far this query has seen no key
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        y = y * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    total = tl.where(row < 0, 1.0, total)  # those out of range have seen none
    y = y / total[:, None]
    tl.store(y_ptr + (at_q * NH + head) * HS + d[None, :], y.to(y_ptr.dtype.element_ty), mask=i[:, None] < T)
    tl.store(lse_ptr + head * T + i, top + tl.log2(total), mask=i < T)


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, y_ptr, dy_ptr, lse_ptr, sum_ptr, dq_ptr, row_ptr, until_ptr, first_ptr, key_blocks_ptr,
    scale, T, S, sqt, sqh, skt, skh, svt, svh, sdt, sdh,
    NH: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HS)
    row = tl.load(row_ptr + i, mask=i < T, other=-1)
    at_q, inside = i.to(tl.int64)[:, None], i[:, None] < T
    q = tl.load(q_ptr + at_q * sqt + head * sqh + d[None, :], mask=inside, other=0.0)
    y = tl.load(y_ptr + (at_q * NH + head) * HS + d[None, :], mask=inside, other=0.0)
    dy = tl.load(dy_ptr + at_q * sdt + head * sdh + d[None, :], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + head * T + i, mask=i < T, other=0.0)
    dy_y = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(sum_ptr + head * T + i, dy_y, mask=i < T)
    dq = tl.zeros((BLOCK, HS), tl.float32)
    for at in range(tl.load(first_ptr + block), tl.load(first_ptr + block + 1)):
        j = tl.load(key_blocks_ptr + at) * BLOCK + tl.arange(0, BLOCK)
        until = tl.load(until_ptr + j, mask=j < S, other=0)
        at_k = j.to(tl.int64)[:, None]
        k = tl.load(k_ptr + at_k * skt + (head // GROUP) * skh + d[None, :], mask=j[:, None] < S, other=0.0)
        v = tl.load(v_ptr + at_k * svt + (head // GROUP) * svh + d[None, :], mask=j[:, None] < S, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(_visible(row, j, until), tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        ds = p * (dp - dy_y[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    dq = dq * (scale / LOG2E)
    tl.store(dq_ptr + (at_q * NH + head) * HS + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, sum_ptr, dk_ptr, dv_ptr, part_ptr, row_ptr, until_ptr, work_ptr,
    query_blocks_ptr, scale, T, S, sqt, sqh, skt, skh, svt, svh, sdt, sdh,
    NKV: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    work, head = work_ptr + tl.program_id(0) * 4, tl.program_id(1)
    d = tl.arange(0, HS)
    j = tl.load(work) * BLOCK + tl.arange(0, BLOCK)
    first, last, slot = tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    until = tl.load(until_ptr + j, mask=j < S, other=0)
    at_k, inside = j.to(tl.int64)[:, None], j[:, None] < S
    k = tl.load(k_ptr + at_k * skt + head * skh + d[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + at_k * svt + head * svh + d[None, :], mask=inside, other=0.0)
    dk = tl.zeros((BLOCK, HS), tl.float32)
    dv = tl.zeros((BLOCK, HS), tl.float32)
    for step in range(first * GROUP, last * GROUP):
        i = tl.load(query_blocks_ptr + step // GROUP) * BLOCK + tl.arange(0, BLOCK)
        h = head * GROUP + step % GROUP
        row = tl.load(row_ptr + i, mask=i < T, other=-1)
        at_q = i.to(tl.int64)[:, None]
        q = tl.load(q_ptr + at_q * sqt + h * sqh + d[None, :], mask=i[:, None] < T, other=0.0)
        dy = tl.load(dy_ptr + at_q * sdt + h * sdh + d[None, :], mask=i[:, None] < T, other=0.0)
        lse = tl.load(lse_ptr + h * T + i, mask=i < T, other=0.0)
        dy_y = tl.load(sum_ptr + h * T + i, mask=i < T, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (keys, queries)
        seen = (j[:, None] <= row[None, :]) & (row[None, :] < until[:, None])
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(dy.dtype), dy, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
        ds = p * (dp - dy_y[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    dk = dk * (scale / LOG2E)
    if slot < 0:
        to = (at_k * NKV + head) * HS + d[None, :]
        tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=inside)
    else:  # one of several parts of this key block
        to = ((slot * 2 * NKV + head) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[:, None]) * HS + d[None, :]
        tl.store(part_ptr + to, dk)
        tl.store(part_ptr + to + NKV * BLOCK * HS, dv)


@triton.jit
def _add_parts(
    dk_ptr, dv_ptr, part_ptr, shared_ptr, S, NKV: tl.constexpr, HS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    shared, head = shared_ptr + tl.program_id(0) * 3, tl.program_id(1)
    d = tl.arange(0, HS)
    j = tl.load(shared) * BLOCK + tl.arange(0, BLOCK)
    dk = tl.zeros((BLOCK, HS), tl.float32)
    dv = tl.zeros((BLOCK, HS), tl.float32)
    for slot in range(tl.load(shared + 1), tl.load(shared + 2)):
        at = ((slot * 2 * NKV + head) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[:, None]) * HS + d[None, :]
        dk += tl.load(part_ptr + at)
        dv += tl.load(part_ptr + at + NKV * BLOCK * HS)
    to = (j.to(tl.int64)[:, None] * NKV + head) * HS + d[None, :]
    tl.store(dk_ptr + to, dk.to(dk_ptr.dtype.element_ty), mask=j[:, None] < S)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=j[:, None] < S)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


@torch.library.custom_op("lit_model::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor, until: Tensor, first: Tensor, key_blocks: Tensor,
    work: Tensor, query_blocks: Tensor, shared: Tensor, n_slots: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (T, nh, hs), (S, nkv, _) = q.shape, k.shape
    y = torch.empty((T, nh, hs), dtype=q.dtype, device=q.device)
    lse = torch.empty((nh, T), dtype=torch.float32, device=q.device)
    _forward[(triton.cdiv(T, BLOCK), nh)](
        q, k, v, y, lse, row, until, first, key_blocks, hs**-0.5 * LOG2E.value, T, S, *_strides(q, k, v),
        NH=nh, GROUP=nh // nkv, HS=hs, BLOCK=BLOCK, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y, lse


@_packed_attention.register_fake
def _(q, k, v, *plan):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("lit_model::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, row: Tensor, until: Tensor, first: Tensor,
    key_blocks: Tensor, work: Tensor, query_blocks: Tensor, shared: Tensor, n_slots: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (T, nh, hs), (S, nkv, _) = q.shape, k.shape
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    sums = torch.empty_like(lse)
    part = torch.empty((n_slots, 2, nkv, BLOCK, hs), dtype=torch.float32, device=q.device)
    scale, sizes = hs**-0.5 * LOG2E.value, dict(GROUP=nh // nkv, HS=hs, BLOCK=BLOCK)
    _backward_q[(triton.cdiv(T, BLOCK), nh)](
        q, k, v, y, dy, lse, sums, dq, row, until, first, key_blocks, scale, T, S, *_strides(q, k, v, dy),
        NH=nh, **sizes, num_warps=4, num_stages=2,
    )  # fmt: skip
    _backward_kv[(len(work), nkv)](
        q, k, v, dy, lse, sums, dk, dv, part, row, until, work, query_blocks, scale, T, S, *_strides(q, k, v, dy),
        NKV=nkv, **sizes, num_warps=4, num_stages=2,
    )  # fmt: skip
    _add_parts[(len(shared), nkv)](dk, dv, part, shared, S, NKV=nkv, HS=hs, BLOCK=BLOCK)
    return dq, dk, dv


@_packed_attention_backward.register_fake
def _(dy, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_attention(ctx, inputs, output):
    *tensors, ctx.n_slots = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _attention_gradient(ctx, dy, _):
    return *_packed_attention_backward(dy, *ctx.saved_tensors, ctx.n_slots), *(None,) * 8


_packed_attention.register_autograd(_attention_gradient, setup_context=_save_attention)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Softmax attention of the queries q (T, nh, hs) over those of the keys k, v (S, nkv, hs) that each may see.

    On a GPU; 16 bit; hs a power of two, at least 16. Returns (T, nh, hs).
    """
    b = blocks
    lists = (b.row, b.until, b.first, b.key_blocks, b.work, b.query_blocks, b.shared)
    return _packed_attention(q, k, v, *lists, b.n_slots)[0]


STEPS = 8  # blocks of queries that one program of the prompt's backward pass goes through, to keep its sums few


@triton.jit
def _prompt_probabilities(q, k, scale, K):
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    s = tl.where(tl.arange(0, k.shape[0])[None, :] < K, s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _prompt_forward(
    q_ptr, k_ptr, v_ptr, gate_ptr, y_ptr, out_ptr, scale, T, K, sqt, sqh,
    NH: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, d = tl.arange(0, KEYS), tl.arange(0, HS)
    at_q, inside = i.to(tl.int64)[:, None], i[:, None] < T
    at_k = (n[:, None] * (NH // GROUP) + head // GROUP) * HS + d[None, :]
    q = tl.load(q_ptr + at_q * sqt + head * sqh + d[None, :], mask=inside, other=0.0)
    k = tl.load(k_ptr + at_k, mask=n[:, None] < K, other=0.0)
    v = tl.load(v_ptr + at_k, mask=n[:, None] < K, other=0.0)
    p = _prompt_probabilities(q, k, scale, K)
    at_y = (at_q * NH + head) * HS + d[None, :]
    y = tl.load(y_ptr + at_y, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(gate_ptr + head).to(tl.float32) * tl.dot(p.to(v.dtype), v, input_precision="ieee")
    tl.store(out_ptr + at_y, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _prompt_backward(
    q_ptr, k_ptr, v_ptr, gate_ptr, dy_ptr, dq_ptr, dk_ptr, dv_ptr, dgate_ptr, scale, T, K, sqt, sqh, sdt, sdh,
    NH: tl.constexpr, GROUP: tl.constexpr, HS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    n, d = tl.arange(0, KEYS), tl.arange(0, HS)
    at_k = (n[:, None] * (NH // GROUP) + head // GROUP) * HS + d[None, :]
    k = tl.load(k_ptr + at_k, mask=n[:, None] < K, other=0.0)
    v = tl.load(v_ptr + at_k, mask=n[:, None] < K, other=0.0)
    gate = tl.load(gate_ptr + head).to(tl.float32)
    dk = tl.zeros((KEYS, HS), tl.float32)
    dv = tl.zeros((KEYS, HS), tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    for step in range(STEPS):
        i = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        at_q, inside = i.to(tl.int64)[:, None], i[:, None] < T
        q = tl.load(q_ptr + at_q * sqt + head * sqh + d[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + at_q * sdt + head * sdh + d[None, :], mask=inside, other=0.0)
        p = _prompt_probabilities(q, k, scale, K)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        along = tl.sum(p * dp, 1)
        dgate += along
        ds = gate * p * (dp - along[:, None])
        dq = tl.dot(ds.to(k.dtype), k, input_precision="ieee") * (scale / LOG2E)
        tl.store(dq_ptr + (at_q * NH + head) * HS + d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=inside)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
        dv += tl.dot(tl.trans((gate * p).to(dy.dtype)), dy, input_precision="ieee")
    part = tl.program_id(0) * NH + head
    to = (part.to(tl.int64) * KEYS + n[:, None]) * HS + d[None, :]
    tl.store(dk_ptr + to, dk * (scale / LOG2E))
    tl.store(dv_ptr + to, dv)
    tl.store(dgate_ptr + part, tl.sum(dgate, 0))


@torch.library.custom_op("lit_model::prompt_attention", mutates_args=())
def _prompt_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    (T, nh, hs), (K, nkv, _) = q.shape, k.shape
    out = torch.empty((T, nh, hs), dtype=y.dtype, device=y.device)
    _prompt_forward[(triton.cdiv(T, BLOCK), nh)](
        q, k.contiguous(), v.contiguous(), gate, y.contiguous(), out, hs**-0.5 * LOG2E.value, T, K, *_strides(q),
        NH=nh, GROUP=nh // nkv, HS=hs, KEYS=max(16, triton.next_power_of_2(K)), BLOCK=BLOCK,
    )  # fmt: skip
    return out


@_prompt_attention.register_fake
def _(q, k, v, gate, y):
    return y.new_empty(y.shape)


@torch.library.custom_op("lit_model::prompt_attention_backward", mutates_args=())
def _prompt_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, nh, hs), (K, nkv, _) = q.shape, k.shape
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    n, keys = triton.cdiv(T, BLOCK * STEPS), max(16, triton.next_power_of_2(K))
    dk, dv = torch.empty((2, n, nh, keys, hs), dtype=torch.float32, device=q.device)
    dgate = torch.empty((n, nh), dtype=torch.float32, device=q.device)
    _prompt_backward[(n, nh)](
        q, k.contiguous(), v.contiguous(), gate, dy, dq, dk, dv, dgate, hs**-0.5 * LOG2E.value, T, K,
        *_strides(q, dy), NH=nh, GROUP=nh // nkv, HS=hs, KEYS=keys, BLOCK=BLOCK, STEPS=STEPS,
    )  # fmt: skip
    dk, dv = (t.sum(0).view(nkv, -1, keys, hs).sum(1)[:, :K].transpose(0, 1).to(k.dtype) for t in (dk, dv))
    return dq, dk.contiguous(), dv.contiguous(), dgate.sum(0).to(gate.dtype)


@_prompt_attention_backward.register_fake
def _(dy, q, k, v, gate):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, gate))


def _save_prompt(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _prompt_gradient(ctx, dy):
    return *_prompt_attention_backward(dy, *ctx.saved_tensors), dy


_prompt_attention.register_autograd(_prompt_gradient, setup_context=_save_prompt)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """y + gate * softmax attention of every query over all keys.

    q, y: (T, nh, hs).  k, v: (K, nkv, hs).  gate: (nh,). On a GPU; 16 bit; hs a power of two, at least 16.
    Returns (T, nh, hs).
    """
    return _prompt_attention(q, k, v, gate, y)
