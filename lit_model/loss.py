"""Cross-entropy at the target positions only, in chunks, so that the logits never exist all at once.

For 4,000 targets and LLaMA-3's vocabulary of 128k the float32 logits alone are 2 GiB, and their softmax as much again.
The gradient of a chunk is made in the forward pass, while its logits are there, and kept as (M, C): nothing is computed
twice and nothing of size (M, vocab_size) waits for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lit_model.attention import HAS_TRITON
from lit_model.packing import Packed

CHUNK = 2**26  # logits at a time: enough rows for fast products
CPU_ROWS = 16  # of them whose softmax is taken at a time on a CPU


def chunk_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[target], at least in float32, and its gradient, in the dtype of the logits (m, V)."""
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    of_target = targets[:, None]
    loss = -log_p.gather(1, of_target).sum()
    grad = log_p.exp_().scatter_add_(1, of_target, log_p.new_full(of_target.shape, -1.0))  # p - onehot
    return loss, grad.to(logits.dtype)


def chunk_loss_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same; the gradient takes the place of the logits. On a CPU in pieces that stay in the cache."""
    if logits.is_cuda and HAS_TRITON and logits.is_contiguous() and logits.dtype is not torch.float64:
        from lit_model.kernels.cross_entropy import cross_entropy_

        return cross_entropy_(logits, targets)
    losses = []
    n = len(logits) if logits.is_cuda else CPU_ROWS
    for piece, of_piece in zip(logits.split(n), targets.split(n), strict=True):
        loss, grad = chunk_loss(piece, of_piece)
        piece.copy_(grad)
        losses.append(loss)
    return torch.stack(losses).sum(), logits


def cross_entropy(head: nn.Linear, x: Tensor, row: Packed) -> Tensor:
    """The default objective: the sum over the row's targets of -log softmax(head(x))[target], as a float32 scalar
    (float64 for float64 input). An objective is objective(head, x, row) -> scalar sum.

    Args:
        head: the output layer with whatever a method added to it; called as head(x) -> (m, vocab_size), which it
            does not keep for its backward pass. Of the trained tensors that it uses, those in head.parameters() get a
            gradient.
        x: (M, C) hidden states at the wanted tokens of the row.
    """
    trains = torch.is_grad_enabled()  # inside a Function, needs_input_grad does not know that
    weights = [p for p in head.parameters() if p.requires_grad and trains]
    return _HeadLoss.apply(head, x, row.targets, *weights)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: nn.Linear, x: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        wants_grad = any(ctx.needs_input_grad)
        wide = torch.promote_types(x.dtype, torch.float32)
        n_chunks = len(x) * head.out_features // CHUNK + 1
        total = x.new_zeros((), dtype=wide)
        grads = [torch.zeros_like(x), *(torch.zeros_like(w, dtype=wide) for w in weights)] if wants_grad else []
        for i in range(n_chunks):
            rows = slice(len(x) * i // n_chunks, len(x) * (i + 1) // n_chunks)
            chunk = x[rows].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits = head(chunk)  # (m, V)
            loss, grad = chunk_loss_(logits.detach(), targets[rows])
            total += loss
            if wants_grad:
                grad_x, *grad_weights = torch.autograd.grad(logits, (chunk, *weights), grad)
                grads[0][rows] = grad_x
                for sum_, part in zip(grads[1:], grad_weights, strict=True):
                    sum_ += part
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad_x, *grad_weights = ((g.to(grad.dtype) * grad).to(g.dtype) for g in ctx.saved_tensors)
        return None, grad_x, None, *grad_weights
