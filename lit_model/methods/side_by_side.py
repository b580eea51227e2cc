"""Several method folders over one base in memory, side by side: another one for every call, or for every example.

    gpt = load("checkpoints/x", {"fr": "out/fr", "de": "out/de"})
    logits = gpt(idx, method="fr")              (B, T) -> (B, T, vocab_size)
    logits = gpt(idx, method=["fr", "de"])      one for each of the B examples
    gpt.switch("de")                            for generate and for calls without a method; None: the base alone

Nothing is loaded or merged again. In a mixed batch the examples of one method lie together in the packed row, and its
deltas act on their slice of it; its soft prompt is a segment, its prefix keys are seen by its examples only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from lit_model.attention import KVCache
from lit_model.model import GPT, CausalSelfAttention, Config, Linear
from lit_model.packing import Packed, Segment, lay_out


class Route:
    """Which tokens of the row that is being computed belong to which method."""

    def __init__(self):
        self.spans: list[tuple[str | None, slice]] = []
        self.at_head: list[tuple[str | None, slice]] = []  # the same among the tokens whose output is wanted

    def everywhere(self, name: str | None) -> None:
        self.spans = self.at_head = [(name, slice(None))]

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        before = self.spans, self.at_head
        self.everywhere(name)
        yield
        self.spans, self.at_head = before


class InSlices(nn.Module):
    """A delta of a linear layer for the tokens of one method."""

    def __init__(self, name: str, delta: nn.Module, route: Route, at_head: bool):
        super().__init__()
        self.name, self.delta, self.route, self.at_head = name, delta, route, at_head

    def forward(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        spans = [span for name, span in (self.route.at_head if self.at_head else self.route.spans) if name == self.name]
        if spans == [slice(None)]:
            return self.delta(linear, x, y)
        y = y.clone() if spans else y
        for span in spans:
            y[span] = self.delta(linear, x[span], y[span])
        return y


class GatedSlices(nn.Module):
    """A delta of the attention for the tokens of one method: for all others its gate is closed."""

    def __init__(self, name: str, delta: nn.Module, route: Route):
        super().__init__()
        self.name, self.delta, self.route = name, delta, route

    def forward(self, attn: CausalSelfAttention, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        spans = [span for name, span in self.route.spans if name == self.name]
        if not spans:
            return None
        with self.route.only(self.name):  # its prompt goes through its own deltas
            k, v, gate = self.delta(attn, dtype)
        if spans == [slice(None)]:
            return k, v, gate
        gates = gate.new_zeros(self.route.spans[-1][1].stop, len(gate))  # (T, nh)
        for span in spans:
            gates[span] = gate
        return k, v, gates


class SideBySide(GPT):
    """A network with several methods side by side. For inference."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.route = Route()
        self.route.everywhere(None)
        self.tokens_of, self.keys_of = nn.ModuleDict(), nn.ModuleDict()  # name -> its slot of virtual modules
        self.names: list[str] = []

    def take(self, name: str, donor: GPT) -> None:
        """Moves what fills the slots of `donor` into this network, for the tokens of `name`.

        Raises ValueError for a name that torch cannot give a module.
        """
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"{name!r} cannot be the name of a method: take letters, digits and '-'")
        self.names.append(name)
        slots = (Linear, CausalSelfAttention)
        for path, theirs in [(path, m) for path, m in donor.named_modules() if isinstance(m, slots)]:
            ours = self.get_submodule(path)
            for key, delta in theirs.deltas.items():
                if isinstance(ours, Linear):
                    ours.deltas[f"{name}/{key}"] = InSlices(name, delta, self.route, at_head=path == "lm_head")
                else:
                    ours.deltas[f"{name}/{key}"] = GatedSlices(name, delta, self.route)
        self.tokens_of[name], self.keys_of[name] = donor.virtual_tokens, donor.virtual_keys

    def switch(self, name: str | None) -> None:
        """Makes `name` the method of all calls without one; None: the base alone.

        Raises ValueError, with the names that there are, for another name.
        """
        self._check(name)
        self.route.everywhere(name)
        self.virtual_tokens = self.tokens_of[name] if name else nn.ModuleDict()
        self.virtual_keys = self.keys_of[name] if name else nn.ModuleDict()

    def _check(self, name: str | None) -> None:
        if name not in (None, *self.names):
            raise ValueError(f"there is no method {name!r} here; there are {', '.join(self.names)}")

    def merge(self) -> None:
        raise ValueError("methods that lie side by side cannot all be merged: load one of them alone")

    def forward(
        self,
        idx: Tensor,
        packed: Packed | None = None,
        cache: KVCache | None = None,
        method: str | Sequence[str | None] | None = None,
    ) -> Tensor:
        """As GPT.forward. method: that of all examples, or of each of a (B, T) batch; None: what `switch` has set."""
        if isinstance(method, str):
            before = self.route.spans[0][0]
            self.switch(method)
            try:
                return super().forward(idx, packed, cache)
            finally:
                self.switch(before)
        if method is None:
            return super().forward(idx, packed, cache)
        return self._mixed(idx, list(method))

    def _mixed(self, idx: Tensor, methods: list[str | None]) -> Tensor:
        if len(methods) != len(idx):
            raise ValueError(f"{len(methods)} methods for {len(idx)} examples")
        for name in methods:
            self._check(name)
        before, T = self.route.spans[0][0], idx.shape[1]
        order = sorted(range(len(idx)), key=lambda i: methods[i] or "")
        used = sorted({name for name in methods if name})
        # the row: the soft prompts of all methods, then the examples, those of one method together
        segments, roots, fronts, spans, keys = [], {None: None}, {None: np.arange(0)}, [], 0
        for name in used:
            n = sum(virtual.length for virtual in self.keys_of[name].values())
            fronts[name], keys = np.arange(keys, keys + n), keys + n
            if n := sum(virtual.length for virtual in self.tokens_of[name].values()):
                segments.append(Segment(n, front=fronts[name]))
                spans.append((name, n))
            roots[name] = segments[-1] if n else None
        n_virtual = sum(n for _, n in spans)
        for name, group in groupby(order, key=lambda i: methods[i]):
            examples = [Segment(T, roots[name], front=fronts[name]) for _ in group]
            segments += examples
            spans.append((name, T * len(examples)))
        wanted = np.arange(n_virtual, n_virtual + idx.numel())
        packed = lay_out(segments, keys, wanted=wanted, has_virtual_tokens=n_virtual > 0)
        self.virtual_tokens = nn.ModuleDict({f"{n}/{k}": m for n in used for k, m in self.tokens_of[n].items()})
        self.virtual_keys = nn.ModuleDict({f"{n}/{k}": m for n in used for k, m in self.keys_of[n].items()})
        self.route.spans, self.route.at_head = _slices(spans), _slices([s for s in spans[-len({*methods}) :]])
        try:
            logits = super().forward(idx[order].flatten(), packed.to(idx.device))
        finally:
            self.switch(before)
        return logits.unflatten(0, idx.shape)[np.argsort(order)]


def _slices(counts: Sequence[tuple[str | None, int]]) -> list[tuple[str | None, slice]]:
    ends = np.cumsum([n for _, n in counts]).tolist()
    return [(name, slice(end - n, end)) for (name, n), end in zip(counts, ends)]
