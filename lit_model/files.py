"""Reading and writing with errors that name the file."""

import json
import os
from pathlib import Path
from typing import Any

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


def refuse_used(folder: Path) -> None:
    """Raises ValueError if `folder` holds a checkpoint, a finetuning run or the like: nothing there is replaced."""
    holds = [("lit_config.json", "a checkpoint"), ("hparams.yaml", "a finetuning run"), ("*.json", "other files")]
    for name, what in (*holds, ("*.safetensors", "weights")):
        if any(folder.glob(name)):
            raise ValueError(f"{folder} holds {what} already; name another folder or remove it")
