"""LLaMA-Adapter v2 (https://arxiv.org/abs/2304.15010), its part for text: v1, and a little of every layer.

    y = scale * (W x + b) + bias          in every linear layer, and all norms are trained

on top of the prompts and gates of adapter.py, whose keys and values go through the scaled layers as well. scale = 1
and bias = 0 at the start make it the base model exactly.

Trained on LLaMA-7B: 1,229,760 of v1, a scale and a bias for each output of every linear layer, 2,783,744, and 266,240
of the norms: 4,279,744 numbers. The paper takes K = 20 and 31 layers; the defaults here are v1's. The authors' two
releases put the scale elsewhere (in front of W; biases only on some layers); this is the equation of the paper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_model.methods import adapter
from lit_model.model import GPT, Linear


@dataclass
class AdapterV2(adapter.Adapter):
    """LLaMA-Adapter v2."""


class ScaleBias(nn.Module):
    def __init__(self, n_out: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:  # y (T, n_out)
        return y * self.scale.to(y.dtype) + self.bias.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return weight * self.scale[:, None], self.bias + (0 if bias is None else bias * self.scale)


def install(gpt: GPT, options: AdapterV2) -> None:
    """Adds v1's prompts and gates, and a scale and a bias to every linear layer; un-freezes the norms."""
    adapter.install(gpt, options)
    for linear in (m for m in gpt.modules() if isinstance(m, Linear)):
        linear.deltas["adapter_v2"] = ScaleBias(linear.out_features)
    for name, p in gpt.named_parameters():
        if "norm" in name:
            p.requires_grad_(True)
