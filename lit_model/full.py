"""Full finetuning: every parameter of the network is trained, in float32, whatever dtype the activations have.

AdamW at a learning rate of 1e-5 moves a bfloat16 weight of 0.02 by less than its last bit, so it would not move at all.
"""

import math

import torch

from lit_model import model
from lit_model.model import GPT, Config  # noqa: F401  a method's file exports these names; here they are the base's own


def install(gpt: model.GPT, options: None = None) -> None:
    """Adds nothing."""


def trainable(name: str) -> bool:
    return True


def merge(gpt: model.GPT, dtype: torch.dtype) -> float:
    """The trained weights are the network's already. Returns the relative error that rounding them to `dtype` adds."""
    exact = [p.float() for p in gpt.parameters()]
    error = sum((p.to(dtype).float() - p).square().sum().item() for p in exact)
    return math.sqrt(error / sum(p.square().sum().item() for p in exact))
