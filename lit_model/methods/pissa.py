"""PiSSA (https://arxiv.org/abs/2404.02948) and OLoRA (https://arxiv.org/abs/2406.01775): a LoRA that starts from W.

    pissa    A and B begin as the r largest singular values of W and their vectors
    olora    A and B begin as the first r rows of R and columns of Q of W = Q R

The papers take that part out of W. Here it is subtracted beside W, which is the same: y = W x + s (B A - B0 A0) x, the
base model exactly at the start. Over a quantized W it differs: the papers quantize what is left of W, here it is W.
Trained: A and B, as many numbers as LoRA's. A method file holds it as a plain LoRA of twice the rank, B A - B0 A0.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_model.methods.lora import LoRA, LoRADelta, target_layers
from lit_model.model import GPT


@dataclass
class PiSSA(LoRA):
    """PiSSA and OLoRA."""

    init: Literal["pissa", "olora"] = "pissa"
    """start from the largest singular values, or from the QR decomposition"""


class PiSSADelta(LoRADelta):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.register_buffer("A0", torch.zeros_like(self.A), persistent=False)
        self.register_buffer("B0", torch.zeros_like(self.B), persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.with_start(self.A, self.B)

    def with_start(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A0, B0 = self.A0.to(A.device), self.B0.to(B.device)
        return torch.cat((A, A0), dim=-2), torch.cat((B, -B0), dim=-1)  # (2r, n_in), (n_out, 2r)


def install(gpt: GPT, options: PiSSA) -> None:
    """Adds one to every linear layer that `options.targets` names. Raises ValueError if there is no such layer."""
    for linear in target_layers(gpt, options).values():
        linear.deltas["pissa"] = PiSSADelta(linear, options)


@torch.no_grad()
def init_from_base(gpt: GPT, options: PiSSA) -> None:
    """Gives A and B their values, once the base weights are there."""
    for linear in target_layers(gpt, options).values():
        delta, weight, r = linear.deltas["pissa"], linear.dense(), options.r
        if options.init == "pissa":
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            root = (s[..., :r] / delta.scale).sqrt()
            delta.A.copy_(root[..., None] * v[..., :r, :])
            delta.B.copy_(u[..., :r] * root[..., None, :])
        else:
            q, upper = torch.linalg.qr(weight)
            delta.A.copy_(upper[..., :r, :])
            delta.B.copy_(q[..., :r])
        delta.A0, delta.B0 = delta.A.detach().clone(), delta.B.detach().clone()


def to_save(gpt: GPT, tensors: dict[str, Tensor], options: PiSSA) -> tuple[str, LoRA, dict[str, Tensor]]:
    """What a method file holds: a plain LoRA of twice the rank."""
    for name in target_layers(gpt, options):
        A, B = (tensors.pop(f"{name}.deltas.pissa.{letter}") for letter in "AB")
        A, B = gpt.get_submodule(name).deltas["pissa"].with_start(A, B)
        tensors |= {f"{name}.deltas.lora.A": A.contiguous(), f"{name}.deltas.lora.B": B.contiguous()}
    settings = {name: value for name, value in asdict(options).items() if name != "init"}
    growth = math.sqrt(2) if options.rslora else 2  # so that the scale stays
    return "lora", LoRA(**settings | dict(r=2 * options.r, alpha=growth * options.alpha)), tensors
