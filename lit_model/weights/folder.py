"""Hugging Face folders: a checkpoint as it was downloaded, read tensor by tensor from the mapped files, and written so
that transformers opens it. docs/weights.md says which files count.
"""

import hashlib
import json
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lit_model.families import Family, read_config, write_config
from lit_model.files import DTYPES, read_json, reading, refuse_pointer, replacing, stream_tensors
from lit_model.model import GPT, Config

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
OF_ALL_PARTS = "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config"
LANGUAGE = r"(?:language_model\.model|model\.language_model)\.(.+)|(?:language_model\.)?(lm_head\..+)"  # its tensors
SAMPLES, SAMPLE = 64, 32  # pieces of a tensor that its identity is made of, and numbers in a piece


class Folder:
    """An opened checkpoint folder. Tensors have our names and lie in the mapped files until they are read. Of a network
    with several parts (`text_config`) the language network is read, and a line on stderr says what is not.

    Raises FileNotFoundError: a file is missing. ValueError: config.json or the tensors are not of a supported kind.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        file = self.path / "config.json"
        if not file.is_file():
            hint = "a checkpoint folder comes from scripts/download.py or scripts/convert.py"
            raise FileNotFoundError(f"{file} is not there; {hint}")
        self.hf = read_json(file)
        is_wrapper = isinstance(self.hf.get("text_config"), dict)  # of a network that also sees or hears
        if is_wrapper:
            self.hf = {name: self.hf[name] for name in OF_ALL_PARTS if name in self.hf} | self.hf["text_config"]
        with reading(file):
            self.family, config = read_config(self.hf)
        self._open = cache(opened)
        own = re.compile(LANGUAGE if is_wrapper else rf"(?:{re.escape(self.family.prefix)})?(.+)()")
        self._file_of, skipped = {}, set()
        for name, path in self._stored().items():
            if match := own.fullmatch(name):
                self._file_of[match[1] or match[2]] = name, path
            else:
                skipped.add(".".join(name.split(".")[:2]))
        if skipped:
            print(f"{self.path}: read without {', '.join(sorted(skipped))}", file=sys.stderr)
        # a billion layers would take long to miss
        self.config = replace(config, n_layer=min(config.n_layer, len(self._file_of) or 1))
        self._shapes = network_shapes(self.config)
        sources = [stored for name in self._shapes for stored in self._sources(name)]
        if missing := [name for name in sources if name not in self._file_of]:
            raise ValueError(f"{self._weights} lacks {len(missing)} tensors, such as {self.family.prefix}{missing[0]}")
        others = self._file_of.keys() - {*sources, "lm_head.weight"}
        if strange := sorted(name for name in others if not name.endswith(self.family.ignored)):
            raise ValueError(f"{self._weights} has a tensor {strange[0]} that the model has no place for")
        if self.config.tie and "lm_head.weight" in self._file_of:  # one that differs is taken, as by transformers
            self._shapes["lm_head.weight"] = self._shapes["wte.weight"]
            self.config = replace(self.config, tie=self._sample("lm_head.weight") == self._sample("wte.weight"))
        self.names = [name for name in self._shapes if name != "lm_head.weight" or not self.config.tie]

    def tensor(self, name: str) -> Tensor:
        """Our tensor of this name, on the CPU: a view of the mapped file where it is stored as we have it."""
        is_tied = name == "lm_head.weight" and self.config.tie
        views = self._views("wte.weight" if is_tied else name)
        return torch.stack(views) if len(views) > 1 else views[0].contiguous()

    @cached_property
    def identity(self) -> str:
        """A hash of names, shapes, dtypes and 64 pieces of each tensor: equal for equal values in every format.
        Networks that differ in few numbers can share it."""
        identity = hashlib.sha256()
        for name in sorted(self.names):
            identity.update(name.encode() + self._sample(name))
        return identity.hexdigest()

    def _sample(self, name: str) -> bytes:
        content = b""
        for t in self._views(name):
            starts = torch.linspace(0, max(t.numel() - SAMPLE, 0), SAMPLES, dtype=torch.float64).long()
            index = (starts[:, None] + torch.arange(SAMPLE)).clamp(max=t.numel() - 1).flatten()
            values = t[torch.unravel_index(index, t.shape)].view(torch.uint8)
            content += f" {t.dtype} {tuple(t.shape)} ".encode() + values.numpy().tobytes()
        return content

    def _stored(self) -> dict[str, Path]:
        """Their name -> file of each tensor."""
        for file_name in ("model.safetensors", "pytorch_model.bin"):
            self._weights = self.path / file_name
            if self._weights.is_file():  # before an index, which may be left from another save
                return dict.fromkeys(self._open(self._weights).keys(), self._weights)
            self._weights = self.path / f"{file_name}.index.json"
            if self._weights.is_file():
                with reading(self._weights):
                    shards = read_json(self._weights)["weight_map"]
                    if any(Path(shard).name != shard for shard in shards.values()):
                        raise ValueError("it names a shard outside its folder")
                return {name: self.path / shard for name, shard in shards.items()}
        raise FileNotFoundError(f"{self.path} has no weights: neither model.safetensors nor pytorch_model.bin")

    def _sources(self, name: str) -> list[str]:
        """The stored tensors that our tensor `name` lies in: one, or one for each expert."""
        return expert_names(self.family.stored(name), self._shapes[name])

    def _views(self, name: str) -> list[Tensor]:
        fused, shape, views = self.family.fused(name), self._shapes[name], []
        rows, wanted = [self._shapes[other][0] for other in fused], shape[len(shape) == 3 :]  # of one expert
        for their_name, path in (self._file_of[source] for source in self._sources(name)):
            shard = self._open(path)
            with reading(path):
                t = shard[their_name] if isinstance(shard, dict) else shard.get_tensor(their_name)
                t = t.T if self.family.is_transposed(name) else t  # first, so that q, k and v lie one below the other
                if len(fused) > 1 and t.dim() and len(t) == sum(rows):
                    t = t.split(rows)[fused.index(name)]
                if t.shape != wanted or t.dtype not in DTYPES:
                    what = f"{tuple(t.shape)} of {t.dtype}".replace("torch.", "")
                    raise ValueError(f"{path}: {their_name} is {what}; the model wants {tuple(wanted)}, not quantized")
            views.append(t)
        return views


def expert_names(stored: str, shape: Sequence[int]) -> list[str]:
    """Names of the tensors that hold one of ours, of this shape."""
    return [stored.format(i) for i in range(shape[0])] if len(shape) == 3 else [stored]


def network_shapes(config: Config) -> dict[str, torch.Size]:
    """Name -> shape of all tensors of a network; a tied output layer is left out."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GPT(config).state_dict().items()}
    if config.tie:
        del shapes["lm_head.weight"]
    return shapes


