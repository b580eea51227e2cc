"""Text from a network: tokens that follow prompts (decode.py makes them), and the pieces of text that they are."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lit_model.model import GPT

if TYPE_CHECKING:
    from lit_model.data.tokenizer import Tokenizer
    from lit_model.decode import Sampling


def generate(
    gpt: GPT,
    ids: Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
    **more: float,
) -> Iterator[Any]:
    """Yields the tokens that follow `ids`, as they are made; ends before a stop token or where the context is full.

    Args:
        ids: the prompt, at least one token; or several prompts: then (number of the prompt, token) is yielded, and
            prompt i has seed + i.
        temperature, top_k, top_p, seed, more: how the next token is chosen, see `Sampling`.
    Raises:
        ValueError: a prompt is empty or leaves no room in the model's context, or an option is out of its range.
    """
    from lit_model.decode import Sampling

    way = Sampling(temperature, top_k, top_p, **more)
    if len(ids) and isinstance(ids[0], Sequence):
        ways = [way._replace(seed=None if seed is None else seed + i) for i in range(len(ids))]
        yield from generate_batch(gpt, ids, max_new_tokens, ways, stop_ids)
        return
    for _, token in generate_batch(gpt, [ids], max_new_tokens, [way._replace(seed=seed)], stop_ids):
        yield token


def generate_batch(
    gpt: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ways: "Sequence[Sampling]",
    stop_ids: Sequence[int] = (),
    methods: Sequence[str | None] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields (number of the prompt, token that follows it) of many prompts at a time, as they are made. What follows
    one does not depend on the others; what they begin with is computed once. methods: of each prompt, where several lie
    side by side (methods/side_by_side.py).

    Raises ValueError as `generate` does.
    """
    from lit_model.decode import Decoder

    own = gpt.n_virtual_keys + gpt.n_virtual_tokens
    fronts = [gpt.n_front(name) for name in methods] if methods else [own] * len(prompts)
    room = [gpt.config.block_size - n - len(ids) for ids, n in zip(prompts, fronts, strict=True)]
    for ids, way, n in zip(prompts, ways, room, strict=True):
        way.check(max_new_tokens)
        if not len(ids) or n < 1:
            needs = f"at least one, and room after it in the model's context of {gpt.config.block_size}"
            raise ValueError(f"the prompt has {len(ids)} tokens; it needs {needs}")
    n_new = [min(max_new_tokens, n) for n in room]
    ends = [gpt.config.block_size - n + more for n, more in zip(room, n_new)]
    is_long = [end > (gpt.config.short_context or math.inf) for end in ends]  # whose positions turn in another way
    for side in {*is_long}:
        group = [i for i, flag in enumerate(is_long) if flag == side]
        parts = (None if values is None else [values[i] for i in group] for values in (prompts, n_new, ways, methods))
        decoder = Decoder.of(gpt, *parts)
        open_rows = dict(enumerate(group))
        for step, tokens in enumerate(decoder.tokens(max(n_new[i] for i in group)), 1):
            for row, i in list(open_rows.items()):
                if tokens[row] not in stop_ids:
                    yield i, tokens[row]
                if tokens[row] in stop_ids or step == n_new[i]:
                    del open_rows[row]
            if not open_rows:
                break


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
