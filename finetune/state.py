"""What an interrupted run resumes from, so that it ends as if nothing had happened.

out_dir/state.safetensors   what is trained, AdamW's two moments of it, and buffers: whole tensors, so that a run of
                            FSDP resumes with another number of processes; none before the first save and after the end
        its header          options and data of the run, its progress, and the states of its random numbers

A state replaces the one before it in one step, when it has been brought to the disk. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.devices import fill, gathered, whole
from lit_model.files import reading, stream_tensors
from lit_model.packing import Example

MOMENTS = ("exp_avg", "exp_avg_sq")
HASHED = ("base network", "examples")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    stale: int = 0  # evaluations since the best
    first: dict[str, float] = field(default_factory=dict)  # numbers of the evaluation before training
    best: dict[str, float] = field(default_factory=dict)  # numbers of the best evaluation
    n_tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations
    is_finished: bool = False
    began: str = ""  # when, as an ISO date and time: a chat template may tell it, also after midnight


def read_state(out_dir: Path) -> tuple[dict[str, Any], Progress]:
    """Identity and progress of the run that out_dir holds; {} and a new one without a state. Raises ValueError."""
    path = state_file(out_dir)
    if not path.is_file():
        return {}, Progress()
    with reading(f"{path} (--overwrite starts anew)"), safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["state"])
        return header["identity"], Progress(**header["progress"])


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


class State:
    """The state of a run, which all processes save and load at the same time."""

    def __init__(self, out_dir: Path, identity: dict[str, Any], rank: int = 0):
        self.path, self.identity, self.rank = state_file(out_dir), identity, rank

    def refuse_other(self, stored: dict[str, Any]) -> None:
        """Raises ValueError if the run that out_dir holds, which has `stored` as its identity, had other options or
        data."""
        for name in {**stored, **self.identity}:
            there, here = stored.get(name), self.identity.get(name)
            if there != here:
                difference = f"another {name}" if name in HASHED else f"{name} {there} there and {here} here"
                hint = "name another --out_dir, or replace it with --overwrite"
                raise ValueError(f"{self.path.parent} holds a run with {difference}: {hint}")

    def mark(self, progress: Progress) -> None:
        """Writes a state without tensors: a run begins, or has ended."""
        if self.rank == 0:
            self._write([], {}, progress)

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Raises OSError in all processes, and leaves what was there, if it cannot be written."""
        random, sliced = gathered(_random_states()), _tensors(network, optimizer)
        tensors = ((name, whole(t)) for name, t in sliced.items())
        failure = ""
        if self.rank == 0:
            try:
                self._write(tensors, sliced, progress, random)
            except OSError as e:
                failure = str(e)
        for _ in tensors:  # all processes make each tensor whole together
            pass
        if failure := gathered(failure)[0]:
            raise OSError(f"{self.path} could not be written, the state before it is kept ({failure})")

    def _write(self, tensors: Any, like: dict[str, Tensor], progress: Progress, random: Any = ()) -> None:
        for cut_off in self.path.parent.glob(f"{self.path.name}.*.partial"):
            cut_off.unlink()
        header = json.dumps(dict(identity=self.identity, progress=asdict(progress), random=random))
        stream_tensors(self.path, tensors, {name: t.shape for name, t in like.items()}, dict(state=header))

    def load(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts everything back as it was."""
        with safe_open(self.path, framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                step = torch.tensor(float(header["progress"]["step"]), device=p.device)
                optimizer.state[p] = dict(step=step) | {name: torch.zeros_like(p) for name in MOMENTS}
            for name, t in _tensors(network, optimizer).items():
                fill(t, file.get_tensor(name))
        if self.rank < len(header["random"]):  # otherwise there were fewer processes
            states = {d: torch.tensor(list(bytes.fromhex(s))).byte() for d, s in header["random"][self.rank].items()}
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])


def state_file(out_dir: Path) -> Path:
    return out_dir / "state.safetensors"


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
