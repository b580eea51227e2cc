"""What reading costs: prints, and times nothing that a busy machine could fail. Run with -m slow -s."""

import csv
import gzip
import json
import random
import subprocess
import sys

import pytest
from conftest import ROOT

READING = """
import re, sys, time
from pathlib import Path
from lit_model.data.rows import read_rows
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
mib = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before, began = mib("VmRSS"), time.perf_counter()
rows = read_rows(sys.argv[1])
print(len(rows), time.perf_counter() - began, mib("VmHWM") - before)
"""


@pytest.mark.slow
def test_how_long_50000_rows_take(tmp_path):
    """Prints a table: seconds, and the most memory beside what the imports take."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    words = [f"word{i}" for i in range(3000)]
    text = lambda n: " ".join(random.choices(words, k=n))  # noqa: E731
    alpaca = [dict(instruction=text(12), input=text(8), output=text(45)) for _ in range(50_000)]
    roles = ("user", "assistant") * 2
    chats = [dict(messages=[dict(role=role, content=text(30)) for role in roles]) for _ in range(50_000)]
    for name, rows in (("alpaca", alpaca), ("chats", chats)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        (tmp_path / f"{name}.jsonl").write_text(lines)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    for end, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"alpaca.{end}", "w", newline="") as file:
            writer = csv.DictWriter(file, list(alpaca[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(alpaca)
    (tmp_path / "text.txt").write_text("\n\n".join(text(300) for _ in range(50_000)))
    for path in sorted(tmp_path.iterdir()):
        done = subprocess.run(
            [sys.executable, "-c", READING, path], capture_output=True, text=True, check=True, cwd=ROOT
        )
        n, seconds, mib = done.stdout.split()
        print(f"{path.name:16} {path.stat().st_size >> 20:5} MiB, {n} rows: {float(seconds):5.1f} s, {mib} MiB")
        assert int(n) == 50_000
