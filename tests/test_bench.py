"""What is measured is what trains, and what cannot be measured is said in one line."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LLAMA, ROOT, fail, say

from lit_model import GPT, Config, families, load
from lit_model.cli import cli
from lit_model.data.examples import render
from lit_model.data.tokenizer import Tokenizer
from lit_model.methods import full
from scripts.bench import bench, random_checkpoint, serve
from scripts.bench.bench_table import table
from scripts.bench.kernel_time import products
from scripts.bench.workload import lengths


@pytest.fixture
def preset(monkeypatch):
    """A tiny network under the name of a preset."""
    tiny = families.write_config(Config(**LLAMA | dict(vocab_size=8000, block_size=512)))
    monkeypatch.setitem(families.PRESETS, "tiny", tiny)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--methods lore", "there is no 'lore' in 'bf16': methods are adapter, adapter_v2, bottleneck"),
        ("--precision bf8", "there is no 'adapter' in 'bf8'"),
        ("--preset gpt-5", "there is no preset 'gpt-5'"),
        ("--out notes.md/bench.jsonl", "notes.md"),
    ],
)
def test_mistakes_in_measuring_end_in_one_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    assert message in fail(bench, capsys, monkeypatch, args)


def test_a_run_that_measures_nothing_says_so(preset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ours", lambda case: 1 / 0)
    assert "nothing could be measured" in fail(bench, capsys, monkeypatch, f"--preset tiny --out {tmp_path / 'a'}")


def test_bench_measures_the_peer_beside_us(preset, tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench.jsonl"
    args = "--preset tiny --methods lora,selective --precision fp32,int8 --devices cpu --batch_size 4 --steps 1"
    stdout = say(bench, capsys, monkeypatch, f"{args} --peers hf-peft --out {out}")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    cases = [(r["method"], r["precision"]) for r in lines if r["system"] == "lit-model"]
    assert cases == [("lora", "fp32"), ("lora", "int8"), ("selective", "fp32"), ("selective", "int8")]
    assert [r["precision"] for r in lines if r["system"] == "transformers + peft"] == ["fp32", "bf16"]
    assert "theirs: selective fp32 failed" in stdout  # peft has none, which takes no other result with it
    assert all(abs(r["loss"] - math.log(8000)) < 1 for r in lines)
    assert f"| lit-model: lora fp32 | {lines[0]['setting']} | {lines[0]['tokens_per_second']:,.0f} |" in stdout


def test_the_table_compares_with_the_peer_and_with_one_device():
    line = dict(method="lora", precision="fp8", setting="", step_ms=1.0, peak_gib=1.0, loss=1.0)
    line |= dict(strategy="ddp", start_s=None, mfu=0.5, products=None, attention=None)
    ours = dict(line, system="lit-model", tokens_per_second=300.0, world=1)
    peer = dict(line, system="transformers + peft", precision="bf16", tokens_per_second=100.0, world=1)
    assert "| 300 | 3.00 x |" in table([ours, peer])
    assert "lora fp8, 2 x ddp |  | 450 | 1.50 x |" in table([ours, dict(ours, tokens_per_second=450.0, world=2)])


def test_training_everything_takes_three_products_a_layer():
    gpt = GPT(Config(**LLAMA))
    full.install(gpt)
    done = list(products(gpt, 100, 10))
    assert all(backward and trained for _, _, backward, trained in done)
    assert len(done) == 7 * 3 + 1
    assert [n for _, n, _, _ in done] == [100] * 14 + [10, 100, 100, 10, 10, 10, 10, 10]


def test_random_checkpoint_opens_and_its_rows_are_as_long_as_they_say(preset, tmp_path, capsys, monkeypatch):
    """In tokens, the preamble and what the tokenizer adds included."""
    out = tmp_path / "random"
    say(random_checkpoint, capsys, monkeypatch, f"--preset tiny --out_dir {out} --n_rows 300")
    assert load(out)(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()
    tokenizer, rows = Tokenizer(out), json.loads((out / "rows.json").read_text())
    texts = [render("alpaca", row["instruction"], row["input"]) + row["output"] for row in rows]
    counts = [2 + len(ids) for ids in map(tokenizer.encode, texts)]
    assert np.mean(counts) == pytest.approx(lengths(300).mean(), rel=0.02)
    for text, n in (("", 29), ("a", 39)):
        preamble = render("alpaca", "\0", text).split("\0")[0]
        assert 1 + len(tokenizer.encode(preamble)) == n
    assert "is not empty" in fail(random_checkpoint, capsys, monkeypatch, f"--preset tiny --out_dir {out}")


def test_a_start_is_timed_by_part(tiny):
    command = f"scripts/bench/start_time.py finetune/lora.py --checkpoint_dir {tiny}/base --data {tiny}/data.json"
    process = subprocess.run(
        [sys.executable, *command.split(), "--devices=cpu"], cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    parts = [line.split(": ")[-1] for line in process.stdout.splitlines() if "after launch" in line]
    names = ["imported", "rows", "network", "optimizer", "validated", "first"]
    assert [part.replace(",", "").split()[0] for part in parts] == names


def test_the_server_is_measured_under_load(tiny, capfd, monkeypatch):
    server = f"--server=--checkpoint_dir {tiny}/base --places 2 --device cpu"
    monkeypatch.setattr(sys, "argv", ["serve.py", "--clients", "1,3", "--prompt", "20", "--new", "12", server])
    cli(serve.main, serve.Options, "")
    start, head, *rows = capfd.readouterr().out.splitlines()
    assert start.startswith("start: ") and [row.split(" | ")[0] for row in rows] == ["1", "3"]
    assert all(float(row.split(" | ")[3].replace(",", "")) > 0 for row in rows)
