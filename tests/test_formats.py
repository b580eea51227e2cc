"""Weights in from every kind of file: the same network comes out, with no more memory than it must; broken, partial and
dangerous files end in one line that names them."""

import json
import os
import pickle
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import GPT2, LLAMA, randomize
from safetensors.torch import load_file, save_file
from test_convert import QUANTS, bpe_fields, write_gguf
from test_families import make
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lit_model import load, model
from lit_model.load import fingerprint_of, read_tensors, save_checkpoint
from lit_model.weights.folder import convert_hf
from lit_model.weights.gguf import convert_gguf
from lit_model.weights.meta import convert_meta
from lit_model.data.tokenizer import Tokenizer


def split(tensors: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[i::n]} for i in range(n)]


@pytest.mark.parametrize("named", ["scaling.factor", "scale_linear"])
def test_gguf_with_linear_rope_scaling_is_refused(named, tiny, tmp_path):
    """llama.cpp takes a factor without a type for linear."""
    gpt = model.GPT(model.Config(**{**LLAMA, "vocab_size": 400}))
    write_gguf(tmp_path / "m.gguf", gpt, QUANTS.F32, bpe_fields(tiny), rope={named: 1.0})
    convert_gguf(tmp_path / "m.gguf", tmp_path / "lit", torch.float32)
    write_gguf(tmp_path / "m.gguf", gpt, QUANTS.F32, bpe_fields(tiny), rope={named: 4.0})
    with pytest.raises(ValueError, match="m.gguf: rope scaling of type 'linear' is not supported"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "other", torch.float32)


def test_an_index_left_from_another_save_is_not_taken(tmp_path):
    """transformers takes a single file first, too."""
    _, checkpoint = make("qwen3", tmp_path)
    shards = {name: "model-00001-of-00002.safetensors" for name in load_file(tmp_path / "hf/model.safetensors")}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    convert_hf(tmp_path / "hf", tmp_path / "again")
    assert fingerprint_of(tmp_path / "again") == fingerprint_of(checkpoint)


def test_a_tied_output_layer_that_is_stored_as_another_is_refused(tmp_path):
    gpt = model.GPT(model.Config(**{**LLAMA, "tie": True}))
    tensors = gpt.state_dict()
    save_checkpoint(tmp_path / "a", gpt.config, tensors, {})
    with pytest.raises(ValueError, match="said to be the embedding .tied., but is stored as something else"):
        save_checkpoint(tmp_path / "b", gpt.config, tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, {})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("n", [1, 3])
def test_shards_of_either_kind_give_the_same_checkpoint(kind, n, tmp_path):
    _, checkpoint = make("qwen3", tmp_path)
    folder, stem = tmp_path / "other", {"safetensors": "model", "bin": "pytorch_model"}[kind]
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "hf/config.json").read_bytes())
    tensors, write = load_file(tmp_path / "hf/model.safetensors"), {"safetensors": save_file, "bin": torch.save}[kind]
    names = [f"{stem}.{kind}"] if n == 1 else [f"{stem}-{i + 1:05}-of-{n:05}.{kind}" for i in range(n)]
    parts = split(tensors, n)
    for name, part in zip(names, parts):
        write(part, folder / name)
    if n > 1:
        where = {key: name for name, part in zip(names, parts) for key in part}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": where}))
    convert_hf(folder, tmp_path / "again")
    assert fingerprint_of(tmp_path / "again") == fingerprint_of(checkpoint)
    if n > 1:
        (folder / names[1]).unlink()
        with pytest.raises(FileNotFoundError, match=f"{names[1]} is missing, though {stem}.{kind}.index.json names it"):
            convert_hf(folder, tmp_path / "third")
        assert not (tmp_path / "third").exists()


