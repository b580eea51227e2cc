"""What an interrupted run resumes from, so that it ends as if nothing had happened.

out_dir/state/run.json            options and data of the run, and its last step once it is finished
              step-N/tensors/*    what is trained and AdamW's two moments of it, by torch.distributed.checkpoint: a run
                                  of FSDP resumes with another number of processes
              step-N/state.json   progress, states of the random numbers, and the sha256 of every file

A state is written aside, brought to the disk and renamed; the last two are kept. One that is cut off or altered differs
from its sha256, and the one before it is taken. Nothing is pickled.
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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from finetune.devices import local
from lit_model.files import reading, write_text
from lit_model.packing import Example

KEPT = 2
PIECE = 2**30  # bytes: a file of tensors is twice in the host's memory while it is written
MOMENTS = ("exp_avg", "exp_avg_sq")
HASHED = ("base network", "examples")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    stale: int = 0
    """evaluations since the best"""
    first: dict[str, float] = field(default_factory=dict)
    """numbers of the evaluation before training"""
    best: dict[str, float] = field(default_factory=dict)
    """numbers of the best evaluation"""
    counts: dict[str, float] = field(default_factory=dict)
    """what the meter has counted"""


def may_differ(default: Any) -> Any:
    """An option that may differ when a run resumes: what it computes stays the same, up to rounding."""
    return field(default=default, metadata=dict(may_differ=True))


def plain(value: Any) -> Any:
    """Options as what YAML and JSON know."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return str(value) if isinstance(value, Path) else value


def identity(options: Any, base: str, examples: list[Example]) -> dict[str, Any]:
    """What must be the same when a run resumes: options, base network, and the examples with their order."""
    ids = hashlib.sha256()
    for e in examples:
        learned = b"" if e.learned is None else e.learned.tobytes()
        ids.update(f"{len(e.ids)} {e.first_target}".encode() + e.ids.tobytes() + learned)
    return dict(_settings(options)) | dict(zip(HASHED, (base, ids.hexdigest())))


def _settings(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value):
            yield from _settings(value, f"{prefix}{f.name}.")
        elif not f.metadata.get("may_differ"):
            yield prefix + f.name, plain(value)


