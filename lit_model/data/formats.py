"""Files of rows: a reader for each format, which yields places and values as they stand. rows.py makes rows of them.

A broken line comes as the reason, an Unusable, in place of its value, and the reader goes on behind it. What breaks the
file as a whole raises ValueError.
"""

import codecs
import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lit_model.files import refuse_pointer

WANTED = ".json, .jsonl, .ndjson, .csv, .tsv or .txt (all also as .gz), .parquet, or owner/name of the Hub"
ONE_A_LINE = "; a file of one object a line is a .jsonl file"
PIECE = 2000  # fewest characters of a piece of a .txt file
BATCH = 256  # rows of a parquet file that are read at a time
Values = Iterator[tuple[str, Any]]  # (where it stands in the file, the value)


class Unusable(ValueError):
    """Why a row cannot be used. `why` is the same for all rows with this fault; `how` shows this one."""

    def __init__(self, why: str, how: str):
        super().__init__(f"{why} ({how})")
        self.why = why


def values_of(path: Path) -> Values:
    return READERS[_ending(path)](path)


def files_behind(path: Path) -> list[Path]:
    """The file itself, or those of a data set on the Hub. Raises FileNotFoundError or ValueError."""
    known = _ending(path) in READERS
    if path.is_file() and known:
        refuse_pointer(path)
        return [path]
    if known or path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path.as_posix()):
        fault = "no file that can be read" if path.exists() else "not there"
        raise FileNotFoundError(f"{path} is {fault}; --data wants {WANTED}")
    return _from_hub(path.as_posix())


def _from_hub(name: str) -> list[Path]:
    """Parquet files of a data set, fetched into the Hub's cache: those of the train split, if their names tell."""
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        names = [file for file in list_repo_files(name, repo_type="dataset") if file.endswith(".parquet")]
        names = [file for file in names if "train" in file] or names
        files = [Path(hf_hub_download(name, file, repo_type="dataset")) for file in names]
        fault = "it has no parquet files; download a file of it and name that"
    except Exception as e:  # of the Hub or of the network, and these are other classes in every version
        files, fault = [], " ".join(f"{type(e).__name__}: {e}".split())[:200]
    if not files:
        raise ValueError(f"{name} is no file here, and cannot be read as a data set of the Hub: {fault}")
    print(f"data set {name} of the Hub: {', '.join(names)}")
    return files


def _ending(path: Path) -> str:
    """What says how a file is read."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text, with their ends."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        with opened(path, "rt", encoding="utf-16" if is_utf16 else "utf-8-sig", newline="") as file:
            for line in file:
                if "\0" in line:
                    raise UnicodeError("it holds zero bytes")
                yield line
    except UnicodeError as e:
        fault = f"is not text in UTF-8 or UTF-16 ({getattr(e, 'reason', e)}): save it as UTF-8"
        raise ValueError(f"{path} {fault}") from None


def _json_list(path: Path) -> Values:
    try:
        values = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as e:
        hint = ONE_A_LINE if e.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {e.lineno}: not JSON ({e.msg} at column {e.colno}{hint})") from None
    if not isinstance(values, list):
        raise ValueError(f"{path} holds no list of rows{ONE_A_LINE}")
    for number, value in enumerate(values, 1):
        yield f"row {number}", value


def _json_lines(path: Path) -> Values:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.strip())
        except (ValueError, RecursionError) as e:
            value = Unusable("not JSON", re.sub(r": line 1 (column \d+).*", r" at \1", str(e)))
        yield f"line {number}", value


def _table(path: Path) -> Values:
    """The first line has the names; what stands between them stands between the values, too."""
    lines = _lines(path)
    first = next(lines, "")
    delimiter = "\t" if _ending(path) == ".tsv" else max(",;\t", key=first.count)
    csv.field_size_limit(2**31 - 1)  # a text may be long
    rows = csv.DictReader(chain([first], lines), delimiter=delimiter, strict=True)
    rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
    while True:
        place = f"line {rows.reader.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as e:
            if "unexpected end" in str(e):  # the rows behind the quote are lost with it
                raise ValueError(f"{path}, {place}: not CSV (a quote is opened and never closed)") from None
            row = Unusable("not CSV", str(e))
        if row is None:
            return
        if not isinstance(row, Unusable) and None in row:
            row = Unusable("it has more fields than the first line has names", "put quotes around texts with commas")
        yield place, row


def _pieces(path: Path) -> Values:
    """Pieces of at least PIECE characters: to the end of a paragraph, of a line, of a word, whichever comes in time."""
    text = "".join(_lines(path)).replace("\r\n", "\n")
    ends = "|".join(rf".{{{PIECE},{2 * PIECE}}}?{end}" for end in (r"(?:\n\n|\Z)", r"\n", r"\s"))
    pieces = (piece.strip("\n") for piece in re.findall(rf"{ends}|.{{1,{2 * PIECE}}}", text, re.DOTALL))
    for number, piece in enumerate((piece for piece in pieces if piece.strip()), 1):
        yield f"piece {number}", {"text": piece}


def _parquet(path: Path) -> Values:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: parquet files are read by pyarrow: pip install pyarrow") from None
    number = 0
    with ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            for value in batch.to_pylist():
                number += 1
                yield f"row {number}", _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """A parquet file gives an object the keys of all objects in its column, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Values]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _pieces,
    ".parquet": _parquet,
}
