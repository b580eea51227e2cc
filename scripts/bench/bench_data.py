"""How long reading takes, and how much memory: rows made of the demo's, the first time and from the cache.

python scripts/bench_data.py --n_rows 50000
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lit_model.weights import demo as hub
from lit_model.cli import cli
from lit_model.data.rows import PromptOptions, read_rows
from lit_model.data.dataset import read_dataset
from lit_model.data.tokenizer import Tokenizer


@dataclass
class Options:
    """Options."""

    n_rows: int = 50_000
    """how many rows"""
    file: Path | None = None
    """measure this file, in this process; null: files of every kind, each in a process of its own"""


def main(options: Options) -> None:
    hub.fetch_demo_model()
    hub.fetch_demo_data()
    if options.file is not None:
        return measure(options.file)
    print("| rows of | file | first time | from the cache | peak memory |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, rows in (("instruction", instructions(options.n_rows)), ("messages", chats(options.n_rows))):
            path = Path(folder) / f"{kind}.json"
            path.write_text(json.dumps(rows))
            command = [sys.executable, __file__, "--file", str(path)]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
            first, again = (json.loads(done.stdout.splitlines()[-1]) for done in runs)
            size = f"{path.stat().st_size / 1e6:.0f} MB"
            times = f"{first['seconds']:.1f} s | {again['seconds']:.1f} s"
            print(f"| {kind}, {len(rows):,} | {size} | {times} | {first['peak_gib']:.2f} GiB |", flush=True)


def measure(path: Path) -> None:
    tokenizer, began = Tokenizer(hub.DEMO_CHECKPOINT), time.perf_counter()
    options = PromptOptions(max_length=512, style="chat" if path.stem == "messages" else "alpaca")
    read_dataset(path, tokenizer, options, cache_dir=path.parent / "cache")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(dict(seconds=seconds, peak_gib=peak)))


def instructions(n: int) -> list[dict[str, str]]:
    rng, rows = random.Random(0), read_rows(hub.DEMO_DATA)
    return [row | {"instruction": f"{i}: {row['instruction']}"} for i, row in enumerate(rng.choices(rows, k=n))]


def chats(n: int) -> list[dict[str, list]]:
    """Of one to three turns."""
    rng, rows, made = random.Random(0), read_rows(hub.DEMO_DATA), []
    for i in range(n):
        messages = []
        for row in rng.choices(rows, k=rng.randint(1, 3)):
            messages.append({"role": "user", "content": f"{i} {row['instruction']}\n{row['input']}"})
            messages.append({"role": "assistant", "content": row["output"][:600]})
        made.append({"messages": messages})
    return made


if __name__ == "__main__":
    cli(main, Options, __doc__)
