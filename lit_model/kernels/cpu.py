"""On a CPU: RMSNorm, and attention of packed rows in bfloat16, forward and backward written out. Torch's fused
attention takes 4 times as long in its backward pass, autograd over the plain products a sixth longer
(docs/speed-log.md). The scores of a row are kept for the backward pass: rows that have too many do not take this way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST_SCORES = 4 * 1024**2  # of one head, for a row: 75 MB for 9 heads in each layer


def can_take(q: Tensor, lengths: Sequence[tuple[int, int]]) -> bool:
    """Whether SegmentsAttention is the way for these queries, with such numbers of queries and keys."""
    wanted = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    return wanted and sum(n_q * n_k for n_q, n_k in lengths) <= MOST_SCORES


class SegmentsAttention(torch.autograd.Function):
    """softmax(scale q k^T) v of each segment: q (T, nh, hs), k and v (S, nkv, hs); segments lie end to end
    with `lengths` (queries, keys). A segment's last query sees all its keys, the one before it one fewer, ...

    Returns (T, nh, hs). Plain calculus: with p the softmax and y = p v,
    dv = p^T dy,  ds = p * (dy v^T - sum(dy v^T * p)),  dq = scale ds k,  dk = scale ds^T q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[tuple[int, int]], scale: float) -> Tensor:
        (nh, hs), nkv, (n_q, n_k) = q.shape[1:], k.shape[1], zip(*lengths, strict=True)
        ctx.lengths, ctx.scale, y, kept = lengths, scale, torch.empty_like(q), []
        parts = q.split(n_q), k.split(n_k), v.split(n_k), y.split(n_q)
        for (lq, lk), q1, k1, v1, y1 in zip(lengths, *parts, strict=True):
            q1 = _heads(q1).view(nkv, -1, hs)  # the heads that share a key lie together
            k1, v1 = _heads(k1, scale), _heads(v1)  # (nkv, keys, hs)
            scores = (q1 @ k1.mT).view(nh, -1, k1.shape[1])
            scores += scores.new_full(scores.shape[1:], -torch.inf).triu(lk - lq + 1)
            p = scores.softmax(-1).view(nkv, -1, k1.shape[1])  # (nkv, nh / nkv * queries, keys)
            y1.copy_((p @ v1).view(nh, -1, hs)[:, :lq].transpose(0, 1))
            kept += q1, k1, v1, p
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        saved = ctx.saved_tensors
        kept = [saved[i::4] for i in range(4)]  # q, k, v, p of all segments
        (nh, hs), nkv, (n_q, n_k) = grad.shape[1:], kept[1][0].shape[0], zip(*ctx.lengths, strict=True)
        dq = torch.empty_like(grad)
        dk, dv = (grad.new_empty(sum(n_k), nkv, hs) for _ in range(2))
        parts = grad.split(n_q), dq.split(n_q), dk.split(n_k), dv.split(n_k)
        for (lq, lk), q, k, v, p, dy1, dq1, dk1, dv1 in zip(ctx.lengths, *kept, *parts, strict=True):
            dy1 = _heads(dy1).view(nkv, -1, hs)
            ds = torch._softmax_backward_data(dy1 @ v.mT, p, -1, p.dtype)
            dq1.copy_((ds @ k).view(nh, -1, hs)[:, :lq].transpose(0, 1))
            # x^T p instead of p^T x: of the two, the smaller one is turned around
            torch.mul((q.mT @ ds).permute(2, 0, 1)[:lk], ctx.scale, out=dk1)
            dv1.copy_((dy1.mT @ p).permute(2, 0, 1)[:lk])
        return dq, dk, dv, None, None


class RMSNormCPU(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight in few operations: torch's own takes twice as long, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        r = (norm.square() / x.shape[-1] + eps).rsqrt()  # (T, 1)
        ctx.save_for_backward(x, weight, r)
        return (x * r).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, r = ctx.saved_tensors
        short_r = r.to(x.dtype)
        grad_weight = (grad * x * short_r).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along_x = (grad * x).sum(-1, keepdim=True, dtype=r.dtype) * r**3 / x.shape[-1]  # (T, 1)
        return torch.addcmul(grad * short_r, x, along_x.to(x.dtype), value=-1), grad_weight, None


class Packed1:
    """A second copy of a bfloat16 weight in oneDNN's own order: its product with one token takes two thirds."""

    def __init__(self, weight: Tensor):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.of = weight.data_ptr(), weight._version, weight.dtype

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is as it was."""
        return self.of == (weight.data_ptr(), weight._version, weight.dtype)

    def can_take(self, x: Tensor, weight: Tensor) -> bool:
        """Whether x is one token that needs no gradient."""
        return len(x) == 1 and not torch.is_grad_enabled() and x.dtype == weight.dtype and self.is_of(weight)

    def times(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def _heads(x: Tensor, factor: float = 1.0) -> Tensor:
    """(l, n, hs) times factor as (n, l', hs): l' is l rounded up to 32, with zeros behind. For every new shape oneDNN
    prepares a product for 2 ms."""
    length, n, hs = x.shape
    padded = x.new_zeros(n, length + -length % 32, hs)
    torch.mul(x.transpose(0, 1), factor, out=padded[:, :length])
    return padded
