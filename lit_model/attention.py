"""Attention over packed rows (packing.py): contexts and `attend`.

A context is what a layer knows of its row beside x. It decides which keys the queries meet.

On a GPU in 16 bit kernels/packed_attention.py computes it, or kernels/long_attention.py if the examples are long, or
without Triton torch's variable-length attention over the keys that each segment sees, gathered; on a CPU
(kernels/cpu.py), or in float32, one segment after the other.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from lit_model.kernels.cpu import SegmentsAttention, can_take
from lit_model.packing import Packed
from lit_model.rope import Angles

# from torch 2.13 on it takes fewer key than query heads, and needs enable_gqa=True for that
_VARLEN_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters

HAS_TRITON = find_spec("triton") is not None

GatedKeys = tuple[Tensor, Tensor, Tensor]  # k, v (K, nkv, hs) and a gate (nh,), see PackedRow.over
MOST_PROMPT_KEYS = 128  # that a kernel takes: with head size 128 they fit into the 99 KiB of an RTX 40's shared memory


@dataclass
class PackedRow:
    """A row whose keys are all computed now: training, evaluation, a plain forward."""

    packed: Packed
    rope: Angles | None  # None: no rotary positions in this layer
    virtual_keys: Tensor | None  # (2, P, nkv, hs) keys and values of this layer in front of every example
    window: int | None  # number of keys that a token sees, itself included; None: all
    scale: float  # of the scores q k^T before the softmax
    softcap: float | None  # scores become softcap * tanh(scores / softcap); None: they stay
    wanted: Tensor | None = None  # (M,) in the last layer: tokens whose queries are wanted, over the keys of all

    def attend(self, q: Tensor, k: Tensor, v: Tensor, prompts: Sequence[GatedKeys]) -> Tensor:
        """q (T, nh, hs), k and v (T, nkv, hs) without positions. Returns (T, nh, hs); in the last layer (M, nh, hs)."""
        if self.virtual_keys is None and self.wanted is None:
            return self.over(q, k, v, prompts, self.rope)  # rotates in fewer passes
        q, k = self.rotated(q, k)
        if self.virtual_keys is not None:
            k, v = torch.cat((self.virtual_keys[0], k)), torch.cat((self.virtual_keys[1], v))
        return self.over(self.narrow(q), k, v, prompts)

    def rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q, k) if self.rope is None else (self.rope.queries(q), self.rope.keys(k))

    def over(self, q: Tensor, k: Tensor, v: Tensor, prompts: Sequence[GatedKeys], rope: Angles | None = None) -> Tensor:
        """Softmax attention of every segment's queries q (T, nh, hs) over those of k, v (n, nkv, hs) that it may see.

        Args:
            prompts: keys and values that every query sees in a softmax of their own; times a gate, that is added.
            rope: of q and k, which are of the same tokens then; None: they are rotated already.
        Returns: (T, nh, hs).
        """
        packed = self.packed
        blocks = packed.blocks.get(self.window) if packed.blocks and _has_kernels(q) else None
        is_long = packed.bounds is not None and self.window is None and self.softcap is None and _has_cudnn(q)
        is_plain = q.shape[-1] <= 128 and q.shape[-1].bit_count() == 1  # else the kernel takes no RoPE and no prompt
        if rope is not None and (is_long or not (blocks and is_plain and rope.turns_all_of(q))):
            (q, k), rope = self.rotated(q, k), None
        if is_long:
            from lit_model.kernels.long_attention import long_attention

            y = long_attention(q, k, v, packed.bounds, self.scale)
        elif blocks:
            fits = prompts and len(prompts[0][0]) <= MOST_PROMPT_KEYS and prompts[0][2].ndim == 1  # one gate for all
            prompt, *prompts = prompts if fits and is_plain and self.softcap is None else (None, *prompts)
            from lit_model.kernels.packed_attention import packed_attention  # needs Triton to be imported

            y = packed_attention(q, k, v, blocks, self.scale, rope, prompt, self.window, self.softcap)
        else:
            y = self._over_gathered(q, k, v)
        if prompts and rope is not None:
            q = rope.queries(q)
        for pk, pv, gate in prompts:
            y = y + gate.to(y.dtype)[..., None] * plain_attention(q, pk, pv, self.scale, self.softcap)
        return y

    def _over_gathered(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed, window = self.packed, self.window
        if packed.kv_index is not None:
            k, v = k.index_select(0, packed.kv_index), v.index_select(0, packed.kv_index)  # (S, nkv, hs)
        if self.softcap is not None or not _fast_16_bit(q):
            return _attend_each(q, k, v, packed, self.scale, window, self.softcap)
        if not _VARLEN_GQA:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        options = {"enable_gqa": True} if _VARLEN_GQA else {}
        options |= dict(scale=self.scale, window_size=(-1 if window is None else window - 1, 0))  # causal
        return varlen_attn(q, k, v, packed.cu_q, packed.cu_k, packed.max_q, packed.max_k, **options)

    def narrow(self, x: Tensor) -> Tensor:
        """(T, C) -> (M, C), the tokens that go on after attention."""
        return x if self.wanted is None else x.index_select(0, self.wanted)


def is_few(x: Tensor, most: int = 64) -> bool:
    """Whether x (T, C) is of so few tokens that a step waits for nothing but its weights: decoding on a GPU."""
    return x.is_cuda and HAS_TRITON and not torch.is_grad_enabled() and len(x) <= most


def _fast_16_bit(q: Tensor) -> bool:
    """On a GPU that has kernels for this dtype."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and half and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _has_kernels(q: Tensor) -> bool:
    if not (HAS_TRITON and _fast_16_bit(q)):
        return False
    most = 256 if torch.cuda.get_device_capability(q.device)[0] in (9, 10) else 128  # what their shared memory holds
    return 16 <= q.shape[-1] <= most


