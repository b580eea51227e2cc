"""Selective finetuning: some of the network's own parameters are trained, all others stay as they are.

    head          the output layer ("finetuning I")
    last_blocks   the last n blocks, the final norm and the output layer
    bitfit        biases only (BitFit, https://arxiv.org/abs/2106.10199); LLaMA has none: each linear layer of its
                  blocks gets one, zero at the start
    norms         the norms
    regex         what a regular expression finds in the parameters' names

Below the first block that is trained nothing is kept for a backward pass. If the output layer is the embedding matrix
and is trained alone, it becomes a copy of it; a regex that names the embedding trains both as one.

On LLaMA-7B: head 131,072,000; last_blocks 1 333,459,456; bitfit 1,359,872; norms 266,240.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lit_model import model


@dataclass
class Selective:
    """Selective finetuning."""

    what: Literal["head", "last_blocks", "bitfit", "norms", "regex"] = "last_blocks"
    """which parameters are trained"""
    n: int = 2
    """for last_blocks: how many"""
    regex: str = ""
    """for regex: what the names of the parameters contain, such as 'attn.*weight'"""


@dataclass
class Config(model.Config):
    selective: Selective = field(default_factory=Selective)


class AddedBias(nn.Module):
    def __init__(self, n_out: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, linear: model.Linear, x: Tensor, y: Tensor) -> Tensor:  # y (T, n_out)
        return y + self.bias.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return weight, self.bias + (0 if bias is None else bias)


def install(gpt: model.GPT, options: Selective) -> None:
    """Adds the biases of bitfit where there are none, and parts an output layer that is trained from the embedding.

    Raises ValueError if nothing would be trained.
    """
    if options.what == "last_blocks" and not 1 <= options.n <= gpt.config.n_layer:
        raise ValueError(f"selective.n is {options.n}; the model has {gpt.config.n_layer} blocks")
    if options.what == "bitfit":
        for linear in (m for m in gpt.blocks.modules() if isinstance(m, model.Linear) and m.bias is None):
            linear.deltas["bitfit"] = AddedBias(linear.out_features)
    if options.regex and options.what != "regex":
        raise ValueError(f"selective.regex goes with selective.what regex, not with {options.what}")
    names = [name for name, _ in gpt.named_parameters(remove_duplicate=False)]
    try:
        chosen = {name for name in names if _chosen(name, options, gpt.config.n_layer)}
    except re.error as e:
        raise ValueError(f"selective.regex {options.regex!r} is no regular expression: {e}") from None
    if not chosen or (options.what == "regex" and not options.regex):
        some = ", ".join(sorted({re.sub(r"blocks\.\d+", "blocks.0", name) for name in names}))
        raise ValueError(f"selective.regex {options.regex!r} finds no parameter; there are {some}")
    if gpt.config.tie and "lm_head.weight" in chosen and "wte.weight" not in chosen:
        gpt.config = replace(gpt.config, tie=False)
        gpt.lm_head.weight = nn.Parameter(gpt.wte.weight.detach().clone())


class GPT(model.GPT):
    def __init__(self, config: Config):
        super().__init__(config)
        install(self, config.selective)


def _chosen(name: str, options: Selective, n_layer: int) -> bool:
    if options.what == "head":
        return name.startswith("lm_head.")
    if options.what == "last_blocks":
        block = re.match(r"blocks\.(\d+)\.", name)
        return name.startswith(("norm_f.", "lm_head.")) or (block is not None and int(block[1]) >= n_layer - options.n)
    if options.what == "bitfit":
        return name.endswith(".bias")
    if options.what == "norms":
        return "norm" in name
    return re.search(options.regex, name) is not None


def trainable(name: str, config: Config) -> bool:
    return _chosen(name, config.selective, config.n_layer)
