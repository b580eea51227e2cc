"""Data: files of rows. examples.py and classify.py make token examples of them. A row is one of

instruction, input (may be empty or absent), output      an instruction and its answer
prompt, completion                                        a text and what follows it, as they stand
messages                                                  a conversation: a list of role and content; ShareGPT's
                                                          conversations, lists of from and value, are read as such
text, label                                               for classification
text                                                      a text to learn as it is; a .txt file is some of them
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_model.files import refuse_pointer

KINDS = {  # what a row must have: what else it may have
    ("text", "label"): (),
    ("messages",): ("system",),
    ("conversations",): ("system",),
    ("instruction", "output"): ("input",),
    ("prompt", "completion"): (),
    ("text",): (),
}
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"} | {r: r for r in ("user", "assistant", "system")}
PIECE = 2000  # characters of a .txt file's rows, at least


@dataclass
class PromptOptions:
    """How the data is read."""

    style: str = "alpaca"
    """text around instruction and input: alpaca; chatml, turns between <|im_start|> and <|im_end|>; chat, the template
    of the checkpoint; or a text of your own, such as 'Q: {instruction} {input}\\nA:'. Messages are always chatml or
    chat: chat where it can be"""
    mask: bool = True
    """learn the response only; false: the prompt too"""
    max_length: int = 384
    """longest example in tokens; a longer response is cut and still ends in the end-of-text token, a longer
    conversation is cut where it is"""
    val_fraction: float = 0.05
    """share of the rows that is kept for validation and never trained on"""
    question: str = "Label:"
    """for rows of text and label: what stands between the two"""


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a .json (one list), .jsonl (one object a line), .csv or .txt file, all of one kind, see above.

    Raises ValueError with the file, and the line where there is one, that is no such row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; --data wants a .json, .jsonl, .csv or .txt file")
    refuse_pointer(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text in UTF-8 ({e.reason} at byte {e.start})") from None
    if "\0" in text:
        raise ValueError(f"{path} is no text: it holds zero bytes")
    if path.suffix.lower() == ".txt":
        rows, where = [(i, {"text": piece}) for i, piece in enumerate(_pieces(text), 1)], "piece"
    else:
        rows, where = _parsed(path, text)
    if not rows:
        raise ValueError(f"{path} holds no row")
    needed = _kind(rows[0][1])
    made = [_checked(row, needed, f"{path}, {where} {number}") for number, row in rows]
    known = {*needed, *KINDS[needed]}
    if unread := Counter(key for _, row in rows for key in row if row[key] and key not in known):
        print(f"{path}: not read: {', '.join(f'{key} (of {n} rows)' for key, n in unread.items())}")
    return made


def _kind(row: Any) -> tuple[str, ...]:
    """What rows of the kind of this one must have."""
    keys = set(row) if isinstance(row, dict) else set()
    if "label" in keys and "instruction" not in keys:
        return ("text", "label")
    fits = (needed for needed in KINDS if set(needed) <= keys and not (needed == ("text",) and len(keys & _KNOWN) > 1))
    return next(fits, ("instruction", "output"))


_KNOWN = {key for needed in KINDS for key in needed}


def _checked(row: Any, needed: tuple[str, ...], where: str) -> dict[str, Any]:
    """The row with the keys of its kind alone, texts as texts."""
    if not isinstance(row, dict) or not set(needed) <= row.keys():
        has = f"it is {json.dumps(row)[:40]}"
        if isinstance(row, dict):
            has = f"it has {', '.join(map(str, row)) or 'nothing'}"
        others = ""
        if needed == ("instruction", "output"):  # it is of no kind
            kinds = "; or ".join(" and ".join(kind) for kind in KINDS if kind != needed and kind != ("conversations",))
            others = f" (or {kinds}; in small letters, between commas)"
        raise ValueError(f"{where}: a row needs {' and '.join(needed)}; {has}{others}")
    if needed[0] in ("messages", "conversations"):
        return {"messages": _messages(row.get("system"), row[needed[0]], where)}
    made = {}
    for key in (*needed, *KINDS[needed]):
        value = row.get(key)
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"{where}: {key} is no text but {json.dumps(value)[:40]}")
        made[key] = "" if value is None else _encodable(str(value), where)
    if "label" in made:
        made["label"] = made["label"].strip()
        if not made["label"]:
            raise ValueError(f"{where}: the label is empty")
    if "instruction" in made:
        made = {key: made[key] for key in ("instruction", "input", "output")}
    return made


def _messages(system: Any, messages: Any, where: str) -> list[dict[str, Any]]:
    messages, made = messages if isinstance(messages, list) else [messages], []
    if system:
        messages = [dict(role="system", content=system), *messages]
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"{where}: a message is no object but {json.dumps(message)[:40]}")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: a message's role is {role!r}; known are {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise ValueError(f"{where}: a message calls tools, which is not supported")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"{where}: a message's content is no text but {json.dumps(content)[:40]}")
        made.append({"role": ROLES[role], "content": _encodable(content, where)})
        made[-1] |= {"weight": 0} if message.get("weight") == 0 else {}
    return made


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: {e.object[e.start]!r} is half a character of UTF-16, and no text") from None
    return text


def _pieces(text: str) -> list[str]:
    """Of PIECE characters and more: up to the end of a paragraph, of a line, of a word, whichever comes in time."""
    ends = "|".join(rf".{{{PIECE},{2 * PIECE}}}?{end}" for end in (r"(?:\n\n|\Z)", r"\n", r"\s"))
    pieces = (piece.strip("\n") for piece in re.findall(rf"{ends}|.{{1,{2 * PIECE}}}", text, re.DOTALL))
    return [piece for piece in pieces if piece.strip()]


def _parsed(path: Path, text: str) -> tuple[list[tuple[int, Any]], str]:
    """(the rows of a file with their numbers, what these count)"""
    if path.suffix.lower() == ".csv":
        csv.field_size_limit(2**31 - 1)  # a text may be long
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # or a quote left open takes all the rest
        try:
            rows = [(reader.line_num, {k: v for k, v in row.items() if v is not None}) for row in reader]
        except csv.Error as e:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV ({e})") from None
        if long := [number for number, row in rows if None in row]:
            what = "has more fields than the first line has names: put quotes around texts with commas"
            raise ValueError(f"{path}, line {long[0]}: it {what}")
        return rows, "line"
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
        hint = "; a file of one object a line is a .jsonl file" if where == "row" and e.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {number}: not JSON ({e.msg} at column {e.colno}{hint})") from None
    except (TypeError, RecursionError):
        raise ValueError(f"{path} holds no list of rows") from None
    except ValueError as e:  # a whole number of 5,000 digits
        raise ValueError(f"{path}: {e}") from None
    return rows, where


def files_of(data: Path | str) -> list[tuple[Path, float]]:
    """(file, weight) of `a.json`, or of several: `a.json,b.jsonl:0.5`. Raises ValueError for a weight that is none."""
    if Path(data).exists():  # its name may have commas
        return [(Path(data), 1.0)]
    found = []
    for part in str(data).split(","):
        name, _, weight = part.strip().rpartition(":")
        try:
            found.append((Path(name), float(weight)) if name else (Path(weight), 1.0))
        except ValueError:  # a colon of the name
            found.append((Path(part.strip()), 1.0))
        if not 0 < found[-1][1] <= 1000:
            raise ValueError(f"--data: the weight of {part} must be above 0, and at most 1000")
    return found


def weighted(rows: Sequence[dict], weight: float, seed: int) -> list[dict]:
    """Each row as often as `weight` says: of 2.5 each twice, and half of them, chosen by `seed`, once more."""
    whole, part = divmod(weight, 1)
    some = np.random.default_rng(seed).permutation(len(rows))[: round(part * len(rows))]
    return [*rows] * int(whole) + [rows[i] for i in sorted(some)]


def asked(row: dict) -> str:
    """What makes a row that row: of a text and its label the text."""
    return row["text"] if "label" in row else repr(row)


def split_rows(rows: Sequence[dict], val_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows), shuffled by `seed`. Repeated rows are dropped first: none is in both."""
    unique = list({asked(row): row for row in rows}.values())
    if len(unique) < len(rows):
        print(f"{len(rows) - len(unique)} of {len(rows)} rows left out: they repeat another one")
    if other := len({repr(row) for row in rows}) - len(unique):
        print(f"{other} of these repeat a text with another label: the last one counts")
    order = np.random.default_rng(seed).permutation(len(unique))
    n_val = max(1, round(val_fraction * len(unique))) if val_fraction else 0
    if n_val >= len(unique):
        raise ValueError(
            f"{len(unique)} rows are too few to keep {n_val} for validation (prompt.val_fraction) and train on others"
        )
    return [unique[i] for i in order[n_val:]], [unique[i] for i in order[:n_val]]
