"""Decoding: many sequences that grow by one token a step, over one pool of keys and values.

The pool's slots are flat. A table says which slot holds the key of each position of each sequence, so what sequences
begin with (a system prompt, examples, virtual keys and tokens of a method) is computed once and stored once. A step is
a row of one token for each sequence. Everything that it needs lies on the device, the sampled tokens and the random
numbers included, so on a GPU a step is one CUDA graph; the host looks at the tokens every few steps.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lit_model.attention import HAS_TRITON, CachedRow, GatedKeys, KVCache, PackedRow, plain_attention
from lit_model.kernels.cpu import Packed1
from lit_model.model import GPT, Linear
from lit_model.packing import Example, Packed, Segment, lay_out, tree
from lit_model.rope import rope_angles

LOOK = 8  # steps on a GPU between two looks of the host at the tokens
ROW_TOKENS = 16384  # about the most tokens of prompts that go through the network at a time


class Sampling(NamedTuple):
    """How the next token is chosen. The likeliest token always stays."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token each time
    top_k: int | None = None  # sample from the k likeliest tokens only
    top_p: float | None = None  # from the smallest set of tokens that has this probability
    min_p: float | None = None  # from tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides positive logits of tokens that are in the text, multiplies negative ones
    seed: int | None = None  # the same seed gives the same tokens

    def check(self, max_new_tokens: int = 1) -> None:
        """Raises ValueError for a value out of its range."""
        for name, value, fits in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63),
        ):
            if not fits:
                raise ValueError(f"{name} is {value}, out of its range")


