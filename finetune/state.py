"""What an interrupted run resumes from, so that it ends as if nothing had happened.

out_dir/state/run.json                 options and data of the run, and its last step once it is finished
              step-N/state.safetensors what is trained, AdamW's two moments of it, and buffers: whole tensors, so that a
                                       run of FSDP resumes with another number of processes
              step-N/state.json        progress, states of the random numbers, and the sha256 of the tensors

A state is written aside, brought to the disk and renamed; the last two are kept. One that is cut off or altered differs
from its sha256, and the one before it is taken. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.devices import fill, gathered, whole
from lit_model.files import reading, stream_tensors, write_text
from lit_model.packing import Example

KEPT = 2
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
    n_tokens: int = 0
    seconds: float = 0.0
    """of training, without evaluations"""


def may_differ(default: Any) -> Any:
    """Marks an option that may change when a run resumes, since it changes no result beyond rounding."""
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

    def finished_step(self) -> int | None:
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
                hint = "name another --out_dir, or replace it with --overwrite"
                raise ValueError(f"{self.folder.parent} holds a run with {difference}: {hint}")
        return step

    def newest(self) -> Path | None:
        """The newest state that is whole; None if there is none. Says which ones are broken.

        Raises ValueError if states are there and none is whole.
        """
        paths = [path for path in self._all()[::-1] if path.suffix != ".partial"]
        for path in paths:
            try:
                if _sha256(path / "state.safetensors") == _read(path / "state.json")["sha256"]:
                    return path
                print(f"{path} is not used: state.safetensors is cut off or altered")
            except (ValueError, OSError, KeyError, TypeError) as e:
                print(f"{path} is not used: {e}")
        if paths:
            raise ValueError(f"no state in {self.folder} is whole: start anew with --overwrite")
        return None

    def begin(self, finished: int | None = None) -> None:
        """Another run begins here, or (finished: its last step) ends. What is not ours stays."""
        if self.rank == 0:
            self.folder.mkdir(exist_ok=True, parents=True)
            if finished is not None:  # before its states go: it is not to begin again
                _write(self.folder / "run.json", dict(identity=self.identity, finished=finished))
            for path in self._all():
                shutil.rmtree(path)
            _write(self.folder / "run.json", dict(identity=self.identity, finished=finished))

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Called by all processes at the same time. Raises OSError in all of them, and leaves what was there, if it
        cannot be written."""
        path = self.folder / f"step-{progress.step}"
        aside = path.with_suffix(".partial")
        random = gathered(_random_states())
        sliced = _tensors(network, optimizer)
        tensors = ((name, whole(t)) for name, t in sliced.items())
        failure = ""
        if self.rank == 0:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                file = aside / "state.safetensors"
                stream_tensors(file, tensors, {name: t.shape for name, t in sliced.items()})
                _write(aside / "state.json", dict(progress=asdict(progress), random=random, sha256=_sha256(file)))
                shutil.rmtree(path, ignore_errors=True)
                os.replace(aside, path)
            except OSError as e:
                shutil.rmtree(aside, ignore_errors=True)
                failure = str(e)
        for _ in tensors:  # all processes make each tensor whole together
            pass
        if failure := gathered(failure)[0]:
            raise OSError(f"{path} could not be written, the state before it is kept ({failure})")
        if self.rank == 0:
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
        with safe_open(path / "state.safetensors", framework="pt") as file:
            for name, t in _tensors(network, optimizer).items():
                fill(t, file.get_tensor(name))
        if self.rank < len(content["random"]):  # otherwise there were fewer processes
            states = {d: torch.tensor(list(bytes.fromhex(s))).byte() for d, s in content["random"][self.rank].items()}
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
        return progress


def _random_states() -> dict[str, str]:
    states = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: bytes(state.tolist()).hex() for device, state in states.items()}


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By name what is trained, AdamW's moments of it, and buffers (PiSSA's start: an SVD may differ next time): the
    tensors themselves."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    moments = {f"{moment}.{name}": optimizer.state[p][moment] for name, p in trained.items() for moment in MOMENTS}
    buffers = {f"buffer.{name}": b for name, b in network.named_buffers()}
    return {f"trained.{name}": p.detach() for name, p in trained.items()} | moments | buffers


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, sort_keys=True)
    write_text(path, json.dumps(dict(sha256=hashlib.sha256(text.encode()).hexdigest(), content=content), indent=1))


def _read(path: Path) -> dict[str, Any]:
    stored = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(stored["content"], sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != stored["sha256"]:
        raise ValueError(f"{path.name} is cut off or altered")
    return stored["content"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
