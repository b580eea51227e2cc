"""Hugging Face folders: a checkpoint as it was downloaded, read tensor by tensor from the mapped files, and written so
that transformers opens it.

    config.json                       the shape (families.py)
    model.safetensors                 or model.safetensors.index.json and its shards; else pytorch_model.bin, likewise
    tokenizer.json or tokenizer.model, tokenizer_config.json, ...

Other files (consolidated.*, original/, GGUF) are ignored.
"""

import hashlib
import json
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lit_model.families import Family, Source, read_config, write_config
from lit_model.files import DTYPES, read_json, reading, refuse_pointer, replacing, stream_tensors, write_text
from lit_model.model import GPT, Config

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
SAMPLES, SAMPLE = 64, 32  # pieces of a tensor that its identity is made of, and numbers in a piece


class Folder:
    """An opened checkpoint folder. Tensors have our names and lie in the mapped files until they are read.

    Raises FileNotFoundError: a file is missing. ValueError: config.json or the tensors are not of a supported kind.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        file = self.path / "config.json"
        if not file.is_file():
            old = (self.path / "lit_config.json").is_file()
            hint = "the folder is of an older format: make it anew with" if old else "a checkpoint folder comes from"
            raise FileNotFoundError(f"{file} is not there; {hint} scripts/download.py or scripts/convert.py")
        self.hf = read_json(file)
        with reading(file):
            self.family, self.config = read_config(self.hf)
        self._shards: dict[Path, Any] = {}
        self._file_of = {self._short(name): (name, path) for name, path in self._stored()}
        if self.config.n_layer > len(self._file_of):  # a network of a billion layers takes long to build
            raise ValueError(f"{self._weights} has {len(self._file_of)} tensors for {self.config.n_layer} layers")
        head_is_stored = self.config.tie and "lm_head.weight" in self._file_of
        self.config = replace(self.config, tie=self.config.tie and not head_is_stored)
        shapes = network_shapes(self.config)
        sources = {name: self.family.source(name).name for name in shapes}
        if missing := [name for name in sources.values() if name not in self._file_of]:
            raise ValueError(f"{self._weights} lacks {len(missing)} tensors, such as {self.family.prefix}{missing[0]}")
        others = self._file_of.keys() - {*sources.values()}
        if strange := sorted(name for name in others if not name.endswith(self.family.ignored)):
            raise ValueError(f"{self._weights} has a tensor {strange[0]} that the model has no place for")
        if head_is_stored and self._sample("lm_head.weight") == self._sample("wte.weight"):  # as transformers has it
            self.config = replace(self.config, tie=True)
        self.names = list(network_shapes(self.config))

    def tensor(self, name: str) -> Tensor:
        """Our tensor of this name, on the CPU: a view of the mapped file where it is stored as we have it."""
        return self._view(name).contiguous()

    @cached_property
    def identity(self) -> str:
        """A hash of names, shapes, dtypes and 64 pieces of each tensor: equal for equal values in every format.
        Networks that differ in few numbers can share it."""
        identity = hashlib.sha256()
        for name in sorted(self.names):
            identity.update(name.encode() + self._sample(name))
        return identity.hexdigest()

    def _sample(self, name: str) -> bytes:
        t = self._view(name)
        starts = torch.linspace(0, max(t.numel() - SAMPLE, 0), SAMPLES, dtype=torch.float64).long()
        index = (starts[:, None] + torch.arange(SAMPLE)).clamp(max=t.numel() - 1).flatten()
        values = t[torch.unravel_index(index, t.shape)].view(torch.uint8)
        return f" {t.dtype} {tuple(t.shape)} ".encode() + values.numpy().tobytes()

    def _short(self, name: str) -> str:
        return name.removeprefix(self.family.prefix)

    def _stored(self) -> Iterator[tuple[str, Path]]:
        """(their name, file) of each tensor."""
        for file_name in ("model.safetensors", "pytorch_model.bin"):
            self._weights = self.path / file_name
            index = self.path / f"{file_name}.index.json"
            if self._weights.is_file():  # before an index, which may be left from another save
                yield from ((name, self._weights) for name in self._open(self._weights).keys())
                return
            if index.is_file():
                self._weights = index
                with reading(index):
                    shards = dict(read_json(index)["weight_map"])
                    if any(Path(shard).name != shard for shard in shards.values()):
                        raise ValueError("it names a shard outside its folder")
                yield from ((name, self.path / shard) for name, shard in shards.items())
                return
        raise FileNotFoundError(f"{self.path} has no weights: neither model.safetensors nor pytorch_model.bin")

    def _open(self, path: Path) -> Any:
        if path not in self._shards:
            refuse_pointer(path)
            with reading(path):
                is_pickle = path.suffix == ".bin"
                self._shards[path] = unpickled(path) if is_pickle else safe_open(path, framework="pt")
        return self._shards[path]

    def _view(self, name: str) -> Tensor:
        source = self.family.source(name)
        their_name, path = self._file_of[source.name]
        shard = self._open(path)
        with reading(path):
            t = shard[their_name] if isinstance(shard, dict) else shard.get_tensor(their_name)
            t = t.T if source.transposed else t  # first, so that q, k and v lie one below the other
            t = t.chunk(len(self.family.fused))[source.part] if source.part is not None else t
            shapes = network_shapes(self.config)
            shape = shapes.get(name, shapes["wte.weight"])  # a tied output layer may be stored, too
            if t.shape != shape or t.dtype not in DTYPES:
                what = f"{tuple(t.shape)} of {t.dtype}".replace("torch.", "")
                raise ValueError(f"{path}: {their_name} is {what}; the model wants {tuple(shape)}, not quantized")
        return t


_SHAPES: dict[str, dict[str, torch.Size]] = {}


def network_shapes(config: Config) -> dict[str, torch.Size]:
    """Name -> shape of all tensors of a network; a tied output layer is left out."""
    key = repr(config)
    if key not in _SHAPES:
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in GPT(config).state_dict().items()}
        if config.tie:
            del shapes["lm_head.weight"]
        _SHAPES[key] = shapes
    return _SHAPES[key]


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, mapped into memory where its format allows. Nothing but tensors is unpacked.

    Raises ValueError if it is no such file, or holds anything else.
    """
    refuse_pointer(path)
    with reading(path), warnings.catch_warnings(action="ignore"):  # of pickle's protocols
        if zipfile.is_zipfile(path) and any(i.compress_type for i in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as e:  # a broken one can raise nearly anything
            hint = ", or holds more than tensors, which could run code" if "weights_only" in str(e) else ""
            raise ValueError(
                f"{path} is broken or only partly written{hint} ({str(e).splitlines()[0][:100]})"
            ) from None
        for name, t in content.items():
            is_dense = isinstance(name, str) and t.layout == torch.strided and not t.is_meta
            if not is_dense or t.nbytes > t.untyped_storage().nbytes():
                raise ValueError(f"{name} is a sparse or an expanded tensor or has no name: no network is made of it")
        return content


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that say how text becomes tokens and answers end: name -> content."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def save_folder(
    out_dir: Path,
    config: Config,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    files: Mapping[str, bytes],
    hf: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder. config.json comes last: where it stands, the folder is complete.

    Args:
        tensors: our name -> tensor, or pairs of them in any order, of which one at a time is held in memory.
        files: name -> content of the tokenizer's files.
        hf: config.json of the network that this one was made from.

    Raises ValueError, leaving nothing, if no family has this shape, or the tensors are not exactly those of it.
    """
    stated = write_config(config, dict(hf or {}))
    if stated is None:
        raise ValueError(f"no family of transformers has this shape: {config}")
    family, _ = read_config(stated)
    shapes, dtypes = dict(network_shapes(config)), set()

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, t in tensors.items() if isinstance(tensors, Mapping) else tensors:
            if config.tie and name == "lm_head.weight":
                continue
            if (shape := shapes.pop(name, None)) != t.shape:
                fault = (
                    "is twice there or no part of it" if shape is None else f"is {tuple(t.shape)}, not {tuple(shape)}"
                )
                raise ValueError(f"these weights do not make the network: {name} {fault}")
            dtypes.add(t.dtype)
            yield name, t
        if shapes:
            raise ValueError(f"these weights do not make the network: {min(shapes)} is missing")

    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        names = {family.full_name(family.source(name)): shape for name, shape in shapes.items()}
        stream_tensors(out_dir / "model.safetensors", _theirs(family, checked()), names, dict(format="pt"))
    except BaseException:
        if is_new:
            out_dir.rmdir()
        raise
    for name, content in files.items():
        with replacing(out_dir / name) as aside:
            aside.write_bytes(content)
    dtype = "float32" if len(dtypes) > 1 else str(dtypes.pop()).removeprefix("torch.")
    stated = {name: value for name, value in stated.items() if name != "torch_dtype"} | dict(dtype=dtype)
    write_text(out_dir / "config.json", json.dumps(stated, indent=2) + "\n")


def _theirs(family: Family, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under transformers' name, fused and transposed as there."""
    waiting: dict[Source, dict[int, Tensor]] = {}
    for name, t in tensors:
        source = family.source(name)
        if source.part is not None:
            parts = waiting.setdefault(source._replace(part=None), {})
            parts[source.part] = t
            if len(parts) < len(family.fused):
                continue
            t = torch.cat([parts[i] for i in range(len(parts))])
            parts.clear()
        yield family.full_name(source), t.T if source.transposed else t
