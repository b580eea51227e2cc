"""Weights in: a GGUF file, or a folder of the Hugging Face Hub, becomes a checkpoint folder."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_model.checkpoint import read_tensors, save_checkpoint
from lit_model.model import Config

# ---------------------------------------------------------------------------------------------------- Hugging Face

_HF_LLAMA = {
    "model.embed_tokens": "wte",
    "model.norm": "norm_f",
    "lm_head": "lm_head",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    **{f"self_attn.{p}_proj": f"attn.{p}_proj" for p in "qkvo"},
    **{f"mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
_HF_GPT2 = {
    "wte": "wte",
    "wpe": "wpe",
    "ln_f": "norm_f",
    "lm_head": "lm_head",
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "attn.c_proj": "attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def convert_hf(src_dir: Path, out_dir: Path, dtype: torch.dtype | None = None) -> None:
    """Converts a folder with config.json and *.safetensors of a LLaMA or GPT-2 network.

    Args:
        dtype: of the stored weights; None keeps what the source has.
    Raises:
        FileNotFoundError: a file is missing. ValueError: config.json or a tensor is of a kind that is not known here.
    """
    if not (src_dir / "config.json").is_file():
        raise FileNotFoundError(f"{src_dir / 'config.json'} is not there; {src_dir} is no Hugging Face checkpoint")
    config = _hf_config(src_dir / "config.json")
    rename = _hf_gpt2_tensors if config.arch == "gpt2" else _hf_llama_tensors
    tensors = {name: t.to(dtype or t.dtype) for name, t in rename(_hf_tensors(src_dir))}
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (src_dir / name).is_file():
            out_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(src_dir / name, out_dir / name)
    save_checkpoint(out_dir, config, tensors)


def _hf_config(path: Path) -> Config:
    hf = json.loads(path.read_text())
    if hf.get("model_type") == "gpt2":
        sizes = dict(n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"], block_size=hf["n_positions"])
        return Config(
            arch="gpt2",
            vocab_size=hf["vocab_size"],
            n_hidden=hf.get("n_inner"),
            norm_eps=hf["layer_norm_epsilon"],
            tie=hf.get("tie_word_embeddings", True),
            **sizes,
        )
    if hf.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {hf.get('model_type')!r}; known are 'llama' and 'gpt2'")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5; 4
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rope scaling of type {rope.get('rope_type', rope.get('type'))!r} is not supported")
    for field in ("attention_bias", "mlp_bias"):
        if hf.get(field):
            raise ValueError(f"{path}: {field} is true; LLaMA networks with biases are not supported")
    return Config(
        vocab_size=hf["vocab_size"],
        block_size=hf["max_position_embeddings"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_kv_head=hf.get("num_key_value_heads"),
        n_embd=hf["hidden_size"],
        n_hidden=hf["intermediate_size"],
        head_size=hf.get("head_dim"),
        rope_base=rope.get("rope_theta") or hf.get("rope_theta") or 10000.0,
        norm_eps=hf["rms_norm_eps"],
        tie=hf.get("tie_word_embeddings", False),
    )


def _hf_tensors(src_dir: Path) -> dict[str, Tensor]:
    index = src_dir / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if strange := [shard for shard in shards if Path(shard).name != shard]:
            raise ValueError(f"{index} names a shard outside its folder: {strange[0]}")
    else:
        shards = ["model.safetensors"]
    return {name: t for shard in shards for name, t in read_tensors(src_dir / shard).items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    """`prefix.7.rest.weight` -> `blocks.7.<names[rest]>.weight`. Raises ValueError for a name that has no place."""
    layer, rest, kind = re.fullmatch(r"(?:(?:model\.layers|h|blk)\.(\d+)\.)?(.*?)\.?(weight|bias)", name).groups()
    if rest not in names:
        raise ValueError(f"the tensor {name} has no place in the model")
    return (f"blocks.{layer}." if layer else "") + f"{names[rest]}.{kind}"


def _hf_llama_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, t in tensors.items():
        if not name.endswith("rotary_emb.inv_freq"):
            yield _renamed(name, _HF_LLAMA), t


def _hf_gpt2_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, t in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that old files store
            continue
        if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):  # GPT-2 stores these as (n_in, n_out)
            t = t.T
        if ".attn.c_attn." in name:
            for p, part in zip("qkv", t.chunk(3), strict=True):
                yield f"blocks.{name.split('.')[1]}.attn.{p}_proj.{name.split('.')[-1]}", part
        else:
            yield _renamed(name, _HF_GPT2), t


# ------------------------------------------------------------------------------------------------------------ GGUF

_GGUF_LLAMA = {
    "token_embd": "wte",
    "output_norm": "norm_f",
    "output": "lm_head",
    "attn_norm": "norm_1",
    "ffn_norm": "norm_2",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(src: Path, out_dir: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Converts a GGUF file of the llama architecture: weights dequantized into `dtype`, tokenizer and chat template.

    Raises FileNotFoundError or ValueError: no such file, no GGUF file, or of a kind that is not known here.
    """
    from gguf import GGUFReader, dequantize  # here because importing it takes as long as importing torch

    if not src.is_file():
        raise FileNotFoundError(f"{src} is not there")
    try:
        reader = GGUFReader(src)
    except (ValueError, IndexError) as e:
        raise ValueError(f"{src} is not a whole GGUF file: {e}") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{src}: its architecture is {fields.get('general.architecture')!r}; known is 'llama'")
    of = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    n_head = of["attention.head_count"]
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    config = Config(
        vocab_size=shapes["token_embd.weight"][0],
        block_size=of["context_length"],
        n_layer=of["block_count"],
        n_head=n_head,
        n_kv_head=of.get("attention.head_count_kv", n_head),
        n_embd=of["embedding_length"],
        n_hidden=of["feed_forward_length"],
        head_size=of.get("attention.key_length"),
        rope_base=of.get("rope.freq_base", 10000.0),
        norm_eps=round(of["attention.layer_norm_rms_epsilon"], 12),  # the file has it as float32: 9.99999974e-06
        tie="output.weight" not in shapes,
    )
    tensors = {}
    for t in reader.tensors:
        weight = torch.tensor(dequantize(t.data, t.tensor_type)).view(shapes[t.name])
        if t.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _half_split(weight, config.head_size)
        tensors[_renamed(t.name, _GGUF_LLAMA)] = weight.to(dtype)
    out_dir.mkdir(parents=True, exist_ok=True)
    _save_gguf_tokenizer(fields, src, out_dir)
    save_checkpoint(out_dir, config, tensors)


