"""LoRA: low-rank adaptation (https://arxiv.org/abs/2106.09685).

A frozen linear layer W (n_out, n_in) gets a correction of rank r beside it:

    y = W x  +  (alpha / r) * B A x          A (r, n_in), B (n_out, r)

    B = 0 at the start makes it the base model exactly; A is kaiming-uniform with a = sqrt(5), as in the authors' code.

Trained: A and B of every layer that `targets` names; on LLaMA-7B with r = 8 on q and v: 32 * 2 * 8 * (4096 + 4096) =
4,194,304 numbers. rsLoRA (https://arxiv.org/abs/2312.03732) scales by alpha / sqrt(r) instead, so that the size of the
correction does not shrink with the rank. The paper's dropout on x defaults to 0 here: with it, a preamble that examples
share would have to be computed for each of them again (packing.py).
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model import model


@dataclass
class LoRA:
    """LoRA."""

    r: int = 8
    """rank of the correction"""
    alpha: float = 16.0
    """size of the correction: it is multiplied by alpha / r"""
    targets: str = "q_proj,v_proj"
    """which linear layers get one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"""
    dropout: float = 0.0
    """share of the inputs of A that is dropped in training"""
    rslora: bool = False
    """multiply by alpha / sqrt(r) instead of alpha / r"""


@dataclass
class Config(model.Config):
    lora: LoRA = field(default_factory=LoRA)


class LoRADelta(nn.Module):
    def __init__(self, linear: model.Linear, options: LoRA):
        super().__init__()
        self.scale = options.alpha / (math.sqrt(options.r) if options.rslora else options.r)
        self.dropout = options.dropout
        self.A = nn.Parameter(torch.empty(options.r, linear.in_features))
        self.B = nn.Parameter(torch.empty(linear.out_features, options.r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, linear: model.Linear, x: Tensor, y: Tensor) -> Tensor:  # x (T, n_in), y (T, n_out)
        x = F.dropout(x, self.dropout, self.training)
        return y + F.linear(F.linear(x, self.A.to(x.dtype)) * self.scale, self.B.to(x.dtype))

    def delta_weight(self) -> Tensor:
        """The correction as a matrix (n_out, n_in), in float32."""
        return self.B.float() @ self.A.float() * self.scale


def install(gpt: model.GPT, options: LoRA) -> None:
    """Adds a LoRA to every linear layer that `options.targets` names.

    Raises ValueError, with the names that there are, if one is unknown, and for a rank below 1.
    """
    linears = {name: m for name, m in gpt.named_modules() if isinstance(m, model.Linear)}
    known = sorted({name.split(".")[-1] for name in linears})
    targets = [t.strip() for t in options.targets.split(",") if t.strip()]
    if unknown := [t for t in targets if t not in known]:
        raise ValueError(f"lora.targets: no layer is called {', '.join(unknown)}; there are {', '.join(known)}")
    if not targets:
        raise ValueError(f"lora.targets is empty; there are {', '.join(known)}")
    if options.r < 1:
        raise ValueError(f"lora.r is {options.r}; it must be at least 1")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"lora.dropout is {options.dropout}; it must be at least 0 and below 1")
    for name, linear in linears.items():
        if name.split(".")[-1] in targets:
            linear.deltas["lora"] = LoRADelta(linear, options)


class GPT(model.GPT):
    def __init__(self, config: Config):
        super().__init__(config)
        install(self, config.lora)


def trainable(name: str) -> bool:
    return ".deltas.lora." in name


@torch.no_grad()
def merge(gpt: model.GPT) -> None:
    """Adds every correction to its weight, in float32, and takes the LoRA out of its slot."""
    for linear in (m for m in gpt.modules() if isinstance(m, model.Linear) and "lora" in m.deltas):
        merged = linear.weight.float() + linear.deltas.pop("lora").delta_weight()
        linear.weight = nn.Parameter(merged, requires_grad=False)
