"""Reading and writing with errors that name the file."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """The object that a JSON file holds. Raises FileNotFoundError; ValueError if it is none or lacks a `needed` key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there") from None
    except ValueError as e:  # no JSON, or no text
        raise ValueError(f"{path} is broken or only partly written ({e})") from None
    missing = [key for key in needed if key not in content] if isinstance(content, dict) else ["a JSON object"]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return content


def write_text(path: Path, text: str) -> None:
    """Writes in one step: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step. Raises OSError, and leaves nothing, if there is no room or no right."""
    aside = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, aside, metadata)
    except SafetensorError as e:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {e}") from None
    umask = os.umask(0)
    os.umask(umask)
    aside.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    os.replace(aside, path)


def stream_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes a safetensors file in one step, one tensor after the other as they come, so that no two need be in memory.

    The header stands first and is known last: room is kept for it, for tensors of these `shapes`, and what it does not
    need is filled with spaces, as the format allows.
    """
    room = sum(len(name) + 24 * len(shape) + 120 for name, shape in shapes.items()) // 64 * 64 + 64 - 8
    aside, header, end, uneven = path.with_name(path.name + ".partial"), {}, 0, []

    def write(name: str, t: Tensor) -> None:
        nonlocal end
        header[name] = dict(dtype=DTYPES[t.dtype], shape=list(t.shape), data_offsets=[end, end + t.nbytes])
        file.write(memoryview(t.contiguous().flatten().view(torch.uint8).numpy()))
        end += t.nbytes

    try:
        with open(aside, "wb") as file:
            file.seek(8 + room)
            for name, t in tensors:
                if t.nbytes % 64:
                    uneven.append((name, t))  # small ones; what stands behind them would not be aligned
                else:
                    write(name, t)
            for name, t in sorted(uneven, key=lambda named: -named[1].itemsize):
                write(name, t)
            file.seek(0)
            file.write(room.to_bytes(8, "little") + json.dumps(header, separators=(",", ":")).encode().ljust(room))
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def refuse_used(folder: Path) -> None:
    """Raises ValueError if `folder` holds a checkpoint, a finetuning run or the like: nothing there is replaced."""
    holds = [("lit_config.json", "a checkpoint"), ("hparams.yaml", "a finetuning run"), ("*.json", "other files")]
    holds += [("tokenizer.model", "a tokenizer"), ("chat_template.jinja", "a chat template")]
    for name, what in (*holds, ("*.safetensors", "weights")):
        if any(folder.glob(name)):
            raise ValueError(f"{folder} holds {what} already; name another folder or remove it")