def _half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows of q or k from Meta's rope order, where (0, 1), (2, 3), ... turn together, to (i, i + head_size / 2)."""
    return weight.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _save_gguf_tokenizer(fields: dict[str, Any], src: Path, out_dir: Path) -> None:
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens, kind = of["tokens"], of["model"]
    if kind == "gpt2":
        _gpt2_tokenizer(of, src).save(str(out_dir / "tokenizer.json"))
    elif kind == "llama":
        (out_dir / "tokenizer.model").write_bytes(_sentencepiece_model(of))
    else:
        raise ValueError(f"{src}: its tokenizer is of the kind {kind!r}; known are 'gpt2' and 'llama'")
    stated = {
        "bos_token": tokens[of["bos_token_id"]] if "bos_token_id" in of else None,
        "eos_token": tokens[of["eos_token_id"]],
        "add_bos_token": of.get("add_bos_token", kind == "llama"),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(stated, indent=2) + "\n")


def _gpt2_tokenizer(of: dict[str, Any], src: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pre = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    }
    if of.get("pre", "gpt-2") not in pre:
        raise ValueError(f"{src}: it splits words by the rule {of['pre']!r}; known are {', '.join(pre)}")
    merges = [tuple(merge.split(" ")) for merge in of["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(of["tokens"])}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*pre[of.get("pre", "gpt-2")], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(of["tokens"], of["token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _sentencepiece_model(of: dict[str, Any]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as spm

    proto = spm.ModelProto()
    for piece, score, kind in zip(of["tokens"], of["scores"], of["token_type"], strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)  # GGUF numbers the kinds as sentencepiece does
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = spec.BPE, 6 in of["token_type"], len(of["tokens"])
    spec.unk_id, spec.bos_id, spec.eos_id = (of.get(f"{k}_token_id", -1) for k in ("unknown", "bos", "eos"))
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = of.get("add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
