"""Weights in: a GGUF file, or a folder of the Hugging Face Hub, becomes a checkpoint folder."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from lit_model.checkpoint import read_tensors, save_checkpoint
from lit_model.files import read_json, refuse_used
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
    refuse_used(out_dir)
    config = _hf_config(src_dir / "config.json")
    rename = _hf_gpt2_tensors if config.arch == "gpt2" else hf_llama_tensors
    tensors = {name: t.to(dtype or t.dtype) for name, t in rename(_hf_tensors(src_dir))}
    save_checkpoint(out_dir, config, tensors, _name_eos(tokenizer_files(src_dir), src_dir))


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder's tokenizer: name -> content. Says so if there is none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
        print(f"{folder} has neither tokenizer.json nor tokenizer.model: the checkpoint needs one beside its weights")
    return files


def _name_eos(files: dict[str, bytes], src_dir: Path) -> dict[str, bytes]:
    """Names the end-of-text token in tokenizer_config.json where it is missing there, as in GPT-2's own repository."""
    stated = "tokenizer_config.json"
    config = read_json(src_dir / stated) if stated in files else {}
    eos = read_json(src_dir / "config.json").get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    if "tokenizer.json" not in files or config.get("eos_token") or eos is None:
        return files
    token = Tokenizer.from_str(files["tokenizer.json"].decode()).id_to_token(eos)
    return files | {stated: (json.dumps(config | {"eos_token": token}, indent=2) + "\n").encode()}


_HF_ONLY = {  # what this model can do: field -> values; absent or null is fine
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
}


def _hf_config(path: Path) -> Config:
    hf = read_json(path)
    kind = hf.get("model_type")
    if kind not in _HF_ONLY:
        raise ValueError(f"{path}: model_type is {kind!r}; known are 'llama' and 'gpt2'")
    for field, values in _HF_ONLY[kind].items():
        if hf.get(field) is not None and hf[field] not in values:
            raise ValueError(f"{path}: {field} is {hf[field]!r}, which is not supported")
    if hf.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config: quantized folders are not supported; take the original weights")
    if kind == "gpt2":
        hf = read_json(path, "n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "layer_norm_epsilon")
        sizes = dict(n_layer=hf["n_layer"], n_head=hf["n_head"], n_embd=hf["n_embd"], block_size=hf["n_positions"])
        return Config(
            arch="gpt2",
            vocab_size=hf["vocab_size"],
            n_hidden=hf.get("n_inner"),
            norm_eps=hf["layer_norm_epsilon"],
            tie=hf.get("tie_word_embeddings", True),
            **sizes,
        )
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    hf = read_json(path, *sizes, "max_position_embeddings", "rms_norm_eps")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5; 4
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rope scaling of type {rope.get('rope_type', rope.get('type'))!r} is not supported")
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
        shards = sorted(set(read_json(index, "weight_map")["weight_map"].values()))
        if strange := [shard for shard in shards if Path(shard).name != shard]:
            raise ValueError(f"{index} names a shard outside its folder: {strange[0]}")
    else:
        shards = ["model.safetensors"]
    return {name: t for shard in shards for name, t in read_tensors(src_dir / shard).items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    """`prefix.7.rest.weight` -> `blocks.7.<names[rest]>.weight`. Raises ValueError for a name that has no place."""
    match = re.fullmatch(r"(?:(?:model\.layers|h|blk)\.(\d+)\.)?(.*?)\.?(weight|bias)", name)
    layer, rest, kind = match.groups() if match else (None, None, None)
    if rest not in names:
        raise ValueError(f"the tensor {name} has no place in the model")
    return (f"blocks.{layer}." if layer else "") + f"{names[rest]}.{kind}"


def hf_llama_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of transformers' LLaMA under our name."""
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
    refuse_used(out_dir)
    if not src.is_file():
        raise FileNotFoundError(f"{src} is not there")
    try:
        reader = GGUFReader(src)
    except (ValueError, IndexError, KeyError, OverflowError) as e:
        raise ValueError(f"{src} is not a whole GGUF file: {e}") from None
    fields = _Fields({name: field.contents() for name, field in reader.fields.items()})
    fields.path = src
    if fields.get("general.architecture") != "llama":
        raise ValueError(f"{src}: its architecture is {fields.get('general.architecture')!r}; known is 'llama'")
    n_head = fields["llama.attention.head_count"]
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in (t.name for t in reader.tensors):
        raise ValueError(f"{src}: rope scaling of type {scaling!r} is not supported")
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{src} has no tensor token_embd.weight")
    config = Config(
        vocab_size=shapes["token_embd.weight"][0],
        block_size=fields["llama.context_length"],
        n_layer=fields["llama.block_count"],
        n_head=n_head,
        n_kv_head=fields.get("llama.attention.head_count_kv", n_head),
        n_embd=fields["llama.embedding_length"],
        n_hidden=fields["llama.feed_forward_length"],
        head_size=fields.get("llama.attention.key_length"),
        rope_base=fields.get("llama.rope.freq_base", 10000.0),
        norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),  # float32 there: 9.99999974e-06
        tie="output.weight" not in shapes,
    )
    tensors = {}
    for t in reader.tensors:
        try:
            weight = torch.tensor(dequantize(t.data, t.tensor_type)).view(shapes[t.name])
        except NotImplementedError:
            raise ValueError(f"{src}: {t.name} is of the type {t.tensor_type.name}, which gguf cannot unpack") from None
        if t.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _half_split(weight, config.head_size)
        tensors[_renamed(t.name, _GGUF_LLAMA)] = weight.to(dtype)
    save_checkpoint(out_dir, config, tensors, _gguf_tokenizer(fields))


class _Fields(dict):
    """Fields of a GGUF file; one that is missing is an error that names file and field."""

    path: Path

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.path} has no field {name}")


