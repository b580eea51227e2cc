"""What bench.py prints and keeps: its results, the file of them (one JSON object a line), and their table."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """One line of the table."""

    system: str
    setting: str
    tokens_per_second: float
    """real tokens"""
    step_ms: float
    peak_gib: float
    """on a CPU that of the process, whatever it has measured before"""
    loss: float
    start_s: float | None = None
    """from the random weights to the first step that counts: planning memory, compiling, warming up"""
    mfu: float | None = None
    """share of the GPU's peak that the computed tokens' matrix products make"""
    products: float | None = None
    """share of the step's time that these products take alone, measured in the same run"""
    attention: float | None = None
    """share of it that attention takes alone, forward and backward"""


def commit() -> str:
    """Which version of this code it is, "-dirty" if it was changed since; empty where git does not say."""
    if not shutil.which("git"):
        return ""
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(lines: list[dict[str, Any]]) -> str:
    """Lines of the file. "ratio": to the peer's speed, or to that of one device."""
    text = [
        "| run | how | real tokens/s | ratio | step | memory a device | products | attention | MFU | start | loss |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    peers = {(r["method"], r["precision"]): r["tokens_per_second"] for r in lines if r["system"] != "lit-model"}
    alone = {(r["method"], r["precision"]): r["tokens_per_second"] for r in lines if r["world"] == 1}
    for r in lines:
        case, speed = (r["method"], r["precision"]), r["tokens_per_second"]
        base = peers.get(case) or peers.get((r["method"], "bf16")) or alone.get(case, speed)
        devices = f", {r['world']} x {r['strategy']}" if r["world"] > 1 else ""
        ratio = f"{speed / base:.2f} x" if speed != base else ""
        run = f"{r['system']}: {' '.join(case)}{devices} | {r['setting']} | {speed:,.0f} | {ratio}"
        costs = f"{r['step_ms']:,.0f} ms | {r['peak_gib']:.1f} GiB"
        shares = " | ".join(_text(r[name], ".0%") for name in ("products", "attention", "mfu"))
        text.append(f"| {run} | {costs} | {shares} | {_text(r['start_s'], '.0f', ' s')} | {r['loss']:.3f} |")
    return "\n".join(text)


def _text(x: float | None, form: str, unit: str = "") -> str:
    return "" if x is None else f"{x:{form}}{unit}"
