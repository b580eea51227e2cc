"""Rows into token examples.

Prompt and response are tokenized apart and joined as ids, so that no token spans the boundary and a prompt has the same
ids in training and in generation. Only the response and the end-of-text token after it are learned; of a conversation
the assistant's turns (chat.py).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tqdm import tqdm

from lit_model.data.tokenizer import Tokenizer
from lit_model.packing import Example

BATCH = 256  # rows that are tokenized at a time
EMPTY, CUT = "left out: they have nothing to learn", "cut to examples.max_length"
LONG = "left out: their prompt alone fills examples.max_length"
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
    fits = style in ("alpaca", "none") or "{instruction}" in style or "{text}" in style
    if style == "chatml":
        fits = all(len(tokenizer.encode(token)) == 1 for token in ("<|im_start|>", "<|im_end|>"))
    if not fits:
        known = "alpaca, chat, chatml (if the tokenizer knows <|im_start|>) and texts with {instruction} in them"
        raise ValueError(f"the style {style!r} cannot be taken: known are {known}")


def render(style: str, instruction: str, input: str = "", tokenizer: Tokenizer | None = None) -> str:
    """The prompt that a response follows. The style chat needs the tokenizer, which has the template."""
    if style == "none":
        return instruction
    if style in ("chat", "chatml"):
        from lit_model.data.chat import chat_text

        question = f"{instruction}\n\n{input}" if input else instruction
        return chat_text(tokenizer, style, [{"role": "user", "content": question}], asks=True)
    if style == "alpaca":
        style = ALPACA_INPUT if input else ALPACA
    values = {"{instruction}": instruction, "{text}": instruction, "{input}": input}
    return re.sub("|".join(values), lambda match: values[match[0]], style.replace("\\n", "\n"))


def conversation_style(style: str, tokenizer: Tokenizer) -> str:
    """The style of messages: the checkpoint's template, if it has one and chatml is not asked for."""
    return "chatml" if style == "chatml" or tokenizer.chat_template is None else "chat"


def tokenize(rows: Sequence[dict], tokenizer: Tokenizer, options: ExampleOptions, name: str = "rows") -> list[Example]:
    """Token examples of `rows`, in order, one kind of row after the other. Rows with an empty response, and those whose
    prompt leaves no room for a response within `max_length`, are left out, and a line says how many."""
    kinds: dict[Callable, list[dict]] = {}
    for row in rows:
        if options.style == "chat" and "instruction" in row:
            row = _as_chat(row)
        make = _conversations if "messages" in row else _texts if "text" in row else _responses
        kinds.setdefault(make, []).append(row)
    examples, counts = [], Counter()
    with tqdm(total=len(rows), desc=f"tokenizing {len(rows)} {name}", leave=False) as bar:
        for make, of_kind in kinds.items():
            for start in range(0, len(of_kind), BATCH):
                batch = of_kind[start : start + BATCH]
                examples += make(batch, tokenizer, options, counts)
                bar.update(len(batch))
    for what in +counts:  # those above 0
        print(f"{counts[what]} of {len(rows)} {name} {what}")
    return examples


def _as_chat(row: dict) -> dict:
    """An instruction and its answer as a turn of each."""
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]}


def _responses(
    batch: Sequence[dict], tokenizer: Tokenizer, options: ExampleOptions, counts: Counter
) -> Iterator[Example]:
    """Examples of rows of instruction, input and output, or of prompt and completion."""
    texts = [
        row["prompt"] if "prompt" in row else render(options.style, row["instruction"], row["input"], tokenizer)
        for row in batch
    ]
    answers = [row["completion"] if "completion" in row else row["output"] for row in batch]
    prompts, responses = tokenizer.encode_batch(texts), tokenizer.encode_within(answers)
    for answer, prompt, response in zip(answers, prompts, responses, strict=True):
        if not prompt:  # then the response begins the text
            response = tokenizer.encode(answer)
        prompt = tokenizer.bos + prompt
        room = options.max_length - len(prompt) - 1
        if not answer.strip():
            counts[EMPTY] += 1
        elif room < 1:
            counts[LONG] += 1
        else:
            counts[CUT] += len(response) > room
            ids = np.array(prompt + response[:room] + [tokenizer.eos_id], dtype=np.int32)
            yield Example(ids, max(1, len(prompt)) if options.mask else 1)


def _texts(batch: Sequence[dict], tokenizer: Tokenizer, options: ExampleOptions, counts: Counter) -> Iterator[Example]:
    """Examples of texts to learn as they are, in pieces of max_length tokens."""
    texts = [row["text"] for row in batch if row["text"].strip()]
    counts[EMPTY] += len(batch) - len(texts)
    for ids in tokenizer.encode_batch(texts):
        ids = np.array([*tokenizer.bos, *ids, tokenizer.eos_id], dtype=np.int32)
        for start in range(0, len(ids) - 1, options.max_length - 1):  # neighbours share a token, learned by the first
            yield Example(ids[start : start + options.max_length], 1)


def _conversations(
    batch: Sequence[dict], tokenizer: Tokenizer, options: ExampleOptions, counts: Counter
) -> Iterator[Example]:
    """Examples of rows of messages."""
    from lit_model.data.chat import is_learned, turns

    style = conversation_style(options.style, tokenizer)
    validate_style(style, tokenizer)
    used = [row for row in batch if any(is_learned(row["messages"]))]
    chats = [turns(tokenizer, style, row["messages"], row.get("tools")) for row in used]
    counts[EMPTY] += len(batch) - len(chats)
    firsts = tokenizer.encode_batch([pieces[0][0] for pieces in chats])
    others = iter(tokenizer.encode_within([text for pieces in chats for text, _ in pieces[1:]]))
    for pieces, first in zip(chats, firsts, strict=True):
        ids, learned = [*tokenizer.bos], [False] * len(tokenizer.bos)
        for (_, is_said), piece in zip(pieces, [first, *islice(others, len(pieces) - 1)], strict=True):
            ids += piece
            learned += [is_said or not options.mask] * len(piece)
        counts[CUT] += len(ids) > options.max_length
        ids, learned = ids[: options.max_length], learned[: options.max_length]
        targets = np.flatnonzero(learned[1:]) + 1
        if not len(targets):
            counts[LONG] += 1
            continue
        first_target, end = int(targets[0]), int(targets[-1]) + 1
        flags = np.array(learned[first_target:end])
        yield Example(np.array(ids[:end], dtype=np.int32), first_target, learned=None if flags.all() else flags)
