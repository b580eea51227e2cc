"""Every script runs as a user types it, on a tiny checkpoint; mistakes end in one line."""

import csv
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, fail, say
from safetensors.torch import load_file

from finetune import adapter, lora
from generate import base as generate_base
from lit_model import load
from lit_model.cli import cli
from lit_model.load import METHODS
from scripts import merge

FAST = "--train.epochs 3 --train.batch_size 8 --train.sample abc --devices cpu"


def run(script: str, args: str, cwd: Path) -> str:
    """What a script prints in a process of its own, in another folder."""
    done = subprocess.run([sys.executable, ROOT / script, *args.split()], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


GAINS = {  # method -> learning rate, and by how much three epochs lower the loss at least
    "adapter": (0.5, 0.02),
    "adapter_v2": (3e-2, 0.1),
    "bottleneck": (1e-2, 0.05),
    "dora": (1e-2, 0.1),
    "full": (1e-2, 0.1),
    "ia3": (0.3, 0.02),
    "lora": (1e-2, 0.1),
    "pissa": (1e-2, 0.1),
    "prefix": (0.3, 0.02),
    "prompt": (0.3, 0.02),
    "selective": (1e-2, 0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_finetune_generate_merge(tiny, tmp_path, method, capsys, monkeypatch):
    """One of them as a user types it, in a process of its own; the others in this one."""
    base, out_dir, (lr, gain) = tiny / "base", tmp_path / "run", GAINS[method]

    def stdout(script: str, args: str) -> str:
        if method == "lora":
            return run(script, args, cwd=tmp_path)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        return say(module, capsys, monkeypatch, args)

    args = f"--checkpoint_dir {base} --data {tiny}/data.json --out_dir {out_dir} {FAST} --train.lr {lr}"
    text = stdout(f"finetune/{method}.py", args)
    assert "before: validation loss" in text and "tokens/s" in text and "peak memory" in text
    assert f"try:  python generate/base.py --checkpoint_dir {base} --method_dir {out_dir}" in text
    files = {path.name.split(".")[0] for path in out_dir.iterdir()} - {"hf"}
    assert files == {"lit_method", "last", "hparams", "metrics", "loss", "events", "state"}
    with open(out_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    val_losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert len(losses) == 3 * -(-57 // 8)  # 57 training rows in batches of 8, three times
    assert val_losses[-1] < val_losses[0] - gain and losses[-1] < losses[0] - gain
    assert yaml.safe_load((out_dir / "hparams.yaml").read_text())["train"]["lr"] == lr

    args = f"--checkpoint_dir {base} --method_dir {out_dir}"
    stdout("generate/base.py", f"{args} --prompt apple --temperature 0 --max_new_tokens 8")
    args += f" --out_dir {tmp_path}/merged"
    if method in ("adapter", "bottleneck", "prefix", "prompt"):
        line = f"error: {method} cannot be merged into the base weights; generate with --method_dir instead"
        assert fail(merge, capsys, monkeypatch, args) == line
        return
    text = stdout("scripts/merge.py", f"{args} --dtype float32")
    rest = tmp_path / "merged/adapter_v2" if method == "adapter_v2" else None
    assert (f"--method_dir {rest}" in text) == (rest is not None)
    idx = torch.randint(0, 400, (1, 20))
    torch.testing.assert_close(load(tmp_path / "merged", rest)(idx), load(base, out_dir)(idx), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(load(tmp_path / "merged")(idx), load(base)(idx), atol=1e-2)


def test_a_config_file_repeats_a_run_to_the_bit(tiny, tmp_path, capsys, monkeypatch):
    args = f"--checkpoint_dir {tiny}/base --data {tiny}/data.json {FAST} --train.max_steps 5"
    say(lora, capsys, monkeypatch, f"{args} --out_dir {tmp_path}/a --lora.r 3 --lora.dropout 0.1")
    say(lora, capsys, monkeypatch, f"--config {tmp_path}/a/hparams.yaml --out_dir {tmp_path}/b")
    a, b = (load_file(tmp_path / run / "last.safetensors") for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_is_replaced_only_where_the_command_says_so(tiny, tmp_path, capsys, monkeypatch):
    """--overwrite is not part of the settings that --config repeats, and what stands beside --config counts."""
    args = f"--checkpoint_dir {tiny}/base --data {tiny}/data.json --devices cpu --train.sample= --train.max_steps"
    for name in "ab":
        say(lora, capsys, monkeypatch, f"{args} 1 --out_dir {tmp_path}/{name} --overwrite")
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir() if path.is_file()}
    config = f"--train.lr 5e-3 --config {tmp_path}/a/hparams.yaml --out_dir {tmp_path}"
    line = f"{tmp_path}/b holds a run with train.lr 0.002 there and 0.005 here"
    assert line in fail(lora, capsys, monkeypatch, f"{config}/b")
    diverging = f"{args} 3 --out_dir {tmp_path}/b --train.lr 1e30 --overwrite"
    assert "nothing was saved yet" in fail(lora, capsys, monkeypatch, diverging)
    for name in ("hparams.yaml", "lit_method.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == before[name]
    say(lora, capsys, monkeypatch, f"{config}/c")
    settings = yaml.safe_load((tmp_path / "c/hparams.yaml").read_text())
    assert settings["train"]["lr"] == 5e-3 and settings["train"]["max_steps"] == 1


def test_of_two_config_files_the_later_one_counts(tmp_path, monkeypatch):
    for name, top_k in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"top_k: {top_k}\nseed: {top_k}\n")
    given = []
    args = f"--config {tmp_path}/a.yaml --seed 9 --config={tmp_path}/b.yaml".split()
    monkeypatch.setattr(sys, "argv", ["base.py", *args])
    cli(given.append, generate_base.Options, "")
    assert (given[0].top_k, given[0].seed) == (2, 9)


@pytest.mark.parametrize(
    "args, says",
    [
        ("--train.batch_size 0", "train.batch_size is 0; it must be at least 1"),
        ("--train.grad_clip -1", "train.grad_clip is -1"),
        ("--train.max_examples 0", "train.max_examples is 0"),
        ("--examples.val_fraction 1.0", "examples.val_fraction is 1.0"),
        ("--examples.val_fraction 0.999", "60 rows are too few to keep 60 for validation"),
        (
            "--train.lr 1e30 --train.warmup_steps 0 --train.grad_clip 0 --lora.alpha 1e30",
            "at step 1: try a lower train.lr; nothing was saved yet",
        ),
    ],
)
def test_mistakes_in_training_end_in_one_line(args, says, tiny, tmp_path, capsys, monkeypatch):
    """Beside those of test_mistakes.py."""
    given = f"--checkpoint_dir {tiny}/base --data {tiny}/data.json --out_dir {tmp_path}/run --devices=cpu"
    assert says in fail(lora, capsys, monkeypatch, f"{given} --train.sample= {args}")


@pytest.mark.parametrize(
    "args, says",
    [
        ("--temperature -1", "temperature is -1.0"),
        ("--top_k 0", "top_k is 0"),
        ("--top_p 2", "top_p is 2.0"),
        ("--max_new_tokens 0", "max_new_tokens is 0"),
        ("--input x", "the style 'none' has no {input} in it: the input 'x' would be left out"),
        ("--style chatml", "the style 'chatml' cannot be taken"),
        ("--device gpu", "there is no device 'gpu' here"),
    ],
)
def test_mistakes_in_generation_end_in_one_line(args, says, tiny, capsys, monkeypatch):
    assert says in fail(generate_base, capsys, monkeypatch, f"--checkpoint_dir {tiny}/base {args}")


def test_what_is_no_run_of_ours_is_not_replaced(tiny, tmp_path, capsys, monkeypatch):
    """A checkpoint folder, and trained tensors without the state of a run beside them."""
    before = (tiny / "base/model.safetensors").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lit_method.safetensors").write_text("mine")
    for out_dir in (tiny / "base", tmp_path / "run"):
        args = f"--checkpoint_dir {tiny}/base --data {tiny}/data.json --out_dir {out_dir} --devices cpu"
        assert "is not empty" in fail(adapter, capsys, monkeypatch, args)
    assert (tiny / "base/model.safetensors").read_bytes() == before
    assert (tmp_path / "run/lit_method.safetensors").read_text() == "mine"


def help_of(script: Path, capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    return capsys.readouterr().out


SCRIPTS = [p for d in ("finetune", "generate", "scripts") for p in sorted((ROOT / d).rglob("*.py"))]


@pytest.mark.parametrize(
    "script", [p for p in SCRIPTS if "cli(main" in p.read_text()], ids=lambda path: str(path.relative_to(ROOT))
)
def test_help_explains_every_option_on_two_screens(script, capsys, monkeypatch):
    text = help_of(script, capsys, monkeypatch)
    lines = text.splitlines()
    assert "<class" not in text and str(ROOT) not in text and str(Path.home()) not in text
    assert len(lines) <= 100 and max(map(len, lines)) <= 120
    names = [i for i, line in enumerate(lines) if line.startswith("  --")]
    assert names
    for i in names:
        name, _, about = lines[i].strip().partition("  ")
        assert len((about or lines[i + 1]).strip()) > 8, f"no help for {name}"


def test_help_shows_what_people_use_first(capsys, monkeypatch):
    text = help_of(ROOT / "finetune/lora.py", capsys, monkeypatch)
    places = [text.index(f"  {name} ") for name in ("--checkpoint_dir", "--data", "--out_dir", "--train.lr")]
    assert places == sorted(places) and places[0] < text.index("  --memory_gb ")
