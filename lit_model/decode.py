"""Decoding: many sequences that grow by one token a step, over one pool of keys and values.

The pool's slots are flat. A table says which slot holds the key of each position of each sequence, so what sequences
begin with (a system prompt, examples, virtual keys and tokens of a method) is computed once and stored once. A step is
a row of one token for each sequence. Everything that it needs lies on the device, the sampled tokens and the random
numbers included, so on a GPU a step is one CUDA graph; the host looks at the tokens every few steps. Sequences come and
go meanwhile (engine.py does that for a server), and leave their slots to others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_model.attention import HAS_TRITON, GatedKeys, PackedRow, plain_attention
from lit_model.kernels.cpu import Packed1
from lit_model.methods.mixed import Choice, mix
from lit_model.methods.side_by_side import filled, n_front, places_in, slots_of
from lit_model.model import GPT, Linear
from lit_model.packing import Example, Packed, Segment, lay_out, tree
from lit_model.sampling import LOOK, Sampler, Sampling

MOST_GRAPHS = 32  # that are kept: one for each number of sequences and each way in which they are sampled
ROW_TOKENS = 16384  # about the most tokens of prompts that go through the network at a time


@dataclass(eq=False)
class Request:
    """A prompt, and how it goes on."""

    ids: Sequence[int]
    n_new: int  # most new tokens
    way: Sampling
    method: str | None = None  # of those that lie side by side


@dataclass(kw_only=True)
class CachedRow(PackedRow):
    """Prompts: a row that may continue earlier ones; each token is stored in its slot."""

    state: "Decoder"
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prompts: Sequence[GatedKeys]) -> Tensor:
        q, k, v = self.store(q, k, v)
        if self.packed.blocks is not None:  # it sees its own keys alone
            k, v = k[self.state.slot], v[self.state.slot]
        return self.over(q, k, v, prompts)

    def store(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores k, rotated, and v (T, nkv, hs) in the slots of their tokens. Returns q (T, nh, hs), rotated, and the
        keys and values in all slots of this layer, (slots, nkv, hs)."""
        (keys, values), slot, rope = self.state.kv[self.layer], self.state.slot, self.rope
        if q.is_cuda and HAS_TRITON and rope is not None and rope.turns_all_of(q) and q.shape[-1].bit_count() == 1:
            from lit_model.kernels.decode import rotate_and_store

            return rotate_and_store(q, k, v, rope, slot, keys, values), keys, values
        q, k = self.rotated(q, k)
        keys.index_copy_(0, slot, k)
        values.index_copy_(0, slot, v)
        return q, keys, values


