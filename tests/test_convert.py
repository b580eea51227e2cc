"""GGUF in: q and k in the right rope order, weight types, tokenizers of both kinds; nothing held twice in memory."""

import json
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from conftest import LLAMA, WORDS, randomize
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lit_model import load, model
from lit_model.checkpoint import fingerprint_of, save_checkpoint
from lit_model.convert import convert_hf
from lit_model.convert_gguf import _GGUF_NAMES, convert_gguf
from lit_model.generate import stream_text
from lit_model.tokenizer import Tokenizer

SIZES = {**LLAMA, "n_hidden": 96}  # rows of 32, the size of a quantized block
WHOLE = dict(model_type="llama", vocab_size=8, max_position_embeddings=8, num_hidden_layers=1, num_attention_heads=1,
             hidden_size=8, intermediate_size=8, rms_norm_eps=1e-5)  # fmt: skip
QUANTS = gguf.GGMLQuantizationType


def write_gguf(
    path, gpt: model.GPT, kind: QUANTS, tokenizer: dict, arch: str = "llama", quantize=None, rope=None
) -> None:
    """Writes `gpt` as llama.cpp does: of llama q and k in Meta's rope order, of gpt2 q, k and v in one; matrices of the
    given kind, as `quantize(name, data)` makes them, vectors in float32. rope: more numbers about it."""
    quantize = quantize or (lambda name, data: gguf.quantize(data, kind))
    c, writer = gpt.config, gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_rope_freq_base(c.rope_base)
        writer.add_layer_norm_rms_eps(c.norm_eps)
    for name, value in (rope or {}).items():
        writer.add_float32(f"{arch}.rope.{name}", value)
    for name, value in tokenizer.items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](f"tokenizer.{name}", value)
    back = {ours: theirs for theirs, ours in _GGUF_NAMES.items()} | {"attn_qkv": "attn_qkv"}
    tensors = gpt.state_dict()
    if c.rope_scaling:
        plain = model.rope_frequencies(replace(c, rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", (plain / model.rope_frequencies(c)).float().numpy())
    if c.tie:
        del tensors["lm_head.weight"]
    for name, t in list(tensors.items()):
        stem, _, ending = name.rpartition(".")
        prefix = ""
        if stem.startswith("blocks."):
            _, layer, stem = stem.split(".", 2)
            prefix = f"blk.{layer}."
        if arch == "gpt2" and stem in ("attn.k_proj", "attn.v_proj"):
            continue
        if arch == "gpt2" and stem == "attn.q_proj":
            t = torch.cat([tensors[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            stem = "attn_qkv"
        if arch == "llama" and stem in ("attn.q_proj", "attn.k_proj"):  # from (i, i + hs/2) to (2i, 2i + 1)
            t = torch.cat([torch.stack(head.chunk(2), 1).flatten(0, 1) for head in t.split(c.head_size)])
        data, name = t.float().numpy(), f"{prefix}{back[stem]}.{ending}"
        if t.ndim == 2:
            writer.add_tensor(name, quantize(name, data), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bpe_fields(tiny) -> dict:
    """The fields of a GGUF file for the tokenizer of the tiny checkpoint."""
    hf = json.loads((tiny / "base/tokenizer.json").read_text())["model"]
    tokens = sorted(hf["vocab"], key=hf["vocab"].get)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in ("<bos>", "<eos>") else 1 for token in tokens],
        "ggml.merges": [" ".join(merge) for merge in hf["merges"]],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.add_bos_token": True,
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize("kind, error", [("F32", 0), ("F16", 1e-3), ("BF16", 2e-2), ("Q8_0", 5e-2), ("Q4_1", 0.5)])
def test_gguf_gives_the_logits_it_was_written_from(tiny, tmp_path, kind, error):
    gpt = randomize(model.GPT(model.Config(**{**SIZES, "vocab_size": 400})), std=0.1).eval()
    write_gguf(tmp_path / "m.gguf", gpt, QUANTS[kind], bpe_fields(tiny))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "lit", torch.float32)
    idx = torch.randint(0, 400, (1, 30))
    got, expected = load(tmp_path / "lit")(idx), gpt(idx)
    assert (got - expected).norm() / expected.norm() <= error
    ours, original = Tokenizer(tmp_path / "lit"), Tokenizer(tiny / "base")
    for text in ("apple river", "Don't  stop: 日本 🙂\n\t12345", " ".join(WORDS)):
        assert ours.encode(text) == original.encode(text) and ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.chat_template) == (0, 1, "{{ messages }}")


def test_gguf_with_a_sentencepiece_tokenizer(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS))
    SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "sp"), vocab_size=320, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    sp = SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    n = sp.get_piece_size()
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(n)]
    fields = {
        "ggml.model": "llama",
        "ggml.tokens": [sp.id_to_piece(i) for i in range(n)],
        "ggml.scores": [sp.get_score(i) for i in range(n)],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    gpt = model.GPT(model.Config(**{**SIZES, "vocab_size": n}))
    write_gguf(tmp_path / "m.gguf", gpt, QUANTS.F32, fields)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "lit")
    ours = Tokenizer(tmp_path / "lit")
    for text in ("apple river", "  two  spaces", "Ünïcode 日本 🙂", " ".join(WORDS)):
        assert ours.encode(text) == sp.encode(text) and ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    first, later = sp.encode("apple river")[:1], sp.encode("apple river")[1:]  # decoded alone, the space would be lost
    assert "".join(stream_text(ours, later, after=first)) == "apple river".removeprefix(ours.decode(first))
    del fields["ggml.eos_token_id"]
    write_gguf(tmp_path / "n.gguf", gpt, QUANTS.F32, fields)
    with pytest.raises(ValueError, match="n.gguf has no field tokenizer.ggml.eos_token_id"):
        convert_gguf(tmp_path / "n.gguf", tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_the_fingerprint_names_the_weights(tmp_path):
    gpt = model.GPT(model.Config(**LLAMA))
    save_checkpoint(tmp_path / "a", gpt.config, gpt.state_dict(), {})
    save_checkpoint(tmp_path / "b", gpt.config, dict(reversed(gpt.state_dict().items())), {})
    gpt.blocks[1].norm_1.weight.data[3] += 1e-6
    save_checkpoint(tmp_path / "c", gpt.config, gpt.state_dict(), {})
    a, b, c = (fingerprint_of(tmp_path / name) for name in "abc")
    assert a == b != c


def test_an_interrupted_conversion_does_not_look_complete(tmp_path):
    class DiskFull(dict):
        def items(self):
            raise OSError("no space left")

    gpt = model.GPT(model.Config(**LLAMA))
    with pytest.raises(OSError):
        save_checkpoint(tmp_path, gpt.config, gpt.state_dict(), DiskFull())
    assert not (tmp_path / "lit_config.json").exists()


def test_unknown_architectures_are_refused_with_the_field(tmp_path):
    for config, says in (
        ({"model_type": "mamba"}, "model_type is 'mamba'; known are gpt2, llama, mistral, qwen2, qwen3, smollm3"),
        ({"model_type": "llama", "vocab_size": 8}, "config.json lacks hidden_size, intermediate_size"),
        ({**WHOLE, "rope_scaling": {"type": "yarn"}}, "rope scaling of type 'yarn'"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "activation_function is 'relu'"),
        ({**WHOLE, "quantization_config": {}, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is True, which is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=says):
            convert_hf(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="config.json is not there"):
        convert_hf(tmp_path / "out", tmp_path / "out")


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(WHOLE))
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside its folder: ../secret.safetensors"):
        convert_hf(tmp_path, tmp_path / "out")


def test_loading_holds_no_second_copy_in_memory(tmp_path):
    """Every weight of a 200 MB checkpoint is read; the process's own memory, beside the mapped file, hardly grows."""
    config = model.Config(vocab_size=64, block_size=64, n_layer=4, n_head=8, n_embd=1024, n_hidden=6400)
    gpt = model.GPT(config).bfloat16()
    size = sum(p.numel() * 2 for p in gpt.parameters())
    save_checkpoint(tmp_path, config, gpt.state_dict(), {})
    code = f"""
import re, torch
from lit_model import load
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = own()
gpt = load({str(tmp_path)!r}, dtype=torch.bfloat16)
assert all(p.view(torch.int16).any() for p in gpt.parameters())
print(own() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.2 * size


def test_7b_builds_on_the_meta_device_without_memory():
    with torch.device("meta"):
        gpt = model.GPT(model.Config.from_name("llama-7b"))
    assert sum(p.numel() for p in gpt.parameters()) == 6_738_415_616
    assert all(p.is_meta for p in gpt.parameters())
    with pytest.raises(ValueError, match="there is no preset 'llama-8b'; there are gpt2, "):
        model.Config.from_name("llama-8b")
    assert np.prod(gpt.blocks[0].mlp.up_proj.weight.shape) == 4096 * 11008
