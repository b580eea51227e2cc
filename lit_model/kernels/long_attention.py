"""Attention of a row of long examples, by cuDNN. On an H200 it is faster than packed_attention.py, whose tiles fit
short segments that share how they begin, from some 2,500 tokens an example on; at 16,384 it takes half the time
(docs/speed-log.md). It adds up the gradients of q in any order: repeats are not bit-identical.

cuDNN plans anew for each length that it meets, for 0.14 s. Examples are padded at their end for it, so that it meets
few: causal, nothing real sees what comes behind.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OPS = torch.ops.aten
LENGTHS = 16  # that it meets between a power of two and the next
MOST_PADDED = 2**15  # tokens


def _padding(n: int) -> int:
    """Tokens behind n of them. Where attention takes seconds a plan is nothing, and a copy of all is much."""
    return -n % max(128, 2 ** (n.bit_length() - 1) // LENGTHS) if n < MOST_PADDED else 0


def _examples(bounds: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Of each B examples in turn that have one length what cuDNN takes of each tensor (T, heads, hs): (B, heads, their
    padded length, hs)."""
    start = 0
    for length, group in groupby(bounds.diff().tolist()):
        end, n = start + sum(group), _padding(length)
        parts = [t[start:end].unflatten(0, (-1, length)) for t in tensors]
        yield [(F.pad(t, (0, 0, 0, 0, 0, n)) if n else t).transpose(1, 2) for t in parts]
        start = end


def _joined(bounds: Tensor, parts: list[Tensor]) -> Tensor:
    """What `_examples` has cut."""
    lengths = [length for length, _ in groupby(bounds.diff().tolist())]
    cut = [part.transpose(1, 2)[:, :n].flatten(0, 1) for part, n in zip(parts, lengths, strict=True)]
    return torch.cat(cut) if len(cut) > 1 else cut[0].contiguous()


@torch.library.custom_op("lit_model::long_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    attend = _OPS._scaled_dot_product_cudnn_attention
    ys, lses = zip(*(attend(*qkv, None, True, 0.0, True, scale=scale)[:2] for qkv in _examples(bounds, q, k, v)))
    return _joined(bounds, ys), _joined(bounds, lses)  # (T, nh, hs), (T, nh, 1)


@_forward.register_fake
def _(q, *rest):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[1], 1), dtype=torch.float32)


@torch.library.custom_op("lit_model::long_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads, seed = [], torch.zeros((), dtype=torch.int64, device=q.device)
    for *tensors, lse1 in _examples(bounds, dy, q, k, v, y, lse):
        more = lse1.contiguous(), seed, seed, None, None, None, lse1.shape[2], lse1.shape[2], 0.0, True
        grads.append(_OPS._scaled_dot_product_cudnn_attention_backward(*tensors, *more, scale=scale))
    dq, dk, dv = (_joined(bounds, parts) for parts in zip(*grads))
    return dq, dk, dv


@_backward.register_fake
def _(dy, q, k, v, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, bounds, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


_forward.register_autograd(
    lambda ctx, dy, _: (*_backward(dy, *ctx.saved_tensors, ctx.scale), None, None), setup_context=_keep
)


def long_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of each example alone: queries q (T, nh, hs) over keys k, v (T, nkv, hs).

    On a GPU; 16 bit; hs up to 128, a multiple of 8. bounds: (N + 1,) on the CPU, 0 and where each example ends.
    Returns: (T, nh, hs).
    """
    return _forward(q, k, v, bounds, scale)[0]
