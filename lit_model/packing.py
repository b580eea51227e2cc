"""Packed rows: examples of any length lie end to end in one flat row, without padding, and share how they begin.

A row is a list of segments. A segment may name a parent: its tokens see the tokens of all its ancestors, and its own
causally; positions continue from the parent. So what many examples begin with (a template's preamble, a soft prompt)
is computed once and seen by each of them, and the result is exactly that of each example alone:

    segment 0   "Below is an instruction ..."                    sees itself
    segment 1   "Name three fruits. ### Response: Apple ..."     sees 0 and itself
    segment 2   "Write a haiku. ### Response: Old pond ..."      sees 0 and itself

Attention gathers the keys of every segment once, `keys[kv_index]`, and runs over pairs (queries of a segment, keys of
a segment). Where the keys come from does not matter: from this row, from the KV cache (a decoding step is a row of
one-token segments), or from virtual keys in front of them (prefix tuning). Dropout would make the copies of a shared
segment differ in training, so rows are then packed with share=False.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None

# torch 2.13 takes fewer key than query heads and wants to be told, 2.11 has no such option
_VARLEN_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
MIN_SHARED = 16  # a common beginning shorter than this is cheaper computed twice than kept as a segment of its own


@dataclass
class Packed:
    """Which token of a row sees which. N segments, T rows of queries, S rows of gathered keys, M wanted rows."""

    pos: Tensor  # (T,) position of each row in its own example
    segments: list[tuple[int, int]]  # N pairs: number of queries, number of keys
    cu_q: Tensor  # (N + 1,) int32, where each segment's queries begin
    cu_k: Tensor  # (N + 1,) int32, where each segment's gathered keys begin
    max_q: int  # most queries of a segment
    max_k: int  # most keys of a segment
    kv_index: Tensor | None  # (S,) rows of the source of keys; None: the row's own, in order
    wanted: Tensor | None = None  # (M,) rows whose logits or loss are wanted; None: all
    targets: Tensor | None = None  # (M,) the token that each wanted row shall predict
    slots: Tensor | None = None  # (T,) where the KV cache stores this row's keys and values
    has_prompt: bool = False  # the row begins with the model's virtual tokens, which `idx` does not contain

    def to(self, device: torch.device) -> "Packed":
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


class Segment:
    """A run of tokens, and the segment that it continues. `lay_out` fills in the rest."""

    def __init__(self, length: int, parent: "Segment | None" = None):
        self.length = length
        self.parent = parent
        self.keys: Tensor  # rows of the source of keys that its last token sees
        self.end: int  # position after its last token


def lay_out(segments: Sequence[Segment], prefix_length: int = 0, cached: int | None = None) -> Packed:
    """Lays segments end to end. A parent stands before its children, in this row or (KV cache) in an earlier one.

    Args:
        prefix_length: number of virtual keys in front of all others; every example sees them, and starts after them.
        cached: number of slots of the KV cache in use; None: there is no cache.
    """
    keys, pos, first = [], [], prefix_length + (cached or 0)
    row = first
    for s in segments:
        seen, start = (s.parent.keys, s.parent.end) if s.parent else (torch.arange(prefix_length), prefix_length)
        s.keys = torch.cat((seen, torch.arange(row, row + s.length)))
        s.end = start + s.length
        keys.append(s.keys)
        pos.append(torch.arange(start, s.end))
        row += s.length
    counts = [(s.length, len(s.keys)) for s in segments]
    plain = cached is None and not prefix_length and not any(s.parent for s in segments)
    return Packed(
        pos=torch.cat(pos),
        segments=counts,
        cu_q=torch.tensor([0, *accumulate(q for q, _ in counts)], dtype=torch.int32),
        cu_k=torch.tensor([0, *accumulate(k for _, k in counts)], dtype=torch.int32),
        max_q=max(q for q, _ in counts),
        max_k=max(k for _, k in counts),
        kv_index=None if plain else torch.cat(keys),
        slots=None if cached is None else torch.arange(first, row) - prefix_length,
    )


def equal_examples(n: int, length: int, prompt_length: int = 0, prefix_length: int = 0) -> Packed:
    """`n` examples of `length` tokens each: what a (B, T) batch is as a packed row. Every row's logits are wanted."""
    root = Segment(prompt_length) if prompt_length else None
    packed = lay_out([root] * bool(root) + [Segment(length, root) for _ in range(n)], prefix_length)
    if root is None:
        return packed
    return replace(packed, has_prompt=True, wanted=torch.arange(prompt_length, len(packed.pos)))


# ---------------------------------------------------------------------------------------------------- building rows


@dataclass
class Example:
    """One training example: `ids` (n,) int32, of which those from `first_target` on are to be predicted."""

    ids: np.ndarray
    first_target: int

    @property
    def n_targets(self) -> int:
        return len(self.ids) - self.first_target


def pack(
    examples: Sequence[Example], row_tokens: int, prompt_length: int = 0, prefix_length: int = 0, share: bool = True
) -> list[tuple[Tensor, Packed]]:
    """Packs examples into rows of about `row_tokens` tokens (one that is longer gets a row of its own).

    Returns a list of (idx, packed). The sum of the losses of the rows is that of the examples one by one; the order in
    which examples lie in the rows is not theirs: those that begin alike lie together, so that they can share.
    """
    examples = sorted(examples, key=lambda e: e.ids.astype(">i4").tobytes()) if share else examples
    return [_pack_row(members, prompt_length, prefix_length, share) for members in _fill(examples, row_tokens, share)]