class States:
    """The states of a run, in `out_dir/state`."""

    def __init__(self, out_dir: Path, identity: dict[str, Any], rank: int = 0):
        self.folder, self.identity, self.rank = out_dir / "state", identity, rank

    def finished(self) -> int | None:
        """Last step of the run that is here; None if it is not finished, or there is none.

        Raises ValueError if it had other options or data.
        """
        path = self.folder / "run.json"
        if not path.is_file():
            return None
        with reading(path):
            run = _read(path)
            stored, step = run["identity"], run["finished"]
        for name in {**stored, **self.identity}:
            there, here = stored.get(name), self.identity.get(name)
            if there != here:
                difference = f"another {name}" if name in HASHED else f"{name} {there} there and {here} here"
                raise ValueError(
                    f"{self.folder.parent} holds a run with {difference}: name another --out_dir, or replace it with "
                    "--overwrite"
                )
        return step

    def newest(self) -> Path | None:
        """The newest state that is whole; None if there is none. Says which ones are broken.

        Raises ValueError if states are there and none is whole.
        """
        paths = [path for path in self._all()[::-1] if path.suffix != ".partial"]
        for path in paths:
            try:
                _verify(path)
                return path
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
                print(f"{path} is not used: {e}")
        if paths:
            raise ValueError(f"no state in {self.folder} is whole: start anew with --overwrite")
        return None

    def begin(self) -> None:
        """Another run begins here. What is not ours stays."""
        self._clear(None)

    def finish(self, step: int) -> None:
        """The run is over: its states are no longer needed."""
        self._clear(step)

    def _clear(self, finished: int | None) -> None:
        if self.rank == 0:
            self.folder.mkdir(exist_ok=True, parents=True)
            if finished is not None:
                _write(self.folder / "run.json", dict(identity=self.identity, finished=finished))
            for path in self._all():
                shutil.rmtree(path)
            _write(self.folder / "run.json", dict(identity=self.identity, finished=finished))

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Called by all processes at the same time. Raises OSError in all of them, and leaves what was there, if it
        cannot be written in one."""
        path = self.folder / f"step-{progress.step}"
        aside = path.with_suffix(".partial")
        try:
            _together(lambda: self._empty(aside))
            random = _together(lambda: self._write_tensors(aside, _tensors(network, optimizer)))
            _together(lambda: self._complete(aside, path, progress, random))
        except OSError as e:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"{path} could not be written, the state before it is kept ({e})") from None

    def _empty(self, aside: Path) -> None:
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "tensors").mkdir(parents=True)

    def _write_tensors(self, aside: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Writes the tensors that this process has. Returns the states of its random numbers."""
        ends = accumulate(local(t).nbytes for t in tensors.values())
        pieces = {name: 1 + end // PIECE for name, end in zip(tensors, ends)}
        writer = HuggingFaceStorageWriter(str(aside / "tensors"), pieces, save_distributed=True)
        with warnings.catch_warnings(action="ignore"):  # that there is one process alone
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        states = dict(cpu=torch.get_rng_state())
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state()
        return {device: bytes(state.tolist()).hex() for device, state in states.items()}

    def _complete(self, aside: Path, path: Path, progress: Progress, random: list[dict[str, str]]) -> None:
        if self.rank > 0:
            return
        files = sorted((aside / "tensors").iterdir())
        sums = dict(zip((str(file.relative_to(aside)) for file in files), _each(_to_disk, files)))
        _write(aside / "state.json", dict(progress=asdict(progress), random=random, sha256=sums))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
        _to_disk(self.folder)
        for old in [other for other in self._all() if other.suffix == ".partial"] + self._all()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _all(self) -> list[Path]:
        """The states, whole and cut off, the newest last."""
        paths = [path for path in self.folder.glob("step-*") if path.is_dir() and path.stem[5:].isdigit()]
        return sorted(paths, key=lambda path: int(path.stem[5:]))

    def load(self, path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Puts everything back as it was. Called by all processes at the same time."""
        content = _read(path / "state.json")
        progress = Progress(**content["progress"])
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            step = torch.tensor(float(progress.step), device=p.device)
            optimizer.state[p] = dict(step=step) | {name: torch.zeros_like(p) for name in MOMENTS}
        reader = HuggingFaceStorageReader(str(path / "tensors"))
        with warnings.catch_warnings(action="ignore"):
            dcp.load(_tensors(network, optimizer), storage_reader=reader, no_dist=not dist.is_initialized())
        if self.rank < len(content["random"]):  # otherwise there were fewer processes
            states = {d: torch.tensor(list(bytes.fromhex(s))).byte() for d, s in content["random"][self.rank].items()}
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
        return progress


@torch.no_grad()
def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By name what is trained, AdamW's moments of it, and buffers (PiSSA's start: an SVD may differ next time): the
    tensors themselves."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    moments = {f"{moment}.{name}": optimizer.state[p][moment] for name, p in trained.items() for moment in MOMENTS}
    buffers = {f"buffer.{name}": b for name, b in network.named_buffers()}
    return {f"trained.{name}": p.detach() for name, p in trained.items()} | moments | buffers


def _verify(path: Path) -> None:
    """Raises ValueError or OSError, with the name of the file, if a state is not whole."""
    sums = _read(path / "state.json")["sha256"]
    for (name, expected), actual in zip(sums.items(), _each(_sha256, [path / name for name in sums])):
        if actual != expected:
            raise ValueError(f"{name} is cut off or altered: its sha256 is {actual[:12]}... and not {expected[:12]}...")


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, sort_keys=True)
    write_text(path, json.dumps(dict(sha256=hashlib.sha256(text.encode()).hexdigest(), content=content), indent=1))


def _read(path: Path) -> dict[str, Any]:
    whole = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(whole["content"], sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != whole["sha256"]:
        raise ValueError(f"{path.name} is cut off or altered: its content differs from its sha256")
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


def _together(do: Callable[[], Any]) -> list[Any]:
    """What it returns in each process. Raises OSError in all of them if it fails in one."""
    try:
        result = "", do()
    except (Exception, CheckpointException) as e:  # whatever dcp raises; CheckpointException is no Exception
        result = " ".join(str(e).split())[-200:] or type(e).__name__, None
    results = [result]
    if dist.is_initialized():
        results = [None] * dist.get_world_size()
        dist.all_gather_object(results, result)
    for failure, _ in results:
        if failure:
            raise OSError(failure)
    return [value for _, value in results]
