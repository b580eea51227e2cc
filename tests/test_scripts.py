"""Every script runs as a user types it, from another folder, on a tiny checkpoint; mistakes end in one line."""

import csv
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import scripts.convert_gguf
import scripts.convert_hf
import torch
import yaml
from conftest import ROOT, WORDS, save_tokenizer
from safetensors.torch import load_file
from scripts.random_checkpoint import random_rows, train_tokenizer
from scripts.workload import lengths
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import finetune.adapter
import finetune.lora
import generate.base
import scripts.download
import scripts.merge
from lit_model import load
from lit_model.cli import cli
from lit_model.data.examples import render
from lit_model.data.tokenizer import Tokenizer

FAST = "--train.epochs 3 --train.batch_size 8 --train.sample abc --devices cpu".split()


def run(script: str, *args, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "method, lr, gain",
    [("adapter", 0.5, 0.02), ("adapter_v2", 3e-2, 0.1), ("bottleneck", 1e-2, 0.05), ("full", 1e-2, 0.1),
     ("ia3", 0.3, 0.02), ("lora", 1e-2, 0.1), ("prefix", 0.3, 0.02), ("prompt", 0.3, 0.02), ("selective", 1e-2, 0.1)],
)  # fmt: skip
def test_finetune_generate_merge(tiny, tmp_path, method, lr, gain, capsys, monkeypatch):
    """One of them as a user types it, in a process of its own; the others in this one."""
    base, out = tiny / "base", tmp_path / "run"

    def say(script: str, *args) -> str:
        if method == "lora":
            return run(script, *args, cwd=tmp_path)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        cli(module.main, module.Options, module.__doc__)
        said = capsys.readouterr()
        return said.out + said.err

    said = say(
        f"finetune/{method}.py", "--checkpoint_dir", base, "--data", tiny / "data.json", "--out_dir", out, *FAST,
        "--train.lr", lr,
    )  # fmt: skip
    assert "validation loss:" in said and "tokens/s" in said and "peak memory" in said
    assert f"--checkpoint_dir {base} --method_dir {out}" in said
    files = {path.name.split(".")[0] for path in out.iterdir()}
    assert files == {"lit_method", "last", "hparams", "metrics", "loss", "events", "state"}
    with open(out / "metrics.csv") as file:
        log = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in log if row["loss"]]
    val = [float(row["val_loss"]) for row in log if row["val_loss"]]
    assert len(losses) == 3 * -(-57 // 8)  # 57 training rows in batches of 8, three times
    assert val[-1] < val[0] - gain and losses[-1] < losses[0] - gain
    assert yaml.safe_load((out / "hparams.yaml").read_text())["train"]["lr"] == lr

    prompt = ["--checkpoint_dir", base, "--prompt", "apple", "--temperature", 0, "--max_new_tokens", 8]
    assert "tokens/s" in say("generate/base.py", *prompt, "--method_dir", out)
    merge = ["--checkpoint_dir", base, "--method_dir", out, "--out_dir", tmp_path / "m"]
    if method in ("adapter", "bottleneck", "prefix", "prompt"):
        code, err = call(scripts.merge, capsys, monkeypatch, *merge)
        assert code == 2
        assert err == f"error: {method} cannot be merged into the base weights; generate with --method_dir instead\n"
        return
    said = say("scripts/merge.py", *merge)
    rest = tmp_path / "m/adapter" if method == "adapter_v2" else None
    assert (f"--method_dir {rest}" in said) == (rest is not None)
    idx = torch.randint(0, 400, (1, 20))
    torch.testing.assert_close(load(tmp_path / "m", rest)(idx), load(base, out)(idx), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(load(tmp_path / "m")(idx), load(base)(idx), atol=1e-2)


def test_a_config_file_repeats_a_run_to_the_bit(tiny, tmp_path):
    args = ["--checkpoint_dir", tiny / "base", "--data", tiny / "data.json", *FAST, "--train.max_steps", 5]
    run("finetune/lora.py", *args, "--out_dir", tmp_path / "a", "--lora.r", 3, "--lora.dropout", 0.1, cwd=tmp_path)
    run("finetune/lora.py", "--config", tmp_path / "a/hparams.yaml", "--out_dir", tmp_path / "b", cwd=tmp_path)
    a, b = (load_file(tmp_path / run / "last.safetensors") for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_is_replaced_only_where_the_command_says_so(tiny, tmp_path, capsys, monkeypatch):
    """--overwrite is not part of the settings that --config repeats, and what stands beside --config counts."""

    def start(*more) -> tuple[int, str]:
        return call(finetune.lora, capsys, monkeypatch, *more, "--devices", "cpu", "--train.sample=")

    new = ["--checkpoint_dir", tiny / "base", "--data", tiny / "data.json", "--train.max_steps", 1, "--out_dir"]
    for out in (tmp_path / "a", tmp_path / "b"):
        monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, new), str(out), "--overwrite", "--devices", "cpu"])
        cli(finetune.lora.main, finetune.lora.Options, "")
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir() if path.is_file()}
    code, err = start("--train.lr", "5e-3", "--config", tmp_path / "a/hparams.yaml", "--out_dir", tmp_path / "b")
    assert code == 2 and f"{tmp_path}/b holds a run with train.lr 0.002 there and 0.005 here" in err
    code, err = start(*new, tmp_path / "b", "--train.lr", 1e30, "--train.max_steps", 3, "--overwrite")
    assert code == 2 and "nothing was saved yet" in err
    assert all(
        (tmp_path / "b" / name).read_bytes() == before[name] for name in ("hparams.yaml", "lit_method.safetensors")
    )
    args = ["--train.lr", "5e-3", "--config", tmp_path / "a/hparams.yaml", "--out_dir", tmp_path / "c"]
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, args)])
    cli(finetune.lora.main, finetune.lora.Options, "")
    settings = yaml.safe_load((tmp_path / "c/hparams.yaml").read_text())
    assert settings["train"]["lr"] == 5e-3 and settings["train"]["max_steps"] == 1


