"""Files into the examples of a run: read, split, weighted, tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_model.data.examples import ExampleOptions, conversation_style, tokenize, validate_style
from lit_model.data.rows import Row, files_of, read_rows, row_key, split_rows, weighted
from lit_model.data.tokenizer import Tokenizer
from lit_model.files import reading
from lit_model.packing import Example

if TYPE_CHECKING:  # imported below where rows have labels
    from lit_model.data.labels import Task


@dataclass
class Dataset:
    train: list[Example]
    val: list[Example]
    task: "Task | None"
    """of rows with text and label"""
    style: str
    """what generation has to put around a prompt"""


def read_dataset(
    data: Path | str,
    tokenizer: Tokenizer,
    options: ExampleOptions,
    *,
    val_data: Path | None = None,
    head: str = "labels",
    seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """The examples of one file or several.

    Args:
        data: a file, or several with weights: `a.json,b.jsonl:0.5`.
        val_data: the file to validate on, instead of a share of `data`.
        head: what classifies rows of text and label, see labels.py.
        seed: of the split, and of the rows that a weight chooses.
        limit: train on this many rows only.
    Raises:
        FileNotFoundError or ValueError: a file that is not there, or no such data.
    """
    files = files_of(data)
    val = read_rows(val_data, strict=options.strict) if val_data else []
    parts = [read_rows(path, strict=options.strict) for path, _ in files]
    names = ", ".join(str(path) for path, _ in files)
    style, task = style_of([*val, *(row for part in parts for row in part)], tokenizer, options, head, names)
    train, val = _split(parts, [weight for _, weight in files], val, options.val_fraction, seed)
    options, both = replace(options, style=style), []
    for part, name in ((train[:limit], "training rows"), (val, "validation rows")):
        made = tokenize(part, tokenizer, options, name, task)
        if not made and (part or name == "training rows"):
            raise ValueError(f"{names}: none of the {len(part)} {name} is left to learn from")
        both.append(made)
    return Dataset(*both, task, style)


def style_of(
    rows: Sequence[Row], tokenizer: Tokenizer, options: ExampleOptions, head: str, names: str
) -> "tuple[str, Task | None]":
    """The one style of all rows, and the task of rows with text and label.

    Raises ValueError if only some rows have labels, or the style leaves out the input of one.
    """
    n_labelled = sum("label" in row for row in rows)
    if n_labelled < len(rows) and (n_labelled or head == "linear"):
        have = f"{n_labelled} of {len(rows)} rows have text and label"
        raise ValueError(f"{names}: {have}; to classify, as with --head linear, all rows need both")
    if n_labelled:
        from lit_model.data.labels import task_of

        with reading(names):
            task = task_of(rows, head, options.style)
        return task.style, task
    instructions = any("instruction" in row for row in rows)
    if not any("messages" in row for row in rows):  # bare texts take none
        return options.style if instructions else "none", None
    of_messages = conversation_style(options.style, tokenizer)
    validate_style(of_messages, tokenizer)
    if instructions and of_messages != options.style:
        print(f"instructions become turns, too, in the style {of_messages}, as they go with messages")
    return of_messages, None


def _split(
    parts: Sequence[list[dict]], weights: Sequence[float], val: list[dict], val_fraction: float, seed: int
) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows) of files with weights. `val`: the rows of val_data, in place of a share."""
    given = {row_key(row) for row in val}
    if overlap := sum(row_key(row) in given for part in parts for row in part):
        print(f"{overlap} rows left out of training: the validation file holds them, too")
    others = [[row for row in part if row_key(row) not in given] for part in parts]
    splits = [split_rows(part, 0.0 if val else val_fraction, seed) for part in others]
    val = list({row_key(row): row for row in [*val, *(row for _, of_val in splits for row in of_val)]}.values())
    never = {row_key(row) for row in val}  # what one file validates on, another may train on
    train = []
    for (of_train, _), weight in zip(splits, weights, strict=True):
        train += weighted([row for row in of_train if row_key(row) not in never], weight, seed)
    if len(parts) > 1:
        train = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
    return train, val