def _half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows of q or k from Meta's rope order, where (0, 1), (2, 3), ... turn together, to (i, i + head_size / 2)."""
    return weight.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _gguf_tokenizer(fields: _Fields) -> dict[str, bytes]:
    """The files of the tokenizer: name -> content."""
    kind, tokens = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        files = {"tokenizer.json": _byte_level_bpe(fields).to_str().encode()}
    elif kind == "llama":
        files = {"tokenizer.model": _sentencepiece_model(fields)}
    else:
        raise ValueError(f"{fields.path}: its tokenizer is of the kind {kind!r}; known are 'gpt2' and 'llama'")
    bos = fields.get("tokenizer.ggml.bos_token_id")
    stated = {
        "bos_token": None if bos is None else tokens[bos],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", kind == "llama"),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    return files | {"tokenizer_config.json": (json.dumps(stated, indent=2) + "\n").encode()}


def _byte_level_bpe(fields: _Fields) -> Tokenizer:
    rule = fields.get("tokenizer.ggml.pre", "gpt-2")  # how text is split before pairs merge
    splits = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    if rule not in splits:
        raise ValueError(f"{fields.path}: it splits words by the rule {rule!r}; known are {', '.join(splits)}")
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits[rule], pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4
    kinds = dict(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens if kinds[t] == control])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens if kinds[t] == user_defined])
    return tokenizer


def _sentencepiece_model(fields: _Fields) -> bytes:
    from sentencepiece import sentencepiece_model_pb2 as spm

    names = ("tokens", "scores", "token_type")
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in names)
    proto = spm.ModelProto()
    for piece, score, kind in zip(tokens, scores, kinds, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)  # GGUF numbers the kinds as sentencepiece does
    spec = proto.trainer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = spec.BPE, 6 in kinds, len(tokens)
    ids = (fields.get(f"tokenizer.ggml.{name}_token_id", -1) for name in ("unknown", "bos", "eos"))
    spec.unk_id, spec.bos_id, spec.eos_id = ids
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
