"""A mixture of experts in the place of the MLP (https://arxiv.org/abs/2401.04088): each token goes through the few of
n small MLPs that a router chooses for it, and their outputs are added with the router's weights.

The tokens are sorted by expert, so that each layer of all experts is one grouped product over runs of rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.config import Config
from lit_model.config import Experts as Shape
from lit_model.model import ACTIVATIONS, Linear


class Experts(nn.Module):
    """One linear layer of all n experts. It has the slot of a Linear; there `linear` is a `Rows`."""

    bias = None

    def __init__(self, n: int, n_in: int, n_out: int):
        super().__init__()
        self.n_experts, self.in_features, self.out_features = n, n_in, n_out
        self.weight = nn.Parameter(torch.empty(n, n_out, n_in))
        self.deltas = nn.ModuleDict()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def dense(self) -> Tensor:
        """The weights in float32, (n, n_out, n_in)."""
        return self.weight.float()

    def forward(self, x: Tensor, rows: "Rows") -> Tensor:
        """x (R, n_in), sorted by expert -> (R, n_out)"""
        y = rows.times(x, self.weight.to(x.dtype))
        for delta in self.deltas.values():
            y = delta(rows, x, y)
        return y


class Rows(NamedTuple):
    """Which rows belong to which expert."""

    ends: Tensor  # (n,) int32: where the run of each expert ends

    def times(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (R, n_in), each row times the matrix of its expert, weight (n, n_out, n_in) -> (R, n_out)"""
        is_fast = x.is_cuda and x.dtype == torch.bfloat16 and not any(size % 8 for size in weight.shape[1:])
        if is_fast and torch.cuda.get_device_capability(x.device) >= (9, 0):
            return torch._grouped_mm(x, weight.mT, offs=self.ends)
        return _one_by_one(x, weight, self.ends)


@torch.compiler.disable
def _one_by_one(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(counts), weight, strict=True)])


class _Gather(torch.autograd.Function):
    """x[index], where each row of x is taken equally often: `back` lists the places of each in turn. Its gradient is a
    sum over these; torch adds them up in memory instead, which takes a quarter of a training step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.n = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back).view(ctx.n, -1, grad.shape[1]).sum(1), None, None


class Router(Linear):
    """(T, C) -> (T, n) scores of the experts. A class of its own, since it stays unquantized."""


class MoE(nn.Module):
    def __init__(self, config: Config, shape: Shape):
        super().__init__()
        self.n_active, self.normalize = shape.n_active, shape.normalize
        self.activation = ACTIVATIONS[config.activation]
        self.router = Router(config.n_embd, shape.n)
        self.experts = nn.ModuleDict()
        sizes = config.n_embd, shape.n_hidden
        for name, (n_in, n_out) in dict(gate_proj=sizes, up_proj=sizes, down_proj=sizes[::-1]).items():
            self.experts[name] = Experts(shape.n, n_in, n_out)

    def forward(self, x: Tensor) -> Tensor:
        k, gate, up, down = self.n_active, *self.experts.values()
        weight, expert = self.router(x).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).topk(k)  # (T, k)
        if self.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        expert, order = expert.flatten().sort(stable=True)  # (T k)
        rows = Rows(torch.searchsorted(expert, torch.arange(gate.n_experts, device=x.device), right=True).int())
        back = order.argsort()
        h = _Gather.apply(x, order // k, back)  # (T k, C)
        y = _Gather.apply(down(self.activation(gate(h, rows)) * up(h, rows), rows), back, order)
        return (y.unflatten(0, (-1, k)) * weight.to(x.dtype)[..., None]).sum(1)  # (T, C)
