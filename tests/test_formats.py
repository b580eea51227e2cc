"""Hugging Face folders of every kind of file: the same network comes out, with no more memory than it must; broken,
partial and dangerous files end in one line that names them."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import LLAMA, ROOT, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config

from lit_model import load, model
from lit_model.weights.folder import Folder, save_folder

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, head_dim=24,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=96,
)  # fmt: skip


@pytest.fixture
def qwen(tmp_path):
    """A folder of one file, as transformers writes it, and the logits of its network for `IDX`."""
    hf = randomize(AutoModelForCausalLM.from_config(Qwen3Config(**SIZES)), std=0.1).eval()
    hf.save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        return tmp_path / "hf", hf(IDX).logits


IDX = torch.arange(30)[None]


def is_same(folder, qwen) -> bool:
    source, logits = qwen
    torch.testing.assert_close(load(folder)(IDX), logits, rtol=0, atol=1e-5)
    return Folder(folder).identity == Folder(source).identity


def shards(tensors: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::n]} for i in range(n)]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("n", [1, 3])
def test_shards_of_either_kind_give_the_same_network(kind, n, qwen, tmp_path):
    source, folder = qwen[0], tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors, stem = load_file(source / "model.safetensors"), dict(safetensors="model", bin="pytorch_model")[kind]
    names = [f"{stem}.{kind}"] if n == 1 else [f"{stem}-{i + 1:05}-of-{n:05}.{kind}" for i in range(n)]
    parts = shards(tensors, n)
    for name, part in zip(names, parts):
        (save_file if kind == "safetensors" else torch.save)(part, folder / name)
    if n > 1:
        where = {key: name for name, part in zip(names, parts) for key in part}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": where}))
    assert is_same(folder, qwen)
    if n > 1:
        (folder / names[1]).unlink()
        with pytest.raises(FileNotFoundError, match=names[1]):
            load(folder)
        outside = {"weight_map": where | {next(iter(parts[0])): f"../hf/{stem}.{kind}"}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(outside))
        with pytest.raises(ValueError, match="index.json: it names a shard outside its folder"):
            load(folder)


def test_other_files_of_a_repository_are_ignored(qwen):
    """transformers, too, takes a single file before an index, and safetensors before .bin."""
    folder, _ = qwen
    others = {name: "model-00001-of-00002.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": others}))
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "m.gguf"):
        (folder / name).write_text("something else")
    assert is_same(folder, qwen)


def test_a_bin_file_in_the_old_format_is_read(qwen, tmp_path):
    source, folder = qwen[0], tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert is_same(folder, qwen)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_but_tensors_is_unpickled(qwen, tmp_path):
    folder = qwen[0]
    (folder / "model.safetensors").unlink()
    path, code = folder / "pytorch_model.bin", RunsCode(tmp_path / "it-ran")

    def refused(says: str) -> None:
        with pytest.raises(ValueError, match=f"pytorch_model.bin.*{says}"):
            load(folder)

    torch.save({"model.norm.weight": code}, path)
    refused("holds more than tensors, which could run code")
    path.write_bytes(pickle.dumps(code))
    refused("broken")
    path.write_bytes(b"")
    refused("broken")
    torch.save([torch.zeros(2)], path)
    refused("broken")
    torch.save({"model.norm.weight": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:300])
    refused("broken")
    assert not (tmp_path / "it-ran").exists()


def test_gpt2_in_a_bin_file_with_its_masks(tmp_path):
    """As its own repository has it: no `transformer.` in front, causal masks among the weights."""
    config = GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    hf = randomize(GPT2LMHeadModel(config), 0.1).eval()
    hf.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    old = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    torch.save(old, tmp_path / "hf/pytorch_model.bin")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "hf")(IDX), hf(IDX).logits, rtol=0, atol=1e-5)


def test_a_tied_output_layer_that_is_stored_as_another_is_taken(tmp_path):
    """transformers 5 then takes the stored one, and does not tie."""
    gpt = model.GPT(model.Config(**{**LLAMA, "tie": True}))
    save_folder(tmp_path / "a", gpt.config, gpt.state_dict(), {})
    file = tmp_path / "a/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    torch.testing.assert_close(load(tmp_path / "a")(IDX), gpt(IDX))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    loaded = load(tmp_path / "a")
    assert not loaded.config.tie and (loaded(IDX) - gpt(IDX)).abs().max() > 1


def test_weights_are_mapped_and_written_one_by_one(tmp_path):
    """Six shards of 60 MB: neither opening nor rewriting them takes the memory of one. In a process of its own; what
    is measured is memory that belongs to no file."""
    folder = tmp_path / "hf"
    folder.mkdir()
    config = dict(
        model_type="llama", vocab_size=64, max_position_embeddings=64, num_hidden_layers=6, num_attention_heads=8,
        hidden_size=1024, intermediate_size=8192, rms_norm_eps=1e-5,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    C, F, where = 1024, 8192, {}
    for i in range(6):
        p = f"model.layers.{i}"
        part = {f"{p}.mlp.{n}_proj.weight": torch.ones(F, C).bfloat16() for n in ("gate", "up")}
        part |= {f"{p}.mlp.down_proj.weight": torch.ones(C, F).bfloat16()}
        part |= {f"{p}.self_attn.{n}_proj.weight": torch.ones(C, C).bfloat16() for n in "qkvo"}
        part |= {f"{p}.{n}_layernorm.weight": torch.ones(C).bfloat16() for n in ("input", "post_attention")}
        if i == 0:
            part |= {n: torch.ones(64, C).bfloat16() for n in ("model.embed_tokens.weight", "lm_head.weight")}
            part["model.norm.weight"] = torch.ones(C).bfloat16()
        save_file(part, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    code = f"""
import re, torch
from pathlib import Path
from lit_model import load
from lit_model.weights.folder import Folder, save_folder

def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def tensors(folder):
    for name in folder.names:
        yield name, folder.tensor(name).half()
        peaks.append(memory())

before = memory()
gpt = load({str(folder)!r}, dtype=torch.bfloat16)
print(memory() - before)
folder, before, peaks = Folder({str(folder)!r}), memory(), []
save_folder(Path({str(tmp_path / "out")!r}), folder.config, tensors(folder), {{}})
print(max(peaks) - before)
"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    shard = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    loading, writing = (int(line) / shard for line in done.stdout.split())
    print(f"of a shard of {shard / 2**20:.0f} MiB: loading takes {loading:.2f}, writing in another dtype {writing:.2f}")
    assert loading < 0.5 and writing < 1
