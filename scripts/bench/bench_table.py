"""What bench.py and whole_run.py measure and show: their results, the CSV file that these are added to, and tables."""

import csv
import shutil
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """One line of the table."""

    system: str
    method: str
    precision: str
    setting: str
    tokens_per_second: float
    """real tokens"""
    step_ms: float
    peak_gib: float | None
    """None on a CPU, where only the peak of the whole process is known"""
    loss: float
    targets: float
    """share of the tokens that are predicted"""
    start_s: float | None = None
    """from the random weights to the first step that counts: planning memory, compiling, warming up"""
    mfu: float | None = None
    """share of the GPU's peak that the computed tokens' matrix products make"""
    products: float | None = None
    """share of the step's time that these products take alone, measured in the same run"""
    ratio: float | None = None
    """tokens a second, of the peer's"""
    world: int = 1
    """number of processes"""


def series(devices: str, strategy: str) -> list[tuple[str, str]]:
    """Every one of these devices with every strategy, as they stand between commas; a single device only once."""
    pairs = [(d.strip(), s.strip()) for d in devices.split(",") for s in strategy.split(",")]
    if len(pairs) == 1:
        return pairs
    return list(dict.fromkeys((d, "auto" if d in ("1", "auto", "cpu", "cpu:1") else s) for d, s in pairs))


def commit() -> str:
    """Which version of this code it is, "-dirty" if it was changed since; empty where git does not say."""
    describe = ["git", "describe", "--always", "--dirty"]
    if not shutil.which("git"):
        return ""
    return subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


COLUMNS = ["when", "on", "torch", "commit", "preset", "data", "batch_size", "row_tokens", "steps", "memory_gb"]
COLUMNS += ["strategy"]
COLUMNS += [f.name for f in fields(Result)]


def open_table(path: Path) -> None:
    """Makes the CSV file, unless it is there. Raises ValueError if it is something else, OSError if it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as file:
        file.seek(0)
        header = file.readline().strip()
        if not header:
            csv.writer(file).writerow(COLUMNS)
        elif header != ",".join(COLUMNS):
            raise ValueError(f"{path} is no table of this script, or one of another version: name another --out")


def save(path: Path, result: Result, about: dict[str, Any]) -> None:
    """Adds a line. about: what else is known, by COLUMNS."""
    row = dict(when=datetime.now().isoformat(timespec="minutes")) | about | asdict(result)
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, COLUMNS, extrasaction="ignore").writerow(row)


def read_lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def table(results: list[Result]) -> str:
    def percent(x: float | None) -> str:
        return "" if x is None else f"{100 * x:.0f} %"

    lines = ["| run | how | real tokens/s | of the peer's | step | peak memory | products alone | MFU | loss |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in results:
        run = f"{r.system}: {r.method} {r.precision} | {r.setting}"
        speed = f"{r.tokens_per_second:,.0f} | {f'{r.ratio:.2f} x' if r.ratio else ''} | {r.step_ms:,.0f} ms"
        shares = f"{percent(r.products)} | {percent(r.mfu)} | {r.loss:.3f}"
        memory = f"{r.peak_gib:.1f} GiB" if r.peak_gib else ""
        lines.append(f"| {run} | {speed} | {memory} | {shares} |")
    return "\n".join(lines)


def scaling_table(rows: list[dict[str, str]]) -> str:
    """Lines of the CSV file, each beside the first one of its method and precision."""
    lines = ["| devices | run | real tokens/s | a device | scaling | step | memory a device | MFU |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    first = {}
    for r in rows:
        speed, world = float(r["tokens_per_second"]), int(r["world"])
        first.setdefault((r["method"], r["precision"]), speed / world)
        scaling = speed / first[r["method"], r["precision"]]
        name = f"{world} {r['strategy'] if world > 1 else ''} | {r['method']} {r['precision']}, {r['setting']}"
        memory = f"{float(r['peak_gib']):.1f} GiB" if r["peak_gib"] else ""
        mfu = f"{100 * float(r['mfu']):.0f} %" if r["mfu"] else ""
        speeds = f"{speed:,.0f} | {speed / world:,.0f} | {scaling:.2f} x | {float(r['step_ms']):,.0f} ms"
        lines.append(f"| {name} | {speeds} | {memory} | {mfu} |")
    return "\n".join(lines)
