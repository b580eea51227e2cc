"""Every mistake ends in one line that names the file or option and what to do, with exit code 2, and nothing is lost.
docs/mistakes.md shows these lines; run with -s to print them for it."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ROOT, fail
from safetensors.torch import load_file, save_file

from finetune import lora
from generate import base as generate_base
from lit_model import model
from lit_model.weights.folder import save_folder, tokenizer_files
from scripts import convert, merge


def broken_lines(d: Path) -> None:
    (d / "rows.jsonl").write_text('\n{"instruction": "a", \n{"instruction": "b", \n')


def half_a_gz(d: Path) -> None:
    (d / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-9])


def half_a_checkpoint(d: Path) -> None:
    path = d / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def no_weights(d: Path) -> None:
    (d / "base/model.safetensors").unlink()


def a_tensor(d: Path, change) -> None:
    path = d / "base/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.clone() for name, t in tensors.items()}, path)


def another_base(d: Path) -> None:
    shutil.copytree(ROOT_RUN / "run", d / "run")
    torch.manual_seed(1)
    gpt = model.GPT(model.Config(**{**LLAMA, "vocab_size": 400, "block_size": 512}))
    files = tokenizer_files(d / "base")
    shutil.rmtree(d / "base")
    save_folder(d / "base", gpt.config, gpt.state_dict(), files)


def fewer_tokens(d: Path) -> None:
    stated, path = d / "base/config.json", d / "base/model.safetensors"
    stated.write_text(stated.read_text().replace('"vocab_size": 400', '"vocab_size": 300'))
    tensors = load_file(path)
    save_file({n: t[:300].clone() if len(t) == 400 else t.clone() for n, t in tensors.items()}, path)


def hf_folder(d: Path, **config) -> None:
    (d / "hf").mkdir()
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    whole = dict(model_type="llama", max_position_embeddings=8, rms_norm_eps=1e-5, **sizes) | config
    (d / "hf/config.json").write_text(json.dumps(whole))
    save_file({"model.norm.weight": torch.zeros(8)}, d / "hf/model.safetensors")


def answers(d: Path, output: str) -> None:
    rows = ({"instruction": str(i), "output": output} for i in range(40))
    (d / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ROOT_RUN = Path()
TRAIN, GENERATE = (
    (lora, "--checkpoint_dir base --out_dir out --devices cpu "),
    (generate_base, "--checkpoint_dir base "),
)
HF = (generate_base, "--checkpoint_dir hf ")
MISTAKES = [  # what is wrong, what is done before, script and arguments, the line
    ("a misspelt option", None, TRAIN, "--lora.rnk 4", "there is no option --lora.rnk; did you mean --lora.r?"),
    ("half of an option's name", None, TRAIN, "--lr 1e-3", "there is no option --lr; did you mean --train.lr?"),
    ("a word for a number", None, TRAIN, "--train.lr fast", "--train.lr is 'fast'; it must be a number"),
    ("a kind that there is not", None, TRAIN, "--quantize nf5", "--quantize is 'nf5'; it must be one of none, nf4, "),
    ("a negative rate", None, TRAIN, "--train.lr -1", "train.lr is -1.0; it must be at least 0"),
    ("an infinite rate", None, TRAIN, "--train.lr .inf", "train.lr is inf; it must be finite"),
    ("more tokens than the network has", fewer_tokens, TRAIN, "",
     "base: the tokenizer has a token 397, and the network only 300"),
    ("rank 0", None, TRAIN, "--lora.r 0", "lora.r is 0; it must be above 0"),
    ("a rank of no use", None, TRAIN, "--lora.r 65", "lora.r is 65, but blocks.0.attn.q_proj is a matrix of "),
    ("an unknown layer", None, TRAIN, "--lora.targets query", "no layer is called query; there are down_proj"),
    ("no checkpoint", None, (lora, "--checkpoint_dir nowhere"), "", "nowhere/config.json is not there; "),
    ("half a checkpoint", half_a_checkpoint, GENERATE, "", "model.safetensors: it is broken or only partly"),
    ("a checkpoint without weights", no_weights, GENERATE, "", "base has no weights: neither model.safetensors nor"),
    ("a tensor too few", lambda d: a_tensor(d, lambda t: t.pop("model.norm.weight")), GENERATE, "",
     "base/model.safetensors lacks 1 tensors, such as model.norm.weight"),
    ("a tensor too many", lambda d: a_tensor(d, lambda t: t.update(x=torch.zeros(1))), GENERATE, "",
     "has a tensor x that the model has no place for"),
    ("another shape", lambda d: a_tensor(d, lambda t: t.update({"model.norm.weight": torch.zeros(3)})), GENERATE, "",
     "model.norm.weight is (3,) of float32; the model wants (64,)"),
    ("trained on another base", another_base, GENERATE, "--method_dir run", "run was trained on another base"),
    ("no data", None, TRAIN, "--data nothing.json", "nothing.json is not there; --data wants .json, .jsonl, "),
    ("only broken lines", broken_lines, TRAIN, "--data rows.jsonl", "rows.jsonl, line 2: not JSON ("),
    ("other columns", lambda d: (d / "a.csv").write_text("question,answer\na,b\n"), TRAIN, "--data a.csv",
     "a.csv, line 2: a row needs instruction and output, or messages, or "),
    ("a quote left open", lambda d: (d / "a.csv").write_text('text\na\n"b\nc\n'), TRAIN, "--data a.csv",
     "a.csv, line 3: not CSV (a quote is opened and never closed)"),
    ("half a compressed file", half_a_gz, TRAIN, "--data a.jsonl.gz",
     "a.jsonl.gz: it is broken or only partly written (EOFError: "),
    ("an empty file", lambda d: (d / "a.json").write_text("[]"), TRAIN, "--data a.json", "a.json holds no row"),
    ("a picture as data", lambda d: (d / "a.json").write_bytes(b"\x89PNG\xff"), TRAIN, "--data a.json",
     "a.json is not text in UTF-8 or UTF-16"),
    ("only empty answers", lambda d: answers(d, " "), TRAIN, "--data a.jsonl",
     "none of the 38 training rows is left to learn from"),
    ("prompts that fill all", None, TRAIN, "--examples.max_length 5", "none of the 57 training rows is left"),
    ("longer than the context", lambda d: answers(d, "stone " * 900), TRAIN,
     "--data a.jsonl --examples.max_length 9999", "tokens, and the model's context of 512 has room for 512"),
    ("an output folder in use", lambda d: shutil.copytree(ROOT_RUN / "run", d / "out"), TRAIN, "--train.lr 0.1",
     "out holds a run with train.lr 0.002 there and 0.1 here: name another --out_dir, or replace it with --overwrite"),
    ("another family", lambda d: hf_folder(d, model_type="mamba"), HF, "", "model_type is 'mamba'; known are gemma2"),
    ("an odd activation", lambda d: hf_folder(d, hidden_act="gelu"), HF, "", "hidden_act is 'gelu', which is not "),
    ("weights that are not all there", hf_folder, HF, "",
     "hf/model.safetensors lacks 11 tensors, such as model.embed_tokens.weight"),
    ("no GGUF file", lambda d: (d / "m.gguf").write_text("hello"), (convert, "--src m.gguf --out_dir new"), "",
     "m.gguf: it is no GGUF file of version 2 or 3"),
    ("merging onto the base", lambda d: shutil.copytree(ROOT_RUN / "run", d / "run"),
     (merge, "--checkpoint_dir base --method_dir run --out_dir base"), "",
     "base is not empty: name another folder"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def trained(tiny, tmp_path_factory):
    """A folder with a run."""
    global ROOT_RUN
    ROOT_RUN = tmp_path_factory.mktemp("mistakes")
    rows = ROOT_RUN / "data.json"
    shutil.copy(tiny / "data.json", rows)
    lora.main(lora.Options(checkpoint_dir=tiny / "base", data=str(rows), out_dir=ROOT_RUN / "run", devices="cpu"))


@pytest.mark.parametrize("what, before, script, args, line", MISTAKES, ids=[m[0].replace(" ", "-") for m in MISTAKES])
def test_a_mistake_ends_in_one_line(what, before, script, args, line, tiny, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny / "base", tmp_path / "base")
    shutil.copy(tiny / "data.json", tmp_path / "data.json")
    if before:
        before(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    module, first = script
    data = "--data data.json " if module is lora and "--data" not in args and "nowhere" not in first else ""
    said = fail(module, capsys, monkeypatch, f"{first} {data}{args}")
    print(f"| {what} | `{said.removeprefix('error: ')}` |")
    assert line in said and len(said) < 400
    assert {path: path.read_bytes() for path in files} == files  # nothing is lost
    shown = (ROOT / "docs/mistakes.md").read_text()
    assert f"| {what} |" in shown and re.sub(r"\W", "", line[:40]) in re.sub(r"\W", "", shown)
