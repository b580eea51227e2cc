"""LoRA: low-rank adaptation (https://arxiv.org/abs/2106.09685), with rsLoRA and LoRA+.

A frozen linear layer W (n_out, n_in) gets a correction of rank r beside it:

    y = W x  +  (alpha / r) * B A x          A (r, n_in), B (n_out, r)

B = 0 at the start makes it the base model exactly; A is kaiming-uniform with a = sqrt(5), as in the authors' code.
Trained: A and B of every layer that `targets` names; on LLaMA-7B with r = 8 on q and v: 32 * 2 * 8 * (4096 + 4096) =
4,194,304 numbers. Dropout on x defaults to 0 here: with it, what examples share is computed for each (packing.py).

With rslora (https://arxiv.org/abs/2312.03732) its size is the same for any r. LoRA+: https://arxiv.org/abs/2402.12354
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.files import require_positive
from lit_model.model import GPT, Linear


@dataclass
class LoRA:
    """LoRA."""

    r: int = 8
    """rank of the correction"""
    alpha: float = 16.0
    """size of the correction, which is multiplied by alpha / r"""
    targets: str = "q_proj,v_proj"
    """layers to adapt: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, or regular
    expressions of whole names such as blocks.[0-3].mlp.*"""
    dropout: float = 0.0
    """share of the inputs of A that is dropped in training"""
    rslora: bool = False
    """multiply by alpha / sqrt(r) instead of alpha / r"""
    lr_ratio: float = 1.0
    """LoRA+: learning rate of B as a multiple of A's; the paper has 16"""

    @property
    def scale(self) -> float:  # what B A is multiplied by
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class LoRADelta(nn.Module):
    def __init__(self, linear: Linear, options: LoRA):
        super().__init__()
        self.scale, self.dropout = options.scale, options.dropout
        n = linear.weight.shape[:-2]  # (); of all experts (n,)
        self.A = nn.Parameter(torch.empty(*n, options.r, linear.in_features))
        self.B = nn.Parameter(torch.empty(*n, linear.out_features, options.r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.A, -(self.A.shape[-1] ** -0.5), self.A.shape[-1] ** -0.5)
        nn.init.zeros_(self.B)

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:  # x (T, n_in), y (T, n_out)
        A, B = self.factors()
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x  # compiled, one of 0 copies x
        return y + linear.times(linear.times(x, A.to(x.dtype)) * self.scale, B.to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.factors()
        return weight + B.float() @ A.float() * self.scale, bias


def install(gpt: GPT, options: LoRA) -> None:
    """Adds a LoRA to every linear layer that `options.targets` names. Raises ValueError if there is no such layer."""
    for linear in target_layers(gpt, options).values():
        linear.deltas["lora"] = LoRADelta(linear, options)


def target_layers(gpt: GPT, options: LoRA, experts: bool = True) -> dict[str, Linear]:
    """The layers that `options.targets` names, those of experts among them. Raises ValueError for an unknown name."""
    require_positive(options, "r", "alpha", "lr_ratio")
    linears = {n: m for n, m in gpt.named_modules() if isinstance(m, Linear) or (experts and hasattr(m, "n_experts"))}
    layers = {}
    for target in map(str.strip, re.split(r",(?![^{]*})", options.targets)):  # not at the comma of {1,3}
        names = []
        with suppress(re.error):  # not an expression: the name of no layer
            names = [name for name in linears if name.split(".")[-1] == target or re.fullmatch(target, name)]
        if not names:
            known = ", ".join(sorted({name.split(".")[-1] for name in linears}))
            raise ValueError(f"lora.targets: no layer is called {target or 'nothing'}; there are {known}")
        layers |= {name: linears[name] for name in names}
    return layers


def lr_scale(options: LoRA) -> Callable[[str], float]:
    """LoRA+: what the learning rate of a trained tensor is multiplied by, from its name."""
    return lambda name: options.lr_ratio if name.endswith(".B") else 1.0


def validate_rank(gpt: GPT) -> None:
    """Raises ValueError for a rank that adds nothing. Files may have one: PiSSA's doubles when it is saved."""
    for name, delta in ((name, m) for name, m in gpt.named_modules() if isinstance(m, LoRADelta)):
        r, most = delta.A.shape[-2], min(delta.A.shape[-1], delta.B.shape[-2])
        if r > most:
            layer = name.rsplit(".deltas.")[0]
            raise ValueError(f"lora.r is {r}, but {layer} is a matrix of rank {most} at most: more adds nothing")
