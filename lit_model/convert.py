"""Weights in: a folder of the Hugging Face Hub becomes a checkpoint folder. convert_gguf.py and convert_meta.py take
other files. Tensors go one by one from file to file, so that a network needs little more memory than its largest shard.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lit_model.checkpoint import open_tensors, save_checkpoint
from lit_model.files import as_dtype, blamed_on, read_json, refuse_pointer, refuse_used
from lit_model.model import Config
from lit_model.tokenizer import FILES

_HF_LLAMA = {
    "model.embed_tokens": "wte",
    "model.norm": "norm_f",
    "lm_head": "lm_head",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    **{f"self_attn.{p}_proj": f"attn.{p}_proj" for p in "qkvo"},
    **{f"self_attn.{p}_norm": f"attn.{p}_norm" for p in "qk"},
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
    """Converts a folder with config.json and *.safetensors or *.bin of a network of the families in `_HF_ONLY`.

    Args:
        dtype: of the stored weights; None keeps what the source has.
    Raises:
        FileNotFoundError: a file is missing. ValueError: config.json or a tensor is of a kind that is not known here.
    """
    refuse_used(out_dir)
    config = hf_config(src_dir / "config.json")
    rename = _hf_gpt2_tensors if config.arch == "gpt2" else hf_llama_tensors
    with blamed_on(src_dir):
        tensors = ((name, as_dtype(name, t, dtype)) for name, t in rename(_hf_tensors(src_dir)))
        save_checkpoint(out_dir, config, tensors, _name_eos(tokenizer_files(src_dir), src_dir))


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder's tokenizer: name -> content. Says so if there is none."""
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if not files.keys() & {"tokenizer.json", "tokenizer.model"}:
        print(f"{folder} has neither tokenizer.json nor tokenizer.model: the checkpoint needs one beside its weights")
    return files


def _name_eos(files: dict[str, bytes], src_dir: Path) -> dict[str, bytes]:
    """Names the end-of-text token in tokenizer_config.json where it is missing there, as in GPT-2's own repository."""
    stated = "tokenizer_config.json"
    config = read_json(src_dir / stated) if stated in files else {}
    eos = read_json(src_dir / "config.json").get("eos_token_id")
    eos = next(iter(eos), None) if isinstance(eos, list) else eos
    if "tokenizer.json" not in files or config.get("eos_token") or eos is None:
        return files
    try:
        token = Tokenizer.from_str(files["tokenizer.json"].decode()).id_to_token(eos)
    except Exception as e:  # tokenizers raises nothing more special
        raise ValueError(f"{src_dir / 'tokenizer.json'} is broken, or has no token {eos!r} ({e})") from None
    if token is None:
        raise ValueError(f"{src_dir / 'config.json'}: eos_token_id is {eos}, which tokenizer.json does not have")
    return files | {stated: (json.dumps(config | {"eos_token": token}, indent=2) + "\n").encode()}


