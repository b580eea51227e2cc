"""Text from a network: tokens that follow prompts (decode.py makes them), and the pieces of text that they are."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lit_model.model import GPT

if TYPE_CHECKING:
    from lit_model.data.tokenizer import Tokenizer
    from lit_model.sampling import Sampling


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
    from lit_model.sampling import Sampling

    are_many = len(ids) and isinstance(ids[0], Sequence)
    prompts = ids if are_many else [ids]
    way = Sampling(temperature, top_k, top_p, **more)
    ways = [way._replace(seed=None if seed is None else seed + i) for i in range(len(prompts))]
    for i, token in generate_batch(gpt, prompts, max_new_tokens, ways, stop_ids):
        yield (i, token) if are_many else token


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
    from lit_model.decode import Decoder, Request
    from lit_model.methods.side_by_side import n_front, slots_of

    slots, context = slots_of(gpt, methods), gpt.config.block_size
    groups = [], []  # those that end within short_context, and those beyond, whose positions turn in another way
    for i, (ids, way, name) in enumerate(zip(prompts, ways, methods or [None] * len(prompts), strict=True)):
        way.check(max_new_tokens)
        front = n_front(slots[name])
        request = Request(ids, min(max_new_tokens, room_after(gpt, ids, front, context)), way, name)
        is_long = front + len(ids) + request.n_new > (gpt.config.short_context or math.inf)
        groups[is_long].append((i, request))
    for group in filter(None, groups):
        decoder = Decoder.of(gpt, [request for _, request in group], methods and [*dict.fromkeys(methods)])
        open_rows = dict(enumerate(group))
        for step, tokens in enumerate(decoder.tokens(max(request.n_new for _, request in group)), 1):
            for row, (i, request) in list(open_rows.items()):
                if tokens[row] not in stop_ids:
                    yield i, tokens[row]
                if tokens[row] in stop_ids or step == request.n_new:
                    del open_rows[row]
            if not open_rows:
                break


def room_after(gpt: GPT, ids: Sequence[int], n_front: int, length: int) -> int:
    """Tokens that may follow a prompt in a context of this length, with n_front keys and tokens of a method in front.

    Raises ValueError if there is none, or the prompt is empty, or has a token that the network lacks.
    """
    room = length - n_front - len(ids)
    if not len(ids) or room < 1:
        needs = f"at least one, and room after it in the context of {length}"
        raise ValueError(f"the prompt has {len(ids)} tokens; it needs {needs}")
    if min(ids) < 0:
        raise ValueError("the prompt has a negative token")
    gpt.config.check_tokens(max(ids))
    return room


class TextStream:
    """Text of tokens as they come. It waits while it may still be half of a character, or lie in a stop text."""

    WINDOW = 32  # tokens that are decoded again with the next one

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str] = (), after: Sequence[int] = ()):
        """after: tokens of a text that these continue; sentencepiece drops the space before the first one otherwise."""
        self.tokenizer, self.stops, self.ids, self.is_stopped = tokenizer, stops, list(after), False
        self.held_back = max(map(len, stops), default=1) - 1
        self.text = tokenizer.decode(self.ids) if self.ids else ""
        self.shown = len(self.text)

    def push(self, *tokens: int) -> str:
        """What can be shown now. A stop text ends it: see is_stopped."""
        self.ids += tokens
        self.text = self.tokenizer.decode(self.ids)
        found = [at for at in (self.text.find(stop, self.shown) for stop in self.stops) if at >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
            return self.end()
        piece = ""
        if not self.text.endswith("\ufffd"):
            piece = self.text[self.shown : len(self.text) - self.held_back]
            self.shown += len(piece)
        if len(self.ids) > 2 * self.WINDOW and len(self.text) - self.shown <= self.held_back:
            rest = len(self.text) - self.shown
            self.ids = self.ids[-self.WINDOW :]  # longer than any rest
            self.text = self.tokenizer.decode(self.ids)
            self.shown = len(self.text) - rest
        return piece

    def end(self) -> str:
        """The rest."""
        piece, self.shown = self.text[self.shown :], len(self.text)
        return piece


def stream_text(
    tokenizer: "Tokenizer", tokens: Iterable[int], stops: Sequence[str] = (), after: Sequence[int] = ()
) -> Iterator[str]:
    """Text pieces of `tokens`, up to the first of `stops`; the rest as in `TextStream`."""
    stream = TextStream(tokenizer, stops, after)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
        if stream.is_stopped:
            return
    yield stream.end()
