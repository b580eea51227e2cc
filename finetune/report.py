"""What a run tells: losses that come back from the GPU later, a meter, the closing line, the files of out_dir."""

import csv
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from finetune.state import plain
from lit_model.files import lock, replacing, write_text
from lit_model.model import GPT, Config, Linear
from lit_model.packing import Example
from lit_model.quantize import FP8Linear


@dataclass
class Step:
    """One optimizer step. What came of it comes back from the GPU without holding it up: send, receive."""

    number: int
    lr: float
    batch: list[Example]
    n_computed: int = 0  # tokens in this process's rows: fewer than in the examples where these share a beginning
    n_own_targets: int = 0  # in this process's rows

    @property
    def n_targets(self) -> int:
        return sum(e.n_targets for e in self.batch)

    def send(self, values: Tensor) -> None:
        self.values = values.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def receive(self) -> list[float]:
        if self.arrived:
            self.arrived.synchronize()
        return self.values.tolist()


class Meter:
    """Counts tokens, seconds of training without the evaluations, and how long the GPU waited between two steps."""

    COUNTS = ("n_tokens", "n_computed", "n_targets", "before", "idle_ms")

    def __init__(self, device: torch.device):
        self.n_tokens, self.n_computed, self.n_targets, self.before, self.idle_ms = 0, 0, 0, 0.0, 0.0
        self.began: float | None = None
        self.lag = 1 if device.type == "cuda" else 0  # a GPU works on the next step while we read what came of one

    def start(self) -> None:
        self.began = time.perf_counter()
        self.marks = deque()  # events at the beginning and the end of each step

    def pause(self) -> None:
        self.before, self.began = self.seconds(), None

    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.began if self.began else 0.0)

    def mark(self) -> None:
        """Call at the beginning and at the end of the GPU's work on a step."""
        if self.lag:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def count(self, step: Step) -> None:
        """Call when the GPU is done with the step."""
        self.n_tokens += sum(len(e.ids) for e in step.batch)
        self.n_computed += step.n_computed
        self.n_targets += step.n_own_targets
        if len(self.marks) > 4:  # of the step before, of this one and of the next
            _, ended = self.marks.popleft(), self.marks.popleft()
            self.idle_ms += ended.elapsed_time(self.marks[0])


# TFLOP/s of matrix products in bf16 without sparsity, from the makers' data sheets, half of those in fp8; the first
# name that fits counts
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165,
}  # fmt: skip


def n_parameters(config: Config) -> int:
    """Of the base network, however its weights are kept."""
    with torch.device("meta"):
        return sum(
            p.numel() for p in GPT(Config(**{f.name: getattr(config, f.name) for f in fields(Config)})).parameters()
        )


def products(gpt: GPT, n_computed: float, n_targets: float) -> Iterator[tuple[Linear, float, bool, bool]]:
    """The matrix products that training on so many tokens takes, without attention scores: of each linear layer, for
    how many tokens, whether it also takes one towards its input, and whether one for its weight's gradient.

    Blocks below the lowest one that is trained have no backward pass. Only the targets need the output layer and, in
    the last block, all but keys and values.
    """
    trains = [any(p.requires_grad for p in block.parameters()) for block in gpt.blocks]
    lowest = trains.index(True) if any(trains) else len(trains)  # none: only the output layer is trained
    if len(gpt.virtual_tokens) or len(gpt.virtual_keys):
        lowest = 0
    for i, block in enumerate(gpt.blocks):
        for linear in (m for m in block.modules() if isinstance(m, Linear)):
            in_last = i == len(gpt.blocks) - 1 and linear not in (block.attn.k_proj, block.attn.v_proj)
            trained = linear.weight is not None and linear.weight.requires_grad
            yield linear, n_targets if in_last else n_computed, i >= lowest, trained
    yield gpt.head, n_targets, True, gpt.head.weight.requires_grad


def n_flops(gpt: GPT, n_computed: float, n_targets: float) -> float:
    return sum(
        2 * (1 + backward + trained) * linear.in_features * linear.out_features * n
        for linear, n, backward, trained in products(gpt, n_computed, n_targets)
    )


