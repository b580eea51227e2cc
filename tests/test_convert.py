"""GGUF files in: the Hugging Face folder that comes out gives the logits it was written from and, opened by
transformers, the same logits and ids; broken files leave nothing."""

import json
import logging
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import GPT2, LLAMA, WORDS, fail, randomize, say
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_model import families, load, model
from lit_model.config import Layer
from lit_model.data.tokenizer import Tokenizer
from lit_model.generate import stream_text
from lit_model.rope import LinearScaling, Llama3Scaling, LongScaling, Rope
from lit_model.weights.folder import Folder
from lit_model.weights.gguf import convert_gguf
from scripts import convert, download

SIZES = {**LLAMA, "n_hidden": 96, "vocab_size": 400}  # rows of 32, the size of a quantized block
QUANTS = gguf.GGMLQuantizationType
TEXTS = ["apple river", "Don't  stop: 日本 🙂\n\t12345", "  two  spaces", " ", "\n\n", "Ünïcode", " ".join(WORDS)]


NAMES = {  # ours -> llama.cpp's
    "wte": "token_embd", "wpe": "position_embd", "norm_f": "output_norm", "lm_head": "output",
    "norm_1": "attn_norm", "norm_2": "ffn_norm", "post_norm_1": "post_attention_norm", "post_norm_2": "post_ffw_norm",
    "attn.o_proj": "attn_output", **{f"attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    **{f"attn.{p}_norm": f"attn_{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
}  # fmt: skip
FUSED = {  # our modules -> the one tensor that they lie in
    "gpt2": {"attn.q_proj attn.k_proj attn.v_proj": "attn_qkv"},
    "phi3": {"attn.q_proj attn.k_proj attn.v_proj": "attn_qkv", "mlp.gate_proj mlp.up_proj": "ffn_up"},
}


def write_gguf(
    path, gpt, tokenizer: dict, kind=QUANTS.F32, arch="llama", quantize=None, fields=None, tensors_in_part=0
) -> None:
    """Writes `gpt` as llama.cpp does: of llama q and k in Meta's rope order, of others some in one; Gemma's norms as
    1 + weight; matrices of the given kind, as `quantize(name, data)` makes them, vectors in float32. fields: more about
    the architecture."""
    quantize = quantize or (lambda name, data: gguf.quantize(data, kind))
    c, writer = gpt.config, gguf.GGUFWriter(path, arch, split_max_tensors=tensors_in_part)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_head_count(c.n_head)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_head_count_kv(c.n_kv_head)
        rope = c.layers[-1].rope
        writer.add_rope_freq_base(rope.base)
        writer.add_key_length(c.head_size)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        if isinstance(rope.scaling, Llama3Scaling):
            slower = Rope(rope.base).frequencies(c.head_size) / rope.frequencies(c.head_size)
            writer.add_tensor("rope_freqs.weight", slower.float().numpy())
        if isinstance(rope.scaling, LongScaling):
            for name, factors in (("short", rope.scaling.short_factor), ("long", rope.scaling.long_factor)):
                writer.add_tensor(f"rope_factors_{name}.weight", np.array(factors, np.float32))
    add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
    add[float] = writer.add_float32
    named = {f"{arch}.{name}": value for name, value in (fields or {}).items()}
    for name, value in (named | {f"tokenizer.{name}": value for name, value in tokenizer.items()}).items():
        add[type(value)](name, value)
    tensors = gpt.state_dict()
    if c.tie:
        del tensors["lm_head.weight"]
    for name, t in list(tensors.items()):
        prefix, stem, ending = re.fullmatch(r"(blocks\.\d+\.)?(.+)\.(\w+)", name).groups()
        theirs = NAMES[stem]
        for modules, fused in FUSED.get(arch, {}).items():
            if stem in modules.split():
                t = torch.cat([tensors[name.replace(stem, module)] for module in modules.split()])
                theirs = fused if modules.startswith(stem) else None
        if theirs is None:
            continue
        if arch == "gemma3" and "norm" in name:
            t = t + 1
        if arch == "llama" and stem in ("attn.q_proj", "attn.k_proj"):
            t = meta_order(t, c.head_size)
        data, name = t.float().numpy(), f"{(prefix or '').replace('blocks', 'blk')}{theirs}.{ending}"
        if t.ndim == 2:
            writer.add_tensor(name, quantize(name, data), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def meta_order(t: torch.Tensor, head_size: int) -> torch.Tensor:
    """From (i, i + hs/2) to (2i, 2i + 1)."""
    return torch.cat([torch.stack(head.chunk(2), 1).flatten(0, 1) for head in t.split(head_size)])


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
        "ggml.eot_token_id": 7,
        "ggml.add_bos_token": True,
        "chat_template": "{{ messages }}",
    }


def opened_by_transformers(folder) -> tuple:
    """The network and the tokenizer of a folder as transformers opens it, after their comparison with ours."""
    logging.disable(logging.WARNING)
    hf, theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), None
    idx = torch.randint(0, hf.config.vocab_size, (1, 30))
    ours, other = load(folder)(idx), hf(idx).logits.detach()
    assert (ours - other).abs().max() <= 1e-5 * other.abs().max()
    if (folder / "tokenizer.json").is_file():
        ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
            assert ours.bos + ours.encode(text) == theirs.encode(text), text
        assert (theirs.eos_token_id, theirs.chat_template) == (ours.eos_id, ours.chat_template)
    return hf, theirs


@pytest.mark.parametrize("kind, error", [("F32", 0), ("F16", 1e-3), ("BF16", 2e-2), ("Q8_0", 5e-2), ("Q4_1", 0.5)])
def test_gguf_gives_the_logits_it_was_written_from(tiny, tmp_path, kind, error):
    gpt = randomize(model.GPT(model.Config(**SIZES)), std=0.1).eval()
    write_gguf(tmp_path / "m.gguf", gpt, bpe_fields(tiny), QUANTS[kind])
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", torch.float32)
    idx = torch.randint(0, 400, (1, 30))
    logits, expected = load(tmp_path / "hf")(idx), gpt(idx)
    assert (logits - expected).norm() / expected.norm() <= error
    ours, original = Tokenizer(tmp_path / "hf"), Tokenizer(tiny / "base")
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text) and ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.chat_template, ours.stop_ids) == (0, 1, "{{ messages }}", [1, 7])
    opened_by_transformers(tmp_path / "hf")
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [1, 7]


