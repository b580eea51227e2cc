"""Several method folders over one base in memory, side by side: another one for every call, or for every example.

    gpt = load("checkpoints/x", {"fr": "out/fr", "de": "out/de"})
    logits = gpt(idx, method="fr")              (B, T) -> (B, T, vocab_size)
    logits = gpt(idx, method=["fr", None])      one for each of the B examples; None: the base alone
    generate_batch(gpt, prompts, 50, ways, methods=["fr", None, "de"])
    gpt.switch("de")                            for generate and for calls without a method

Nothing is loaded or merged again: a switch hangs other modules into the slots. A mixed batch of a plain call is one
pass a method; decoded, it is one pass for all (mixed.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_model.model import GPT, Config
from lit_model.packing import Packed


class SideBySide(GPT):
    """A network with several methods side by side. For inference."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.slots: dict[str | None, dict[str, nn.ModuleDict]] = {None: _slots(self)}

    def take(self, name: str, donor: GPT) -> None:
        """Makes what fills the slots of `donor` the method `name`."""
        self.slots[name] = {path: modules.to(self.device) for path, modules in _slots(donor).items()}

    def switch(self, name: str | None) -> None:
        """Makes `name` the method of all calls without one; None: the base alone. Raises KeyError for another name."""
        for modules, slot, filling in places_in(self, self.slots[name]):
            modules[slot] = filling

    def merge(self) -> None:
        raise ValueError("methods that lie side by side cannot all be merged: load one of them alone")

    def forward(
        self,
        idx: Tensor,
        packed: Packed | None = None,
        method: str | Sequence[str | None] | None = None,
    ) -> Tensor:
        """As GPT.forward. method: of all examples of a (B, T) batch, or of each; None: what `switch` has set."""
        if method is None:
            return super().forward(idx, packed)
        methods, rows, logits = [method] * len(idx) if isinstance(method, str) else method, [], []
        for name in dict.fromkeys(methods):
            mine = torch.tensor([other == name for other in methods], device=idx.device)  # (B,)
            with filled(places_in(self, self.slots[name])):
                logits.append(super().forward(idx[mine]))
            rows.append(mine.nonzero()[:, 0])
        return torch.cat(logits)[torch.cat(rows).argsort()]


def slots_of(gpt: GPT, names: Sequence[str | None] | None) -> dict[str | None, dict[str, nn.ModuleDict]]:
    """What fills the slots under each method, by their paths; without names under None what fills them now."""
    return {None: _slots(gpt)} if names is None else gpt.slots


def n_front(slots: dict[str, nn.ModuleDict]) -> int:
    """Number of virtual keys and tokens that a method puts in front of an example."""
    return sum(v.length for slot in ("virtual_keys", "virtual_tokens") for v in slots[slot].values())


def places_in(gpt: GPT, slots: dict[str, nn.ModuleDict]) -> list[tuple[dict, str, nn.ModuleDict]]:
    """(modules of the owner, name of the slot, what is to fill it)."""
    paths = [(*path.rpartition(".")[::2], filling) for path, filling in slots.items()]
    return [(gpt.get_submodule(owner)._modules, slot, filling) for owner, slot, filling in paths]


@contextmanager
def filled(places: list[tuple[dict, str, nn.ModuleDict]]) -> Iterator[None]:
    """Meanwhile the slots are filled with these."""
    before = [(modules, slot, modules[slot]) for modules, slot, _ in places]
    for modules, slot, filling in places:
        modules[slot] = filling
    try:
        yield
    finally:
        for modules, slot, filling in before:
            modules[slot] = filling


def _slots(gpt: GPT) -> dict[str, nn.ModuleDict]:
    """What fills the slots of a network, by their paths."""
    slots = "virtual_tokens", "virtual_keys", "deltas"
    return {path: m for path, m in gpt.named_modules() if path.endswith(slots)}
