"""Rotary positions (RoPE, https://arxiv.org/abs/2104.09864): frequencies, their scaling, the rotation."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_model.files import validate_fields


@dataclass(frozen=True)
class LinearScaling:
    """All rotations are slower by `factor` (https://arxiv.org/abs/2306.15595)."""

    factor: float

    def frequencies(self, plain: Tensor, base: float, length: int) -> Tensor:
        return plain / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's way to a longer context: rotations that are slow in the original context get slower by `factor`."""

    factor: float
    low_freq_factor: float  # up to this many rotations in the original context: slower by all of `factor`
    high_freq_factor: float  # from this many on: unchanged
    original_max_position_embeddings: int

    def frequencies(self, plain: Tensor, base: float, length: int) -> Tensor:
        rotations = self.original_max_position_embeddings * plain / (2 * math.pi)
        unchanged = ((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain * (unchanged + (1 - unchanged) / self.factor)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (https://arxiv.org/abs/2309.00071): as Llama3Scaling, but in between the step from slow to unchanged is
    linear in the index of a pair, and cosines and sines are multiplied by `attention_factor`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0  # rotations in the original context from which on a pair is unchanged
    beta_slow: float = 1.0  # up to which it is slower by all of `factor`
    truncate: bool = True  # both bounds at whole indices
    llama_4_scaling_beta: float | None = None  # queries grow by this times log(1 + position // original context)

    def frequencies(self, plain: Tensor, base: float, length: int) -> Tensor:
        size, context = 2 * len(plain), self.original_max_position_embeddings

        def index(rotations: float) -> float:
            """Of the pair that turns this often in the original context."""
            return size * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(base))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        steps = torch.arange(len(plain), device=plain.device).to(plain.dtype)
        slower = ((steps - low) / max(high - low, 1e-3)).clamp(0, 1)
        return plain * (1 - slower + slower / self.factor)


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE (https://arxiv.org/abs/2402.13753): each pair is slower by a factor of its own; there are two lists, for
    rows whose longest example fits into the original context and for others."""

    short_factor: tuple  # (hs / 2,)
    long_factor: tuple
    original_max_position_embeddings: int
    attention_factor: float

    def frequencies(self, plain: Tensor, base: float, length: int) -> Tensor:
        factors = self.long_factor if length > self.original_max_position_embeddings else self.short_factor
        return plain / torch.tensor(factors, dtype=plain.dtype, device=plain.device)


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer."""

    base: float = 10000.0
    share: float = 1.0  # of a head's numbers that turn; the last ones do not (partial rotary positions)
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongScaling | None = None

    def __post_init__(self):
        for part in (self, self.scaling):
            if part is not None:
                validate_fields(part)

    def frequencies(self, head_size: int, length: int = 0, dtype: Any = torch.float64, on: Any = None) -> Tensor:
        """(r / 2,) radians that each pair of a head's first r numbers turns from one position to the next, in a row
        whose longest example has `length` tokens; on: a device."""
        size = int(head_size * self.share)
        plain = self.base ** (-torch.arange(0, size, 2, device=on).to(dtype) / size)
        return plain if self.scaling is None else self.scaling.frequencies(plain, self.base, length)


class Angles(NamedTuple):
    """Of the tokens of a row, r numbers of a head turn."""

    cos: Tensor  # (T, 1, 1, r / 2)
    sin: Tensor  # (T, 1, 2, r / 2), for either half
    growth: Tensor | None = None  # (T, 1, 1) what queries are multiplied by

    def keys(self, k: Tensor) -> Tensor:
        """Rotated, (T, nkv, hs)."""
        return rotate(k, self.cos, self.sin)

    def queries(self, q: Tensor) -> Tensor:
        """Rotated, (T, nh, hs)."""
        return self.keys(q) if self.growth is None else self.keys(q) * self.growth

    def turns_all_of(self, q: Tensor) -> bool:
        """Whether whole heads are rotated, and no more is done to queries than to keys."""
        return self.growth is None and 2 * self.cos.shape[-1] == q.shape[-1]


def rope_angles(pos: Tensor, rope: Rope, head_size: int, length: int, dtype: torch.dtype) -> Angles:
    """Angles of tokens at the positions (T,) in a row whose longest example has `length` tokens. Made again in every
    forward: a buffer would need care on the meta device and under changes of dtype, and the cost is negligible."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = (pos[:, None] * rope.frequencies(head_size, length, wide, pos.device))[:, None, None]
    size, growth = getattr(rope.scaling, "attention_factor", 1.0), getattr(rope.scaling, "llama_4_scaling_beta", None)
    cos, sin = angles.cos() * size, angles.sin() * size
    if growth is not None:
        context = rope.scaling.original_max_position_embeddings
        steps = (pos // context).to(wide)[:, None, None]
        growth = (1 + growth * steps.log1p()).to(dtype) if length > context else None
    return Angles(cos.to(dtype), torch.cat((-sin, sin), dim=2).to(dtype), growth)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pair (x[i], x[i + r/2]) of the first r numbers of every head by its angle. x: (T, n, hs)."""
    size = 2 * cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    halves = x.unflatten(-1, (2, -1))  # (T, n, 2, hs / 2)
    return (halves * cos + halves.flip(-2) * sin).flatten(-2)