def test_convert_and_download_scripts(tiny, tmp_path, rows):
    config = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", rows)
    said = run("scripts/convert_hf.py", "hf", "checkpoints/mine", "--dtype", "bfloat16", cwd=tmp_path)
    assert said.endswith("checkpoint: checkpoints/mine\n")
    assert load(tmp_path / "checkpoints/mine")(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 400)
    said = run("scripts/convert_gguf.py", tmp_path / "hf/config.json", "x", cwd=tmp_path, code=2)
    assert said.startswith("error: ") and "is not a whole GGUF file" in said and said.count("\n") == 1
    said = run("scripts/download.py", "smollm2", cwd=tmp_path, code=2)
    assert said.startswith("error: smollm2 is neither smollm2-135m-instruct nor owner/name") and said.count("\n") == 1


def call(module, capsys, monkeypatch, *args) -> tuple[int, str]:
    """Runs a script in this process. Returns its exit code and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli(module.main, module.Options, module.__doc__)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "args, says",
    [
        ("--lora.rank 4", "lora.rank"),
        ("--train.lr fast", "train.lr"),
        ("--lora.r 0", "lora.r is 0; it must be at least 1"),
        ("--lora.targets q_proj,wq", "no layer is called wq; there are down_proj"),
        ("--train.batch_size 0", "train.batch_size is 0; it must be at least 1"),
        ("--train.grad_clip -1", "train.grad_clip is -1"),
        ("--train.max_examples 0", "train.max_examples is 0"),
        ("--prompt.max_length 9999 --data {long}", "the longest example has"),
        ("--train.warmup_steps 999", "warmup_steps is 999, but the run has 4 steps"),
        ("--memory_gb 4 --devices cpu", "memory_gb limits the memory of a GPU, and none is used here"),
        ("--checkpoint_dir nowhere", "nowhere/lit_config.json is not there"),
        ("--data nowhere.json", "nowhere.json is not there"),
        ("--prompt.max_length 8", "none of the 57 training rows is left"),
        ("--prompt.val_fraction 1.0", "prompt.val_fraction is 1.0"),
        ("--prompt.val_fraction 0.999", "60 rows are too few to keep 60 for validation"),
        (
            "--train.lr 1e30 --train.warmup_steps 0 --train.grad_clip 0 --lora.alpha 1e30",
            "at step 1: try a lower train.lr; nothing was saved yet",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(args, says, tiny, tmp_path, capsys, monkeypatch):
    long = tmp_path / "long.json"
    long.write_text(json.dumps([dict(instruction=str(i), output="river " * 600) for i in range(40)]))
    given = ["--checkpoint_dir", tiny / "base", "--data", tiny / "data.json", "--out_dir", tmp_path / "run"]
    code, err = call(
        finetune.lora, capsys, monkeypatch, *given, "--train.batch_size=16", "--devices=cpu", "--train.sample=",
        *args.format(long=long).split(),
    )  # fmt: skip
    last = err.rsplit("\r", 1)[-1].strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and says in last, err
    assert "Traceback" not in err


@pytest.mark.parametrize("compiler", ["", "no-such-compiler -O2"])
def test_compiling_without_a_compiler_is_refused(compiler, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    given = ["--checkpoint_dir", tiny / "base", "--data", tiny / "data.json", "--out_dir", tmp_path / "run"]
    code, err = call(finetune.lora, capsys, monkeypatch, *given, "--devices=cpu", "--compile=on")
    assert code == 2 and "error: --compile on needs a C++ compiler" in err


def test_a_checkpoint_folder_is_never_taken_for_a_run(tiny, capsys, monkeypatch):
    code, err = call(finetune.adapter, capsys, monkeypatch, "--out_dir", tiny / "base", "--overwrite")
    assert code == 2 and "base is a checkpoint folder; name another --out_dir" in err
    assert (tiny / "base/lit_model.safetensors").is_file()


def test_a_finished_run_is_not_overwritten_unasked(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / "lit_method.safetensors").write_text("")
    code, err = call(finetune.adapter, capsys, monkeypatch, "--out_dir", out, "--checkpoint_dir", tiny / "base")
    assert code == 2 and "holds a run already" in err and "--overwrite" in err


def test_broken_and_foreign_files_are_named(tiny, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (tiny / "base").iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:5000])
    (broken / "tokenizer.json").write_bytes((tiny / "base/tokenizer.json").read_bytes())
    code, err = call(generate.base, capsys, monkeypatch, "--checkpoint_dir", broken, "--device", "cpu")
    assert code == 2 and "broken/lit_model.safetensors is broken or only partly written" in err
    code, err = call(generate.base, capsys, monkeypatch, "--checkpoint_dir", tiny / "base", "--method_dir",
                     tiny / "base/lit_model.safetensors")  # fmt: skip
    assert code == 2 and "is not a method file of lit-model" in err
    config = json.loads((tiny / "base/lit_config.json").read_text())
    (broken / "lit_config.json").write_text(json.dumps({**config, "n_layer": 4}))
    (broken / "lit_model.safetensors").write_bytes((tiny / "base/lit_model.safetensors").read_bytes())
    code, err = call(generate.base, capsys, monkeypatch, "--checkpoint_dir", broken)
    assert code == 2 and "lacks 9 tensors, such as blocks.3" in err
    (broken / "lit_config.json").write_text(json.dumps({**config, "n_hidden": 128}))
    code, err = call(generate.base, capsys, monkeypatch, "--checkpoint_dir", broken)
    assert code == 2 and "blocks.0.mlp.down_proj.weight is (64, 112); the model wants (64, 128)" in err
    config.pop("rope_base")
    (broken / "lit_config.json").write_text(json.dumps(config))
    code, err = call(generate.base, capsys, monkeypatch, "--checkpoint_dir", broken)
    assert code == 2 and "broken/lit_config.json lacks rope_base" in err
    (broken / "lit_config.json").write_text("{")
    code, err = call(generate.base, capsys, monkeypatch, "--checkpoint_dir", broken)
    assert code == 2 and "broken/lit_config.json is broken or only partly written" in err
    (broken / "lit_config.json").write_bytes((tiny / "base/lit_config.json").read_bytes())
    (broken / "tokenizer.json").write_text("{")
    code, err = call(generate.base, capsys, monkeypatch, "--checkpoint_dir", broken)
    assert code == 2 and "broken/tokenizer.json is broken or only partly written" in err
    code, err = call(scripts.merge, capsys, monkeypatch, "--method_dir", "nowhere", "--out_dir", tmp_path / "x")
    assert code == 2 and "nowhere/lit_method.safetensors is not there" in err


@pytest.mark.parametrize(
    "args, says",
    [
        ("--temperature -1", "temperature is -1.0"),
        ("--top_k 0", "top_k is 0"),
        ("--top_p 2", "top_p is 2.0"),
        ("--max_new_tokens 0", "max_new_tokens is 0"),
        ('--stop [""] --style alpaca', "an empty --stop"),
        ("--input x", "--input goes with a --style"),
        ("--style chatml", "the style chatml needs a tokenizer that knows <|im_start|>"),
        ("--device gpu", "there is no device 'gpu' here"),
        ("--checkpoint_dir nowhere", "nowhere/lit_config.json is not there; scripts/download.py"),
    ],
)
def test_mistakes_in_generation_end_in_one_line(args, says, tiny, capsys, monkeypatch):
    given = ["--checkpoint_dir", tiny / "base", *args.split()]
    code, err = call(generate.base, capsys, monkeypatch, *given)
    assert code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1, err


def test_a_checkpoint_is_not_replaced_by_another(tiny, tmp_path, capsys, monkeypatch):
    before = (tiny / "base/lit_model.safetensors").read_bytes()
    for module, args in (
        (scripts.convert_hf, ["--src_dir", tmp_path, "--out_dir", tiny / "base"]),
        (scripts.convert_gguf, ["--src", tmp_path / "x", "--out_dir", tiny / "base"]),
        (scripts.merge, ["--method_dir", tmp_path, "--out_dir", tiny / "base"]),
    ):
        code, err = call(module, capsys, monkeypatch, *args)
        assert code == 2 and "base holds a checkpoint already" in err
    assert (tiny / "base/lit_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_download_converts_what_the_hub_gives(weights, tiny, tmp_path, rows, monkeypatch):
    """The Hub is a folder here. Like GPT-2's repository it names no end-of-text token in tokenizer_config.json."""
    config = GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)

    def snapshot_download(repo_id, local_dir, allow_patterns, ignore_patterns=()):
        assert not any(fnmatch(weights, pattern) for pattern in ignore_patterns)
        if any(fnmatch(weights, pattern) for pattern in allow_patterns):
            GPT2LMHeadModel(config).save_pretrained(local_dir)
            if weights.endswith(".bin"):
                torch.save(load_file(local_dir / "model.safetensors"), local_dir / weights)
                (local_dir / "model.safetensors").unlink()
        save_tokenizer(local_dir, rows)
        (local_dir / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
        return str(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    scripts.download.main(scripts.download.Options("someone/gpt2", tmp_path / "gpt2"))
    assert Tokenizer(tmp_path / "gpt2").eos_id == 1
    assert load(tmp_path / "gpt2")(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 400)


@pytest.mark.parametrize(
    "args, says",
    [
        (
            "scripts/bench.py --methods lore",
            "there is no 'lore' in 'bf16': methods are adapter, adapter_v2, bottleneck",
        ),
        ("scripts/bench.py --data demo", "llama-7b has 32000: take --preset smollm2-135m"),
        ("scripts/bench.py --out notes.md", "notes.md is no table of this script"),
        ("scripts/random_checkpoint.py --preset smollm2-135m --out_dir .", "holds other files already"),
        ("scripts/bench.py --methods full --precision nf4", "full finetuning trains the weights that nf4 would freeze"),
        ("scripts/bench.py --steps 0", "steps is 0; it must be at least 1"),
        ("scripts/bench.py --devices cpu --memory_gb 4", "memory_gb is a positive number of GiB"),
        ("scripts/bench.py --preset gpt-5", "there is no preset 'gpt-5'"),
        (
            "scripts/whole_run.py --methods loop",
            "there is no 'loop' in 'bf16': methods are adapter, adapter_v2, bottleneck",
        ),
        ("scripts/whole_run.py --precision bf8", "there is no 'adapter' in 'bf8': methods are"),
        ("scripts/whole_run.py --checkpoint_dir nowhere", "nowhere/lit_config.json is not there"),
        ("scripts/random_checkpoint.py --n_rows 1", "n_rows is 1; it must be at least 2"),
    ],
)
def test_mistakes_in_measuring_end_in_one_line(args, says, tmp_path, capsys, monkeypatch):
    script, *args = args.split()
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "rows.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    code, err = call(module, capsys, monkeypatch, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_random_rows_are_as_long_as_they_say():
    """In tokens, the preamble and what a model adds included; also if a word is one token only after a space."""
    frames = [render("alpaca", "a", text) for text in ("a", "")]
    tokenizer = train_tokenizer(50 * [*frames, *(f"{word} {word} {word[::-1]}" for word in WORDS)], 2000)
    rows = random_rows(tokenizer, 300)
    texts = [(render("alpaca", row["instruction"], row["input"]), row["output"]) for row in rows]
    n = [2 + sum(len(tokenizer.encode(text).ids) for text in pair) for pair in texts]
    assert np.mean(n) == pytest.approx(lengths(300).mean(), rel=0.01)


def test_bench_measures_on_a_cpu(tmp_path):
    """One step of a real shape: a table with our row, and the same in the CSV file."""
    said = run(
        "scripts/bench.py", "--preset", "smollm2-135m", "--methods", "lora", "--precision", "fp32", "--devices", "cpu",
        "--batch_size", 2, "--steps", 1, "--recompute", "on", "--out", tmp_path / "bench.csv", cwd=ROOT,
    )  # fmt: skip
    with open(tmp_path / "bench.csv") as file:
        (row,) = csv.DictReader(file)
    assert (
        f"| lit-model: lora fp32 | 1 rows of 130 tokens, blocks recomputed | {float(row['tokens_per_second']):,.0f} |"
        in said
    )
    assert 8 < float(row["loss"]) < 13 and float(row["start_s"]) > 0


def test_whole_runs_are_timed_and_replaced(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "base")
    shutil.copy(tiny / "data.json", tmp_path / "base/rows.json")
    args = "--checkpoint_dir base --devices cpu --precision fp32,int8 --methods lora --epochs 1 --batch_size 8".split()
    for _ in range(2):
        said = run("scripts/whole_run.py", *args, cwd=tmp_path)
        lines = [line for line in said.splitlines() if line.startswith("| 1 ")]
        assert [line.split("|")[2].strip() for line in lines] == ["lora fp32", "lora int8"]
        assert all(re.search(r"\| \d+ s \| \d+ s \| [1-9][\d,]* \|", line) for line in lines)


@pytest.mark.parametrize("script", sorted(str(p.relative_to(ROOT)) for d in ("finetune", "generate", "scripts")
                                          for p in (ROOT / d).glob("*.py") if "cli(main" in p.read_text()))  # fmt: skip
def test_help_explains_every_option(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.split("options:")[1].splitlines()
    options = [line for line in lines if line.strip().startswith("--") and "CONFIG" not in line]
    assert len(options) >= 2
    for line, following in zip(lines, lines[1:] + [""]):
        if line in options:
            text = line.strip().split("  ", 1)[1] if "  " in line.strip() else following
            assert len(text.split("(type:")[0].strip()) > 8, f"{script}: no help for {line}"


def test_of_two_config_files_the_later_one_counts(tmp_path, monkeypatch):
    for name, top_k in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"top_k: {top_k}\nseed: {top_k}\n")
    got = []
    args = f"--config {tmp_path}/a.yaml --seed 9 --config={tmp_path}/b.yaml".split()
    monkeypatch.setattr(sys, "argv", ["base.py", *args])
    cli(got.append, generate.base.Options, "")
    assert (got[0].top_k, got[0].seed) == (2, 9)
