"""LLaMA-Adapter: zero-init attention (https://arxiv.org/abs/2303.16199).

Each of the upper layers owns a prompt: K vectors (K, C), which are no tokens, so the row does not grow. The layer's
own frozen projections make keys and values of them, every token attends to these in a softmax of its own, and a gate
per head, zero at the start, lets the result in:

    y = softmax(q k^T / sqrt(hs)) v  +  tanh(gate) * softmax(q (W_k prompt)^T / sqrt(hs)) (W_v prompt)

    q carries its rotary position, the prompt has none. gate = 0 makes it the base model exactly.

Trained: prompt and gates of layer start_layer and up; on LLaMA-7B 30 * (10 * 4096 + 32) = 1,229,760 numbers. As in the
paper: tanh, one gate per head, prompt from N(0, 1). `gate="linear"` is lit-llama's convention, without the tanh.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lit_model.files import require_positive
from lit_model.model import GPT, CausalSelfAttention


@dataclass
class Adapter:
    """LLaMA-Adapter."""

    prompt_length: int = 10
    """number of prompt vectors K in each adapted layer"""
    start_layer: int = 2
    """first adapted layer; those below stay frozen (the paper adapts the top 30 of 32)"""
    gate: Literal["tanh", "linear"] = "tanh"
    """form of the gate: tanh(gate) as in the paper, or gate itself"""


class AdapterDelta(nn.Module):
    def __init__(self, n_embd: int, n_head: int, options: Adapter):
        super().__init__()
        self.linear_gate = options.gate == "linear"
        self.prompt = nn.Parameter(torch.empty(options.prompt_length, n_embd))
        self.gate = nn.Parameter(torch.empty(n_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(self, attn: CausalSelfAttention, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        prompt = self.prompt.to(dtype)
        k, v = attn.keys_and_values(prompt)  # (K, nkv, hs)
        return k, v, self.gate if self.linear_gate else self.gate.tanh()


def install(gpt: GPT, options: Adapter) -> None:
    """Adds an adapter to the attention of every layer from `start_layer` on.

    Raises ValueError if there is no such layer, or the prompt is empty.
    """
    n_layer = gpt.config.n_layer
    require_positive(options, "prompt_length")
    if not 0 <= options.start_layer < n_layer:
        raise ValueError(f"adapter.start_layer is {options.start_layer}; the model has layers 0 to {n_layer - 1}")
    for block in gpt.blocks[options.start_layer :]:
        block.attn.deltas["adapter"] = AdapterDelta(gpt.config.n_embd, gpt.config.n_head, options)
