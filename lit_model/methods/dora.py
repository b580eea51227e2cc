"""DoRA: weight-decomposed low-rank adaptation (https://arxiv.org/abs/2402.09353).

LoRA, with the size of each row of the weights trained apart from its direction:

    y = (m / |W + s B A|) * (W + s B A) x          m (n_out,), |.| the norms of the rows

|.| carries no gradient (the paper's section 4.3). Stored is m - |W|, zero at the start like B: the base model exactly.
Trained on LLaMA-7B with r = 16 on all linear layers: 39,976,960 numbers of A and B and 1,359,872 of m.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_model.methods.lora import LoRA, LoRADelta, target_layers
from lit_model.model import GPT, Linear

TINY = 1e-30  # a row of zeros, such as a pruned one, stays one


@dataclass
class DoRA(LoRA):
    """DoRA: its options are LoRA's."""


class DoRADelta(LoRADelta):
    is_first = True  # of several methods: it computes from the weights themselves

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.magnitude = nn.Parameter(torch.zeros(len(self.B), device=self.B.device))

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:  # x (T, n_in), y (T, n_out)
        bias = 0 if linear.bias is None else linear.bias.to(y.dtype)
        return (super().forward(linear, x, y) - bias) * self.row_sizes(linear, x.dtype).to(y.dtype) + bias

    def row_sizes(self, linear: Linear, dtype: torch.dtype) -> Tensor:
        """m / |W + s B A|, (n_out,), without making B A: with p = W A^T the squared norm of a row is
        |W|^2 + 2 s p . B + s^2 B (A A^T) . B."""
        with torch.no_grad():
            A, B, s = self.A.to(dtype), self.B.to(dtype), self.scale
            p = linear.matmul(A).T  # (n_out, r)
            base = linear.dense().to(self.B.dtype).square().sum(-1)
            square = base + ((2 * s) * p + (s**2) * (B @ (A @ A.T))).mul(B).sum(-1)
        return (base.sqrt() + self.magnitude) / square.clamp(min=TINY).sqrt()

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        merged, bias = super().merged(weight, bias)
        sizes = (weight.norm(dim=-1) + self.magnitude) / merged.norm(dim=-1).clamp(min=TINY**0.5)
        return merged * sizes[:, None], bias


def install(gpt: GPT, options: DoRA) -> None:
    """Adds a DoRA to every linear layer that `options.targets` names. Raises ValueError if there is no such layer."""
    for linear in target_layers(gpt, options, experts=False).values():
        linear.deltas["dora"] = DoRADelta(linear, options)