def _has_cudnn(q: Tensor) -> bool:
    """Whether cuDNN's attention is the faster one, as on Hopper. It adds up gradients in any order."""
    if not _fast_16_bit(q) or torch.are_deterministic_algorithms_enabled():
        return False
    return torch.cuda.get_device_capability(q.device)[0] in (9, 10) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


@torch.compiler.disable  # every row has other segments: it would be compiled anew for each
def _attend_each(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    if window is None and softcap is None and can_take(q, packed.lengths):
        return SegmentsAttention.apply(q, k, v, packed.lengths, scale)
    n_q, n_k = zip(*packed.lengths, strict=True)
    parts = zip(q.split(n_q), k.split(n_k), v.split(n_k), strict=True)
    return torch.cat([_attend_one(*qkv, scale, window, softcap) for qkv in parts])


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One segment: (lq, nh, hs) over (lk, nkv, hs). The last query sees all keys, or the last `window`, the one before
    it those up to one key earlier, ..."""
    lq, lk = len(q), len(k)
    if window is not None and window < lk:
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq).triu(lk - lq - window + 1)
    elif lq == 1 or (lq == lk and softcap is None):
        mask = None
    else:
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
    if softcap is not None:
        return plain_attention(q, k, v, scale, softcap, mask)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, n, l, hs)
    how = dict(attn_mask=mask, is_causal=mask is None and lq > 1, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, **how)[0].transpose(0, 1)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention written out: queries (T, nh, hs) over keys (S, nkv, hs), each over all of them, or over those
    that `mask` (T, S) allows."""
    T, nh, hs = q.shape
    q = q.transpose(0, 1).reshape(k.shape[1], -1, hs)  # the heads that share a key lie together
    scores = q @ (k * scale).permute(1, 2, 0)  # (nkv, nh / nkv * T, S)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.unflatten(1, (-1, T)).masked_fill(~mask, -torch.inf).flatten(1, 2)
    y = scores.softmax(-1) @ v.transpose(0, 1)  # (nkv, nh / nkv * T, hs)
    return y.view(nh, T, hs).transpose(0, 1)
