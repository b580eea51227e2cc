"""What a command of finetune/ does from its launch to its first step, and how long each part takes.

python scripts/bench/start_time.py finetune/lora.py --devices cpu
python scripts/bench/start_time.py --to_end finetune/adapter.py --checkpoint_dir checkpoints/random-7b ...
PYTHONPATH=../an-older-checkout python scripts/bench/start_time.py finetune/lora.py --devices cpu

The parts are functions, found by their names, so that this file measures another checkout in the same way. What the run
writes goes to a temporary folder, which is removed. With --to_end it trains to its end.
"""

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # Python itself has taken less than 0.1 s before
PARTS = {  # the name of a function -> what it does
    "read_dataset": "rows read and tokenized",
    "build": "network built, weights loaded",
    "prepare": "optimizer made, on a GPU compiled and memory planned",
    "evaluate": "validated before training",
    "train_step": "first step",
}


def main(name: str, args: list[str], to_end: bool) -> None:
    script = importlib.import_module(f"finetune.{name}")
    report("imported", BEGAN, 0.0)
    for module in [m for name, m in list(sys.modules.items()) if name.startswith("finetune.")]:
        for part in PARTS.keys() & vars(module).keys():
            setattr(module, part, timed(vars(module)[part], to_end))
    sys.argv = [script.__file__, f"--out_dir={OUT_DIR}", *args]

    def run(options: Any) -> None:
        summary = script.main(options)
        speed = f"{summary.n_tokens / summary.seconds:,.0f} tokens/s, {summary.peak_gib:.1f} GiB at most"
        report(f"all, {summary.seconds:.1f} s of it training: {speed}", BEGAN, 0.0)

    importlib.import_module("lit_model.cli").cli(run, script.Options, "")


def report(part: str, start: float, cpu_start: float) -> None:
    now, cpu = time.perf_counter(), time.process_time() - cpu_start
    print(f"{now - BEGAN:7.2f} s after launch: {now - start:7.2f} s, {cpu:7.2f} s of CPUs: {part}", flush=True)


def timed(function: Callable, to_end: bool) -> Callable:
    """The same function, which reports its first call. Without `to_end` the first step is the process's last."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        starts = time.perf_counter(), time.process_time()
        result = function(*args, **kwargs)
        if part := PARTS.pop(function.__name__, None):
            if (cuda := sys.modules["torch"].cuda).is_initialized():
                cuda.synchronize()
            report(part, *starts)
        if function.__name__ == "train_step" and not to_end:
            shutil.rmtree(OUT_DIR)
            os._exit(0)
        return result

    return wrapper


if __name__ == "__main__":
    OUT_DIR, is_whole = tempfile.mkdtemp(), "--to_end" in sys.argv[1:2]
    main(Path(sys.argv[1 + is_whole]).stem, sys.argv[2 + is_whole :], is_whole)
    shutil.rmtree(OUT_DIR)
