"""Decoding: one token after another from a network, with a cache of keys and values."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_model.model import GPT
from lit_model.packing import Segment, lay_out

if TYPE_CHECKING:
    from lit_model.data.tokenizer import Tokenizer


@torch.no_grad()
def generate(
    gpt: GPT,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Yields the tokens that follow `ids`, as they are made; ends before a stop token or where the context is full.

    Args:
        ids: the prompt, at least one token.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the smallest set of tokens that has this probability.
        seed: the same seed gives the same tokens.
    Raises:
        ValueError: the prompt is empty or leaves no room in the model's context, or an option is out of its range.
    """
    for name, value, fits in (
        ("temperature", temperature, 0 <= temperature < math.inf),
        ("top_k", top_k, top_k is None or top_k >= 1),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("seed", seed, seed is None or 0 <= seed < 2**63),
    ):
        if not fits:
            raise ValueError(f"{name} is {value}, out of its range")
    used, context = gpt.n_virtual_tokens + len(ids), gpt.config.block_size
    n_new = min(max_new_tokens, context - gpt.n_virtual_keys - used)
    if n_new < 1 or not ids:
        needs = f"at least one, and room after it in the model's context of {context}"
        raise ValueError(f"the prompt has {len(ids)} tokens; it needs {needs}")
    generator = torch.Generator(gpt.device).manual_seed(seed) if seed is not None else None
    cache = gpt.new_cache(used + n_new)
    root = Segment(gpt.n_virtual_tokens) if gpt.n_virtual_tokens else None
    tail = Segment(len(ids), root)
    packed = lay_out([root, tail] if root else [tail], gpt.n_virtual_keys, cached=0, wanted=[used - 1])
    idx = torch.tensor(ids, device=gpt.device)
    for _ in range(n_new):
        logits = gpt(idx, packed.to(gpt.device), cache)[-1]
        if not logits.isfinite().all():
            raise ValueError("the network's logits are not finite: its weights are broken, or too large for this dtype")
        token = sample(logits, temperature, top_k, top_p, generator)
        if token.item() in stop_ids:
            return
        yield token.item()
        tail, idx = Segment(1, tail), token[None]
        packed = lay_out([tail], gpt.n_virtual_keys, cached=used)
        used += 1


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token id () from logits (V,)."""
    if temperature < 1e-5:  # logits divided by less are no numbers; the likeliest token has all the probability
        return logits.argmax()
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        p, order = logits.softmax(-1).sort(descending=True)
        logits[order[p.cumsum(-1) - p >= top_p]] = -torch.inf  # the likeliest token always stays
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[0]


def stream_text(
    tokenizer: "Tokenizer", tokens: Iterable[int], stops: Sequence[str] = (), after: Sequence[int] = ()
) -> Iterator[str]:
    """Text pieces of `tokens` as they come; ends before the first of `stops`.

    A piece waits while it may still be half of a character, or lie in a stop.

    Args:
        after: tokens of a text that these continue; sentencepiece drops the space before the first token otherwise.
    """
    ids, held_back = list(after), max(map(len, stops), default=1) - 1
    text = tokenizer.decode(ids) if ids else ""
    start = shown = len(text)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        found = [at for at in (text.find(stop, start) for stop in stops) if at >= 0]
        if found:
            yield text[shown : min(found)]
            return
        safe = len(text) - held_back
        if not text.endswith("\ufffd") and safe > shown:
            yield text[shown:safe]
            shown = safe
    yield text[shown:]
