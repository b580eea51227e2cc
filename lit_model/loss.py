"""Cross-entropy at the target positions only, in chunks, so that the logits never exist all at once.

For 4,000 targets and LLaMA-3's vocabulary of 128k the float32 logits alone are 2 GiB, and their softmax as much again.
The gradient of a chunk is made in the forward pass while its logits are there, and kept as (M, C): nothing is computed
twice and nothing of size (M, vocab_size) is kept for the backward pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1024  # target rows at a time


def linear_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """The sum over the M rows of x of -log softmax(head(x))[target], as a float32 scalar (float64 for float64 input).

    Args:
        head: the output layer with whatever a method hung into it; called as head(x) -> (m, vocab_size).
        x: (M, C) hidden states at the target positions.
        targets: (M,) int64.
    """
    return _HeadLoss.apply(head, x, targets, *(p for p in head.parameters() if p.requires_grad))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: nn.Module, x: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        wants_grad = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(t) for t in (x, *weights)] if wants_grad else []
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            chunk = x[rows].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                loss = F.cross_entropy(head(chunk).to(total.dtype), targets[rows], reduction="sum")
            total += loss.detach()
            if wants_grad:
                grad_x, *grad_weights = torch.autograd.grad(loss, (chunk, *weights))
                grads[0][rows] = grad_x
                for total_grad, grad in zip(grads[1:], grad_weights, strict=True):
                    total_grad += grad
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_x, *grad_weights = (g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return None, grad_x, None, *grad_weights
