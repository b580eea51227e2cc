"""Reading and writing files, with errors that name the file."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, Literal, get_args, get_origin

import torch
import yaml
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """The net round everything that parses a file: turns any error that its content causes into a ValueError that names
    the file. A missing file stays a FileNotFoundError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, FileNotFoundError):
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":  # of libraries in Rust
            raise
        reason = " ".join(str(e).split())[:300]
        if type(e) is not ValueError:  # ours; another one, such as JSON's, says little to a user
            reason = f"it is broken or only partly written ({type(e).__name__}: {reason})"
        raise ValueError(reason if str(path) in reason else f"{path}: {reason}") from e


def lock(path: Path, wait: bool = False) -> IO:
    """A lock file, held until it is closed or this process ends. Raises BlockingIOError if another process holds it,
    unless we are to wait. On Windows nothing is held."""
    file = open(path, "w")
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def refuse_pointer(path: Path) -> None:
    """Raises ValueError if Git has left a note of where the file is; FileNotFoundError without a file."""
    if not path.is_file():  # or a device that never ends
        raise FileNotFoundError(f"{path} is {'no file' if path.exists() else 'not there'}")
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a pointer of Git LFS and not the file itself: fetch it with 'git lfs pull'")


def read_yaml(path: Path) -> dict[str, Any]:
    """The options that a YAML file holds. Raises FileNotFoundError; ValueError if it holds none, or has tags, aliases
    or a depth that can run code, take all memory or end Python."""
    with reading(path):
        refuse_pointer(path)
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or depth > 50:
                line = event.start_mark.line + 1
                raise ValueError(f"line {line} has an alias, a tag or more than 50 levels, unlike a file of options")
        return dict(yaml.safe_load(text) or {})


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises FileNotFoundError; ValueError if it holds none."""
    with reading(path):
        refuse_pointer(path)
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


def validate_fields(instance: Any) -> None:
    """Raises ValueError for a field of a dataclass whose value is not of its type, or a number that is not above 0."""
    for f in fields(instance):
        value, types = getattr(instance, f.name), get_args(f.type) or (f.type,)
        if get_origin(f.type) is Literal:
            fits, expected = value in types, f"one of {', '.join(map(str, types))}"
        elif value is not None and {int, float} & {*types}:
            numbers, expected = ((int, float), "a number") if float in types else ((int,), "a whole number")
            fits, expected = type(value) in numbers and 0 < value < 2**40, f"{expected} above 0"
        else:
            fits, expected = isinstance(value, types), " or ".join(t.__name__ for t in types)
        if not fits:
            raise ValueError(f"{f.name} is {repr(value)[:60]}; it must be {expected}")


def require_positive(options: Any, *names: str) -> None:
    """Raises ValueError for a number among a method's options that is not above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{type(options).__name__.lower()}.{name} is {getattr(options, name)}; it must be above 0")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write the file `path`; renamed to it only when completely written and synced: a reader sees the old file
    or the new one, whatever happens. Another process writes to another place."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.unlink(missing_ok=True)  # a link that stands there would be followed
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes in one step."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """A file under a second name, in one step: a link where the file system knows them."""
    with replacing(target) as aside:
        try:
            os.link(source, aside)
        except OSError:
            shutil.copyfile(source, aside)


def stream_tensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file in one step, one tensor after the other as they come, so that no two need be in memory.

    The header stands first and is known last: room is kept for it, for tensors of these `shapes`, and what it does not
    need is filled with spaces, as the format allows.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    room = len(json.dumps(header)) + sum(len(name) + 24 * len(shape) + 122 for name, shape in shapes.items())
    room = math.ceil((8 + room) / 64) * 64 - 8
    with replacing(path) as aside, open(aside, "wb") as file:
        file.seek(8 + room)
        for name, t in _aligned(tensors):
            header[name] = dict(dtype=DTYPES[t.dtype], shape=list(t.shape), data_offsets=[end, end + t.nbytes])
            file.write(memoryview(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
            end += t.nbytes
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header, separators=(",", ":")).encode().ljust(room))


def cast(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype that it is to be stored in. Raises ValueError if that cannot hold one of its numbers."""
    stored = t.to(dtype)
    if not stored.isfinite().all() and t.isfinite().all():
        largest, kind = t.abs().max().item(), str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds {largest:.4g}, more than a {kind} can: store it with --dtype float32")
    return stored


def _aligned(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """In the order in which each lies at a multiple of its numbers' size: small ones of odd sizes come last."""
    uneven = []
    for name, t in tensors:
        if t.nbytes % 64:
            uneven.append((name, t))
        else:
            yield name, t
    yield from sorted(uneven, key=lambda named: -named[1].itemsize)


DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def refuse_used(folder: Path) -> None:
    """Raises ValueError if there is anything in `folder`: nothing is replaced."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name another folder, or remove it")
