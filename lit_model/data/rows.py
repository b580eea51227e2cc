"""Rows: what --data names, each of one kind. formats.py reads the files; examples.py and labels.py make token examples.

a row has                                      it is returned with
instruction, output, perhaps input             instruction, input, output
prompt, completion: texts                      the same: a text and its continuation, as they stand
text, label                                    the same: a text and its class
text                                           the same: to learn as it is; a .txt file is many of them
messages, perhaps system and tools             messages, which begin with that system, and tools if there are some
conversations: ShareGPT's from and value       the same
prompt, completion: TRL's lists of messages    the same; those of the prompt are not learned

null, NaN and missing are the same. A message keeps its other keys: a checkpoint's template decides which it renders. A
row that cannot be used is left out, and a line says how many are, why, and where the first is.
"""

import json
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_model.data.formats import Unusable, files_behind, values_of
from lit_model.files import reading

KINDS = {  # what a row must have, the first that fits: what is read of it
    ("instruction", "output"): ("instruction", "input", "output"),
    ("messages",): ("messages", "system", "tools"),
    ("conversations",): ("conversations", "system", "tools"),
    ("text", "label"): ("text", "label"),
    ("prompt", "completion"): ("prompt", "completion"),
    ("text",): ("text",),
}
KEYS = {key for needed in KINDS for key in needed}
NEEDS = "a row needs instruction and output, or messages, or prompt and completion, or text and label, or text"
ROLES = {  # in files: as they are returned
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


class Row(dict):
    """What is read of a row, in one of the forms above."""

    place = ""


def place(row: dict) -> str:
    """The file of a row, and where in it; nothing for one that was not read from a file."""
    return getattr(row, "place", "")


class Notes:
    """What is to be said about rows: each reason once, with the number of its rows and the first of them.

    strict: a row that cannot be used raises ValueError, instead of being left out and counted.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.seen = 0  # rows in the files, used or not
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.last: dict[str, str] = {}  # place of the last row that was counted

    def add(self, what: str, place: str, details: object = "") -> None:
        """Counts a row once, however many turns of it are named one after the other."""
        if not place or self.last.get(what) != place:
            self.counts[what] += 1
        self.last[what] = place
        self.first.setdefault(what, f"{place}: {details}" if details else place)

    def leave_out(self, why: str, place: str, details: object = "") -> None:
        if self.strict:
            raise ValueError(f"{place}: {details or why}")
        self.add(f"left out: {why}", place, details)

    def add_unread(self, keys: Collection[str], place: str) -> None:
        if keys:
            self.add(f"have keys that are not read: {', '.join(sorted(keys))}", place)

    def say(self, of: int, name: str) -> None:
        """Prints a line for each reason. `of`: number of all rows; `name`: what they are called."""
        for what, n in self.counts.items():
            print(f"{n} of {of} {name} {what}" + (f" (first: {self.first[what]})" if self.first[what] else ""))


def read_rows(path: Path | str, notes: Notes | None = None, strict: bool = False) -> list[Row]:
    """Rows of a file or of a data set on the Hub, in the forms above. A file may mix them.

    Args:
        path: a .json (one list), .jsonl or .ndjson (one object a line), .csv, .tsv or .txt file, each also compressed
            as .gz; a .parquet file; or owner/name on the Hub.
        notes: takes what is to be said, and says itself whether to be strict; without it, that is printed.
        strict: refuse a file with a row that cannot be used.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no row can be used. It names the file, and why and where the first cannot.
    """
    said, rows = notes or Notes(strict), []
    for file in files_behind(Path(path)):
        with reading(file):
            for where, value in values_of(file):
                said.seen += 1
                at = f"{file}, {where}"
                try:
                    row, unread = _row(value)
                except (ValueError, TypeError, RecursionError) as e:
                    said.leave_out(getattr(e, "why", "they hold what is no text"), at, e)
                else:
                    rows.append(Row(row))
                    rows[-1].place = at
                    said.add_unread(unread, at)
    if not rows:
        raise ValueError(next(iter(said.first.values()), f"{path} holds no row"))
    if notes is None:
        said.say(said.seen, "rows")
    return rows


def _row(value: Any) -> tuple[dict[str, Any], list[str]]:
    """(the row in its form above, its keys that are not read). Raises Unusable."""
    if isinstance(value, Unusable):
        raise value
    _require(isinstance(value, dict), "a row is an object with names", value)
    row = _given(value)
    if not str(row.get("label", "")).strip():
        row.pop("label", None)
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        prompt, completion = (_objects(key, row.pop(key)) for key in ("prompt", "completion"))
        row["messages"] = [message | {"weight": 0} for message in prompt] + completion
    needed = next((keys for keys in KINDS if row.keys() >= {*keys}), None)
    _require(needed is not None and (needed != ("text",) or row.keys() & KEYS == {"text"}), NEEDS, row)
    _require(needed != ("prompt", "completion") or "label" not in row, "a completion with a label is not learned", row)
    unread = [key for key in row if key not in KINDS[needed] and row[key] not in ("", [])]
    if "tools" in KINDS[needed]:
        return _conversation(row, row[needed[0]]), unread
    texts = {key: _text(key, row.get(key, "")) for key in KINDS[needed]}
    if "label" in texts:
        texts["label"] = texts["label"].strip()
    return texts, unread


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without null and NaN, which is unlike itself."""
    return {key: value for key, value in values.items() if value is not None and value == value}


def _require(fits: bool, why: str, value: Any) -> None:
    if not fits:
        raise Unusable(why, f"it is {reprlib.repr(value)}")


def _text(key: str, value: Any) -> str:
    _require(isinstance(value, str | int | float), f"{key} is no text", value)
    text = str(value)
    text.encode()  # fails for half a character of UTF-16, which JSON can spell
    return text


def _conversation(row: dict[str, Any], messages: Any) -> dict[str, Any]:
    conversation = {"messages": [_message(message) for message in _objects("messages", messages)]}
    if row.get("system"):
        system = {"role": "system", "content": _text("system", row["system"])}
        conversation["messages"].insert(0, system)
    if tools := _objects("tools", row.get("tools")):
        conversation["tools"] = tools
    json.dumps(conversation, ensure_ascii=False).encode()  # fails for what no text can be made of
    return conversation


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """role, content, all other keys that have a value, and weight 0 if it is not to be learned."""
    others = {"role": message.get("from"), "content": message.get("value"), **_given(message)}
    role, content = others.pop("role"), others.pop("content")
    _require(isinstance(role, str) and role in ROLES, f"a message needs a role ({', '.join(ROLES)})", message)
    calls = _objects("tool_calls", others.pop("tool_calls", None))
    if role == "function_call":
        content, calls = _calls_in(content)
    content = "" if content is None and calls else _content(content)
    is_learned = 0 not in [others.pop(key, 1) for key in ("train", "weight", "loss_mask")]
    others = {key: value for key, value in others.items() if key not in ("from", "value") and value != ""}
    thinking = [others.pop(key) for key in ("reasoning", "thinking", "reasoning_content") if key in others]
    others |= {"reasoning_content": thinking[-1]} if thinking else {}
    if calls:
        others["tool_calls"] = [_with_arguments(call) for call in calls]
    return {"role": ROLES[role], "content": content} | others | ({} if is_learned else {"weight": 0})


def _content(content: Any) -> str:
    """A text, or the texts of a list of parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    _require(all(isinstance(text, str) for text in texts), "a message needs content that is a text", content)
    return "".join(texts)


def _calls_in(content: Any) -> tuple[Any, list[dict[str, Any]]]:
    """(content, tool calls) of ShareGPT's function_call: the calls are the content, in JSON."""
    calls = _loaded(content)
    calls = calls if isinstance(calls, list) else [calls]
    if all(isinstance(call, dict) and "name" in call for call in calls):
        return None, [{"type": "function", "function": call} for call in calls]
    return content, []


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The call with its arguments as an object, as templates want them, and not as its JSON text."""
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(arguments := _loaded(function.get("arguments")), dict):
        function["arguments"] = arguments
    return call


def _objects(key: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects, which may be given as JSON texts. No value is an empty list."""
    objects = _loaded(value or []) or []
    objects = [_loaded(one) for one in objects] if isinstance(objects, list) else [objects]
    _require(all(isinstance(one, dict) for one in objects), f"{key} is no list of objects", value)
    return objects


def _loaded(value: Any) -> Any:
    """What a JSON text holds; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def files_of(data: Path | str) -> list[tuple[Path, float]]:
    """(file, weight) of `a.json`, or of several: `a.json,b.jsonl:0.5`."""
    if Path(data).exists():  # its name may have commas
        return [(Path(data), 1.0)]
    files = []
    for part in str(data).split(","):
        name, weight = re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", part.strip()).groups()
        files.append((Path(name), float(weight or 1)))
    return files


def weighted(rows: Sequence[dict], weight: float, seed: int) -> list[dict]:
    """Each row as often as `weight` says: at 2.5 each twice, and half of them, chosen by `seed`, once more."""
    whole, part = divmod(weight, 1)
    some = np.random.default_rng(seed).permutation(len(rows))[: round(part * len(rows))]
    return [*rows] * int(whole) + [rows[i] for i in sorted(some)]


def row_key(row: dict) -> str:
    """What a repeated row repeats: of a text and its label the text."""
    return row["text"] if "label" in row else repr(row)


def split_rows(rows: Sequence[dict], val_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows), shuffled by `seed`. Repeated rows are dropped first: none is in both."""
    unique = list({row_key(row): row for row in rows}.values())
    if len(unique) < len(rows):
        print(f"{len(rows) - len(unique)} of {len(rows)} rows left out: they repeat another one")
    if other := len({repr(row) for row in rows}) - len(unique):
        print(f"{other} of these repeat a text with another label: the last one counts")
    order = np.random.default_rng(seed).permutation(len(unique))
    n_val = max(1, round(val_fraction * len(unique))) if val_fraction else 0
    if n_val and n_val >= len(unique):
        needs = f"to keep {n_val} for validation (examples.val_fraction) and train on others"
        raise ValueError(f"{len(unique)} rows are too few {needs}")
    return [unique[i] for i in order[n_val:]], [unique[i] for i in order[:n_val]]
