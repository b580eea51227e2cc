"""Several methods in one pass: each token has the number of its own, in a tensor, so that it works inside a CUDA graph.

The LoRAs of a layer are one of all their ranks, R, of which a token keeps its own: y + (x A^T * own) B^T, A (R, n_in)
and B (n_out, R). Any other method computes every token, and its own take the output. An adapter's gate is zero for the
tokens of others. Keys and tokens in front of an example are those of its own method (decode.py).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.attention import GatedKeys
from lit_model.methods.lora import LoRADelta
from lit_model.model import CausalSelfAttention, Linear

Slots = Mapping[str, nn.ModuleDict]  # what fills the slots of a network, by their paths


class Choice:
    """Which method each token of a row has, by its number in `names`."""

    def __init__(self, names: Sequence[str | None]):
        self.names = names
        self.of: Tensor  # (T,)


def mix(slots: Mapping[str | None, Slots], choice: Choice) -> Slots:
    """What fills the slots where each token has a method of its own. slots: those of each method, by its name."""
    mixed, alone = {}, len(choice.names) == 1
    for path in slots[choice.names[0]]:
        found = {i: slots[name][path] for i, name in enumerate(choice.names) if len(slots[name][path])}
        if path.endswith("attn.deltas"):
            parts = {f"{i} {n}": Gated(d, i, choice) for i, deltas in found.items() for n, d in deltas.items()}
            mixed[path] = nn.ModuleDict(parts)
        elif alone and path.endswith("deltas"):
            mixed[path] = slots[choice.names[0]][path]
        else:
            mixed[path] = nn.ModuleDict({"mix": Mixed(found, choice)} if found and path.endswith("deltas") else {})
    return mixed


class Gated(nn.Module):
    """Keys of a method in a softmax of their own: for tokens of the others their gate is zero."""

    def __init__(self, delta: nn.Module, number: int, choice: Choice):
        super().__init__()
        self.delta, self.number, self.choice = delta, number, choice
        self.kept: GatedKeys | None = None  # they are the same in every step

    def forward(self, attn: CausalSelfAttention, dtype: torch.dtype) -> GatedKeys:
        if self.kept is None:
            of = self.choice.of
            self.choice.of = of.new_full((len(self.delta.prompt),), self.number)  # in the layers that make its keys
            self.kept = self.delta(attn, dtype)
            self.choice.of = of
        if len(self.choice.names) == 1:
            return self.kept
        k, v, gate = self.kept
        return k, v, gate * (self.choice.of == self.number)[:, None]  # (T, nh)


class Mixed(nn.Module):
    """The deltas of a layer of several methods, by the methods' numbers."""

    def __init__(self, deltas: dict[int, nn.ModuleDict], choice: Choice):
        super().__init__()
        self.choice = choice
        loras = {i: d["lora"] for i, d in deltas.items() if [*d] == ["lora"] and type(d["lora"]) is LoRADelta}
        self.others = {i: d for i, d in deltas.items() if i not in loras}
        self.A = self.B = None
        if loras:
            self.A = torch.cat([lora.A for lora in loras.values()])  # (R, n_in), R the sum of the ranks
            self.B = torch.cat([lora.B * lora.scale for lora in loras.values()], dim=1)  # (n_out, R)
            numbers = [torch.full((len(lora.A),), i) for i, lora in loras.items()]
            self.number = torch.cat(numbers).to(self.A.device)  # (R,)

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        of, before = self.choice.of[:, None], y
        if self.A is not None:
            own = F.linear(x, self.A.to(x.dtype)) * (of == self.number)
            y = y + F.linear(own, self.B.to(x.dtype))
        for number, deltas in self.others.items():
            own = before
            for delta in deltas.values():
                own = delta(linear, x, own)
            y = torch.where(of == number, own, y)
        return y
