"""Packed rows: examples of any length lie end to end in one flat row, without padding, and share how they begin.

A row is a list of segments. A segment may name a parent: its tokens see the tokens of all its ancestors, and its own
causally; positions continue from the parent. So what many examples begin with (a template's preamble, a soft prompt)
is computed once and seen by each of them, and the result is exactly that of each example alone:

    segment 0   "Below is an instruction ..."                    sees itself
    segment 1   "Name three fruits. ### Response: Apple ..."     sees 0 and itself
    segment 2   "Write a haiku. ### Response: Old pond ..."      sees 0 and itself

In each layer all keys lie in one tensor, the source: first the virtual keys, if a method has any (prefix tuning), then
the keys of this row's tokens or, in generation (decode.py), those of earlier rows, too. `kv_index` lists for one
segment after the other which of them it sees; where there is no kernel that reads keys where they lie, attention
gathers these and runs over pairs (queries of a segment, keys of a segment).
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # queries or keys that a program of kernels/packed_attention.py takes at a time
MOST_QUERY_BLOCKS = 16  # that one program goes through for a block of keys,
LONGER = 4  # or this many times the mean of the row: in one long example no list is, and none is cut
LONG_EXAMPLE = 2560  # tokens: a row whose examples have as many on average goes through kernels/long_attention.py
LITTLE = 1 / 16  # of the tokens of long examples: if they share fewer, that kernel gains more
MIN_SHARED = 16  # a common beginning shorter than this is cheaper computed twice than kept as a segment of its own


class Movable:
    """A dataclass of tensors, of others of its kind, and of dicts of these."""

    stays: ClassVar[str] = ""  # name of a tensor that stays on the CPU

    def to(self, device: torch.device) -> Self:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        changed = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != self.stays:
                changed[name] = f(value)
            elif isinstance(value, Movable):
                changed[name] = value._map(f)
            elif isinstance(value, dict):
                changed[name] = {key: inner._map(f) for key, inner in value.items()}
        return replace(self, **changed)


@dataclass
class Blocks(Movable):
    """Who sees whom, cut into blocks for kernels/packed_attention.py: what to do for which block of queries, and of
    keys. All int32.

    Segments stand in the order of a tree walk, so a token's descendants are one run: query i sees key j if
    j <= i < until[j], and in a layer with a window if pos[i] - pos[j] < window.
    """

    row: Tensor  # (T,) index of each query among the keys
    until: Tensor  # (S,) first token that no longer sees this key
    pos: Tensor  # (S,) position of each key in its own example
    first: Tensor  # (blocks of queries + 1,) where each one's list begins in key_blocks
    key_blocks: Tensor  # the blocks of keys that a block of queries sees
    work: Tensor  # (pieces, 4): a block of keys; from, to: the blocks of queries that see it; its slot, or -1
    query_blocks: Tensor  # the blocks of queries that see a block of keys
    shared: Tensor  # (n, 3): a block of keys seen by so many queries that several programs share it; from, to: slots
    n_slots: int


def cut_into_blocks(row: np.ndarray, until: np.ndarray, pos: np.ndarray, window: int | None) -> Blocks:
    """The lists of `Blocks` for queries at `row` (ascending) and keys that are seen `until` there."""
    low = np.arange(0, len(until), BLOCK)  # of each block of keys: the first one, and where the last of them ends
    high = np.maximum.reduceat(until, low)
    starts = np.arange(0, len(row), BLOCK)
    first_row, last_row = row[starts], row[np.minimum(starts + BLOCK, len(row)) - 1]
    sees = (low[None] <= last_row[:, None]) & (high[None] > first_row[:, None])  # (query blocks, key blocks)
    if window is not None:
        sees &= np.minimum.reduceat(pos[row], starts)[:, None] - np.maximum.reduceat(pos, low)[None] < window
    by_query, by_key = sees.sum(1), sees.sum(0)
    most = max(MOST_QUERY_BLOCKS, int(LONGER * by_key.mean()))
    query_blocks = np.nonzero(sees.T)[1]
    work, shared, slots = [], [], 0
    for block, (end, n) in enumerate(zip(by_key.cumsum(), by_key)):
        cuts = [*range(end - n, end, most), end]
        if len(cuts) <= 2:
            work.append((block, end - n, end, -1))
            continue
        shared.append((block, slots, slots + len(cuts) - 1))
        work += [(block, a, b, slots + i) for i, (a, b) in enumerate(zip(cuts, cuts[1:]))]
        slots += len(cuts) - 1
    work.sort(key=lambda piece: piece[1] - piece[2])  # long ones first: they would end last
    nothing = len(low)  # a block behind the last; with it a list is never so short that torch.compile compiles anew
    work += [(nothing, 0, 0, -1)] * 2
    shared += [(nothing, 0, 0)] * 2
    return Blocks(
        row=_int32(row),
        until=_int32(until),
        pos=_int32(pos),
        first=_int32([0, *by_query.cumsum()]),
        key_blocks=_int32(np.append(np.nonzero(sees)[1], nothing)),
        work=_int32(work),
        query_blocks=_int32(np.append(query_blocks, 0)),
        shared=_int32(shared),
        n_slots=slots + 2,
    )


def _int32(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))


@dataclass
class Packed(Movable):
    """Which token of a row sees which. N segments, T tokens, S gathered keys, M tokens whose output is wanted."""

    pos: Tensor  # (T,) position of each token in its own example
    lengths: list[tuple[int, int]]  # of each segment: number of queries, number of keys that it sees
    cu_q: Tensor  # (N + 1,) int32, cumulative: where each segment's queries begin
    cu_k: Tensor  # (N + 1,) int32, cumulative: where each segment's gathered keys begin
    max_q: int  # most queries of a segment
    max_k: int  # most keys of a segment
    kv_index: Tensor | None  # (S,) indices into the source of keys; None: this row's own keys, in order
    blocks: dict[int | None, Blocks] | None  # who sees whom, by window; None if some keys are of earlier rows
    bounds: Tensor | None  # (N + 1,) cu_q on the CPU, if the segments are whole examples, and long ones with targets
    n_virtual_keys: int  # at the front of the source of keys
    wanted: Tensor | None  # (M,) tokens whose logits or loss are wanted; None: all
    targets: Tensor | None  # (M,) the token that each of them must predict
    last: "Packed | None" = None  # the row as the last layer needs it: with the queries of the wanted tokens only
    weight: float = 1.0  # 0.0: another process counts this row
    stays = "bounds"


class Segment:
    """A run of tokens, and the segment that it continues. `lay_out` fills in the rest."""

    def __init__(self, length: int, parent: "Segment | None" = None):
        self.length = length
        self.parent = parent
        self.keys: np.ndarray  # indices into the source of keys: all that its last token sees
        self.end: int  # position after its last token
        self.until: int  # index into the source of keys, after its last descendant


def lay_out(
    segments: Sequence[Segment],
    n_virtual_keys: int = 0,
    cached: int = 0,
    wanted: Sequence[int] | np.ndarray | None = None,
    targets: np.ndarray | None = None,
    windows: Iterable[int | None] = (None,),
) -> Packed:
    """Lays segments end to end. A parent stands before its children, in this row or an earlier one. Without earlier
    ones each stands before its parent's next child: a walk through the tree. The network's virtual tokens, if it has
    any, are the first tokens of the first segment.

    Args:
        n_virtual_keys: number of virtual keys that every example sees; its positions start after them.
        cached: number of keys of earlier rows (decode.py).
        wanted: (M,) tokens whose logits or loss are wanted, ascending; None: all.
        targets: (M,) the token that each of them must predict.
        windows: of the network's layers.
    """
    offset = first = n_virtual_keys + cached
    for s in segments:
        seen, start = (s.parent.keys, s.parent.end) if s.parent else (np.arange(n_virtual_keys), n_virtual_keys)
        s.keys = np.concatenate((seen, np.arange(offset, offset + s.length)))
        s.end = start + s.length
        offset += s.length
        s.until = offset
    for s in reversed(segments):
        if s.parent:
            s.parent.until = max(s.parent.until, s.until)
    until = np.repeat([offset, *(s.until for s in segments)], [first, *(s.length for s in segments)])
    pos = np.concatenate([np.arange(s.end - s.length, s.end) for s in segments])
    keys, sizes = [s.keys for s in segments], _sizes([(s.length, len(s.keys)) for s in segments])
    of_keys = until, np.append(np.arange(n_virtual_keys), pos)
    windows = {window if window and window < sizes["max_k"] else None for window in windows}
    own_keys_only = not first and not any(s.parent for s in segments)
    is_long = own_keys_only and targets is not None and len(pos) >= LONG_EXAMPLE * len(segments)
    packed = Packed(
        pos=torch.from_numpy(pos),
        **sizes,
        kv_index=None if own_keys_only else torch.from_numpy(np.concatenate(keys)),
        blocks=None if cached else {w: cut_into_blocks(np.arange(first, offset), *of_keys, w) for w in windows},
        bounds=sizes["cu_q"] if is_long else None,
        n_virtual_keys=n_virtual_keys,
        wanted=None if wanted is None else torch.as_tensor(wanted),
        targets=None if targets is None else torch.from_numpy(targets).long(),
    )
    if targets is not None:
        packed.last = _for_last_layer(packed, segments, np.asarray(wanted))
    return packed


def _for_last_layer(packed: Packed, segments: Sequence[Segment], wanted: np.ndarray) -> Packed | None:
    """The row with queries at `wanted` alone, if these are the last tokens of some segments; None if they are not."""
    ends = np.cumsum([s.length for s in segments])
    n_wanted = np.diff(np.searchsorted(wanted, [0, *ends]))
    runs = [np.arange(end - n, end) for end, n in zip(ends, n_wanted)]
    if not len(wanted) or not np.array_equal(wanted, np.concatenate(runs)):
        return None
    some = [(s, n) for s, n in zip(segments, n_wanted.tolist()) if n]
    row, b = wanted + packed.n_virtual_keys, next(iter(packed.blocks.values()))
    return replace(
        packed,
        bounds=None,
        blocks={w: cut_into_blocks(row, b.until.numpy(), b.pos.numpy(), w) for w in packed.blocks},
        kv_index=torch.from_numpy(np.concatenate([s.keys for s, _ in some])),
        **_sizes([(n, len(s.keys)) for s, n in some]),
    )


def _sizes(lengths: list[tuple[int, int]]) -> dict[str, Any]:
    queries, keys = zip(*lengths, strict=True)
    return dict(
        lengths=lengths,
        cu_q=_int32([0, *accumulate(queries)]),
        cu_k=_int32([0, *accumulate(keys)]),
        max_q=max(queries),
        max_k=max(keys),
    )


def equal_examples(n: int, length: int, n_tokens: int, n_keys: int, windows: Iterable[int | None]) -> Packed:
    """`n` examples of `length` tokens each behind virtual tokens and keys: what a (B, T) batch is as a packed row. All
    real tokens are wanted."""
    if not n_tokens:
        return lay_out([Segment(length) for _ in range(n)], n_keys, windows=windows)
    root = Segment(n_tokens)
    segments = [root, *(Segment(length, root) for _ in range(n))]
    return lay_out(segments, n_keys, wanted=np.arange(n_tokens, n_tokens + n * length), windows=windows)


# ---------------------------------------------------------------------------------------------------- building rows


@dataclass
class Example:
    """One training example: `ids` (n,) int32; the tokens from `first_target` on are to be predicted.

    first_target is at least 1, since nothing stands before the first token to predict it.
    """

    ids: np.ndarray
    first_target: int
    learned: np.ndarray | None = None
    """(n - first_target,) bool: which of the tokens from first_target on are to be predicted, such as an assistant's
    turns; None: all"""
    follows: bool = False
    """a later turn of the conversation that the example before it is of: both go into one batch, which computes what
    they share once"""

    @property
    def n_targets(self) -> int:
        return len(self.ids) - self.first_target if self.learned is None else int(self.learned.sum())

    @property
    def is_learned(self) -> np.ndarray:
        """(n,) bool."""
        learned = np.zeros(len(self.ids), dtype=bool)
        learned[self.first_target :] = True if self.learned is None else self.learned
        return learned


def pack(
    examples: Sequence[Example],
    row_tokens: int,
    n_virtual_tokens: int = 0,
    n_virtual_keys: int = 0,
    share: bool = True,
    rank: int = 0,
    world: int = 1,
    short_context: int | None = None,
    windows: Collection[int | None] = (None,),
) -> list[tuple[Tensor, Packed]]:
    """Packs examples into the fewest rows of `row_tokens` tokens, all of about one size (a little over it, if need be).

    Args:
        share: compute a common beginning of examples once. Not with dropout, which would differ between its copies.
        rank, world: make the rows of this process, of so many. One that would lack a row computes one of another
            process with weight 0, so that all compute the same number.
        short_context, windows: the network's; no row has examples of both sides of the former.
    Returns:
        A list of (idx, packed). The losses of all rows sum to those of the examples one by one. Examples that begin
        alike lie together, so their order is not kept.
    """
    if share:  # any order will do in which examples with the same beginning are neighbours
        examples = sorted(examples, key=lambda e: e.ids.tobytes())
        n_all = sum(len(e.ids) for e in examples)
        if n_all >= LONG_EXAMPLE * len(examples) and None in windows and not n_virtual_tokens and not n_virtual_keys:
            share = sum(map(_common, examples, examples[1:])) > LITTLE * n_all
    is_long = [len(e.ids) - 1 + n_virtual_tokens + n_virtual_keys > (short_context or math.inf) for e in examples]
    parts = [[e for e, flag in zip(examples, is_long) if flag == side] for side in (False, True)]
    groups = [group for part in parts if part for group in _fill(part, row_tokens, share, world)]
    more = n_virtual_tokens, n_virtual_keys, share, {*windows}
    rows = [_pack_row(group, *more) for group in groups[rank::world]]
    if len(rows) < math.ceil(len(groups) / world):
        idx, packed = _pack_row(groups[0], *more)
        rows.append((idx, replace(packed, weight=0.0)))
    return rows


def _fill(examples: Sequence[Example], row_tokens: int, share: bool, world: int) -> Iterator[list[Example]]:
    """Cuts a list of examples into those of one row each."""
    shared = [0, *(_common(a, b) if share else 0 for a, b in zip(examples, examples[1:]))]
    costs = np.array([len(e.ids) - 1 - (n if n >= MIN_SHARED else 0) for e, n in zip(examples, shared)])
    n_rows = world * math.ceil(costs.sum() / row_tokens / world)
    row = (costs.cumsum() - costs / 2) * n_rows // costs.sum()  # rows of one size: a short one would be a slow one
    for _, group in groupby(zip(row, examples), key=itemgetter(0)):
        yield [e for _, e in group]


def _common(a: Example, b: Example) -> int:
    """Number of tokens at the beginning that two examples can share. The token before an example's first target
    predicts it, so it has to be the example's own."""
    n = min(a.first_target, b.first_target) - 1
    differs = np.flatnonzero(a.ids[:n] != b.ids[:n])
    return int(differs[0]) if len(differs) else n