@dataclass
class DecodeRow(PackedRow):
    """One token of each of B sequences: it is stored in its slot, and sees those of its line of the table."""

    state: "Decoder"
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prompts: Sequence[GatedKeys]) -> Tensor:
        """q (B, nh, hs), k and v (B, nkv, hs) without positions. Returns (B, nh, hs)."""
        state = self.state
        q, k, v = state.cache.store(self.layer, state.slot, q, k, v, self.rope)  # (slots, nkv, hs)
        how = self.scale, self.window, self.softcap, state.longest, state.shared
        y = decode_attention(q, k, v, state.table, state.n, *how)
        for pk, pv, gate in prompts:
            y = y + gate.to(y.dtype)[..., None] * plain_attention(q, pk, pv, self.scale, self.softcap)
        return y


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, n: Tensor, scale: float, window: int | None,
    softcap: float | None, longest: int, shared: int = 0, plain: bool = False,
) -> Tensor:  # fmt: skip
    """Softmax attention of one query for each sequence, q (B, nh, hs), over the keys in the first n (B,) slots of its
    line of the table (B, S); window: over the last of them only. longest: no n is larger; shared: so many slots at the
    beginning are the same in all lines. Returns (B, nh, hs)."""
    if q.is_cuda and HAS_TRITON and not plain:
        from lit_model.kernels.decode import attend_table

        return attend_table(q, k, v, table, n, scale, window, softcap, shared)
    table = table[:, :longest]
    if len(table) == 1:  # no copy where the slots of a sequence lie side by side, as they do without virtual keys
        first, last = int(table[0, 0]), int(table[0, -1])
        k, v = (t[first : last + 1] if last - first == longest - 1 else t[table[0]] for t in (k, v))
    else:
        k, v = (t[table] for t in (k, v))  # (B, S, nkv, hs)
    k, v = (t.view(len(q), longest, *t.shape[-2:]).transpose(1, 2) for t in (k, v))  # (B, nkv, S, hs)
    scores = (q.unflatten(1, (k.shape[1], -1)) * scale) @ k.mT  # (B, nkv, nh / nkv, S)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if len(q) > 1 or window:
        at = torch.arange(longest, device=q.device)
        sees = (at < n[:, None]) & (at >= n[:, None] - (window or longest))  # (B, S)
        scores = scores.masked_fill(~sees[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).flatten(1, 2)


class Kept(nn.Module):
    """What a method adds to the keys of an attention, made once."""

    def __init__(self, delta: nn.Module):
        super().__init__()
        self.delta, self.keys = delta, None

    def forward(self, attn: nn.Module, dtype: torch.dtype) -> GatedKeys:
        if self.keys is None:
            self.keys = self.delta(attn, dtype)
        return self.keys


class Decoder:
    """The state of B sequences, on the device. `step` makes the next token of each."""

    @torch.no_grad()
    def __init__(
        self,
        gpt: GPT,
        prompts: Sequence[Sequence[int]],
        n_new: Sequence[int],
        ways: Sequence[Sampling],
        methods: Sequence[str | None] | None = None,
    ):
        """Computes the prompts, and makes the first token of each sequence.

        Args:
            n_new: most tokens that each sequence gets; it has room for them.
            methods: of each sequence, where several lie side by side; None: what the network has.
        """
        self.gpt, device, B = gpt, gpt.device, len(prompts)
        self.sampling = Sampler(ways, gpt.config.vocab_size, prompts, device)
        self.names = [*dict.fromkeys(methods or [None])]
        self.number = torch.tensor([self.names.index(name) for name in methods or [None] * B], device=device)  # (B,)
        self.slots, self.kept = {}, {}
        if B == 1 and device.type == "cpu":
            self._pack()
        if methods:
            from lit_model.methods.mixed import Choice, mix

            self.choice = Choice(self.names)
            self.slots = mix(gpt.slots, self.choice)
        else:
            for attn in (block.attn for block in gpt.blocks if block.attn.deltas):
                self.kept[attn] = nn.ModuleDict({name: Kept(delta) for name, delta in attn.deltas.items()})
        with self._methods():
            most, front, leaves, rows = max(n_new), [], [], []
            for number, name in enumerate(self.names):
                mine = [i for i in range(B) if not methods or methods[i] == name]
                root = self._front(name, front, rows)
                segments, ids, ends = self._tree([prompts[i] for i in mine], root)
                rows += [(segment, part, number) for segment, part in zip(segments, ids, strict=True)]
                leaves += zip(mine, ends, strict=True)
            leaves = [leaf for _, leaf in sorted(leaves, key=itemgetter(0))]
            n_keys = sum(segment.length for segment, _ in front)
            n_stored = n_keys + sum(segment.length for segment, *_ in rows)
            ends = np.array([leaf.length + self._before(leaf) for leaf in leaves])
            self.cache = gpt.new_cache(n_stored + B * most + 1)
            self.cache.length = int(ends.max()) + most
            for segment, kv in front:  # (L, 2, P, nkv, hs)
                at = slice(segment.keys[0], segment.keys[-1] + 1)
                self.cache.k[:, at], self.cache.v[:, at] = kv.to(self.cache.k.dtype).unbind(1)
            logits = self._prefill(rows, n_keys, leaves)
            table = np.full((B, ends.max() + most), n_stored + B * most)  # the last slot: of what nobody wants
            for i, (leaf, n) in enumerate(zip(leaves, n_new)):
                table[i, : leaf.end] = leaf.keys
                table[i, leaf.end : leaf.end + n] = n_stored + i * most + np.arange(n)
            self.table, self.n = torch.from_numpy(table).to(device), torch.from_numpy(ends).to(device)  # (B, S), (B,)
            self.longest = int(ends.max())
            same = (table[:, : ends.min()] == table[0, : ends.min()]).all(0)
            shared = int(same.cumprod().sum())
            self.shared = shared if B > 1 and shared >= 64 else 0  # fewer are not worth it
            self.made = torch.zeros(LOOK if device.type == "cuda" else 1, B, dtype=torch.long, device=device)
            self.at = torch.zeros((), dtype=torch.long, device=device)  # the line of `made` that is next
            self.token, self.graph = self.sampling(logits, self.n), None

    def _pack(self) -> None:
        """On a CPU: weights of a network below a billion parameters, where a second copy is small."""
        linears = [m for m in self.gpt.modules() if isinstance(m, Linear) and m.weight is not None]
        if sum(m.weight.numel() for m in linears) < 1e9 and torch.backends.mkldnn.is_available():
            for m in linears:
                if m.weight.dtype is torch.bfloat16 and not (m.packed and m.packed.is_of(m.weight)):
                    m.packed = Packed1(m.weight)

    @contextmanager
    def _methods(self) -> Iterator[None]:
        """Meanwhile the methods of the sequences are in their slots, and the keys that they add are made once."""
        before = {attn: attn.deltas for attn in self.kept}
        with self.gpt.mixed(self.slots) if self.slots else nullcontext():
            for attn, deltas in self.kept.items():
                attn.deltas = deltas
            try:
                yield
            finally:
                for attn, deltas in before.items():
                    attn.deltas = deltas

    @staticmethod
    def _before(segment: Segment) -> int:
        """Number of tokens and keys before a segment."""
        return 0 if segment.parent is None else segment.parent.length + Decoder._before(segment.parent)

    def _front(self, name: str | None, front: list, rows: list) -> Segment | None:
        """Adds what a method puts in front of all its sequences: keys to `front`, tokens to `rows`."""
        own = self.gpt.slots[name] if self.slots else vars(self.gpt)["_modules"]
        root = None
        for virtual in own["virtual_keys"].values():
            root = Segment(virtual.length, root)
            lay_out([root], cached=sum(segment.length for segment, _ in front))
            front.append((root, virtual()))
        for virtual in own["virtual_tokens"].values():
            root = Segment(virtual.length, root)
            rows.append((root, virtual(), self.names.index(name)))
        return root

    @staticmethod
    def _tree(
        prompts: Sequence[Sequence[int]], root: Segment | None
    ) -> tuple[list[Segment], list[np.ndarray], list[Segment]]:
        """Segments of prompts behind a root, the ids of each, and the segment that each prompt ends in."""
        order = sorted(range(len(prompts)), key=lambda i: np.array(prompts[i]).tobytes())
        examples = [Example(np.array([*prompts[i], 0], dtype=np.int32), len(prompts[i])) for i in order]
        segments, ids, ends = tree(examples, root)
        return segments, ids, [end for _, end in sorted(zip(order, ends), key=itemgetter(0))]

    def _prefill(self, rows: list, used: int, leaves: list[Segment]) -> Tensor:
        """Stores keys and values of all (segment, its ids or its embeddings, number of its method). Returns the logits
        behind each prompt, (B, V)."""
        gpt, found = self.gpt, {}
        while rows:
            lengths = np.cumsum([segment.length for segment, *_ in rows])
            n = max(1, int(np.searchsorted(lengths, ROW_TOKENS, "right")))
            (segments, parts, numbers), rows, lengths = zip(*rows[:n]), rows[n:], lengths[:n]
            ends = {s: end - 1 for s, end in zip(segments, lengths) if s in leaves}
            packed = lay_out(segments, cached=used, wanted=[*ends.values()]).to(gpt.device)
            ids = [np.zeros(len(part), np.int32) if torch.is_tensor(part) else part for part in parts]
            x = gpt.embed_tokens(torch.from_numpy(np.concatenate(ids)).long().to(gpt.device))
            for part, end in zip(parts, lengths):
                if torch.is_tensor(part):
                    x[end - len(part) : end] = part
            number = torch.tensor(numbers).repeat_interleave(torch.tensor([s.length for s in segments]))
            logits = self._through(x, CachedRow, packed.pos, self.cache, number.to(gpt.device), packed)
            found |= dict(zip(ends, logits))
            used += int(lengths[-1])
        return torch.stack([found[leaf] for leaf in leaves])

    def _through(
        self, x: Tensor, kind: type, pos: Tensor, keys: "KVCache | Decoder", number: Tensor,
        packed: Packed | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (M, V) of a row x (T, C) at the positions pos (T,), whose context in each layer is of a kind.
        number: of the method of each token, (T,)."""
        gpt, c, choice = self.gpt, self.gpt.config, getattr(self, "choice", self)
        choice.of = number
        x = x if gpt.wpe is None else x + gpt.wpe(pos).to(x.dtype)
        ropes = {rope: rope_angles(pos, rope, c.head_size, self.cache.length, x.dtype) for rope in c.ropes}
        for i, (block, layer) in enumerate(zip(gpt.blocks, c.layers, strict=True)):
            window = None if packed and layer.window and packed.max_k <= layer.window else layer.window
            x = block(x, kind(packed, ropes.get(layer.rope), None, window, c.attn_scale, c.attn_softcap, keys, i))
        if packed:
            x, choice.of = x[packed.wanted], number[packed.wanted]
        return gpt.head(gpt.norm_f(x))

    def _step(self) -> None:
        self.made.index_copy_(0, self.at[None], self.token[None])
        self.at.add_(1).remainder_(len(self.made))
        self.slot = self.table.gather(1, self.n[:, None])[:, 0]
        pos = self.n.clone()
        self.n.add_(1)
        logits = self._through(self.gpt.embed_tokens(self.token), DecodeRow, pos, self, self.number)
        self.token.copy_(self.sampling(logits, self.n))
        self.n.clamp_(max=self.table.shape[1] - 1)

    @torch.no_grad()
    def step(self) -> None:
        """Stores the newest token of each sequence in `made`, and makes the next one."""
        self.longest = min(self.longest + 1, self.table.shape[1])
        if self.graph is not None:
            self.graph.replay()
            return
        self._step()
        has_experts = any(layer.experts for layer in self.gpt.config.layers)
        if self.gpt.device.type == "cuda" and not (has_experts and self.cache.k.dtype is not torch.bfloat16):
            # the first step has compiled kernels and filled caches
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()

    def tokens(self, n: int) -> Iterator[list[int]]:
        """The next n tokens of all sequences, one step after the other. Raises ValueError for broken weights."""
        for step in range(n):
            i = step % len(self.made)
            if i == 0:
                self.at.zero_()
                with self._methods():
                    for _ in range(min(len(self.made), n - step)):
                        self.step()
                made, is_finite = self.made.tolist(), self.sampling.is_finite.item()
                if not is_finite:
                    fault = "its weights are broken, or too large for this dtype"
                    raise ValueError(f"the network's logits are not finite: {fault}")
            yield made[i]


class Sampler:
    """Chooses the next tokens on the device, each sequence in its own way, whatever stands beside it."""

    def __init__(self, ways: Sequence[Sampling], n: int, prompts: Sequence[Sequence[int]], device: torch.device):
        draws = [way.seed is None and way.temperature >= 1e-5 for way in ways]  # the likeliest token takes no numbers
        seeds = [torch.randint(2**62, ()).item() if draw else way.seed or 0 for draw, way in zip(draws, ways)]
        self.seed = torch.tensor(seeds, device=device)[:, None]  # (B, 1), as all of these
        column = lambda values: torch.tensor(values, dtype=torch.float32, device=device)[:, None]  # noqa: E731
        self.temperature = column([way.temperature for way in ways])
        self.top_k = column([way.top_k or n for way in ways])
        self.top_p, self.min_p = column([way.top_p or 1.0 for way in ways]), column([way.min_p or 0.0 for way in ways])
        self.penalty = column([way.repetition_penalty for way in ways])
        self.is_greedy = all(way.temperature < 1e-5 for way in ways)  # logits divided by less are no numbers
        self.is_filtered = any(way.top_p or way.min_p for way in ways) or len({way.top_k for way in ways}) > 1
        self.most = min(n, max(way.top_k for way in ways)) if all(way.top_k for way in ways) else None
        self.seen = None
        if any(way.repetition_penalty != 1 for way in ways):
            self.seen = torch.zeros(len(ways), n, dtype=torch.bool, device=device)
            for i, ids in enumerate(prompts):
                self.seen[i, list(ids)] = True
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, logits: Tensor, n: Tensor) -> Tensor:
        """Tokens (B,) from logits (B, V), for sequences of n (B,) tokens."""
        logits = logits.float()
        self.is_finite &= logits.isfinite().all()
        if self.seen is not None:
            logits = torch.where(
                self.seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits
            )
        token = logits.argmax(-1)
        if not self.is_greedy:
            x, ids = logits / self.temperature.clamp(min=1e-5), torch.arange(logits.shape[-1], device=logits.device)
            if self.most is not None:
                x, ids = x.topk(self.most, sorted=self.is_filtered)
            elif self.is_filtered:
                x, ids = x.sort(-1, descending=True)
            if self.is_filtered:
                x = self._filtered(x)
            at = (x + gumbel(self.seed, n[:, None], ids)).argmax(-1, keepdim=True)
            sampled = ids.expand_as(x).gather(1, at)[:, 0]
            token = torch.where(self.temperature[:, 0] < 1e-5, token, sampled)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        return token

    def _filtered(self, x: Tensor) -> Tensor:
        """Minus infinity for what top_k, then top_p and min_p leave out of values in descending order."""
        rank = torch.arange(x.shape[-1], device=x.device)
        p = x.masked_fill(rank >= self.top_k, -torch.inf).softmax(-1)
        return x.masked_fill((p.cumsum(-1) - p >= self.top_p) | (p < self.min_p * p[:, :1]) | (p == 0), -torch.inf)


def gumbel(seed: Tensor, n: Tensor, ids: Tensor) -> Tensor:
    """Noise (B, size) whose argmax with logits of the tokens `ids` added is a sample. It depends on seed and n, (B, 1),
    the token, and on nothing else: numbers of splitmix64 (https://doi.org/10.1145/2714064.2660195)."""
    x = (seed * -7046029254386353131 + n * -4658895280553007687 + ids) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return -(-(((x >> 40) & 0xFFFFFF) + 0.5).mul(2.0**-24).log()).log()