def _fill(examples: Sequence[Example], row_tokens: int, share: bool) -> Iterator[list[Example]]:
    members, used = [], 0
    for e in examples:
        shared = _common(members[-1], e) if share and members else 0
        cost = len(e.ids) - (shared if shared >= MIN_SHARED else 0)
        if members and used + cost > row_tokens:
            yield members
            members, used, cost = [], 0, len(e.ids)
        members.append(e)
        used += cost
    if members:
        yield members


def _common(a: Example, b: Example) -> int:
    """Number of tokens at the beginning that two examples can share. The token before an example's first target
    predicts it, so it has to be the example's own."""
    n = min(a.first_target, b.first_target) - 1
    differs = np.flatnonzero(a.ids[:n] != b.ids[:n])
    return int(differs[0]) if len(differs) else max(n, 0)


def _pack_row(members: list[Example], prompt_length: int, prefix_length: int, share: bool) -> tuple[Tensor, Packed]:
    root = Segment(prompt_length) if prompt_length else None
    segments, pieces = [root] * bool(root), []  # pieces: the ids of each segment, without the virtual root
    wanted, targets, row = [], [], prompt_length

    def add(ids: np.ndarray, parent: Segment | None) -> Segment:
        nonlocal row
        segments.append(Segment(len(ids), parent))
        pieces.append(ids)
        row += len(ids)
        return segments[-1]

    def grow(group: list[Example], start: int, parent: Segment | None) -> None:
        """Adds examples that agree up to `start`, where the segments so far end."""
        common = [_common(a, b) for a, b in zip(group, group[1:])] if share else [0] * (len(group) - 1)
        cuts = [0, *(i + 1 for i, n in enumerate(common) if n < start + MIN_SHARED), len(group)]
        for a, b in zip(cuts, cuts[1:]):
            if b - a > 1:
                end = min(common[a : b - 1])
                grow(group[a:b], end, add(group[a].ids[start:end], parent))
            else:
                e = group[a]
                wanted.append(np.arange(row + e.first_target - 1 - start, row + len(e.ids) - 1 - start))
                targets.append(e.ids[e.first_target :])
                add(e.ids[start:], parent)

    grow(members, 0, root)
    packed = replace(
        lay_out(segments, prefix_length),
        wanted=torch.from_numpy(np.concatenate(wanted)),
        targets=torch.from_numpy(np.concatenate(targets)).long(),
        has_prompt=root is not None,
    )
    return torch.from_numpy(np.concatenate(pieces)).long(), packed


# ------------------------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Softmax attention of every segment's queries over the keys that it may see.

    Args:
        q: (T, nh, hs).  k, v: (rows, nkv, hs), the source of keys that `packed.kv_index` points into.
    Returns: (T, nh, hs).
    """
    if packed.kv_index is not None:
        k, v = k.index_select(0, packed.kv_index), v.index_select(0, packed.kv_index)  # (S, nkv, hs)
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and half and varlen_attn is not None and torch.cuda.get_device_capability(q.device) >= (8, 0):
        if not _VARLEN_GQA:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        options = {"enable_gqa": True} if _VARLEN_GQA else {}
        options["window_size"] = (-1, 0)  # causal, aligned at the last query and the last key
        return varlen_attn(q, k, v, packed.cu_q, packed.cu_k, packed.max_q, packed.max_k, **options)
    return _attend_each(q, k, v, packed.segments)


@torch.compiler.disable  # every row has other segments: it would be compiled anew for each
def _attend_each(q: Tensor, k: Tensor, v: Tensor, segments: list[tuple[int, int]]) -> Tensor:
    n_q, n_k = zip(*segments, strict=True)
    return torch.cat([_attend_one(*qkv) for qkv in zip(q.split(n_q), k.split(n_k), v.split(n_k), strict=True)])


def _attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One segment: (lq, nh, hs) over (lk, nkv, hs). The last query sees all keys, the one before it one less, ..."""
    lq, lk = len(q), len(k)
    # in 16 bit on the CPU the backward pass of torch's fused attention takes 4 times as long as these products
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and lk <= 1024:
        mask = torch.full((lq, lk), -torch.inf, dtype=q.dtype).triu(lk - lq + 1)
        return see_all(q, k, v, mask)
    mask = None if lq in (1, lk) else torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, n, l, hs)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=lq == lk > 1, enable_gqa=True)
    return y[0].transpose(0, 1)


def see_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention written out: queries (T, nh, hs) over all keys (S, nkv, hs), with `mask` (T, S) added."""
    (T, nh, hs), (S, nkv, _) = q.shape, k.shape
    q = q.transpose(0, 1).reshape(nkv, -1, hs)  # the heads that share a key lie together
    scores = (q @ (k * hs**-0.5).permute(1, 2, 0)).view(nh, T, S)
    scores = scores if mask is None else scores + mask
    y = scores.softmax(-1).view(nkv, -1, S) @ v.transpose(0, 1)  # (nkv, nh / nkv * T, hs)
    return y.view(nh, T, hs).transpose(0, 1)


class KVCache:
    """Keys and values of all layers, in flat slots; `Packed.kv_index` knows which example a slot belongs to."""

    def __init__(
        self, n_layer: int, slots: int, n_kv_head: int, head_size: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.k = torch.zeros(n_layer, slots, n_kv_head, head_size, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def append(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (T, nkv, hs) keys and values in `slots` (T,); returns all slots of this layer, (slots, nkv, hs)."""
        self.k[layer].index_copy_(0, slots, k)
        self.v[layer].index_copy_(0, slots, v)
        return self.k[layer], self.v[layer]
