"""Adapters (https://arxiv.org/abs/1902.00751, Houlsby et al.): a narrow network behind each half of a block.

    y  +  W_up gelu(W_down y + b_down) + b_up          W_down (size, C), W_up (C, size)

y is what the attention's and the MLP's last linear layer give, before it is added to the stream. W_up = 0 and b_up = 0
at the start make it the base model exactly (the paper: normal numbers of 1e-2).

Trained on LLaMA-7B with size 64, two a block: 32 * 2 * (2 * 64 * 4096 + 64 + 4096) = 33,820,672 numbers; the paper also
trains the blocks' norms (`norms`), 262,144 more.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.files import require_positive
from lit_model.model import GPT, MLP, Linear


@dataclass
class Bottleneck:
    """Adapters."""

    size: int = 64
    """width of the narrow network"""
    where: Literal["both", "mlp"] = "both"
    """behind the attention and the MLP, as in the paper, or behind the MLP only"""
    norms: bool = False
    """train the norms of the blocks, too"""


class BottleneckDelta(nn.Module):
    def __init__(self, n_embd: int, size: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(size, n_embd))
        self.down_bias = nn.Parameter(torch.empty(size))
        self.up = nn.Parameter(torch.empty(n_embd, size))
        self.up_bias = nn.Parameter(torch.empty(n_embd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down, std=0.01)
        for p in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(p)

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:  # y (T, C)
        down, down_bias, up, up_bias = (t.to(y.dtype) for t in (self.down, self.down_bias, self.up, self.up_bias))
        return y + F.linear(F.gelu(F.linear(y, down, down_bias)), up, up_bias)


def install(gpt: GPT, options: Bottleneck) -> None:
    """Adds one or two adapters to every block. Raises ValueError for a size below 1."""
    require_positive(options, "size")
    for block in gpt.blocks:
        linears = [] if options.where == "mlp" else [block.attn.o_proj]
        if isinstance(block.mlp, MLP):  # none in a mixture of experts
            linears.append(block.mlp.down_proj)
        for linear in linears:
            linear.deltas["bottleneck"] = BottleneckDelta(gpt.config.n_embd, options.size)
        if options.norms:
            for norm in (block.norm_1, block.post_norm_1, block.norm_2, block.post_norm_2):
                norm.requires_grad_(True)
