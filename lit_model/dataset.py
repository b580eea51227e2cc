"""Files into the examples of a run: read, split, tokenized, and kept, so that the next run with the same files and the
same options begins at once."""

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from lit_model import chat, classify
from lit_model import data as data_module
from lit_model import examples as examples_module
from lit_model import tokenizer as tokenizer_module
from lit_model.data import PromptOptions, asked, files_of, read_rows, split_rows, weighted
from lit_model.examples import conversation_style, tokenize
from lit_model.files import replacing
from lit_model.packing import Example
from lit_model.tokenizer import Tokenizer

WORTH_KEEPING = 2.0  # seconds that making it took


@dataclass
class Dataset:
    train: list[Example]
    val: list[Example]
    task: classify.Task | None
    """of rows with text and label"""
    style: str
    """what generation has to put around a prompt"""


def read_dataset(
    data: Path | str,
    tokenizer: Tokenizer,
    options: PromptOptions,
    *,
    val_data: Path | None = None,
    head: str = "labels",
    seed: int = 0,
    limit: int | None = None,
    cache_dir: Path | None = None,
) -> Dataset:
    """The examples of one file or several.

    Args:
        data: a file, or several with weights: `a.json,b.jsonl:0.5`. val_data: the file to validate on, instead of a
            share of `data`.
        seed: of the split, and of the rows that a weight chooses. limit: train on so many rows only.
        cache_dir: where examples are kept that took long; None: nowhere.
    Raises:
        FileNotFoundError or ValueError: a file that is not there, or no such data.
    """
    files = files_of(data)
    kept = None
    if cache_dir is not None:
        key = hashlib.sha256()
        for path, weight in (*files, *([(val_data, 0)] if val_data else [])):
            if not path.is_file():
                read_rows(path)  # says what is wrong with it
            key.update(hashlib.sha256(path.read_bytes()).digest() + f"{weight}{path.suffix}".encode())
        modules = (classify, chat, data_module, examples_module, tokenizer_module)  # whose changes change examples
        for path in (__file__, *(module.__file__ for module in modules)):
            key.update(Path(path).read_bytes())
        if "strftime_now" in (tokenizer.chat_template or ""):
            key.update(str(date.today()).encode())
        key.update(json.dumps([asdict(options), head, seed, limit, tokenizer.fingerprint]).encode())
        kept = cache_dir / f"{key.hexdigest()[:32]}.npz"
        if kept.is_file():
            try:
                return _read(kept)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                print(f"{kept} is broken: its examples are made again")
    said, began = io.StringIO(), time.perf_counter()
    with redirect_stdout(said):
        try:
            made = _make(files, tokenizer, options, val_data, head, seed, limit)
        except ValueError as e:
            named = any(str(path) in str(e) for path in (*(path for path, _ in files), val_data))
            raise ValueError(e if named else f"{data_names(files)}: {e}") from None
    print(said.getvalue(), end="")
    if kept is not None and time.perf_counter() - began > WORTH_KEEPING:
        try:
            _write(kept, made, said.getvalue())
        except OSError as e:
            print(f"the examples are not kept for the next run: {e}")
    return made


def _make(
    files: Sequence[tuple[Path, float]],
    tokenizer: Tokenizer,
    options: PromptOptions,
    val_data: Path | None,
    head: str,
    seed: int,
    limit: int | None,
) -> Dataset:
    parts = [read_rows(path) for path, _ in files]
    everything = [row for part in parts for row in part]
    task = None
    if labelled := sum("label" in row for row in everything):
        if labelled < len(everything):
            raise ValueError(f"only some of {data_names(files)} have labels: rows to tell apart go with no others")
        task = classify.task_of(everything, head, options.question)
    elif head == "linear":
        raise ValueError(f"--head linear wants rows of text and label; those of {files[0][0]} have none")

    def examples(rows: Sequence[dict], name: str) -> list[Example]:
        if task is not None:
            return classify.examples(rows, tokenizer, options, task)
        return tokenize(rows, tokenizer, options, name)

    train, val = [], read_rows(val_data) if val_data else []
    if val_data and ("label" in val[0]) != (task is not None):
        raise ValueError(f"{val_data} has rows of another kind than {files[0][0]}")
    held, share = {asked(row) for row in val}, 0.0 if val_data else options.val_fraction
    splits = [split_rows([row for row in part if asked(row) not in held], share, seed) for part in parts]
    val = list({asked(row): row for row in [*val, *(row for _, of_val in splits for row in of_val)]}.values())
    never = {asked(row) for row in val}  # a row of two files may be in one's training part and the other's validation
    for (of_train, _), (_, weight) in zip(splits, files, strict=True):
        train += weighted([row for row in of_train if asked(row) not in never], weight, seed)
    if not train:
        raise ValueError(f"nothing is left to train on of {data_names(files)}")
    if overlap := sum(asked(row) in held for row in everything):
        print(f"{overlap} rows left out of training: {val_data} holds them, too")
    if len(files) > 1:
        train = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
    style, instructions = options.style, any("instruction" in row for row in everything)
    if any("messages" in row for row in everything):
        style = conversation_style(style, tokenizer)
        if instructions and style != options.style:
            print(f"instructions become turns, too, in the style {style}, as they go with messages")
        options = replace(options, style=style)
    elif task is None and not instructions:
        style = "none"
    return Dataset(examples(train[:limit], "training rows"), examples(val, "validation rows"), task, style)


def data_names(files: Sequence[tuple[Path, float]]) -> str:
    return ", ".join(str(path) for path, _ in files)


def _write(path: Path, made: Dataset, said: str) -> None:
    both = [*made.train, *made.val]
    flags = [e.learned if e.learned is not None else np.ones(e.n_targets, dtype=bool) for e in both]
    about = dict(n_train=len(made.train), task=made.task and asdict(made.task), said=said, style=made.style)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, open(aside, "wb") as file:
        np.savez(
            file,
            about=np.array(json.dumps(about)),
            ids=np.concatenate([e.ids for e in both]),
            lengths=np.array([len(e.ids) for e in both]),
            first=np.array([e.first_target for e in both]),
            learned=np.packbits(np.concatenate(flags)),
        )


def _read(path: Path) -> Dataset:
    with np.load(path) as stored:
        about: dict[str, Any] = json.loads(str(stored["about"]))
        ids, lengths, first, bits = (stored[name] for name in ("ids", "lengths", "first", "learned"))
    ends, n_targets = lengths.cumsum(), lengths - first
    flags = np.unpackbits(bits, count=int(n_targets.sum())).astype(bool)
    ends_of_flags = n_targets.cumsum()
    whole = np.logical_and.reduceat(flags, ends_of_flags - n_targets)
    made = []
    for end, n, f, flags_end, m, all_ in zip(
        *(a.tolist() for a in (ends, lengths, first, ends_of_flags, n_targets, whole))
    ):
        made.append(Example(ids[end - n : end], f, learned=None if all_ else flags[flags_end - m : flags_end]))
    print(about["said"], end="")
    print(f"examples taken from {path}")
    n_train = about["n_train"]
    return Dataset(made[:n_train], made[n_train:], about["task"] and classify.Task(**about["task"]), about["style"])