def _pack_row(
    examples: list[Example], n_virtual_tokens: int, n_virtual_keys: int, share: bool, windows: Iterable[int | None]
) -> tuple[Tensor, Packed]:
    root = Segment(n_virtual_tokens) if n_virtual_tokens else None
    segments, ids, leaves = tree(examples, root, share)
    segments = [root, *segments] if root else segments
    ends = dict(zip(segments, accumulate(s.length for s in segments)))
    wanted, targets = [], []
    for e, leaf in zip(examples, leaves, strict=True):
        learned = e.is_learned.nonzero()[0]
        wanted.append(ends[leaf] - len(e.ids) + learned)  # the token before predicts it
        targets.append(e.ids[learned])
    wanted, targets = np.concatenate(wanted), np.concatenate(targets)
    packed = lay_out(segments, n_virtual_keys, wanted=wanted, targets=targets, windows=windows)
    return torch.from_numpy(np.concatenate(ids)).long(), packed


def tree(
    examples: Sequence[Example], root: Segment | None, share: bool = True
) -> tuple[list[Segment], list[np.ndarray], list[Segment]]:
    """Segments behind `root`, the ids of each, and the segment that each example ends in; the last token of an example
    is left out, since no one sees it, and it predicts nothing."""
    segments, ids, leaves = [], [], []

    def add(e: Example, start: int, end: int, parent: Segment | None) -> Segment:
        segments.append(Segment(end - start, parent))
        ids.append(e.ids[start:end])
        return segments[-1]

    def grow(group: Sequence[Example], start: int, parent: Segment | None) -> None:
        """Lays out `group`, whose first `start` tokens are already there as `parent`. Neighbours with MIN_SHARED more
        tokens in common stay together: what they all share becomes a segment, the rest its children."""
        common = [_common(a, b) for a, b in zip(group, group[1:])] if share else [0] * (len(group) - 1)
        cuts = [0, *(i for i, n in enumerate(common, 1) if n < start + MIN_SHARED), len(group)]
        for low, high in zip(cuts, cuts[1:]):
            e = group[low]
            if high - low > 1:
                end = min(common[low : high - 1])
                grow(group[low:high], end, add(e, start, end, parent))
            else:
                leaves.append(add(e, start, len(e.ids) - 1, parent))

    grow(examples, 0, root)
    return segments, ids, leaves
