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

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from a bare clone

from lit_model.cli import cli
from lit_model.model import Config
from scripts.bench import PRECISIONS, commit


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
    wanted = [[part.strip() for part in text.split(",")] for text in (options.devices, options.strategy)]
    wanted += [[part.strip() for part in text.split(",")] for text in (options.methods, options.precision)]
    for method, precision in product(*wanted[2:]):
        if not (ROOT / f"finetune/{method}.py").is_file() or precision not in PRECISIONS:
            raise ValueError(f"there is no finetune/{method}.py in {precision}: precisions are {', '.join(PRECISIONS)}")
    Config.load(options.checkpoint_dir)
    rows = options.checkpoint_dir / "rows.json"
    if not rows.is_file():
        raise FileNotFoundError(f"{rows} is not there: scripts/random_checkpoint.py makes such a folder")
    lines = ["| devices | run | launch to file | training | tokens/s | a device | memory a device |"]
    lines.append("|---|---|---|---|---|---|---|")
    failed = []
    for devices, strategy, method, precision in product(*wanted):
        world = int(number) if (number := devices.split(":")[-1]).isdigit() else 1
        name = f"{method}-{precision}-{devices.replace(':', '')}-{strategy}"
        began = time.perf_counter()
        said = finetune(options, rows, world, devices, strategy, method, precision, options.out_dir / name)
        seconds = time.perf_counter() - began
        closing = re.search(r"trained [\d,]+ tokens in (\d+) s: (\d+) tokens/s.*peak memory ([\d.]+) GiB", said)
        if closing is None:
            failed.append(name)
            continue
        training, speed, memory = closing.groups()
        speeds = f"{int(speed):,} | {int(speed) / world:,.0f}"
        how = f"{devices} {strategy if world > 1 else ''} | {method} {precision}"
        lines.append(f"| {how} | {seconds:.0f} s | {training} s | {speeds} | {memory} GiB |")
    what = f"{options.checkpoint_dir}, --epochs {options.epochs}, {options.batch_size} examples a step and device"
    where = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    print(f"\n{what}, {where}torch {torch.__version__}, commit {commit()}")
    print("\n".join(lines))
    if failed:
        raise ValueError(f"did not come to their end: {', '.join(failed)}")


def finetune(
    options: Options, rows: Path, world: int, devices: str, strategy: str, method: str, precision: str, out_dir: Path
) -> str:
    """Runs a script, shows what it says, and returns it."""
    args = dict(checkpoint_dir=options.checkpoint_dir, data=rows, out_dir=out_dir, devices=devices, strategy=strategy)
    args |= dict(dtype="float32" if precision == "fp32" else "bfloat16", quantize=PRECISIONS[precision])
    flags = [f"--{name}={value}" for name, value in args.items()]
    flags += [f"--train.batch_size={options.batch_size * world}", f"--train.epochs={options.epochs}"]
    flags += ["--prompt.val_fraction=0", "--prompt.max_length=512", "--train.sample=", "--prompt.style=alpaca"]
    flags += ["--overwrite=true"]
    command = [sys.executable, "-u", str(ROOT / f"finetune/{method}.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as run:
        said = []
        for line in run.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return "".join(said)


if __name__ == "__main__":
    cli(main, Options, __doc__)