def peak_tflops(gpt: GPT) -> int | None:
    """Of the GPU, in the type that most products of `gpt` are in; None where it is not known."""
    name = torch.cuda.get_device_name()
    found = (tflops for known, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name))
    in_fp8 = any(isinstance(m, FP8Linear) for m in gpt.modules())
    return next((tflops * (1 + in_fp8) for tflops in found), None)


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use, in GiB: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def closing_line(gpt: GPT, meter: Meter, device: torch.device, world: int = 1) -> str:
    """Tokens per second, share of the GPU's peak where it is known, idle share of the GPU, and the most memory used."""
    n_tokens, seconds = meter.n_tokens, meter.seconds()
    line = f"trained {n_tokens:,} tokens in {seconds:.0f} s: {n_tokens / seconds:.0f} tokens/s"
    memory = f"peak memory {peak_memory(device):.1f} GiB"
    if device.type != "cuda":
        return f"{line}, {memory}"
    if peak := peak_tflops(gpt):
        mfu = n_flops(gpt, meter.n_computed, meter.n_targets) / seconds / peak / 1e12
        line += f", MFU {100 * mfu:.1f} % of {peak} TFLOP/s"
    where = f"{world} x {torch.cuda.get_device_name(device)}" if world > 1 else torch.cuda.get_device_name(device)
    return f"{line}, GPU idle {meter.idle_ms / seconds / 10:.1f} %, {memory} on {where}"


class Log:
    """Writes out_dir: hparams.yaml at once, or with our first tensors if others are there; metrics.csv and TensorBoard
    events as they come; loss.png at the end. Only the first process does.

    A run that goes on after step `done` continues its files; what they say of later steps was lost with these.
    """

    COLUMNS = ("step", "epoch", "loss", "val_loss", "accuracy", "lr", "grad_norm", "tokens", "tokens_per_second")

    def __init__(self, options: Any, done: int = 0, writes: bool = True):
        self.out_dir, self.writes = options.out_dir, writes
        self.rows: list[dict] = []
        if not writes:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = lock(self.out_dir / ".lock")
        except BlockingIOError:
            raise ValueError(f"another run is writing to {self.out_dir}: name another --out_dir") from None
        self.settings = plain(options)
        for name in ("overwrite", "dry_run"):  # or --config with this file would overwrite another run
            self.settings.pop(name)
        if done:
            self._go_on(done)
        elif (self.out_dir / "hparams.yaml").exists():  # a failed run, or one to overwrite; its tensors stay until ours
            for events in self.out_dir.glob("events.out.tfevents.*"):
                events.unlink()
            (self.out_dir / "confusion.png").unlink(missing_ok=True)
        if not any(self.out_dir.glob("*.safetensors")):
            self.write_settings()
        self.file = open(self.out_dir / "metrics.csv", "a" if done else "w", newline="")
        self.csv = csv.DictWriter(self.file, self.COLUMNS)
        if not done:
            self.csv.writeheader()
        self.events = SummaryWriter(str(self.out_dir), purge_step=done + 1 if done else None)

    def _go_on(self, done: int) -> None:
        path = self.out_dir / "metrics.csv"
        with open(path, newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= done]
        with replacing(path) as aside, open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        self.rows = [{name: float(value) for name, value in row.items() if value} for row in kept]

    def write_settings(self) -> None:
        """Call with the first tensors that are saved: those of a run before must not stand under our settings."""
        if self.writes:
            write_text(self.out_dir / "hparams.yaml", yaml.safe_dump(self.settings, sort_keys=False))

    def write(self, step: int, **values: float | None) -> None:
        if not self.writes:
            return
        values = {name: value for name, value in values.items() if value is not None}
        self.rows.append(dict(step=step, **values))
        self.csv.writerow(self.rows[-1])
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
        if not self.writes:
            return
        self.file.close()
        self.events.close()
        from matplotlib.figure import Figure  # which takes most of a second, and not at the start

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, style in (("loss", dict(lw=1, alpha=0.5)), ("val_loss", dict(marker="o"))):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points), label={"loss": "training", "val_loss": "validation"}[name], **style)
        axes.set(xlabel="step", ylabel="loss per target token")
        if axes.lines:  # not of a run that ended at once
            axes.legend()
        figure.savefig(self.out_dir / "loss.png", dpi=120)
        (self.out_dir / ".lock").unlink(missing_ok=True)
        self.lock.close()
