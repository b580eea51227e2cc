"""Everything round the training that is not training: losses that come back from the GPU later, the bar, the files of
out_dir, signals and the clock, the closing lines."""

import csv
import math
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from finetune.devices import highest_of, total
from finetune.state import Progress, plain
from lit_model.files import lock, replacing, write_text
from lit_model.model import GPT, Config, Linear
from lit_model.packing import Example

if TYPE_CHECKING:
    from finetune.run import Run


class Ask(IntEnum):
    """What a run is asked to do after a step. Of several processes the highest counts."""

    GO = 0
    SAVE = 1  # the state: it is old
    STOP = 2  # a signal: save the state, and end
    OVER = 3  # the time is over, or patience: evaluate, and end


@dataclass
class Step:
    """One optimizer step. Its numbers come back from the GPU without holding it up: send, receive."""

    number: int
    lr: float
    batch: list[Example]
    evaluates: bool = False
    is_last: bool = False
    loss: Tensor | None = None  # () the sum of this process
    norm: Tensor | None = None  # () of the whole gradient
    n_computed: int = 0  # tokens in this process's rows: fewer than in the examples where these share a beginning
    n_own_targets: int = 0  # in this process's rows
    events: list[Any] | None = None  # on a GPU: when it began and ended

    @property
    def n_targets(self) -> int:
        return sum(e.n_targets for e in self.batch)

    def mark(self) -> None:
        """Call at the beginning and at the end of the GPU's work on the step."""
        if torch.cuda.is_initialized():
            self.events = [*(self.events or []), torch.cuda.Event(enable_timing=True)]
            self.events[-1].record()

    def send(self, ask: Ask) -> None:
        values = torch.stack((total(self.loss), self.norm.to(self.loss), highest_of(torch.full_like(self.loss, ask))))
        self.values = values.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if values.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def receive(self) -> tuple[float, float, Ask]:
        if self.arrived:
            self.arrived.synchronize()
        loss, norm, ask = self.values.tolist()
        return loss, norm, Ask(int(ask))


class Meter:
    """Counts tokens, seconds of training without the evaluations, and how long the GPU waited between two steps."""

    COUNTS = ("n_tokens", "n_computed", "n_targets", "before", "idle_ms")

    def __init__(self, counts: dict[str, float]):
        for name in self.COUNTS:
            setattr(self, name, counts.get(name, 0))
        self.began: float | None = None
        self.previous: Step | None = None

    def counts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.COUNTS} | dict(before=self.seconds())

    def start(self) -> None:
        self.began, self.previous = time.perf_counter(), None

    def pause(self) -> None:
        self.before, self.began = self.seconds(), None

    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.began if self.began else 0.0)

    def count(self, step: Step) -> None:
        """Call when the GPU is done with the step."""
        self.n_tokens += sum(len(e.ids) for e in step.batch)
        self.n_computed += step.n_computed
        self.n_targets += step.n_own_targets
        if step.events and self.previous:
            self.idle_ms += self.previous.events[1].elapsed_time(step.events[0])
        self.previous = step


@dataclass
class Summary:
    """What a run took and gave."""

    n_trained: int
    n_total: int
    seconds: float
    """of training, without evaluations"""
    n_tokens: int
    peak_gib: float
    val_loss: float


class Diverged(ValueError):
    """A loss or a gradient is not finite."""