class DecodeRow(CachedRow):
    """One token of each of B sequences: it is stored in its slot, and sees those of its line of the table."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prompts: Sequence[GatedKeys]) -> Tensor:
        """q (B, nh, hs), k and v (B, nkv, hs) without positions. Returns (B, nh, hs)."""
        state = self.state
        q, k, v = self.store(q, k, v)  # (slots, nkv, hs)
        how = self.scale, self.window, self.softcap, state.shared
        y = decode_attention(q, k, v, state.table[: len(q)], state.n[: len(q)], *how)
        for pk, pv, gate in prompts:
            y = y + gate.to(y.dtype)[..., None] * plain_attention(q, pk, pv, self.scale, self.softcap)
        return y


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, n: Tensor, scale: float, window: int | None,
    softcap: float | None, shared: int = 0, plain: bool = False,
) -> Tensor:  # fmt: skip
    """Softmax attention of one query for each sequence, q (B, nh, hs), over the keys in the first n (B,) slots of its
    line of the table (B, S); window: over the last of them only. shared: so many slots at the beginning are the same in
    all lines. Returns (B, nh, hs)."""
    if q.is_cuda and HAS_TRITON and not plain:
        from lit_model.kernels.decode import attend_table

        return attend_table(q, k, v, table, n, scale, window, softcap, shared)
    longest = int(n.max())
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


class Decoder:
    """The state of sequences, on the device: `admit` computes their prompts, `steps` makes the next tokens of each, and
    `release` takes one out. They lie in the first places."""

    @torch.no_grad()
    def __init__(self, gpt: GPT, places: int, slots: int, length: int, names: Sequence[str | None] | None = None):
        """Computes what methods put in front of all their sequences.

        Args:
            places: most sequences at a time. slots: tokens that it has room for, of all sequences.
            length: of the longest one, with what its method puts in front.
            names: of methods side by side that sequences may have; None: what the network has.
        """
        self.gpt, self.device, self.names = gpt, gpt.device, [*(names or [None])]
        self.length, self.size, self.graphs = length, 0, {}
        self.lines: list[np.ndarray] = []  # the slots of each sequence
        self.choice, self.methods = Choice(self.names), slots_of(gpt, names)
        self.fillings = places_in(gpt, mix(self.methods, self.choice))
        if places == 1 and self.device.type == "cpu":
            self._pack()
        with filled(self.fillings):
            front, rows = [], []
            self.roots = [self._front(number, front, rows) for number in range(len(self.names))]
            n_keys = sum(segment.length for segment, _ in front)
            self.front = np.arange(n_keys + sum(segment.length for segment, *_ in rows))
            self.users = np.zeros(len(self.front) + slots, dtype=int)  # sequences that see each slot
            self.users[self.front] = 1
            c, dtype = gpt.config, gpt.dtype or gpt.wte.weight.dtype
            sizes = len(self.users) + 1, c.n_kv_head, c.head_size  # the last slot: of what nobody wants
            self.kv = torch.zeros(c.n_layer, 2, *sizes, dtype=dtype, device=self.device)
            for segment, kv in front:  # (L, 2, P, nkv, hs)
                self.kv[:, :, segment.keys] = kv.to(dtype)
            self._prefill(rows, n_keys, self.front, [])
        counts = torch.zeros(3, places, dtype=torch.long, device=self.device)
        self.n, self.number, self.token = counts  # of tokens and keys so far; of the method; the newest token
        self.table = torch.full((places, length), len(self.users), device=self.device)  # the slot of each position
        self.sampler = Sampler(places, gpt.config.vocab_size, self.device)
        look = LOOK if self.device.type == "cuda" else 1
        self.made = torch.zeros(look, places, dtype=torch.long, device=self.device)
        self.at = torch.zeros((), dtype=torch.long, device=self.device)  # the line of `made` that is next

    @classmethod
    def of(cls, gpt: GPT, requests: Sequence[Request], names: Sequence[str | None] | None = None) -> "Decoder":
        """One with these sequences, and room for no more."""
        slots = slots_of(gpt, names)
        length = max(n_front(slots[r.method]) + len(r.ids) + r.n_new for r in requests)
        groups = [[r.ids for r in requests if r.method == name] for name in {r.method for r in requests}]
        n_stored = sum(segment.length for group in groups for segment in cls._tree(group, None)[0])
        decoder = cls(gpt, len(requests), n_stored + sum(r.n_new for r in requests), length, names)
        decoder.admit(requests)
        return decoder

    @torch.no_grad()
    def admit(self, requests: Sequence[Request]) -> None:
        """Computes prompts, and makes the first token of each; there must be places and slots."""
        numbers = [self.names.index(r.method) for r in requests]
        leaves, rows = {}, []
        for number in dict.fromkeys(numbers):
            mine = [i for i, other in enumerate(numbers) if other == number]
            segments, ids, ends = self._tree([requests[i].ids for i in mine], self.roots[number])
            rows += [(segment, part, number) for segment, part in zip(segments, ids, strict=True)]
            leaves |= dict(zip(mine, ends, strict=True))
        leaves = [leaves[i] for i in range(len(requests))]
        free, n_stored = np.flatnonzero(self.users == 0), sum(segment.length for segment, *_ in rows)
        slots = np.concatenate((self.front, free[:n_stored]))
        own = np.split(free[n_stored:], np.cumsum([r.n_new for r in requests]))  # for what follows each prompt
        with filled(self.fillings):
            logits = torch.stack(self._prefill(rows, len(self.front), slots, leaves))
        first = self.size
        for i, (leaf, more) in enumerate(zip(leaves, own), first):
            line = np.concatenate((slots[leaf.keys], more))
            self.users[line] += 1
            self.lines.append(line)
            self.table[i, : len(line)] = torch.from_numpy(line)
            self.table[i, len(line) :] = len(self.users)
        self.size += len(requests)
        mine = slice(first, self.size)
        self.n[mine] = torch.tensor([len(line) - r.n_new for line, r in zip(self.lines[first:], requests)])
        self.number[mine] = torch.tensor(numbers)
        self.sampler.put(requests)
        self.token[mine] = self.sampler(logits, self.n[mine], mine)
        shortest = min(map(len, self.lines))  # what follows a prompt is in slots of its own
        lines = np.stack([line[:shortest] for line in self.lines])
        shared = int((lines == lines[0]).all(0).cumprod().sum())
        self.shared = shared if self.size > 1 and shared >= 64 else 0  # fewer are not worth it

    def release(self, place: int) -> None:
        """Takes out the sequence in a place; the last one moves there."""
        self.size -= 1
        self.users[self.lines[place]] -= 1
        sampler = self.sampler
        for values in (self.lines, sampler.ways):
            values[place] = values[-1]
            values.pop()
        of_places = self.table, self.n, self.number, self.token
        for t in (*of_places, sampler.seed, sampler.numbers, sampler.seen, sampler.found):
            t[place] = t[self.size]
        self.table[self.size], self.n[self.size] = len(self.users), 0
        sampler.look()

    def _pack(self) -> None:
        """On a CPU: weights of a network below a billion parameters, where a second copy is small."""
        linears = [m for m in self.gpt.modules() if isinstance(m, Linear) and m.weight is not None]
        if sum(m.weight.numel() for m in linears) < 1e9 and torch.backends.mkldnn.is_available():
            for m in linears:
                if m.weight.dtype is torch.bfloat16 and not (m.packed and m.packed.is_of(m.weight)):
                    m.packed = Packed1(m.weight)

    def _front(self, number: int, front: list, rows: list) -> Segment | None:
        """Adds what a method puts in front of all its sequences: keys to `front`, tokens to `rows`."""
        own, root = self.methods[self.names[number]], None
        for virtual in own["virtual_keys"].values():
            root = Segment(virtual.length, root)
            lay_out([root], cached=sum(segment.length for segment, _ in front))
            front.append((root, virtual()))
        for virtual in own["virtual_tokens"].values():
            root = Segment(virtual.length, root)
            rows.append((root, virtual(), number))
        return root

    @staticmethod
    def _tree(
        prompts: Sequence[Sequence[int]], root: Segment | None
    ) -> tuple[list[Segment], list[np.ndarray], list[Segment]]:
        """Segments of prompts behind a root, the ids of each, and the segment that each prompt ends in."""
        order = sorted(range(len(prompts)), key=lambda i: np.array(prompts[i]).tobytes())
        examples = [Example(np.array([*prompts[i], 0], dtype=np.int32), len(prompts[i])) for i in order]
        segments, ids, ends = tree(examples, root)
        return segments, ids, [ends[i] for i in np.argsort(order)]

    def _prefill(self, rows: list, used: int, slots: np.ndarray, leaves: list[Segment]) -> list[Tensor]:
        """Stores keys and values of all (segment, its ids or its embeddings, number of its method), the i-th key in
        slots[i], the first `used` of which are there. Returns the logits behind each leaf, (V,)."""
        gpt, found, slots = self.gpt, {}, torch.from_numpy(slots).to(self.device)
        while rows:
            lengths = np.cumsum([segment.length for segment, *_ in rows])
            n = max(1, int(np.searchsorted(lengths, ROW_TOKENS, "right")))
            (segments, parts, numbers), rows, lengths = zip(*rows[:n]), rows[n:], lengths[:n]
            ends = {s: end - 1 for s, end in zip(segments, lengths) if s in leaves}
            wanted, windows = np.array([*ends.values()], dtype=int), gpt.config.windows
            packed = lay_out(segments, cached=used, wanted=wanted, windows=windows).to(gpt.device)
            self.slot = slots[used : used + len(packed.pos)]
            if packed.blocks is None:  # it sees keys of other rows, too
                packed.kv_index = slots[packed.kv_index]
            ids = [np.zeros(len(part), np.int32) if torch.is_tensor(part) else part for part in parts]
            x = gpt.embed_tokens(torch.from_numpy(np.concatenate(ids)).long().to(gpt.device))
            for part, end in zip(parts, lengths):
                if torch.is_tensor(part):
                    x[end - len(part) : end] = part
            number = torch.tensor(numbers).repeat_interleave(torch.tensor([s.length for s in segments]))
            logits = self._through(x, CachedRow, packed.pos, number.to(gpt.device), packed)
            found |= dict(zip(ends, logits, strict=True))
            used += int(lengths[-1])
        return [found[leaf] for leaf in leaves]

    def _through(
        self, x: Tensor, kind: type[CachedRow], pos: Tensor, number: Tensor, packed: Packed | None = None
    ) -> Tensor:
        """Logits (M, V) of a row x (T, C) at the positions pos (T,), whose context in each layer is of a kind.
        number: of the method of each token, (T,)."""
        gpt, choice = self.gpt, self.choice
        choice.of = number
        x = x if gpt.wpe is None else x + gpt.wpe(pos).to(x.dtype)
        contexts = gpt.contexts(packed, pos, self.length, x.dtype)
        for i, (block, row) in enumerate(zip(gpt.blocks, contexts, strict=True)):
            x = block(x, kind(**vars(row), state=self, layer=i))
        if packed:
            x, choice.of = x[packed.wanted], number[packed.wanted]
        return gpt.head(gpt.norm_f(x))

    def _step(self, width: int) -> None:
        """For the first places: as many as were compiled for; what lies in those without a sequence is not wanted."""
        table, n, token = self.table[:width], self.n[:width], self.token[:width]
        self.made[:, :width].index_copy_(0, self.at[None], token[None])
        if self.sampler.kind.logprobs is not None:
            self.sampler.made[:, :width].index_copy_(0, self.at[None], self.sampler.found[None, :width])
        self.at.add_(1).remainder_(len(self.made))
        self.slot = table.gather(1, n[:, None])[:, 0]
        pos = n.clone()
        n.add_(1)
        logits = self._through(self.gpt.embed_tokens(token), DecodeRow, pos, self.number[:width])
        token.copy_(self.sampler(logits, n, slice(width)))
        n.clamp_(max=self.length - 1)

    @torch.no_grad()
    def step(self) -> None:
        """Stores the newest token of each sequence in `made`, and makes the next one."""
        is_cuda, config = self.device.type == "cuda", self.gpt.config
        width = min(len(self.n), 1 << (self.size - 1).bit_length()) if is_cuda else self.size
        key = width, self.shared, self.sampler.kind
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self._step(width)
        has_experts = any(layer.experts for layer in config.layers)
        if is_cuda and HAS_TRITON and not (has_experts and self.kv.dtype is not torch.bfloat16):
            # the first step has compiled kernels and filled caches
            if len(self.graphs) == MOST_GRAPHS:
                self.graphs.clear()
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key]):
                self._step(width)

    def steps(self, n: int) -> list[list[int]]:
        """The next n tokens of all sequences, at most LOOK on a GPU and one on a CPU, a list a step. Raises ValueError
        for broken weights."""
        self.at.zero_()
        self.n[self.size :] = 0  # places without a sequence see next to nothing
        with filled(self.fillings):
            for _ in range(n := min(n, len(self.made))):
                self.step()
        made, is_finite = self.made[:n, : self.size].tolist(), self.sampler.is_finite.item()
        if not is_finite:
            fault = "its weights are broken, or too large for this dtype"
            raise ValueError(f"the network's logits are not finite: {fault}")
        return made

    def tokens(self, n: int) -> Iterator[list[int]]:
        """The next n tokens of all sequences, one step after the other. Raises ValueError for broken weights."""
        while n > 0:
            made = self.steps(n)
            n -= len(made)
            yield from made
