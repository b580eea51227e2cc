"""(IA)^3 (https://arxiv.org/abs/2205.05638): keys, values and the MLP's inner activations, each times a trained number.

    k = l_k * (W_k x)        v = l_v * (W_v x)        down(l * h),  h the inside of the MLP

l = 1 at the start makes it the base model exactly. Trained on LLaMA-7B: 32 * (4096 + 4096 + 11008) = 614,400 numbers.

In LLaMA h = silu(gate) * up, so that l can stand behind up_proj. In GPT-2 it stands in front of down_proj, whose
product is made a second time for it. All of it merges into the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_model.model import GPT, MLP, Linear


@dataclass
class IA3:
    """(IA)^3. It has no options."""


class OutputScale(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(n))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[:, None], None if bias is None else bias * self.scale


class InputScale(OutputScale):
    is_first = True  # of several methods: it computes from the weights themselves

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        return linear.matmul(x * self.scale.to(x.dtype)) + (0 if linear.bias is None else linear.bias.to(y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale, bias


def install(gpt: GPT, options: IA3) -> None:
    """Adds the three scales to every block; two where the MLP is a mixture of experts."""
    for block in gpt.blocks:
        for linear in (block.attn.k_proj, block.attn.v_proj):
            linear.deltas["ia3"] = OutputScale(linear.out_features)
        if isinstance(block.mlp, MLP) and block.mlp.gate_proj is not None:
            block.mlp.up_proj.deltas["ia3"] = OutputScale(block.mlp.up_proj.out_features)
        elif isinstance(block.mlp, MLP):
            block.mlp.down_proj.deltas["ia3"] = InputScale(block.mlp.down_proj.in_features)