class Watch:
    """The bar, metrics.csv and TensorBoard, signals and the clock, and the numbers of steps, which lag one step behind
    on a GPU: it works on the next step while we read those of the last."""

    SAVE_SECONDS = 15 * 60  # a state is never older

    def __init__(self, run: "Run", method: str, progress: Progress):
        self.run, self.progress, self.train = run, progress, run.options.train
        self.meter = Meter(progress.counts)
        self.lag = 1 if run.device.type == "cuda" else 0
        self.underway: deque[Step] = deque()
        self.losses: deque[float] = deque(maxlen=50)
        self.signal, self.saved_at, self.step_number, self.is_over = 0, time.monotonic(), progress.step, False
        self.handlers: dict[int, Any] = {}
        self.log = Log(run.options, progress.step, run.rank == 0)
        bar = dict(initial=progress.step, desc=method, unit="step", dynamic_ncols=True)
        self.bar = tqdm(total=run.n_steps, **bar)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last is what SLURM is told to send before it takes a machine
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                self.handlers[number] = signal.signal(number, self._on_signal)
        if self.step_number:  # otherwise an evaluation comes first
            self.meter.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        self.log.close()
        if isinstance(error, torch.OutOfMemoryError):
            raise ValueError(f"out of memory after step {self.step_number}: {self.run.advice}") from None

    def _on_signal(self, number: int, _: object) -> None:
        if self.signal and number == signal.SIGINT:  # asked twice: at once
            raise KeyboardInterrupt
        if not self.signal and self.run.rank == 0:  # not print, which this may have interrupted
            again = "; again: at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the run ends after this step{again}\n".encode())
        self.signal = number

    def _ask(self) -> Ask:
        """What this process wants."""
        if self.train.max_time is not None and self.meter.seconds() >= 60 * self.train.max_time:
            return Ask.OVER
        if self.signal:
            return Ask.STOP
        return Ask.SAVE if time.monotonic() - self.saved_at >= self.SAVE_SECONDS else Ask.GO

    def step(self, step: Step) -> Ask:
        """Takes the numbers of a step that the GPU may still be working on. Returns what all processes are asked to do
        after it. Raises Diverged."""
        step.send(self._ask())
        self.underway.append(step)
        self.step_number = step.number
        ask = self._receive(0 if step.evaluates else self.lag)
        if ask:
            ask = max(ask, self._receive(0))
        if ask is Ask.STOP:  # the signal may have reached another process
            self.signal = self.signal or signal.SIGTERM
        self.is_over = step.is_last or ask is Ask.OVER
        if step.evaluates or self.is_over:
            self.meter.pause()
        return ask

    def _receive(self, n: int) -> Ask:
        """Takes the numbers of all steps but the last n."""
        ask = Ask.GO
        while len(self.underway) > n:
            step = self.underway.popleft()
            loss, norm, asked = step.receive()
            ask = max(ask, asked)
            if not math.isfinite(loss + norm):
                raise Diverged(f"loss {loss}, gradient norm {norm} at step {step.number}: {self._advice()}")
            if len(self.losses) == self.losses.maxlen and loss > 2 * sum(self.losses) / len(self.losses):
                self.say(f"step {step.number}: the loss of {loss:.3f} is more than twice that of the steps before")
            self.losses.append(loss)
            self.meter.count(step)
            speed = self.meter.n_tokens / self.meter.seconds()
            values = dict(loss=loss, lr=step.lr, grad_norm=norm, tokens=self.meter.n_tokens)
            epoch = step.number / self.run.steps_per_epoch
            self.log.write(step=step.number, epoch=epoch, **values, tokens_per_second=speed)
            self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{step.lr:.1e}", tok_s=f"{speed:.0f}", refresh=False)
            self.bar.update()
        return ask

    def _advice(self) -> str:
        out_dir = self.run.options.out_dir
        saved = f"{out_dir} keeps the best before it" if self.progress.best else "nothing was saved yet"
        return f"try a lower train.lr; {saved}"

    def save_done(self) -> None:
        self.saved_at = time.monotonic()

    def say(self, line: str) -> None:
        self.bar.write(line)

    def evaluated(self, numbers: dict[str, float]) -> bool:
        """Takes the numbers of an evaluation: `val_loss` and what the task adds; none without validation rows. Returns
        whether it is the best so far. Raises Diverged."""
        progress = self.progress
        self.log.write(step=self.step_number, **numbers)
        loss = numbers.get("val_loss", 0.0)
        if not math.isfinite(loss):
            raise Diverged(f"validation loss {loss} after step {self.step_number}: {self._advice()}")
        if numbers:
            when = f"step {self.step_number}" if self.step_number else "before"
            self.say(f"{when}: {_listed(numbers)}")
        is_best = bool(self.step_number) and not (progress.best and numbers and loss >= progress.best["val_loss"])
        if not self.step_number:
            progress.first = numbers
        elif is_best:
            progress.best, progress.stale = numbers or dict(val_loss=0.0), 0
        else:
            progress.stale += 1
            self.is_over |= self.train.patience == progress.stale
        if not self.is_over:
            self.meter.start()
        return is_best

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end by its last step or by patience, and not by the clock or a signal."""
        patience = self.train.patience
        return self.step_number == self.run.n_steps or bool(patience and self.progress.stale >= patience)

    def summary(self, gpt: GPT) -> Summary:
        """Prints what came of the run; after a signal, ends the program as the signal would have."""
        run, options, meter = self.run, self.run.options, self.meter
        if self.signal and not self.is_finished:
            name = signal.Signals(self.signal).name
            print(f"stopped by {name} after step {self.step_number}; this resumes it: {_command()}")
            sys.exit(128 + (self.signal if self.signal == signal.SIGINT else signal.SIGTERM) if run.rank == 0 else 0)
        first, best = self.progress.first, self.progress.best
        if run.val_examples:
            is_worse = best["val_loss"] > first["val_loss"]
            hint = "; that is worse: try a lower train.lr, or train longer" if is_worse else ""
            print(f"before: {_listed(first)}\nafter (best): {_listed(best)}{hint}")
        print(closing_line(gpt, meter, run.device, run.world))
        files = "lit_method.safetensors, last.safetensors, hparams.yaml, metrics.csv, loss.png"
        print(f"saved {options.out_dir}/: {files}")
        print(f"try:  {run.next_command}")
        n_trained, n_total = run.counted
        val_loss = best.get("val_loss", math.nan) if run.val_examples else math.nan
        return Summary(n_trained, n_total, meter.seconds(), int(meter.n_tokens), peak_memory(run.device), val_loss)


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('val_', 'validation ').replace('_', ' ')} {x:.4f}" for name, x in numbers.items())


def _command() -> str:
    """This command line, without --overwrite, which would begin anew."""
    pairs = zip(["", *sys.argv], sys.argv)
    values = {i for i, (before, arg) in enumerate(pairs) if before == "--overwrite" and not arg.startswith("-")}
    args = [arg for i, arg in enumerate(sys.argv) if arg.split("=")[0] != "--overwrite" and i not in values]
    return shlex.join(["python", *args])


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
    in_fp8 = any(type(m).__name__ == "FP8Linear" for m in gpt.modules())
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

    A run that resumes after step `done` continues its files; rows of later steps are dropped.
    """

    COLUMNS = (
        "step",
        "epoch",
        "loss",
        "val_loss",
        "accuracy",
        "macro_f1",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
    )

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
            self._resume(done)
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
        from torch.utils.tensorboard import SummaryWriter  # whose import takes most of a second

        self.events = SummaryWriter(str(self.out_dir), purge_step=done + 1 if done else None)

    def _resume(self, done: int) -> None:
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
