"""A run that is to stop, or to save its state, ends the step that it is in first, with all its processes together."""

import os
import shlex
import signal
import sys
import threading
import time
from typing import Any, NoReturn, Self

from torch import Tensor
from tqdm import tqdm

from finetune.report import Meter
from finetune.setup import Train


class Asked:
    """What this process is asked to do, by a signal or by the clock. It travels with a step to all processes, so that
    they do it after the same one."""

    def __init__(self, train: Train, meter: Meter, rank: int):
        self.train, self.meter, self.rank = train, meter, rank
        self.signal, self.saved_at = 0, time.monotonic()
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last is what SLURM is told to send before it takes a machine
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                self.handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if self.signal and number == signal.SIGINT:  # asked twice: at once
            raise KeyboardInterrupt
        if not self.signal and self.rank == 0:  # not print, which this may have interrupted
            again = "; again: at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: the run ends after this step{again}\n".encode())
        self.signal = number

    def now(self, loss: Tensor) -> Tensor:
        """(3,) beside the loss of a step: stop, end since the time is over, save."""
        asked, train = loss.new_zeros(3), self.train
        over = train.max_time is not None and self.meter.seconds() >= 60 * train.max_time
        due = time.monotonic() - self.saved_at >= 60 * train.save_every_minutes
        for i in (i for i, wanted in enumerate((self.signal, over, due)) if wanted):
            asked[i].fill_(1.0)
        return asked


def leave(number: int, step: int, rank: int) -> NoReturn:
    """Ends the program as the signal of this number would have."""
    names = ("--overwrite", "--resume")  # which would begin anew
    values = {i + 1 for i, arg in enumerate(sys.argv[:-1]) if arg in names and not sys.argv[i + 1].startswith("-")}
    args = [arg for i, arg in enumerate(sys.argv) if arg.split("=")[0] not in names and i not in values]
    again = shlex.join(["python", *args, *["--overwrite=false"] * any(arg.startswith("--config") for arg in args)])
    tqdm.write(f"stopped by {signal.Signals(number).name} after step {step}; this goes on from there: {again}")
    sys.exit(128 + (signal.SIGTERM if number != signal.SIGINT else number) if rank == 0 else 0)
