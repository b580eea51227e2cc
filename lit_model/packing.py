"""Packed rows: examples of any length lie end to end in one flat row, without padding, and share how they begin.

A row is a list of segments. A segment may name a parent: its tokens see the tokens of all its ancestors, and its own
causally; positions continue from the parent. So what many examples begin with (a template's preamble, a soft prompt)
is computed once and seen by each of them, and the result is exactly that of each example alone:

    segment 0   "Below is an instruction ..."                    sees itself
    segment 1   "Name three fruits. ### Response: Apple ..."     sees 0 and itself
    segment 2   "Write a haiku. ### Response: Old pond ..."      sees 0 and itself

In each layer all keys lie in one tensor, the source: first the virtual keys, if a method has any (prefix tuning), then
the keys of this row's tokens or, in generation, all slots of the KV cache. `kv_index` lists for one segment after the
other which of them it sees; attention gathers these and runs over pairs (queries of a segment, keys of a segment). A
decoding step is a row of one-token segments whose other keys come from the cache.
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

# from torch 2.13 on it takes fewer key than query heads, and needs enable_gqa=True for that
_VARLEN_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
MIN_SHARED = 16  # a common beginning shorter than this is cheaper computed twice than kept as a segment of its own


@dataclass
class Packed:
    """Which token of a row sees which. N segments, T tokens, S gathered keys, M tokens whose output is wanted."""

    pos: Tensor  # (T,) position of each token in its own example
    lengths: list[tuple[int, int]]  # of each segment: number of queries, number of keys that it sees
    cu_q: Tensor  # (N + 1,) int32, cumulative: where each segment's queries begin
    cu_k: Tensor  # (N + 1,) int32, cumulative: where each segment's gathered keys begin
    max_q: int  # most queries of a segment
    max_k: int  # most keys of a segment
    kv_index: Tensor | None  # (S,) indices into the source of keys; None: this row's own keys, in order
    wanted: Tensor | None = None  # (M,) tokens whose logits or loss are wanted; None: all
    targets: Tensor | None = None  # (M,) the token that each of them must predict
    slots: Tensor | None = None  # (T,) where the KV cache stores the keys of this row
    n_virtual_keys: int = 0  # at the front of the source of keys
    has_virtual_tokens: bool = False  # the row begins with the network's virtual tokens, which `idx` does not contain

    def to(self, device: torch.device) -> "Packed":
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


class Segment:
    """A run of tokens, and the segment that it continues. `lay_out` fills in the rest."""

    def __init__(self, length: int, parent: "Segment | None" = None):
        self.length = length
        self.parent = parent
        self.keys: Tensor  # indices into the source of keys: all that its last token sees
        self.end: int  # position after its last token


def lay_out(segments: Sequence[Segment], n_virtual_keys: int = 0, cached: int | None = None) -> Packed:
    """Lays segments end to end. A parent stands before its children, in this row or (KV cache) in an earlier one.

    Args:
        n_virtual_keys: every example sees so many virtual keys, and its positions start after them.
        cached: number of slots of the KV cache in use; None: there is no cache.
    """
    keys, pos, first = [], [], n_virtual_keys + (cached or 0)
    offset = first
    for s in segments:
        seen, start = (s.parent.keys, s.parent.end) if s.parent else (torch.arange(n_virtual_keys), n_virtual_keys)
        s.keys = torch.cat((seen, torch.arange(offset, offset + s.length)))
        s.end = start + s.length
        keys.append(s.keys)
        pos.append(torch.arange(start, s.end))
        offset += s.length
    lengths = [(s.length, len(s.keys)) for s in segments]
    own_keys_only = cached is None and not n_virtual_keys and not any(s.parent for s in segments)
    return Packed(
        pos=torch.cat(pos),
        lengths=lengths,
        cu_q=torch.tensor([0, *accumulate(q for q, _ in lengths)], dtype=torch.int32),
        cu_k=torch.tensor([0, *accumulate(k for _, k in lengths)], dtype=torch.int32),
        max_q=max(q for q, _ in lengths),
        max_k=max(k for _, k in lengths),
        kv_index=None if own_keys_only else torch.cat(keys),
        slots=None if cached is None else torch.arange(first, offset) - n_virtual_keys,
        n_virtual_keys=n_virtual_keys,
    )


def equal_examples(n: int, length: int, n_virtual_tokens: int, n_virtual_keys: int) -> Packed:
    """`n` examples of `length` tokens each: what a (B, T) batch is as a packed row. All real tokens are wanted."""
    root = Segment(n_virtual_tokens) if n_virtual_tokens else None
    segments = [Segment(length, root) for _ in range(n)]
    if root is None:
        return lay_out(segments, n_virtual_keys)
    packed = lay_out([root, *segments], n_virtual_keys)
    return replace(packed, has_virtual_tokens=True, wanted=torch.arange(n_virtual_tokens, len(packed.pos)))


# ---------------------------------------------------------------------------------------------------- building rows


@dataclass
class Example:
    """One training example: `ids` (n,) int32, of which those from `first_target` on are to be predicted.

    first_target is at least 1, since nothing stands before the first token to predict it.
    """

    ids: np.ndarray
    first_target: int

    @property
    def n_targets(self) -> int:
        return len(self.ids) - self.first_target


def pack(
    examples: Sequence[Example],
    row_tokens: int,
    n_virtual_tokens: int = 0,
    n_virtual_keys: int = 0,
    share: bool = True,
) -> list[tuple[Tensor, Packed]]:
    """Packs examples into rows of about `row_tokens` tokens (one that is longer gets a row of its own).

    Args:
        share: compute a common beginning of examples once. Not with dropout, which would differ between its copies.
    Returns:
        A list of (idx, packed). The losses of the rows sum to those of the examples one by one. Examples that begin
        alike lie together, so their order is not kept.
    """
    if share:  # any order will do in which examples with the same beginning are neighbours
        examples = sorted(examples, key=lambda e: e.ids.tobytes())
    groups = _fill(examples, row_tokens, share)
    return [_pack_row(group, n_virtual_tokens, n_virtual_keys, share) for group in groups]


def _fill(examples: Sequence[Example], row_tokens: int, share: bool) -> Iterator[list[Example]]:
    """Cuts a list of examples into those of one row each."""
    group, used = [], 0
    for e in examples:
        shared = _common(group[-1], e) if share and group else 0
        cost = len(e.ids) - (shared if shared >= MIN_SHARED else 0)
        if group and used + cost > row_tokens:
            yield group
            group, used, cost = [], 0, len(e.ids)
        group.append(e)
        used += cost
    if group:
        yield group


def _common(a: Example, b: Example) -> int:
    """Number of tokens at the beginning that two examples can share. The token before an example's first target
    predicts it, so it has to be the example's own."""
    n = min(a.first_target, b.first_target) - 1
    differs = np.flatnonzero(a.ids[:n] != b.ids[:n])
    return int(differs[0]) if len(differs) else n


