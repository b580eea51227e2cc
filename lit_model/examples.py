"""Rows into token examples.

Prompt and response are tokenized apart and joined as ids, so that no token spans the boundary and a prompt has the same
ids in training and in generation. Only the response and the end-of-text token after it are trained on; of a
conversation the assistant's turns.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from tqdm import tqdm

from lit_model.chat import chat_text, is_learned, turns
from lit_model.data import PromptOptions
from lit_model.packing import Example
from lit_model.tokenizer import Tokenizer

BATCH = 256  # rows that are tokenized at a time


def render(style: str, instruction: str, input: str = "", tokenizer: Tokenizer | None = None) -> str:
    """The prompt that a response follows; chat needs the tokenizer, which has the template. The alpaca text is that of
    https://github.com/tatsu-lab/stanford_alpaca."""
    if style == "none":
        return instruction
    if style in ("chatml", "chat"):
        question = f"{instruction}\n\n{input}" if input else instruction
        return chat_text(tokenizer, style, [{"role": "user", "content": question}], asks=True)
    if style != "alpaca":  # a template
        values = {"{instruction}": instruction, "{input}": input}
        return re.sub(r"\{instruction\}|\{input\}", lambda m: values[m[0]], style.replace("\\n", "\n"))
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def check(options: PromptOptions, tokenizer: Tokenizer) -> None:
    """Raises ValueError for options that make no sense, or a style that this tokenizer does not know."""
    if not 0 <= options.val_fraction < 1:
        raise ValueError(f"prompt.val_fraction is {options.val_fraction}; it must be at least 0 and below 1")
    if options.max_length < 2:
        raise ValueError(f"prompt.max_length is {options.max_length}; it must be at least 2")
    check_style(options.style, tokenizer)


def check_style(style: str, tokenizer: Tokenizer) -> None:
    if style == "chatml" and any(len(tokenizer.encode(token)) > 1 for token in ("<|im_start|>", "<|im_end|>")):
        raise ValueError("the style chatml needs a tokenizer that knows <|im_start|> and <|im_end|>; try alpaca")
    if style == "chat":
        render(style, "a", tokenizer=tokenizer)
    elif style not in ("alpaca", "chatml", "none") and "{instruction}" not in style:
        raise ValueError(
            f"the style {style!r} is none of alpaca, chatml and chat, and no text with {{instruction}} in it"
        )


def tokenize(rows: Sequence[dict], tokenizer: Tokenizer, options: PromptOptions, name: str = "rows") -> list[Example]:
    """Token examples of `rows`, in order, one kind of row after the other. Rows with an empty response, and those whose
    prompt leaves no room for a response within `max_length`, are left out, and a line says how many."""
    examples: list[Example] = []
    counts = dict(empty=0, long=0, cut=0)
    kinds: dict[Callable, list[dict]] = {}
    for row in map(_as_chat, rows) if options.style == "chat" else rows:
        make = _conversations if "messages" in row else _texts if "text" in row else _responses
        kinds.setdefault(make, []).append(row)
    with tqdm(total=len(rows), desc=f"tokenizing {len(rows)} {name}", leave=False) as bar:
        for make, of_kind in kinds.items():
            for start in range(0, len(of_kind), BATCH):
                batch = of_kind[start : start + BATCH]
                examples += make(batch, tokenizer, options, counts)
                bar.update(len(batch))
    for count, what in (
        (counts["empty"], "left out: they have nothing to learn"),
        (counts["long"], f"left out: their prompt alone fills prompt.max_length {options.max_length}"),
        (counts["cut"], f"cut to prompt.max_length {options.max_length}"),
    ):
        if count:
            print(f"{count} of {len(rows)} {name} {what}")
    if rows and not examples:
        raise ValueError(f"none of the {len(rows)} {name} is left to learn from")
    return examples


def conversation_style(style: str, tokenizer: Tokenizer) -> str:
    """Of messages: the checkpoint's template, if it has one and chatml is not asked for."""
    return "chatml" if style == "chatml" or tokenizer.chat_template is None else "chat"


def _as_chat(row: dict) -> dict:
    """An instruction and its answer as a turn of each."""
    if "instruction" not in row:
        return row
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    turn = dict(user=question, assistant=row["output"])
    return {"messages": [dict(role=role, content=content) for role, content in turn.items()]}


def _responses(batch: Sequence[dict], tokenizer: Tokenizer, options: PromptOptions, counts: dict) -> Iterator[Example]:
    """Of rows of instruction, input and output, or prompt and completion."""
    prompts = tokenizer.encode_batch(
        [
            row["prompt"] if "prompt" in row else render(options.style, row["instruction"], row["input"], tokenizer)
            for row in batch
        ]
    )
    said = [row["completion"] if "completion" in row else row["output"] for row in batch]
    for text, prompt, response in zip(said, prompts, tokenizer.encode_within(said), strict=True):
        response = response if prompt else tokenizer.encode(text)
        prompt = tokenizer.bos + prompt
        room = options.max_length - len(prompt) - 1
        if not text.strip():
            counts["empty"] += 1
        elif room < 1:
            counts["long"] += 1
        else:
            counts["cut"] += len(response) > room
            ids = np.array(prompt + response[:room] + [tokenizer.eos_id], dtype=np.int32)
            yield Example(ids, max(1, len(prompt)) if options.mask else 1)


def _texts(batch: Sequence[dict], tokenizer: Tokenizer, options: PromptOptions, counts: dict) -> Iterator[Example]:
    """Of texts to learn as they are, in pieces of max_length tokens."""
    texts = [row["text"] for row in batch if row["text"].strip()]
    counts["empty"] += len(batch) - len(texts)
    for ids in tokenizer.encode_batch(texts):
        ids = np.array([*tokenizer.bos, *ids, tokenizer.eos_id], dtype=np.int32)
        for start in range(0, len(ids) - 1, options.max_length - 1):  # neighbours share a token, learned by the first
            yield Example(ids[start : start + options.max_length], 1)


def _conversations(
    batch: Sequence[dict], tokenizer: Tokenizer, options: PromptOptions, counts: dict
) -> Iterator[Example]:
    style = conversation_style(options.style, tokenizer)
    check_style(style, tokenizer)
    said_nothing = [not any(is_learned(row["messages"])) for row in batch]
    counts["empty"] += sum(said_nothing)
    chats = [turns(tokenizer, style, row["messages"]) for row, empty in zip(batch, said_nothing) if not empty]
    first = iter(tokenizer.encode_batch([chat[0][0] for chat in chats]))
    later = iter(tokenizer.encode_within([text for chat in chats for text, _ in chat[1:]]))
    for chat in chats:
        ids, learned = [*tokenizer.bos], [False] * len(tokenizer.bos)
        for (_, said), piece in zip(chat, chain(islice(first, 1), later)):
            ids += piece
            learned += [said or not options.mask] * len(piece)
        counts["cut"] += len(ids) > options.max_length
        yield from _example(ids[: options.max_length], learned[: options.max_length], counts)


def _example(ids: list[int], learned: list[bool], counts: dict) -> Iterator[Example]:
    where = np.flatnonzero(learned[1:]) + 1
    if not len(where):
        counts["long"] += 1
        return
    first, end = int(where[0]), int(where[-1]) + 1
    of_targets: Any = np.array(learned[first:end])
    yield Example(np.array(ids[:end], dtype=np.int32), first, learned=None if of_targets.all() else of_targets)
