"""Data: rows of `instruction`, `input` (may be empty or absent) and `output`, made into token examples; or rows of
`text` and `label`, for classify.py.

Prompt and response are tokenized apart and joined as ids, so that no token spans the boundary and a prompt has the same
ids in training and in generation. Only the response and the end-of-text token after it are trained on.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from lit_model.packing import Example
from lit_model.tokenizer import Tokenizer

KEYS = ("instruction", "input", "output")


@dataclass
class PromptOptions:
    """How the data is read."""

    style: Literal["alpaca", "chatml"] = "alpaca"
    """text around instruction and input: Alpaca's, or chat turns between <|im_start|> and <|im_end|>"""
    mask: bool = True
    """learn the response only; false: the prompt too"""
    max_length: int = 384
    """longest example in tokens; a longer response is cut and still ends in the end-of-text token"""
    val_fraction: float = 0.05
    """share of the rows that is kept for validation and never trained on"""
    question: str = "Label:"
    """for rows of text and label: what stands between the two"""


def render(style: str, instruction: str, input: str = "") -> str:
    """The prompt that a response follows. The alpaca text is that of https://github.com/tatsu-lab/stanford_alpaca."""
    if style == "chatml":
        question = f"{instruction}\n\n{input}" if input else instruction
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
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


def read_rows(path: Path | str) -> list[dict[str, str]]:
    """Rows of a .json (one list), .jsonl (one object a line) or .csv file, each with instruction, input and output, or
    all with text and label.

    Raises ValueError with the file, and the line where there is one, that is no such row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; --data wants a .json, .jsonl or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text in UTF-8 ({e.reason} at byte {e.start})") from None
    rows, where = _parsed(path, text)
    if not rows:
        raise ValueError(f"{path} holds no row")
    first = rows[0][1].keys() if isinstance(rows[0][1], dict) else set()
    labelled = {"text", "label"} <= first or (bool({"text", "label"} & first) and "instruction" not in first)
    keys, needed = (("text", "label"),) * 2 if labelled else (KEYS, ("instruction", "output"))
    for number, row in rows:
        if not isinstance(row, dict) or not set(needed) <= row.keys():
            has = f"it is {json.dumps(row)[:40]}"
            if isinstance(row, dict):
                has = f"it has {', '.join(map(str, row)) or 'nothing'}"
            raise ValueError(f"{path}, {where} {number}: a row needs {' and '.join(needed)}; {has}")
        for key in keys:
            if not isinstance(row.get(key, ""), str | int | float | None):
                raise ValueError(f"{path}, {where} {number}: {key} is no text but {json.dumps(row[key])[:40]}")
        if labelled and (row["label"] is None or not str(row["label"]).strip()):
            raise ValueError(f"{path}, {where} {number}: the label is empty")
    texts = [{key: "" if row.get(key) is None else str(row[key]) for key in keys} for _, row in rows]
    return [row | {"label": row["label"].strip()} for row in texts] if labelled else texts


def _parsed(path: Path, text: str) -> tuple[list[tuple[int, Any]], str]:
    """(the rows of a file with their numbers, what these count)"""
    if path.suffix.lower() == ".csv":
        csv.field_size_limit(2**31 - 1)  # a text may be long
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            return [(reader.line_num, {k: v for k, v in row.items() if v is not None}) for row in reader], "line"
        except csv.Error as e:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({e})") from None
    rows, where = [], "row"
    try:
        if path.suffix.lower() == ".jsonl":
            where = "line"
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((number, json.loads(line)))
        else:
            rows = list(enumerate(json.loads(text), 1))
    except json.JSONDecodeError as e:
        number = number if where == "line" else e.lineno
        raise ValueError(f"{path}, line {number}: not JSON ({e.msg} at column {e.colno})") from None
    except TypeError:
        raise ValueError(f"{path} holds no list of rows") from None
    return rows, where


def split_rows(rows: Sequence[dict], val_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows), shuffled by `seed`. Repeated rows are dropped first: none is in both."""
    unique = list({row.get("text", tuple(row.values())): row for row in rows}.values())
    if len(unique) < len(rows):
        print(f"{len(rows) - len(unique)} of {len(rows)} rows left out: they repeat another one")
    if other := len({tuple(row.values()) for row in rows}) - len(unique):
        print(f"{other} of these repeat a text with another label: the last one counts")
    order = np.random.default_rng(seed).permutation(len(unique))
    n_val = max(1, round(val_fraction * len(unique))) if val_fraction else 0
    if n_val >= len(unique):
        raise ValueError(
            f"{len(unique)} rows are too few to keep {n_val} for validation (prompt.val_fraction) and train on others"
        )
    return [unique[i] for i in order[n_val:]], [unique[i] for i in order[:n_val]]


def tokenize(rows: Sequence[dict], tokenizer: Tokenizer, options: PromptOptions, name: str = "rows") -> list[Example]:
    """Token examples of `rows`, in order. Rows with an empty output, and those whose prompt leaves no room for a
    response within `max_length`, are left out, and a line says how many."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    examples, empty, long, cut = [], 0, 0, 0
    for start in tqdm(range(0, len(rows), 256), desc=f"tokenizing {len(rows)} {name}", unit_scale=256, leave=False):
        batch = rows[start : start + 256]
        prompts = tokenizer.encode_batch([render(options.style, row["instruction"], row["input"]) for row in batch])
        responses = tokenizer.encode_batch([row["output"] for row in batch])
        for row, prompt, response in zip(batch, prompts, responses, strict=True):
            prompt = bos + prompt
            room = options.max_length - len(prompt) - 1
            if not row["output"].strip():
                empty += 1
            elif room < 1:
                long += 1
            else:
                cut += len(response) > room
                ids = np.array(prompt + response[:room] + [tokenizer.eos_id], dtype=np.int32)
                examples.append(Example(ids, len(prompt) if options.mask else 1))
    for count, what in (
        (empty, "left out: their output is empty"),
        (long, f"left out: their prompt alone fills prompt.max_length {options.max_length}"),
        (cut, f"cut to prompt.max_length {options.max_length}"),
    ):
        if count:
            print(f"{count} of {len(rows)} {name} {what}")
    if rows and not examples:
        raise ValueError(f"none of the {len(rows)} {name} is left to learn from")
    return examples
