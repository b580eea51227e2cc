"""Times whole runs of finetune/*.py, from the launch to the saved file, one after the other, and prints a table.

A checkpoint of random weights with rows of random words in Alpaca's lengths does for it: scripts/random_checkpoint.py
makes both. Each run has a fixed number of examples a device and step, so that more devices take fewer steps.
"""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a bare clone

from lit_model.load import METHODS
from lit_model.cli import cli
from lit_model.model import Config
from scripts.bench import PRECISIONS
from scripts.bench_table import commit, series


@dataclass
class Options:
    """What to run."""

    checkpoint_dir: Path = Path("checkpoints/random")
    """folder of the base network, with rows.json in it"""
    methods: str = "adapter"
    """names of scripts in finetune/"""
    precision: str = "bf16"
    """of bf16, fp8, int8, nf4 (the base weights; activations in bf16) and fp32"""
    devices: str = "auto"
    """as in the finetuning scripts; several such as 1,8 are run one after the other"""
    strategy: str = "auto"
    """of several devices: ddp, fsdp or fsdp_offload; or some of them, such as ddp,fsdp"""
    batch_size: int = 128
    """examples per optimizer step and device"""
    epochs: int = 5
    """passes over the rows"""
    out_dir: Path = Path("out/whole_run")
    """folder for the runs; those that are there are replaced"""


def main(options: Options) -> None:
    methods, precisions = ([part.strip() for part in text.split(",")] for text in (options.methods, options.precision))
    for method, precision in product(methods, precisions):
        if method not in METHODS or precision not in PRECISIONS:
            known = f"methods are {', '.join(METHODS)}; precisions are {', '.join(PRECISIONS)}"
            raise ValueError(f"there is no {method!r} in {precision!r}: {known}")
    Config.load(options.checkpoint_dir)
    if not (options.checkpoint_dir / "rows.json").is_file():
        raise FileNotFoundError(
            f"{options.checkpoint_dir}/rows.json is not there: scripts/random_checkpoint.py makes such a folder"
        )
    lines = ["| devices | run | launch to file | training | tokens/s | a device | memory a device |"]
    lines.append("|---|---|---|---|---|---|---|")
    failed = []
    for (devices, strategy), method, precision in product(
        series(options.devices, options.strategy), methods, precisions
    ):
        number = devices.split(":")[-1]
        world = int(number) if number.isdigit() else 1
        args = dict(devices=devices, strategy=strategy, quantize=PRECISIONS[precision])
        args |= dict(dtype="float32" if precision == "fp32" else "bfloat16")
        name = f"{method}-{precision}-{world}-{strategy}"
        began = time.perf_counter()
        said = finetune(method, options, world, **args, out_dir=options.out_dir / name)
        seconds = time.perf_counter() - began
        closing = re.search(r"trained [\d,]+ tokens in (\d+) s: (\d+) tokens/s.*peak memory ([\d.]+) GiB", said)
        if closing is None:
            failed.append(name)
            continue
        training, speed, memory = closing.groups()
        speeds = f"{int(speed):,} | {int(speed) / world:,.0f}"
        how = f"{world} {strategy if world > 1 else ''} | {method} {precision}"
        lines.append(f"| {how} | {seconds:.0f} s | {training} s | {speeds} | {memory} GiB |")
    what = f"{options.checkpoint_dir}, --epochs {options.epochs}, {options.batch_size} examples a step and device"
    where = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    print(f"\n{what}, {where}torch {torch.__version__}, commit {commit()}")
    print("\n".join(lines))
    if failed:
        raise ValueError(f"did not come to their end: {', '.join(failed)}")


def finetune(method: str, options: Options, world: int, **args: Any) -> str:
    """Runs a script of finetune/ with `args`, shows what it says, and returns it."""
    rows = options.checkpoint_dir / "rows.json"
    args |= {"checkpoint_dir": options.checkpoint_dir, "data": rows, "overwrite": True}
    args |= {"train.batch_size": options.batch_size * world, "train.epochs": options.epochs, "train.sample": ""}
    args |= {"prompt.val_fraction": 0, "prompt.max_length": 512, "prompt.style": "alpaca"}
    flags = [f"--{name}={value}" for name, value in args.items()]
    command = [sys.executable, "-u", str(ROOT / f"finetune/{method}.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as run:
        said = []
        for line in run.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return "".join(said)


if __name__ == "__main__":
    cli(main, Options, __doc__)
