"""What a run that was interrupted goes on from, so that it ends as if nothing had happened.

out_dir/state/step-N/   tensors/*.safetensors    what is trained and AdamW's two moments of it, a file a process
                        random-R.safetensors     states of the random numbers of process R
                        state.json               everything else, and the sha256 of the other files and of itself
              run.json                           which run it is, before there is a state
              finished.json                      the run came to its end: there is nothing to go on with

A state is written aside, brought to the disk and renamed; the last two are kept. One that is cut off or altered is told
by its sha256, and the one before it is taken. Nothing is pickled. torch.distributed.checkpoint writes the tensors, so
that a run of FSDP goes on with another number of processes.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from finetune.devices import local
from lit_model.checkpoint import fingerprint_of
from lit_model.files import blamed_on, write_text
from lit_model.packing import Example

KEPT = 2
PIECE = 2**30  # bytes: a file of tensors is twice in the host's memory while it is written
# options that may differ when a run goes on: what it computes stays the same, up to rounding
FREE = (
    "checkpoint_dir", "data", "val_data", "out_dir", "devices", "strategy", "compile", "memory_gb", "deterministic",
    "overwrite", "resume", "dry_run", "train.row_tokens", "train.max_time", "train.sample", "train.save_every_minutes",
    "train.full_disk",
)  # fmt: skip
HASHED = ("base network", "examples")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    updates: int = 0
    """of the optimizer: fewer than steps if some were skipped"""
    first: float = float("nan")
    """validation loss at the start"""
    best: float = float("nan")
    stale: int = 0
    """evaluations since the best"""
    saved: bool = False
    first_verdict: dict[str, Any] | None = None
    best_verdict: dict[str, Any] | None = None
    meter: dict[str, float] = field(default_factory=dict)


def plain(value: Any) -> Any:
    """Options as what YAML and JSON know."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return str(value) if isinstance(value, Path) else value


