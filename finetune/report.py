"""Progress, files, signals and time limits of a run: everything round the training that is not training."""

import csv
import math
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from tqdm import tqdm

from finetune.devices import total
from finetune.memory import ADVICE
from finetune.state import plain
from lit_model.files import lock, replacing, write_text
from lit_model.model import Config
from lit_model.packing import Example
from lit_model.weights.folder import network_shapes

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
    loss: Tensor | None = None  # () the sum of this process
    norm: Tensor | None = None  # () of the whole gradient

    @property
    def n_targets(self) -> int:
        return sum(e.n_targets for e in self.batch)

    def send(self, ask: Ask) -> None:
        highest_ask = total(torch.full_like(self.loss, ask), dist.ReduceOp.MAX)
        values = torch.stack((total(self.loss), self.norm.to(self.loss), highest_ask))
        self.values = values.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream().record_event() if values.is_cuda else None

    def receive(self) -> tuple[float, float, Ask]:
        if self.arrived:
            self.arrived.synchronize()
        loss, norm, ask = self.values.tolist()
        return loss, norm, Ask(int(ask))


@dataclass
class Summary:
    """What a run took and gave."""

    n_trained: int
    n_total: int
    seconds: float  # of training, without evaluations
    n_tokens: int
    peak_gib: float
    val_loss: float


class Diverged(ValueError):
    """A loss or a gradient is not finite."""


class Watch:
    """The bar, metrics.csv and TensorBoard, signals and the clock, and the numbers of steps, which lag one step behind
    on a GPU: it works on the next step while we read those of the last."""

    SAVE_SECONDS = 15 * 60  # a state is never older

    def __init__(self, run: "Run", method: str):
        self.run, self.progress, self.train = run, run.progress, run.options.train
        self.lag = 1 if run.device.type == "cuda" else 0
        self.underway: deque[Step] = deque()
        self.signal, self.saved_at = 0, time.monotonic()
        self.handlers: dict[int, Any] = {}
        done = run.progress.step
        self.log = Log(run.options, done, run.rank == 0)
        if not done:
            run.state.mark(run.progress)
        self.bar = tqdm(initial=done, total=run.n_steps, desc=method, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last is what SLURM is told to send before it takes a machine
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                self.handlers[number] = signal.signal(number, self._on_signal)
        self.clock = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()
        self.log.close()
        if isinstance(error, torch.OutOfMemoryError):
            raise ValueError(f"out of memory after step {self.progress.step}: {ADVICE}") from None

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:  # asked twice: at once
            signal.default_int_handler(number, frame)
        if not self.signal and self.run.rank == 0:  # not print, which this may have interrupted
            again = "; again: at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the run ends after this step{again}\n".encode())
        self.signal = number

    def step(self, step: Step) -> Ask:
        """Takes the numbers of a step that the GPU may still be working on. Returns what all processes are asked to do
        after it. Raises Diverged."""
        self.progress.step = step.number
        step.send(self._ask())
        self.underway.append(step)
        ask = self._receive(0 if step.evaluates else self.lag)
        if ask:
            ask = max(ask, self._receive(0))
        if ask is Ask.STOP:  # the signal may have reached another process
            self.signal = self.signal or signal.SIGTERM
        return ask

    def _ask(self) -> Ask:
        """What this process wants."""
        if self.train.max_time is not None and self._seconds() >= 60 * self.train.max_time:
            return Ask.OVER
        if self.signal:
            return Ask.STOP
        return Ask.SAVE if time.monotonic() - self.saved_at >= self.SAVE_SECONDS else Ask.GO

    def _receive(self, n: int) -> Ask:
        """Takes the numbers of all steps but the last n."""
        ask = Ask.GO
        while len(self.underway) > n:
            step = self.underway.popleft()
            loss, norm, asked = step.receive()
            ask = max(ask, asked)
            if not math.isfinite(loss + norm):
                self._diverged(f"loss {loss}, gradient norm {norm} at step {step.number}")
            self.progress.n_tokens += sum(len(e.ids) for e in step.batch)
            speed = self.progress.n_tokens / self._seconds()
            values = dict(loss=loss, lr=step.lr, grad_norm=norm, tokens=self.progress.n_tokens)
            epoch = step.number / self.run.steps_per_epoch
            self.log.write(step=step.number, epoch=epoch, **values, tokens_per_second=speed)
            self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{step.lr:.1e}", tok_s=f"{speed:.0f}", refresh=False)
            self.bar.update()
        return ask

    def _seconds(self) -> float:
        """Brings the seconds of training up to now."""
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now
        return self.progress.seconds

    def _diverged(self, what: str) -> NoReturn:
        out_dir = self.run.options.out_dir
        saved = f"{out_dir} keeps the best before it" if self.progress.best else "nothing was saved yet"
        raise Diverged(f"{what}: try a lower train.lr; {saved}")

    def evaluated(self, numbers: dict[str, float]) -> bool:
        """Takes the numbers of an evaluation: `val_loss` and what the task adds; none without validation rows. Returns
        whether it is the best so far. Raises Diverged."""
        self.clock = time.perf_counter()  # an evaluation is not training
        progress, train = self.progress, self.train
        self.log.write(step=progress.step, **numbers)
        loss = numbers.get("val_loss", 0.0)
        if not math.isfinite(loss):
            self._diverged(f"validation loss {loss} after step {progress.step}")
        if numbers:
            self.bar.write(f"{f'step {progress.step}' if progress.step else 'before'}: {_listed(numbers)}")
        if not progress.step:
            progress.first = numbers
            return False
        is_best = not (progress.best and numbers and loss >= progress.best["val_loss"])
        if is_best:
            progress.best = numbers or dict(val_loss=0.0)
        progress.stale = 0 if is_best else progress.stale + 1
        is_stale = train.patience and progress.stale >= train.patience
        progress.is_finished = bool(progress.step == self.run.n_steps or is_stale)
        return is_best

    def summary(self) -> Summary:
        """Prints what came of the run; after a signal, ends the program as the signal would have."""
        run, options, progress = self.run, self.run.options, self.progress
        if self.signal and not progress.is_finished:
            name = signal.Signals(self.signal).name
            print(f"stopped by {name} after step {progress.step}; the same command without --overwrite resumes it")
            sys.exit(128 + (self.signal if self.signal == signal.SIGINT else signal.SIGTERM) if run.rank == 0 else 0)
        first, best = progress.first, progress.best
        if run.val_examples:
            is_worse = best["val_loss"] > first["val_loss"]
            hint = "; that is worse: try a lower train.lr, or train longer" if is_worse else ""
            print(f"before: {_listed(first)}\nafter (best): {_listed(best)}{hint}")
        where = "" if run.device.type == "cpu" else f" on {run.world} x {torch.cuda.get_device_name(run.device)}"
        tokens, seconds, peak = progress.n_tokens, progress.seconds, peak_memory(run.device)
        speed = f"{tokens / seconds:.0f} tokens/s"
        print(f"trained {tokens:,} tokens in {seconds:.0f} s: {speed}, peak memory {peak:.1f} GiB{where}")
        files = "lit_method.safetensors, last.safetensors, hparams.yaml, metrics.csv, loss.png"
        print(f"saved {options.out_dir}/: {files}")
        print(f"try:  {run.next_command}")
        val_loss = best.get("val_loss", math.nan) if run.val_examples else math.nan
        return Summary(*run.counted, seconds, tokens, peak, val_loss)


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('val_', 'validation ').replace('_', ' ')} {x:.4f}" for name, x in numbers.items())