def test_a_bin_file_in_the_old_format_is_read(tmp_path):
    _, checkpoint = make("llama-3", tmp_path)
    tensors = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_hf(tmp_path / "hf", tmp_path / "again")
    assert fingerprint_of(tmp_path / "again") == fingerprint_of(checkpoint)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/it-ran",)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    make("llama-3", tmp_path)
    (tmp_path / "hf/model.safetensors").unlink()
    path = tmp_path / "hf/pytorch_model.bin"
    torch.save({"model.norm.weight": RunsCode()}, path)
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than tensors, which could run code"):
        convert_hf(tmp_path / "hf", tmp_path / "out")
    path.write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than tensors|is broken"):
        convert_hf(tmp_path / "hf", tmp_path / "out")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="pytorch_model.bin is broken or only partly written"):
        convert_hf(tmp_path / "hf", tmp_path / "out")
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="holds no weights by name"):
        convert_hf(tmp_path / "hf", tmp_path / "out")
    torch.save({"model.norm.weight": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="pytorch_model.bin is broken or only partly written"):
        convert_hf(tmp_path / "hf", tmp_path / "out")
    assert not os.path.exists("/tmp/it-ran") and not (tmp_path / "out").exists()


def meta_folder(folder, gpt: model.GPT, n: int, embeddings_below: bool) -> None:
    """Writes `gpt` as Meta does: rope's neighbours beside each other, and n slices."""
    c, names = gpt.config, {"norm_1": "attention_norm", "norm_2": "ffn_norm"}
    names |= {f"attn.{p}_proj": f"attention.w{p}" for p in "qkvo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
    top = {"wte": "tok_embeddings", "norm_f": "norm", "lm_head": "output"}
    slices = [{"rope.freqs": torch.zeros(3)} for _ in range(n)]
    for name, t in gpt.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("blocks."):
            _, layer, stem = stem.split(".", 2)
            theirs = f"layers.{layer}.{names[stem]}.weight"
        else:
            theirs = f"{top[stem]}.weight"
        if stem in ("attn.q_proj", "attn.k_proj"):  # from (i, i + hs/2) to (2i, 2i + 1)
            t = torch.cat([torch.stack(head.chunk(2), 1).flatten(0, 1) for head in t.split(c.head_size)])
        beside = stem in ("attn.o_proj", "mlp.down_proj") or (stem == "wte" and not embeddings_below)
        parts = [t] * n if t.ndim == 1 else t.chunk(n, dim=1 if beside else 0)
        for part, into in zip(parts, slices, strict=True):
            into[theirs] = part.clone()
    folder.mkdir()
    for i, part in enumerate(slices):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    params = dict(dim=c.n_embd, n_layers=c.n_layer, n_heads=c.n_head, n_kv_heads=c.n_kv_head, norm_eps=c.norm_eps)
    (folder / "params.json").write_text(json.dumps(params | dict(vocab_size=c.vocab_size if embeddings_below else -1)))


@pytest.mark.parametrize("n, embeddings_below", [(1, False), (2, False), (2, True)])
def test_metas_slices_give_the_logits_they_were_written_from(n, embeddings_below, tmp_path):
    gpt = randomize(model.GPT(model.Config(**{**LLAMA, "vocab_size": 96})), std=0.1).eval()
    meta_folder(tmp_path / "meta", gpt, n, embeddings_below)
    convert_meta(tmp_path / "meta", tmp_path / "lit", block_size=128)
    idx = torch.randint(0, 96, (1, 30))
    torch.testing.assert_close(load(tmp_path / "lit")(idx), gpt(idx), rtol=0, atol=1e-6)
    if n > 1:
        (tmp_path / "meta/consolidated.00.pth").unlink()
        with pytest.raises(FileNotFoundError, match="consolidated.01.pth: a slice between them is missing"):
            convert_meta(tmp_path / "meta", tmp_path / "x")
    (tmp_path / "meta/tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    if n == 1:
        with pytest.raises(ValueError, match="tokenizer.model is of tiktoken's kind: put tokenizer.json"):
            convert_meta(tmp_path / "meta", tmp_path / "x")


def test_what_metas_files_do_not_say_is_guessed_by_generation(tmp_path):
    gpt = model.GPT(model.Config(**{**LLAMA, "vocab_size": 96}))
    meta_folder(tmp_path / "meta", gpt, 1, True)
    params = json.loads((tmp_path / "meta/params.json").read_text())
    (tmp_path / "meta/params.json").write_text(json.dumps(params | dict(rope_theta=5e5, use_scaled_rope=True)))
    convert_meta(tmp_path / "meta", tmp_path / "lit")
    config = model.Config.load(tmp_path / "lit")
    assert (config.block_size, config.rope_base, config.rope_scaling.factor) == (131072, 5e5, 32.0)


@pytest.mark.parametrize("arch", ["qwen2", "gpt2", "llama-3.1"])
def test_gguf_of_other_architectures(arch, tiny, tmp_path):
    more = {
        "qwen2": dict(LLAMA, qkv_bias=True, n_hidden=96),
        "gpt2": dict(GPT2),
        "llama-3.1": dict(
            LLAMA, n_hidden=96, rope_base=5e5, rope_scaling=dict(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=8192
            )),
    }[arch]  # fmt: skip
    gpt = randomize(model.GPT(model.Config(**{**more, "vocab_size": 400})), std=0.1).eval()
    tokenizer = bpe_fields(tiny) | {"ggml.pre": {"qwen2": "qwen2", "gpt2": "gpt-2", "llama-3.1": "llama-bpe"}[arch]}
    write_gguf(tmp_path / "m.gguf", gpt, QUANTS.F32, tokenizer, arch.split("-")[0])
    convert_gguf(tmp_path / "m.gguf", tmp_path / "lit", torch.float32)
    idx = torch.randint(0, 400, (1, 30))
    torch.testing.assert_close(load(tmp_path / "lit")(idx), gpt(idx), rtol=0, atol=1e-5)
    assert model.Config.load(tmp_path / "lit") == gpt.config
    text = "apple  river's 12345\n\n日本 🙂"
    ours = Tokenizer(tmp_path / "lit")
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "BF16"])
def test_every_usual_quantization_is_unpacked_as_gguf_does(kind, tiny, tmp_path):
    """K-quants cannot be written by the gguf package: bytes at random are a tensor as well."""
    config = model.Config(**{**LLAMA, "n_embd": 256, "n_hidden": 256, "vocab_size": 400, "n_layer": 1})
    gpt = model.GPT(config)
    rng, raw = np.random.default_rng(0), {}

    def quantize(name: str, data: np.ndarray) -> np.ndarray:
        block, size = gguf.GGML_QUANT_SIZES[QUANTS[kind]]
        blocks = rng.integers(0, 127, (data.size // block, size)).astype(np.uint8)
        for at in {"Q4_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "BF16": []}[kind]:
            blocks[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)  # the scale
        raw[name] = blocks.reshape(data.shape[0], -1)
        return raw[name]

    write_gguf(tmp_path / "m.gguf", gpt, QUANTS[kind], bpe_fields(tiny), "llama", quantize)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "lit", torch.float32)
    got = read_tensors(tmp_path / "lit/lit_model.safetensors")["blocks.0.mlp.down_proj.weight"]
    wanted = gguf.dequantize(raw["blk.0.ffn_down.weight"], QUANTS[kind])
    assert np.array_equal(got.numpy(), wanted) and np.abs(wanted).max() > 0


def test_conversion_needs_less_than_two_shards_of_memory(tmp_path):
    """Six shards of 60 MB, and one tensor at a time: in a process of its own, beside what importing takes."""
    source = tmp_path / "hf"
    source.mkdir()
    config = dict(
        model_type="llama", vocab_size=64, max_position_embeddings=64, num_hidden_layers=6, num_attention_heads=8,
        hidden_size=1024, intermediate_size=8192, rms_norm_eps=1e-5,
    )  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
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
        save_file(part, source / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    code = f"""
import re
from pathlib import Path
from lit_model.weights.folder import convert_hf
memory = lambda what: int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = memory("VmRSS")
convert_hf(Path({str(source)!r}), Path({str(tmp_path / "lit")!r}))
print(memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    took = int(done.stdout.splitlines()[-1])
    print(f"conversion: {took / largest:.2f} of the largest shard of {largest / 2**20:.0f} MiB")
    assert took < 2 * largest


def test_gpt2_in_a_bin_file_with_its_masks(tmp_path):
    """As its own repository has it: no `transformer.` in front, causal masks among the weights."""
    hf = randomize(
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)), 0.1
    ).eval()
    hf.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    old = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    torch.save(old, tmp_path / "hf/pytorch_model.bin")
    convert_hf(tmp_path / "hf", tmp_path / "lit")
    idx = torch.randint(0, 97, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "lit")(idx), hf(idx).logits, rtol=0, atol=1e-5)
