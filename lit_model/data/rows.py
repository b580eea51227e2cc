"""Rows: what a file of --data holds. examples.py and labels.py make token examples of them.

A row is one of
    instruction, input (may be empty or absent), output     an instruction and its answer
    prompt, completion                                       a text and its continuation, as they stand
    messages                                                 a conversation: a list of role and content
    conversations                                            ShareGPT's: a list of from and value, read as messages
    text, label                                              a text and its class
    text                                                     a text to learn as it is; a .txt file is many of them
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_model.files import reading, refuse_pointer

KINDS = {  # what a row must have: all that is read of it
    ("text", "label"): ("text", "label"),
    ("messages",): ("messages", "system"),
    ("conversations",): ("conversations", "system"),
    ("instruction", "output"): ("instruction", "input", "output"),
    ("prompt", "completion"): ("prompt", "completion"),
    ("text",): ("text",),
}
_KNOWN = {key for needed in KINDS for key in needed}
ROLES = dict(user="user", assistant="assistant", system="system", human="user", gpt="assistant", developer="system")
PIECE = 2000  # fewest characters of a row of a .txt file


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a .json (one list), .jsonl (one object a line), .csv or .txt file, all of one kind.

    Raises FileNotFoundError; ValueError with the file, and where there is one with the line, of what is no such row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; --data wants a .json, .jsonl, .csv or .txt file")
    refuse_pointer(path)
    with reading(path):
        unit, numbered = _parsed(path, _text_of(path))
    if not numbered:
        raise ValueError(f"{path} holds no row")
    needed, rows = _kind(numbered[0][1]), []
    for number, row in numbered:
        with reading(f"{path}, {unit} {number}"):
            rows.append(_validated(row, needed))
    unread = Counter(key for _, row in numbered for key in row if row[key] and key not in KINDS[needed])
    if unread:
        print(f"{path}: not read: {', '.join(f'{key} (of {n} rows)' for key, n in unread.items())}")
    return rows


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        fault = "it holds zero bytes" if "\0" in text else None
    except UnicodeDecodeError as e:
        fault = f"{e.reason} at byte {e.start}"
    if fault:
        raise ValueError(f"{path} is not text in UTF-8 ({fault})")
    return text


def _parsed(path: Path, text: str) -> tuple[str, list[tuple[int, Any]]]:
    """(what its numbers count, the numbered rows of a file)."""
    kind = path.suffix.lower()
    if kind == ".txt":
        return "piece", list(enumerate(({"text": piece} for piece in _pieces(text)), 1))
    if kind == ".csv":
        return "line", _csv(path, text)
    if kind == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return "line", [(number, _json(path, line, number)) for number, line in lines if line.strip()]
    return "row", list(enumerate(_json(path, text), 1))


def _json(path: Path, text: str, line: int | None = None) -> Any:
    """line: number of the line that `text` is; None: it is the whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        hint = "; a file of one object a line is a .jsonl file" if line is None and e.msg == "Extra data" else ""
        place = f"{path}, line {line or e.lineno}"
        raise ValueError(f"{place}: not JSON ({e.msg} at column {e.colno}{hint})") from None


def _csv(path: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    usual_limit = csv.field_size_limit(2**31 - 1)  # a text may be long
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # else an open quote takes all the rest
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({e})") from None
    finally:
        csv.field_size_limit(usual_limit)
    return [(number, {key: value for key, value in row.items() if value is not None}) for number, row in rows]


def _pieces(text: str) -> list[str]:
    """Pieces of at least PIECE characters: to the end of a paragraph, of a line, of a word, whichever comes in time."""
    ends = "|".join(rf".{{{PIECE},{2 * PIECE}}}?{end}" for end in (r"(?:\n\n|\Z)", r"\n", r"\s"))
    pieces = (piece.strip("\n") for piece in re.findall(rf"{ends}|.{{1,{2 * PIECE}}}", text, re.DOTALL))
    return [piece for piece in pieces if piece.strip()]


def _kind(row: Any) -> tuple[str, ...]:
    """What rows of the kind of this one must have."""
    keys = set(row) if isinstance(row, dict) else set()
    if "label" in keys and "instruction" not in keys:
        return ("text", "label")
    for needed in KINDS:
        alone = needed != ("text",) or len(keys & _KNOWN) == 1
        if alone and set(needed) <= keys:
            return needed
    return ("instruction", "output")


def _fault(row: Any, needed: tuple[str, ...]) -> str | None:
    """What is wrong with the keys of a row."""
    has = f"it is {json.dumps(row)[:40]}"
    if isinstance(row, dict):
        if None in row:
            return "it has more fields than the first line has names: put quotes around texts with commas"
        if set(needed) <= row.keys():
            return None
        has = f"it has {', '.join(map(str, row)) or 'nothing'}"
    others = ""
    if needed == ("instruction", "output"):  # perhaps it is of no kind
        kinds = "; or ".join(" and ".join(kind) for kind in KINDS if kind != needed and kind != ("conversations",))
        others = f" (or {kinds}; in small letters, between commas)"
    return f"a row needs {' and '.join(needed)}; {has}{others}"


def _validated(row: Any, needed: tuple[str, ...]) -> dict[str, Any]:
    """The row with the keys of its kind alone, in their order, and texts as texts."""
    if fault := _fault(row, needed):
        raise ValueError(fault)
    if needed[0] in ("messages", "conversations"):
        return {"messages": _messages(row.get("system"), row[needed[0]])}
    texts = {key: _text(key, row.get(key)) for key in KINDS[needed]}
    if "label" in texts:
        texts["label"] = texts["label"].strip()
    return texts


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{key} is no text but {json.dumps(value)[:40]}")
    text = "" if value is None else str(value)
    text.encode()  # fails for half a character of UTF-16, which JSON can spell
    return text


def _messages(system: Any, messages: Any) -> list[dict[str, Any]]:
    """Messages of role, content and, where one is not to be learned, weight 0."""
    messages = messages if isinstance(messages, list) else [messages]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    read = []
    for message in messages:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):  # a list of parts
            content = "".join(part["text"] for part in content)
        if role not in ROLES or not isinstance(content, str) or message.get("tool_calls"):
            needs = f"a message needs a role ({', '.join(ROLES)}) and content that is a text, without tool_calls"
            raise ValueError(f"{needs}; it is {json.dumps(message)[:80]}")
        read.append({"role": ROLES[role], "content": _text("content", content)})
        if message.get("weight") == 0:
            read[-1]["weight"] = 0
    return read


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