def opened(path: Path) -> Any:
    """A .safetensors file, or the tensors of a torch.save file (.bin), mapped into memory where its format allows.
    Nothing but tensors is unpacked.

    Raises ValueError if it is no such file, or holds anything else.
    """
    refuse_pointer(path)
    with reading(path), warnings.catch_warnings(action="ignore"):  # of pickle's protocols
        if path.suffix != ".bin":
            return safe_open(path, framework="pt")
        if zipfile.is_zipfile(path) and any(i.compress_type for i in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except UnpicklingError:  # torch's own words advise to load it all the same
            raise ValueError("it is broken, or holds more than tensors, which could run code") from None
        for name, t in content.items():
            if not isinstance(name, str) or t.is_meta or t.nbytes > t.untyped_storage().nbytes():
                raise ValueError(f"{name} has no name or no numbers of its own: no network is made of it")
        return content


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that say how text becomes tokens and answers end: name -> content."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def save_folder(
    out_dir: Path,
    config: Config,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    files: Mapping[str, bytes],
    hf: dict[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder. config.json comes last: where it stands, the folder is complete.

    Args:
        tensors: our name -> tensor, or pairs of them in any order, of which one at a time is held in memory.
        files: name -> content of the tokenizer's files.
        hf: config.json of the network that this one was made from.

    Raises ValueError, leaving nothing, if the tensors are not exactly those of the network.
    """
    stated = write_config(config, hf)
    family, _ = read_config(stated)
    shapes, dtypes = network_shapes(config), set()

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, t in tensors.items() if isinstance(tensors, Mapping) else tensors:
            if config.tie and name == "lm_head.weight":
                continue
            if shapes.pop(name, None) != t.shape:
                fault = f"{name} {tuple(t.shape)} is no part of it, twice there or of another shape"
                raise ValueError(f"these weights do not make the network: {fault}")
            dtypes.add(t.dtype)
            yield name, t
        if shapes:
            raise ValueError(f"these weights do not make the network: {min(shapes)} is missing")

    is_new = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        names = {
            family.full_name(stored): shape
            for name, shape in shapes.items() for stored in expert_names(family.stored(name), shape)
        }  # fmt: skip
        stream_tensors(out_dir / "model.safetensors", _theirs(family, checked()), names, dict(format="pt"))
    except BaseException:
        if is_new:
            out_dir.rmdir()
        raise
    stated.pop("torch_dtype", None)
    stated["dtype"] = "float32" if len(dtypes) > 1 else str(dtypes.pop()).removeprefix("torch.")
    config_json = (json.dumps(stated, indent=2) + "\n").encode()
    for name, content in {**files, "config.json": config_json}.items():
        with replacing(out_dir / name) as aside:
            aside.write_bytes(content)


def _theirs(family: Family, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under transformers' name, fused and transposed as there."""
    waiting: dict[str, Tensor] = {}
    for name, t in tensors:
        if len(fused := family.fused(name)) > 1:
            waiting[name] = t
            if not waiting.keys() >= {*fused}:
                continue
            t = torch.cat([waiting.pop(other) for other in fused])
        t = t.T if family.is_transposed(name) else t
        stored = expert_names(family.full_name(family.stored(name)), t.shape)
        yield from zip(stored, t if len(stored) > 1 else [t], strict=True)