_HF_ONLY = {  # what this model can do: family -> field -> values; absent or null is fine
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
    "mistral": {"hidden_act": ("silu",)},
    "qwen2": {"hidden_act": ("silu",), "use_sliding_window": (False,)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
    "smollm3": {
        "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,)
    },
}  # fmt: skip


def hf_config(path: Path) -> Config:
    """The shape that a config.json of transformers 4 or 5 states. Raises ValueError for what is not known here."""
    with blamed_on(path):
        return _hf_config(path)


def _hf_config(path: Path) -> Config:
    hf = read_json(path)
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _HF_ONLY:
        raise ValueError(f"{path}: model_type is {kind!r}; known are {', '.join(_HF_ONLY)}")
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
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{path}: its rope parameters are not one set for all layers, which is not supported")
    return Config(
        vocab_size=hf["vocab_size"],
        block_size=hf["max_position_embeddings"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_kv_head=hf.get("num_key_value_heads"),
        n_embd=hf["hidden_size"],
        n_hidden=hf["intermediate_size"],
        head_size=hf.get("head_dim"),
        rope_base=rope.get("rope_theta") or hf.get("rope_theta") or (2e6 if kind == "smollm3" else 10000.0),
        rope_scaling=_rope_scaling(path, rope),
        no_rope_every=_no_rope_every(path, hf) if kind == "smollm3" else None,
        window=hf.get("sliding_window", 4096) if kind == "mistral" else None,
        norm_eps=hf["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie=hf.get("tie_word_embeddings", kind == "smollm3"),  # the families' own defaults
    )


def _rope_scaling(path: Path, rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"{path}: partial_rotary_factor is {rope['partial_rotary_factor']}, which is not supported")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{path}: rope scaling of type {kind!r} is not supported")
    names = dict(
        factor="factor", low_freq_factor="low_freq_factor", high_freq_factor="high_freq_factor",
        original_block_size="original_max_position_embeddings",
    )  # fmt: skip
    if missing := [theirs for theirs in names.values() if theirs not in rope]:
        raise ValueError(f"{path}: its rope scaling lacks {', '.join(missing)}")
    return {ours: rope[theirs] for ours, theirs in names.items()}


def _no_rope_every(path: Path, hf: dict[str, Any]) -> int | None:
    n = hf["num_hidden_layers"]
    has_rope = [bool(x) for x in hf.get("no_rope_layers") or []]  # 1: this layer has rope, in spite of the name
    every = has_rope.index(False) + 1 if False in has_rope else None
    if not has_rope:
        every = hf.get("no_rope_layer_interval", 4)
    elif has_rope != [every is None or (i + 1) % every > 0 for i in range(n)]:
        raise ValueError(f"{path}: no_rope_layers is {hf['no_rope_layers']}: not every n-th layer is without rope")
    return every


def _hf_tensors(src_dir: Path) -> Iterator[tuple[str, Tensor]]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (src_dir / name).is_file():  # before an index, which may be left from another save
            shards = [name]
            break
        index = src_dir / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index, "weight_map")["weight_map"]
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{index}: weight_map is no map from names to files")
            shards = sorted(set(shards.values()))
            if strange := [shard for shard in shards if Path(shard).name != shard]:
                raise ValueError(f"{index} names a shard outside its folder: {strange[0]}")
            if missing := [shard for shard in shards if not (src_dir / shard).is_file()]:
                raise FileNotFoundError(f"{src_dir / missing[0]} is missing, though {index.name} names it: fetch it")
            break
    else:
        raise FileNotFoundError(f"{src_dir} has no weights: neither model.safetensors nor pytorch_model.bin")
    for shard in shards:
        if name == "model.safetensors":
            with open_tensors(src_dir / shard) as file:
                yield from ((key, file.get_tensor(key)) for key in file.keys())
        else:
            yield from unpickled(src_dir / shard).items()


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, mapped into memory where its format allows. Nothing but tensors is unpacked.

    Raises ValueError if it is none, or holds anything else.
    """
    refuse_pointer(path)
    options = dict(map_location="cpu", weights_only=True)
    with open(path, "rb") as file:
        if file.read(1) not in (b"P", b"\x80"):
            raise ValueError(f"{path} is broken or only partly written: no file of torch.save")
    try:
        if zipfile.is_zipfile(path) and any(i.compress_type for i in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        with warnings.catch_warnings():  # of pickle's protocols
            warnings.simplefilter("ignore")
            try:
                content = torch.load(path, mmap=True, **options)
            except RuntimeError:  # written by a torch before 1.6
                content = torch.load(path, **options)
    except pickle.UnpicklingError as e:
        if "weights_only" in str(e) or "Unsupported" in str(e):
            raise ValueError(f"{path} holds more than tensors, which could run code: it is not read") from None
        raise ValueError(f"{path} is broken or only partly written ({str(e).splitlines()[0]})") from None
    except Exception as e:  # a broken one can raise nearly anything
        raise ValueError(f"{path} is broken or only partly written ({' '.join(str(e).split())[:100]})") from None
    if (
        not isinstance(content, dict)
        or {type(name) for name in content} - {str}
        or not all(isinstance(t, Tensor) for t in content.values())
    ):
        raise ValueError(f"{path} holds no weights by name")
    for name, t in content.items():
        if t.layout != torch.strided or t.nbytes > t.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} is a sparse or an expanded tensor, which no network is made of")
    return content


def renamed(name: str, names: dict[str, str]) -> str:
    """`prefix.7.rest.weight` -> `blocks.7.<names[rest]>.weight`. Raises ValueError for a name that has no place."""
    match = re.fullmatch(r"(?:(?:model\.layers|layers|h|blk)\.(\d+)\.)?(.*?)\.?(weight|bias)", name)
    layer, rest, kind = match.groups() if match else (None, None, None)
    if rest not in names:
        raise ValueError(f"the tensor {name} has no place in the model")
    return (f"blocks.{layer}." if layer else "") + f"{names[rest]}.{kind}"


def hf_llama_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of transformers' LLaMA under our name."""
    for name, t in tensors:
        if not name.endswith("rotary_emb.inv_freq"):
            yield renamed(name, _HF_LLAMA), t


def _hf_gpt2_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, t in tensors:
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that old files store
            continue
        if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):  # GPT-2 stores these as (n_in, n_out)
            t = t.T
        if ".attn.c_attn." in name:
            for p, part in zip("qkv", t.chunk(3), strict=True):
                yield f"blocks.{name.split('.')[1]}.attn.{p}_proj.{name.split('.')[-1]}", part
        else:
            yield renamed(name, _HF_GPT2), t