LONG = dict(
    short_factor=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0), long_factor=(1.0, 2.0, 4.0, 5.0, 6.0, 9.0, 9.0, 9.5),
    original_max_position_embeddings=8, attention_factor=1.25,
)  # fmt: skip
LLAMA_3_1 = Rope(
    5e5, scaling=Llama3Scaling(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
)
GEMMA_3 = (Layer(7),) * 5 + (Layer(rope=Rope(1e6, scaling=LinearScaling(8.0))),)
OTHERS = {  # architecture -> (Config, what the file says beside it, rule that splits words)
    "qwen2": (dict(qkv_bias=True), {}, "qwen2"),
    "qwen3": (dict(qk_norm="head", head_size=24), {}, "qwen2"),
    "gpt2": (dict(GPT2, n_kv_head=None), {}, "gpt-2"),
    "llama-3.1": (dict(layers=(Layer(rope=LLAMA_3_1),)), {}, "llama-bpe"),
    "llama-linear": (
        dict(layers=(Layer(rope=Rope(scaling=LinearScaling(4.0))),)), {"rope.scaling.factor": 4.0}, "gpt-2",
    ),
    "olmo2": (dict(norm_place="after", qk_norm="all"), {}, "dbrx"),
    "gemma3": (
        dict(families._GEMMA, qk_norm="head", head_size=24, n_layer=6, tie=True, embedding_scale=8.0, layers=GEMMA_3),
        {"attention.sliding_window": 7, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        "gpt-2",
    ),
    "phi3": (
        dict(layers=(Layer(100, Rope(scaling=LongScaling(**LONG))),)),
        {"attention.sliding_window": 100, "rope.scaling.original_context_length": 8, "rope.scaling.attn_factor": 1.25},
        "gpt-2",
    ),
    "phi3-partial": (
        dict(layers=(Layer(rope=Rope(share=0.75)),)),
        {"attention.sliding_window": 0, "rope.dimension_count": 12},
        "gpt-2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tensors_in_part", [0, 6], ids=["whole", "parts"])
@pytest.mark.parametrize("name", OTHERS)
def test_gguf_of_other_architectures(name, tensors_in_part, tiny, tmp_path):
    shape, fields, rule = OTHERS[name]
    gpt = randomize(model.GPT(model.Config(**SIZES | shape | dict(vocab_size=400))), std=0.1).eval()
    tokenizer, arch = bpe_fields(tiny) | {"ggml.pre": rule}, name.split("-")[0]
    write_gguf(tmp_path / "m.gguf", gpt, tokenizer, arch=arch, fields=fields, tensors_in_part=tensors_in_part)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert (len(parts) > 3) == bool(tensors_in_part)
    convert_gguf(parts[0], tmp_path / "hf", torch.float32)
    idx = torch.randint(0, 400, (1, 30))
    torch.testing.assert_close(load(tmp_path / "hf")(idx), gpt(idx), rtol=0, atol=2e-5)
    assert Folder(tmp_path / "hf").config == gpt.config
    if tensors_in_part:
        with pytest.raises(ValueError, match="00002-of.*gguf: it is a part of several: name the first one"):
            convert_gguf(parts[1], tmp_path / "other")
        parts[-1].unlink()
        with pytest.raises(FileNotFoundError, match=parts[-1].name):
            convert_gguf(parts[0], tmp_path / "other")
    opened_by_transformers(tmp_path / "hf")
    text = "apple  river's 12345\n\n日本 🙂"
    ours = Tokenizer(tmp_path / "hf")
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "BF16"])
def test_every_usual_quantization_is_unpacked_as_gguf_does(kind, tiny, tmp_path):
    """The gguf package cannot write K-quants: bytes at random are a tensor as well."""
    gpt = model.GPT(model.Config(**{**SIZES, "n_embd": 256, "n_hidden": 256, "n_layer": 1}))
    rng, raw = np.random.default_rng(0), {}

    def quantize(name: str, data: np.ndarray) -> np.ndarray:
        block, size = gguf.GGML_QUANT_SIZES[QUANTS[kind]]
        blocks = rng.integers(0, 127, (data.size // block, size)).astype(np.uint8)
        for at in {"Q4_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "BF16": []}[kind]:
            blocks[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)  # the scale
        raw[name] = blocks.reshape(data.shape[0], -1)
        return raw[name]

    write_gguf(tmp_path / "m.gguf", gpt, bpe_fields(tiny), QUANTS[kind], quantize=quantize)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", torch.float32)
    t = load_file(tmp_path / "hf/model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    expected = gguf.dequantize(raw["blk.0.ffn_down.weight"], QUANTS[kind])
    assert np.array_equal(t.numpy(), expected) and np.abs(expected).max() > 0


def test_a_number_that_a_dtype_cannot_hold_is_refused(tiny, tmp_path):
    """Instead of an infinity that is found when the network answers nonsense."""
    gpt = model.GPT(model.Config(**{**LLAMA, "vocab_size": 400}))
    gpt.blocks[1].mlp.up_proj.weight.data[0, 0] = 70000.0
    write_gguf(tmp_path / "m.gguf", gpt, bpe_fields(tiny), gguf.GGMLQuantizationType.F32)
    with pytest.raises(ValueError, match=r"m.gguf: blocks.1.mlp.up_proj.weight holds 7e\+04, more than a float16 can"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", torch.float16)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", torch.bfloat16)


def sentencepiece(folder: Path, vocab_size: int = 320) -> SentencePieceProcessor:
    """Trains a model as LLaMA's is: BPE, bytes for what is in no piece, texts as they are."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS))
    SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sp"), vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return SentencePieceProcessor(model_file=str(folder / "sp.model"))


def test_gguf_with_a_sentencepiece_tokenizer(tmp_path):
    sp = sentencepiece(tmp_path)
    n = sp.get_piece_size()
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(n)]
    fields = {
        "ggml.model": "llama",
        "ggml.tokens": [sp.id_to_piece(i) for i in range(n)],
        "ggml.scores": [sp.get_score(i) for i in range(n)],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "chat_template": "{% for m in messages %}{{ bos_token + m.content + eos_token }}{% endfor %}",
    }
    gpt = randomize(model.GPT(model.Config(**{**SIZES, "vocab_size": n})), std=0.1)
    write_gguf(tmp_path / "m.gguf", gpt, fields)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    ours = Tokenizer(tmp_path / "hf")
    for text in TEXTS:
        assert ours.encode(text) == sp.encode(text) and ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    _, theirs = opened_by_transformers(tmp_path / "hf")
    chat = theirs.apply_chat_template([dict(role="user", content="apple")], tokenize=False)
    assert chat == "<s>apple</s>" and ours.encode(chat) == [1, *sp.encode("apple"), 2]
    first, later = sp.encode("apple river")[:1], sp.encode("apple river")[1:]  # decoded alone, the space would be lost
    assert "".join(stream_text(ours, later, after=first)) == "apple river".removeprefix(ours.decode(first))
    del fields["ggml.eos_token_id"]
    write_gguf(tmp_path / "n.gguf", gpt, fields)
    with pytest.raises(ValueError, match="n.gguf.* 'eos_token_id'"):
        convert_gguf(tmp_path / "n.gguf", tmp_path / "n")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("field", ["scaling.factor", "scale_linear"])
def test_gguf_with_a_factor_of_its_rope_alone_is_linear(field, tiny, tmp_path):
    """As in llama.cpp."""
    gpt = model.GPT(model.Config(**SIZES))
    for factor, scaling in ((1.0, None), (4.0, LinearScaling(4.0))):
        write_gguf(tmp_path / "m.gguf", gpt, bpe_fields(tiny), fields={f"rope.{field}": factor})
        convert_gguf(tmp_path / "m.gguf", tmp_path / f"hf{factor}", torch.float32)
        assert Folder(tmp_path / f"hf{factor}").config.layers[0].rope == Rope(scaling=scaling)


# ------------------------------------------------------------------------------------------------------------- script


def test_the_script_sees_what_it_is_given(tiny, tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "m.gguf", model.GPT(model.Config(**SIZES)), bpe_fields(tiny))
    out = tmp_path / "out"
    args = f"--src {tmp_path}/m.gguf --out_dir {out}"
    assert say(convert, capsys, monkeypatch, f"{args} --dtype float32") == f"checkpoint: {out}\n"
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "out is not empty" in fail(convert, capsys, monkeypatch, args)
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    line = fail(convert, capsys, monkeypatch, f"--src {out} --out_dir {tmp_path}/x")
    assert "out is no file" in line
    line = fail(convert, capsys, monkeypatch, f"--src {out}/config.json --out_dir {tmp_path}/x")
    assert "config.json: it is no GGUF file" in line and not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------------------------- Hub

REPOSITORIES = {  # files of repositories on the Hub, and those that make a Hugging Face folder
    "one file": (
        "model.safetensors model.fp16.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack onnx/model.onnx",
        "model.safetensors",
    ),
    "shards": (
        "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
        "consolidated.safetensors consolidated.00.pth original/consolidated.00.pth original/tokenizer.model "
        "pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json q4.gguf",
        "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
    ),
    "pickles": ("pytorch_model.bin rust_model.ot 64.tflite", "pytorch_model.bin"),
    "both": (
        "model.safetensors model-00001-of-00001.safetensors model.safetensors.index.json",
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_download_fetches_one_hugging_face_folder_and_resumes(kind, tmp_path, capsys, monkeypatch):
    """The Hub is a folder here, and its connection breaks once."""
    beside = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    files, expected = ([*names.split(), *beside] for names in REPOSITORIES[kind])
    broken = [True]

    def snapshot_download(repo_id, local_dir, allow_patterns):
        assert repo_id == "someone/tiny"
        (local_dir / ".cache/huggingface").mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            (local_dir / name).write_text("part" if broken else "whole")
            if broken:
                broken.clear()
                raise OSError("the connection broke")

    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo_id: [".gitattributes", "README.md", *files])
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    args = f"--name someone/tiny --out_dir {tmp_path}/tiny"
    line = fail(download, capsys, monkeypatch, args)
    assert "someone/tiny cannot be fetched from the Hub: the connection broke" in line
    assert [path.name for path in tmp_path.iterdir()] == [".someone--tiny.partial"]
    assert say(download, capsys, monkeypatch, args) == f"checkpoint: {tmp_path}/tiny\n"
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == sorted(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert "tiny is not empty" in fail(download, capsys, monkeypatch, args)


def test_download_says_what_is_wrong(capsys, monkeypatch):
    assert "smollm2 is neither smollm2-135m-instruct nor owner/name" in fail(
        download, capsys, monkeypatch, "--name smollm2"
    )
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo_id: ["README.md", "model.gguf"])
    line = fail(download, capsys, monkeypatch, "--name a/b")
    assert "a/b cannot be fetched from the Hub: it has no weights: neither model.safetensors nor pytorch_" in line