def identity(options: Any, examples: list[Example]) -> dict[str, Any]:
    """What must be the same when a run goes on: options, base network, and the examples with their order."""
    ids = hashlib.sha256()
    for e in examples:
        ids.update(np.int64([len(e.ids), e.first_target]).tobytes() + e.ids.tobytes())
        ids.update(b"" if e.learned is None else e.learned.tobytes())
    settings = {name: value for name, value in _flat(plain(options)) if name not in FREE}
    return settings | dict(zip(HASHED, (fingerprint_of(options.checkpoint_dir), ids.hexdigest())))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class States:
    """The states of a run, in `out_dir/state`."""

    def __init__(self, out_dir: Path, identity: dict[str, Any], rank: int = 0):
        self.folder, self.identity, self.rank = out_dir / "state", identity, rank

    @staticmethod
    def any_in(out_dir: Path) -> bool:
        """Whether a run is there."""
        return any((out_dir / "state" / name).is_file() for name in ("run.json", "finished.json"))

    def newest(self) -> Path | None:
        """The newest state that is whole; None if there is none. Says which ones are broken.

        Raises ValueError if it is of a run with other options, or states are there and none is whole.
        """
        found = [path for path in self._all()[::-1] if path.suffix != ".partial"]
        for path in found:
            try:
                check(path)
            except (ValueError, OSError, KeyError, TypeError) as e:
                print(f"{path} is not used: {e}")
                continue
            self.same(_read(path / "state.json")["identity"])
            return path
        if found:
            raise ValueError(f"no state in {self.folder} is whole: start anew with --overwrite")
        if (path := self.folder / "run.json").is_file():  # stopped before its first state: it begins again
            with blamed_on(path):
                identity = _read(path)
            self.same(identity)
        return None

    def finished(self) -> int | None:
        """The last step of a run that has come to its end. Raises ValueError if it had other options."""
        path = self.folder / "finished.json"
        if not path.is_file():
            return None
        with blamed_on(path):
            content = _read(path)
            identity, step = content["identity"], content["step"]
        self.same(identity)
        return step

    def same(self, stored: dict[str, Any]) -> None:
        differ = [name for name in {**stored, **self.identity} if stored.get(name) != self.identity.get(name)]
        if differ:
            values = {name: f"{name} {stored.get(name)} there and {self.identity.get(name)} here" for name in differ}
            what = ", ".join(f"other {name}" if name in HASHED else values[name] for name in differ)
            where = self.folder.parent
            raise ValueError(f"{where} holds a run with {what}: name another --out_dir, or replace it with --overwrite")

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Called by all processes at the same time. Raises OSError in all of them, and leaves what was there, if it
        cannot be written in one."""
        path = self.folder / f"step-{progress.step}"
        aside = path.with_suffix(".partial")
        try:
            _together(lambda: self._empty(aside))
            sums = _together(lambda: self._write_own(aside, _tensors(network, optimizer)))
            _together(lambda: self._complete(aside, path, progress, {k: v for own in sums for k, v in own.items()}))
        except OSError as e:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"{path} could not be written, the state before it is kept ({e})") from None

    def _empty(self, aside: Path) -> None:
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "tensors").mkdir(parents=True)

    def _write_own(self, aside: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Writes what this process has. Returns the sha256 of each of its files."""
        ends = accumulate(local(t).nbytes for t in tensors.values())
        pieces = {name: 1 + end // PIECE for name, end in zip(tensors, ends)}
        writer = HuggingFaceStorageWriter(str(aside / "tensors"), pieces, save_distributed=True)
        with warnings.catch_warnings(action="ignore"):  # that there is one process alone
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        save_file(_random(), aside / f"random-{self.rank}.safetensors")
        own = self._own(aside)
        return dict(zip((str(file.relative_to(aside)) for file in own), _each(_to_disk, own)))

    def _complete(self, aside: Path, path: Path, progress: Progress, sums: dict[str, str]) -> None:
        if self.rank > 0:
            return
        _write(aside / "state.json", dict(progress=asdict(progress), identity=self.identity, sha256=sums))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
        _to_disk(self.folder)
        for cut_off in (other for other in self._all() if other.suffix == ".partial"):
            shutil.rmtree(cut_off, ignore_errors=True)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _all(self) -> list[Path]:
        """The states, whole and cut off, the newest last."""
        found = [path for path in self.folder.glob("step-*") if _number(path) >= 0 and path.is_dir()]
        return sorted(found, key=_number)

    def _own(self, folder: Path) -> list[Path]:
        """The files that this process has written."""
        files = [*(folder / "tensors").glob(f"shard-{self.rank + 1:05d}-*"), folder / f"random-{self.rank}.safetensors"]
        return [file for file in files if file.is_file()]

    def load(self, path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Puts everything back as it was. Called by all processes at the same time."""
        progress = Progress(**_read(path / "state.json")["progress"])
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            step = torch.tensor(float(progress.updates), device=p.device)
            moments = {name: torch.zeros_like(p) for name in MOMENTS} if progress.updates else {}
            optimizer.state[p] = dict(step=step, **moments) if moments else {}
        reader = HuggingFaceStorageReader(str(path / "tensors"))
        with warnings.catch_warnings(action="ignore"):
            dcp.load(_tensors(network, optimizer), storage_reader=reader, no_dist=not dist.is_initialized())
        random = path / f"random-{self.rank}.safetensors"
        if random.is_file():  # otherwise there were fewer processes
            states = load_file(random)
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
        return progress

    def finish(self, step: int) -> None:
        """The run is over: its states are no longer needed."""
        if self.rank == 0:
            self.folder.mkdir(exist_ok=True)
            _write(self.folder / "finished.json", dict(step=step, identity=self.identity))
            for path in self._all():
                shutil.rmtree(path)
            (self.folder / "run.json").unlink(missing_ok=True)

    def begin(self) -> None:
        """Another run begins here. What is not ours stays."""
        if self.rank == 0:
            for path in self._all():
                shutil.rmtree(path)
            (self.folder / "finished.json").unlink(missing_ok=True)
            self.folder.mkdir(exist_ok=True)
            _write(self.folder / "run.json", self.identity)


MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By name what is trained, AdamW's moments of it, and buffers (PiSSA's start: an SVD may differ next time): the
    tensors themselves."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    moments = {
        f"{moment}.{name}": optimizer.state[p][moment]
        for name, p in trained.items()
        for moment in MOMENTS
        if moment in optimizer.state.get(p, {})
    }
    buffers = {f"buffer.{name}": b for name, b in network.named_buffers()}
    return {f"trained.{name}": p.detach() for name, p in trained.items()} | moments | buffers


def _random() -> dict[str, Tensor]:
    return dict(cpu=torch.get_rng_state()) | (
        dict(cuda=torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else {}
    )


def check(path: Path) -> None:
    """Raises ValueError, with the name of the file, if a state is not whole."""
    sums = _read(path / "state.json")["sha256"]
    if missing := [name for name in sums if not (path / name).is_file()]:
        raise ValueError(f"{missing[0]} is missing")
    for (name, expected), got in zip(sums.items(), _each(_sha256, [path / name for name in sums])):
        if got != expected:
            raise ValueError(f"{name} has the sha256 {got[:12]}... instead of {expected[:12]}...: cut off or altered")


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, sort_keys=True)
    write_text(path, json.dumps(dict(sha256=hashlib.sha256(text.encode()).hexdigest(), content=content), indent=1))


def _read(path: Path) -> dict[str, Any]:
    whole = json.loads(path.read_text(encoding="utf-8"))
    if hashlib.sha256(json.dumps(whole["content"], sort_keys=True).encode()).hexdigest() != whole["sha256"]:
        raise ValueError(f"{path.name} is not what its sha256 says: cut off or altered")
    return whole["content"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _each(of: Callable[[Path], str], paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(of, paths))


def _to_disk(path: Path) -> str:
    """Waits until a file or folder is on the disk. Returns the sha256 of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _sha256(path) if path.is_file() else ""


def _number(path: Path) -> int:
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _together(do: Callable[[], Any]) -> list[Any]:
    """What it returns in each process. Raises OSError in all of them if it fails in one."""
    try:
        said = "", do()
    except (Exception, CheckpointException) as e:  # of whatever dcp does; that is no Exception
        said = " ".join(str(e).split())[-200:] or type(e).__name__, None
    everyones = [said]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, said)
    for failure, _ in everyones:
        if failure:
            raise OSError(failure)
    return [value for _, value in everyones]
