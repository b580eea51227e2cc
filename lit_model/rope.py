"""Rotary positions (RoPE, https://arxiv.org/abs/2104.09864): frequencies, their scaling, the rotation."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_model.files import validate_fields

if TYPE_CHECKING:
    from lit_model.model import Config

Rope = tuple[Tensor, Tensor]  # per token: cos (T, 1, 1, hs / 2) and, for either half, sin (T, 1, 2, hs / 2)


@dataclass
class RopeScaling:
    """LLaMA 3.1's way to a longer context: rotations that are slow in the original context get slower by `factor`."""

    factor: float
    low_freq_factor: float  # up to this many rotations in the original context: slower by all of `factor`
    high_freq_factor: float  # from this many on: unchanged
    original_block_size: int

    def __post_init__(self):
        validate_fields(self)


def rope_frequencies(config: "Config", dtype: torch.dtype = torch.float64, device: Any = None) -> Tensor:
    """(hs / 2,) radians that each pair of a head's numbers turns from one position to the next."""
    steps = torch.arange(0, config.head_size, 2, device=device).to(dtype)
    frequencies = config.rope_base ** (-steps / config.head_size)
    if (scaling := config.rope_scaling) is not None:
        rotations = scaling.original_block_size * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        unchanged = ((rotations - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (unchanged + (1 - unchanged) / scaling.factor)
    return frequencies


def rope_angles(pos: Tensor, config: "Config", dtype: torch.dtype) -> Rope:
    """Cosines and sines of tokens at the positions (T,). Made again in every forward: a buffer would need care on the
    meta device and under changes of dtype, and the cost is negligible."""
    frequencies = rope_frequencies(config, torch.promote_types(dtype, torch.float32), pos.device)
    angles = (pos[:, None] * frequencies)[:, None, None]
    return angles.cos().to(dtype), torch.cat((-angles.sin(), angles.sin()), dim=2).to(dtype)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Rotates the pair (x[i], x[i + hs/2]) of every head by its angle; None: not at all. x: (T, n, hs)."""
    if rope is None:
        return x
    cos, sin = rope
    halves = x.unflatten(-1, (2, -1))  # (T, n, 2, hs / 2)
    return (halves * cos + halves.flip(-2) * sin).flatten(-2)
