"""Selective finetuning: some of the network's own parameters are trained, all others stay as they are.

    head          the output layer ("finetuning I")
    last_blocks   the last n blocks, the final norm and the output layer
    bitfit        biases only (BitFit, https://arxiv.org/abs/2106.10199); LLaMA has none: each linear layer of its
                  blocks gets one, zero at the start
    norms         the norms
    regex         parameters whose names a regular expression finds

Below the first block that is trained nothing is kept for a backward pass. If the output layer is the embedding matrix
and is trained alone, it becomes a copy of it; a regex that names the embedding trains both as one.

On LLaMA-7B: head 131,072,000; last_blocks 1 333,459,456; bitfit 1,359,872; norms 266,240.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lit_model.files import require_positive
from lit_model.model import GPT, Linear


@dataclass
class Selective:
    """Selective finetuning."""

    what: Literal["head", "last_blocks", "bitfit", "norms", "regex"] = "last_blocks"
    """which parameters are trained"""
    n: int = 2
    """number of blocks, for last_blocks"""
    regex: str = ""
    """regular expression found in the names of the parameters, such as 'attn.*weight'; overrides `what`"""


class AddedBias(nn.Module):
    def __init__(self, n_out: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:  # y (T, n_out)
        return y + self.bias.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return weight, self.bias + (0 if bias is None else bias)


def install(gpt: GPT, options: Selective) -> None:
    """Un-freezes what is trained, adds the biases of bitfit where there are none, and separates an output layer that is
    trained from the embedding.

    Raises ValueError if nothing would be trained.
    """
    require_positive(options, "n")
    if options.what == "bitfit":
        for linear in (m for m in gpt.blocks.modules() if isinstance(m, Linear) and m.bias is None):
            linear.deltas["bitfit"] = AddedBias(linear.out_features)
    last = "|".join(str(i) for i in range(gpt.config.n_layer - options.n, gpt.config.n_layer))
    patterns = {
        "head": r"^lm_head\.",
        "last_blocks": rf"^norm_f\.|^lm_head\.|^blocks\.({last})\.",
        "bitfit": r"\.bias$",
        "norms": "norm",
        "regex": "",
    }
    pattern = options.regex or patterns[options.what]
    names = [name for name, _ in gpt.named_parameters(remove_duplicate=False)]
    try:
        chosen = [name for name in names if re.search(pattern, name)]
    except re.error:
        chosen = []
    if not chosen or not pattern:
        some = ", ".join(sorted({re.sub(r"blocks\.\d+", "blocks.0", name) for name in names}))
        raise ValueError(f"selective.regex {options.regex!r} finds no parameter; there are {some}")
    if gpt.config.tie and "lm_head.weight" in chosen and "wte.weight" not in chosen:
        gpt.config = replace(gpt.config, tie=False)
        gpt.lm_head.weight = nn.Parameter(gpt.wte.weight.detach().clone())
    for name in chosen:
        gpt.get_parameter(name).requires_grad_(True)