def _pack_row(
    examples: list[Example], n_virtual_tokens: int, n_virtual_keys: int, share: bool
) -> tuple[Tensor, Packed]:
    root = Segment(n_virtual_tokens) if n_virtual_tokens else None
    segments = [root] if root else []
    ids, wanted, targets = [], [], []
    offset = n_virtual_tokens  # of the next segment in the row

    def add(tokens: np.ndarray, parent: Segment | None) -> Segment:
        nonlocal offset
        segments.append(Segment(len(tokens), parent))
        ids.append(tokens)
        offset += len(tokens)
        return segments[-1]

    def grow(group: list[Example], start: int, parent: Segment | None) -> None:
        """Lays out `group`, whose first `start` tokens are already there as `parent`. Neighbours with MIN_SHARED more
        tokens in common stay together: what they all share becomes a segment, the rest its children."""
        common = [_common(a, b) for a, b in zip(group, group[1:])] if share else [0] * (len(group) - 1)
        cuts = [0, *(i for i, n in enumerate(common, 1) if n < start + MIN_SHARED), len(group)]
        for low, high in zip(cuts, cuts[1:]):
            e = group[low]
            if high - low > 1:
                end = min(common[low : high - 1])
                grow(group[low:high], end, add(e.ids[start:end], parent))
            else:
                zero = offset - start  # where the example's first token would stand if it were all its own
                wanted.append(zero + np.arange(e.first_target - 1, len(e.ids) - 1))
                targets.append(e.ids[e.first_target :])
                add(e.ids[start:], parent)

    grow(examples, 0, root)
    packed = replace(
        lay_out(segments, n_virtual_keys),
        wanted=torch.from_numpy(np.concatenate(wanted)),
        targets=torch.from_numpy(np.concatenate(targets)).long(),
        has_virtual_tokens=root is not None,
    )
    return torch.from_numpy(np.concatenate(ids)).long(), packed


# ------------------------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Softmax attention of every segment's queries over the keys that it may see.

    Args:
        q: (T, nh, hs).  k, v: (n, nkv, hs), the source of keys and of their values.
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
    return _attend_each(q, k, v, packed.lengths)


@torch.compiler.disable  # every row has other segments: it would be compiled anew for each
def _attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]]) -> Tensor:
    n_q, n_k = zip(*lengths, strict=True)
    return torch.cat([_attend_one(*qkv) for qkv in zip(q.split(n_q), k.split(n_k), v.split(n_k), strict=True)])


def _attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One segment: (lq, nh, hs) over (lk, nkv, hs). The last query sees all keys, the one before it one fewer, ..."""
    lq, lk = len(q), len(k)
    # In 16 bit on a CPU the backward pass of torch's fused attention takes 4 times as long as the plain products. They
    # keep (nh, lq, lk) scores for it, which is why long segments do not take this way.
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and lk <= 1024:
        mask = torch.full((lq, lk), -torch.inf, dtype=q.dtype).triu(lk - lq + 1)
        return plain_attention(q, k, v, mask)
    mask = None if lq in (1, lk) else torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, n, l, hs)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and lq > 1, enable_gqa=True)
    return y[0].transpose(0, 1)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention written out: queries (T, nh, hs) over keys (S, nkv, hs), `mask` (T, S) added to the scores."""
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

    def store(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (T, nkv, hs) keys and values in `slots` (T,); returns all slots of this layer, (slots, nkv, hs)."""
        self.k[layer].index_copy_(0, slots, k)
        self.v[layer].index_copy_(0, slots, v)
        return self.k[layer], self.v[layer]