def n_parameters(config: Config) -> int:
    """Number of parameters of the base network, however its weights are kept."""
    return sum(shape.numel() for shape in network_shapes(config).values())


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use, in GiB: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Log:
    """Writes out_dir: metrics.csv and TensorBoard events as they come, hparams.yaml with the tensors that are saved,
    loss.png at the end. Only the first process does.

    A run that resumes after step `done` continues its files; rows of later steps are dropped.
    """

    COLUMNS = (
        "step", "epoch", "loss", "val_loss", "accuracy", "macro_f1", "lr", "grad_norm", "tokens", "tokens_per_second",
    )  # fmt: skip

    def __init__(self, options: Any, done: int, writes: bool):
        self.out_dir, self.writes = options.out_dir, writes
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
        if not done and (self.out_dir / "hparams.yaml").exists():  # a failed run, or one to overwrite
            for old in (*self.out_dir.glob("events.out.tfevents.*"), self.out_dir / "confusion.png"):
                old.unlink(missing_ok=True)
        path = self.out_dir / "metrics.csv"
        self.rows = []
        if done:
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= done]
        with replacing(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, self.COLUMNS)
        from torch.utils.tensorboard import SummaryWriter  # whose import takes most of a second

        self.events = SummaryWriter(str(self.out_dir), purge_step=done + 1 if done else None)

    def write_settings(self) -> None:
        """Call with the first tensors that are saved: those of a run before must not stand under our settings."""
        if self.writes:
            write_text(self.out_dir / "hparams.yaml", yaml.safe_dump(self.settings, sort_keys=False))

    def write(self, step: int, **values: float) -> None:
        if not self.writes:
            return
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
        self.draw()
        (self.out_dir / ".lock").unlink(missing_ok=True)
        self.lock.close()

    def draw(self) -> None:
        """The loss curves: loss.png."""
        from matplotlib.figure import Figure  # which takes most of a second, and not at the start

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        styles = dict(loss=dict(label="training", lw=1, alpha=0.5), val_loss=dict(label="validation", marker="o"))
        for name, style in styles.items():
            points = [(int(row["step"]), float(row[name])) for row in self.rows if row.get(name)]
            if points:
                axes.plot(*zip(*points), **style)
        axes.set(xlabel="step", ylabel="loss per target token")
        if axes.lines:  # a run that ended at once has none
            axes.legend()
        figure.savefig(self.out_dir / "loss.png", dpi=120)
