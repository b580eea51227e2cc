"""Rows into token examples.

A row becomes a text, or several, and a text is tokenized once, as a whole: where in it a part begins is found by the
offsets of its tokens, so that the ids are those of the text and of no seam. A token that spans the boundary between
prompt and response is learned. Only the response and the token that ends it are learned; of a conversation what the
assistant says (chat.py).
"""

import re
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from lit_model.data.rows import Notes, Row, place
from lit_model.data.tokenizer import Tokenizer
from lit_model.packing import Example

if TYPE_CHECKING:
    from lit_model.data.labels import Task

EMPTY, CUT = "they have nothing to learn", "cut to examples.max_length"
LONG = "their prompt alone fills examples.max_length"
NAMES = {"{instruction}", "{input}", "{text}"}  # that a style of one's own may have in it
ALPACA = (  # the texts of https://github.com/tatsu-lab/stanford_alpaca
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass
class ExampleOptions:
    """How rows become examples."""

    style: str = "alpaca"
    """text around a row: alpaca; chatml, turns between <|im_start|> and <|im_end|>; chat, the template of the
    checkpoint; or a text of your own, such as 'Q: {instruction} {input}\\nA:'. Messages are always chat or chatml.
    Rows of text and label take a text of your own with {text} in it; without one: '{text}\\nLabel:'"""
    mask: bool = True
    """learn the response only; false: the prompt too"""
    max_length: int = 384
    """longest example in tokens; a longer response is cut and still ends in the end-of-text token, a longer
    conversation is cut where it is"""
    val_fraction: float = 0.05
    """share of the rows that is kept for validation and never trained on"""
    strict: bool = False
    """refuse data with a row that cannot be used; otherwise such rows are left out and counted"""


def validate_options(options: ExampleOptions, tokenizer: Tokenizer) -> None:
    """Raises ValueError for options that make no sense, or a style that this tokenizer does not know."""
    if not 0 <= options.val_fraction < 1 or options.max_length < 2:
        values = f"examples.val_fraction is {options.val_fraction}, examples.max_length {options.max_length}"
        raise ValueError(f"{values}; they must be at least 0 and below 1, and at least 2")
    validate_style(options.style, tokenizer)


def validate_style(style: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a style that there is not, or that this tokenizer does not know."""
    if style == "chat":
        render(style, "a", tokenizer=tokenizer)
        return
    names = set(re.findall(r"\{\w+\}", style))
    fits = style in ("alpaca", "none") or (names & {"{instruction}", "{text}"} and names <= NAMES)
    if style == "chatml":
        fits = all(len(tokenizer.encode(token)) == 1 for token in ("<|im_start|>", "<|im_end|>"))
    if not fits:
        known = "alpaca, chat, chatml (if the tokenizer knows <|im_start|>) and texts with {instruction} in them"
        strange = f"; it names {min(names - NAMES)}, and can name {', '.join(sorted(NAMES))}" if names - NAMES else ""
        raise ValueError(f"the style {style!r} cannot be taken: known are {known}{strange}")


def render(style: str, instruction: str, input: str = "", tokenizer: Tokenizer | None = None, system: str = "") -> str:
    """The prompt that a response follows. The style chat needs the tokenizer, which has the template.

    Raises ValueError for an input that the style has no place for, or a system prompt in a style that is no chat.
    """
    if style in ("chat", "chatml"):
        from lit_model.data.chat import chat_text

        messages = [{"role": "system", "content": system}] if system else []
        return chat_text(tokenizer, style, [*messages, _question(instruction, input)], asks=True)
    if system:
        raise ValueError("a system prompt goes with the styles chat and chatml")
    template = {"none": "{instruction}", "alpaca": ALPACA_INPUT if input else ALPACA}.get(style, style)
    if input and "{input}" not in template:
        raise ValueError(f"the style {style!r} has no {{input}} in it: the input {input[:40]!r} would be left out")
    values = {"{instruction}": instruction, "{text}": instruction, "{input}": input}
    return re.sub("|".join(values), lambda match: values[match[0]], template.replace("\\n", "\n"))


def _question(instruction: str, input: str) -> dict[str, str]:
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}


def prompt_ids(tokenizer: Tokenizer, style: str, prompt: str) -> list[int]:
    """The ids that generation starts from. prompt: as `render` makes it."""
    return first_ids(tokenizer, style, prompt) + tokenizer.encode(prompt)


def first_ids(tokenizer: Tokenizer, style: str, text: str) -> list[int]:
    """The BOS token, unless the family has none, the text begins with it, or writing it is up to a chat template."""
    written = style == "chat" or (tokenizer.bos and text.startswith(tokenizer.bos_token))
    return [] if written else tokenizer.bos


def conversation_style(style: str, tokenizer: Tokenizer) -> str:
    """The style of messages: the checkpoint's template, if it has one and chatml is not asked for."""
    return "chatml" if style == "chatml" or tokenizer.chat_template is None else "chat"


def chat_ids(
    tokenizer: Tokenizer, style: str, messages: Sequence[dict], tools: Sequence[dict] | None = None
) -> list[int]:
    """The ids that the answer to a conversation starts from; in a style that is no chat, that to its last message."""
    from lit_model.data.chat import chat_text

    if style not in ("chat", "chatml"):
        if not messages or not isinstance(messages[-1].get("content"), str):
            raise ValueError("the last message has no text")
        validate_style(style, tokenizer)
        return prompt_ids(tokenizer, style, render(style, messages[-1]["content"]))
    style = conversation_style(style, tokenizer)
    return prompt_ids(tokenizer, style, chat_text(tokenizer, style, messages, True, tools))


@dataclass
class Text:
    """What is tokenized."""

    text: str
    learned: list[tuple[int, int]]  # where what is learned begins and ends, in characters
    row: Row
    style: str
    follows: bool = False  # a later turn of the same conversation, see Example


def tokenize(
    rows: Sequence[Row], tokenizer: Tokenizer, options: ExampleOptions, name: str = "rows", task: "Task | None" = None
) -> list[Example]:
    """Token examples of `rows`, in order; with a task they all have text and label. Rows with an empty response, those
    whose prompt leaves no room for a response within `max_length`, and those that the checkpoint's template refuses are
    left out, and lines say how many, and why the first."""
    if task:
        from lit_model.data.labels import examples

        return examples(rows, tokenizer, options, task)
    notes, found, before = Notes(options.strict), [], None
    with tqdm(rows, desc=f"tokenizing {len(rows)} {name}", leave=False) as bar:
        texts, copies = tee(text for row in bar for text in _texts(row, tokenizer, options, notes))
        encoded = tokenizer.encode_with_places(text.text for text in copies)
        for text, (ids, places) in zip(texts, encoded, strict=True):
            for e in _examples(text, ids, places, tokenizer, options, notes):
                e.follows = text.follows and before is text.row
                before = text.row
                found.append(e)
    notes.say(len(rows), name)
    return found


def _texts(row: Row, tokenizer: Tokenizer, options: ExampleOptions, notes: Notes) -> Iterator[Text]:
    """The texts of a row that is not left out."""
    if options.style == "chat" and "instruction" in row:
        row, answer = copy(row), {"role": "assistant", "content": row["output"]}  # with its place
        row["messages"] = [_question(row["instruction"], row["input"]), answer]
    if "messages" in row:
        from lit_model.data.chat import learned_turns

        style = conversation_style(options.style, tokenizer)
        try:
            turns = learned_turns(tokenizer, style, row, notes)
        except ValueError as e:
            notes.leave_out("their conversation cannot be rendered", place(row), e)
            return
    else:
        style, prompt, answer = "none", row.get("prompt", ""), row.get("completion", row.get("text"))
        if "output" in row:
            style, answer = options.style, row["output"]
            prompt = render(style, row["instruction"], row["input"], tokenizer)
        text = prompt + answer
        turns = [(text, [(len(prompt), len(text))])] if answer.strip() else []
    if not turns:
        notes.leave_out(EMPTY, place(row))
    for i, (text, learned) in enumerate(turns):
        yield Text(text, learned, row, style, follows=i > 0)


def _examples(
    text: Text, ids: np.ndarray, places: np.ndarray, tokenizer: Tokenizer, options: ExampleOptions, notes: Notes
) -> Iterator[Example]:
    """The example of a text; of one that is learned as it is, in pieces of max_length tokens."""
    first, length = first_ids(tokenizer, text.style, text.text), options.max_length
    is_chat = "messages" in text.row
    is_ended = is_chat or text.text.rstrip().endswith(tuple(tokenizer.turn_ends))
    last = [] if is_ended else [tokenizer.eos_id]
    ids = np.array([*first, *ids, *last], dtype=np.int32)
    if "text" in text.row:
        for start in range(0, len(ids) - 1, length - 1):  # neighbours share a token, learned by the first
            yield Example(ids[start : start + length], 1)
        return
    said = [(begin <= places) & (places < end) for begin, end in text.learned]
    learned = np.array([False] * len(first) + np.any(said, axis=0).tolist() + [True] * len(last))
    has_room = learned[: length - (not is_chat)].any()
    if not has_room and not text.follows:
        notes.leave_out(LONG, place(text.row))
    elif len(ids) > length:
        notes.add(CUT, place(text.row))
        if not is_chat:  # a response still ends
            ids = np.append(ids[: length - 1], ids[-1])
        ids, learned = ids[:length], learned[:length]
    if not has_room:
        return
    if not options.mask:
        learned[(learned.argmax() if text.follows else 0) :] = True
    targets = np.flatnonzero(learned[1:]) + 1
    begin, end = int(targets[0]), int(targets[-1]) + 1
    flags = learned[begin:end]
    yield Example(ids[:end], begin, None if flags.all() else flags)


def parts(example: Example, tokenizer: Tokenizer, task: "Task | None" = None) -> list[tuple[str, bool]]:
    """The text of an example in pieces, and whether each is learned. The class that a linear head learns is one."""
    ids, learned = example.ids.tolist(), example.is_learned
    if task and task.head == "linear":
        return [(tokenizer.decode(ids[:-1], special=True), False), (task.classes[ids[-1]], True)]
    ends = [*(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    texts = ["", *(tokenizer.decode(ids[:end], special=True) for end in ends)]
    return [(b[len(a) :], bool(learned[end - 1])) for a, b, end in zip(texts, texts[1:], ends)]


def marked(parts: Sequence[tuple[str, bool]], limit: int | None = None) -> str:
    """A text whose learned pieces are marked: green on a terminal, elsewhere in brackets. A piece of more than `limit`
    characters is shortened."""
    left, right = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[[", "]]")
    text = ""
    for piece, is_learned in parts:
        if limit and len(piece) > limit:
            piece = f"{piece[: limit // 2]} ... {piece[-limit // 2 :]}"
        text += f"{left}{piece}{right}" if is_learned else piece
    return text
