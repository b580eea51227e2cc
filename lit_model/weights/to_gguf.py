"""Weights out: a Hugging Face folder becomes a GGUF file, which llama.cpp and its kin serve; gguf.py reads it back.

Tensors are written one after the other, so that one at a time is held in memory. What is one-dimensional stays in
float32, and so do positions; rows that no block of a quantized kind fits into are stored in half precision.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from torch import Tensor

from lit_model.config import Config
from lit_model.data.tokenizer import Tokenizer
from lit_model.files import replacing
from lit_model.rope import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling
from lit_model.weights.folder import Folder, network_shapes
from lit_model.weights.gguf import _SPLITS, ARCHITECTURES, GGUF, NAMES, SIZES, _config
from lit_model.weights.peft import Modules, plain_lora
from lit_model.weights.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

ARCH_OF = {kind: arch for arch, kind in ARCHITECTURES.items()} | dict(mistral="llama")
THEIRS = {ours: theirs for theirs, ours in NAMES.items()}
WINDOWED = "gemma3", "phi3"
UNUSED, BYTE = 5, 6  # kinds of tokens, beside sentencepiece's
PROBE = "It's 12345 of_them,\n\n\n  DON'T 7.5 \tà la carte 你好 (x)\r\n ok"


def write_gguf(out: Path, base: Folder, kind: str = "Q8_0") -> None:
    """Writes the network of a folder.

    Args:
        kind: that of matrices, as gguf calls it: F32, Q8_0, ...
    Raises:
        ValueError: llama.cpp has no such network, or no such tokenizer.
    """
    arch, shapes = _arch(base), network_shapes(base.config)
    fields = _sizes(base.config, arch) | _tokenizer(Tokenizer(base.path), base.config)
    with replacing(out) as aside:
        writer = gguf.GGUFWriter(aside, arch)
        for name, value in fields.items():
            _add(writer, name, value)
        tensors = dict(_extra(base.config))
        names = dict.fromkeys(base.family.fused(name)[0] for name in shapes)
        plan = [(name, _plan([shapes[other] for other in base.family.fused(name)], name, kind)) for name in names]
        for name, t in tensors.items():
            writer.add_tensor_info(name, t.shape, np.dtype("f4"), t.nbytes)
        for name, (shape, dtype) in plan:
            in_bytes = gguf.quant_shape_to_byte_shape(shape, dtype)
            n, kind_of = int(np.prod(in_bytes)), np.dtype("u1")
            writer.add_tensor_info(their_name(name, arch), in_bytes, kind_of, n, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors.values():
            writer.write_tensor_data(t)
        for name, (_, dtype) in plan:
            writer.write_tensor_data(quantize(_stored(name, base, arch).float().numpy(), dtype))
        writer.close()
        written, _ = _config(GGUF(aside), arch)
        if replace(written, layers=base.config.layers, block_size=base.config.block_size) != base.config or any(
            isinstance(rope.scaling, YarnScaling) and rope not in written.ropes for rope in base.config.ropes
        ):
            raise ValueError(f"a GGUF file of {arch} cannot say this network's shape: llama.cpp would answer otherwise")


def write_gguf_lora(out: Path, header: dict[str, Any], tensors: dict[str, Tensor], base: Folder) -> None:
    """Writes a LoRA (`load.read_method`) alone. Raises ValueError if it is none, or one that llama.cpp cannot take."""
    arch, modules = _arch(base), Modules(base)
    layers = plain_lora(header, tensors, base)
    if base.config.tie and "lm_head" in layers:
        raise ValueError("llama.cpp takes no LoRA on an output layer that is the embedding: merge it with --to gguf")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as aside:
        writer = gguf.GGUFWriter(aside, arch)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(len(next(iter(layers.values()))[0])))
        for theirs, (A, B) in layers.items():
            name = f"{modules.ours[theirs][0]}.weight"
            writer.add_tensor(f"{their_name(name, arch)}.lora_a", A.numpy())
            writer.add_tensor(f"{their_name(name, arch)}.lora_b", _rows(name, B, base.config, arch).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _arch(base: Folder) -> str:
    kind = base.hf["model_type"]
    if kind not in ARCH_OF:
        raise ValueError(f"a GGUF file of {kind} is not supported; known are {', '.join(ARCH_OF)}")
    return ARCH_OF[kind]


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Adds a field of the type that its value has; numbers are 32 bits wide."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](name, value) if type(value) in kinds else writer.add_array(name, value)


def _plan(fused: list[torch.Size], name: str, kind: str) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType]:
    """Shape and kind of the tensor that begins with ours of this name, and holds all of these shapes."""
    shape = (sum(rows for rows, *_ in fused), *fused[0][1:])
    if len(shape) == 1 or name == "wpe.weight":
        kind = "F32"
    elif kind.startswith(("Q4", "Q5")) and name in ("wte.weight", "lm_head.weight"):
        kind = "Q8_0"  # what all tokens meet
    if kind.startswith("Q") and shape[-1] % 32:
        kind = "F16"
    return shape, gguf.GGMLQuantizationType[kind]


def their_name(name: str, arch: str) -> str:
    """`blocks.7.attn.q_proj.weight` -> `blk.7.attn_q.weight`"""
    module, _, kind = name.rpartition(".")
    layer = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        layer = f"blk.{layer}."
    module = THEIRS[module]
    if arch in ("gpt2", "phi3"):
        module = dict(attn_q="attn_qkv", ffn_gate="ffn_up").get(module, module)
    return f"{layer}{module}.{kind}"


def _stored(name: str, base: Folder, arch: str) -> Tensor:
    """The tensor that begins with ours of this name, with rows as llama.cpp has them."""
    t = torch.cat([base.tensor(other) for other in base.family.fused(name)])
    return t.float() + 1 if arch == "gemma3" and "norm" in name else _rows(name, t, base.config, arch)


def _rows(name: str, t: Tensor, config: Config, arch: str) -> Tensor:
    """The rows of q and k in Meta's rope order where llama.cpp has them so."""
    if arch == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
        return t.unflatten(0, (-1, 2, config.head_size // 2)).transpose(1, 2).flatten(0, 2)
    return t


def _sizes(config: Config, arch: str) -> dict[str, Any]:
    """The shape as GGUF's fields."""
    eps = "layer_norm_epsilon" if arch == "gpt2" else "layer_norm_rms_epsilon"
    windows = {layer.window for layer in config.layers} - {None}
    fields = {f"{arch}.{theirs}": getattr(config, ours) for theirs, ours in SIZES.items()} | {
        "general.quantization_version": 2, f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.attention.value_length": config.head_size, f"{arch}.attention.{eps}": config.norm_eps,
    }  # fmt: skip
    context = config.block_size
    if windows and arch in WINDOWED:
        fields[f"{arch}.attention.sliding_window"] = min(windows)
    elif windows:  # llama.cpp has none here: up to there it answers as the network does
        context = min(context, *windows)
    fields[f"{arch}.context_length"] = context
    if arch == "gpt2":
        return fields
    rope = next(layer.rope for layer in reversed(config.layers) if layer.rope is not None)
    fields[f"{arch}.rope.freq_base"] = float(rope.base)
    fields[f"{arch}.rope.dimension_count"] = int(config.head_size * rope.share)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling | YarnScaling):
        fields[f"{arch}.rope.scaling.type"] = "yarn" if isinstance(scaling, YarnScaling) else "linear"
        fields[f"{arch}.rope.scaling.factor"] = float(scaling.factor)
    if isinstance(scaling, YarnScaling | LongScaling):
        fields[f"{arch}.rope.scaling.original_context_length"] = scaling.original_block_size
    if isinstance(scaling, LongScaling):
        fields[f"{arch}.rope.scaling.attn_factor"] = float(scaling.attention_factor)
    return fields


def _extra(config: Config) -> dict[str, np.ndarray]:
    """Tensors beside the network's: by what each frequency of the positions is divided."""
    scaling = next((rope.scaling for rope in config.ropes if rope.scaling is not None), None)
    if isinstance(scaling, LongScaling):
        lists = dict(rope_factors_short=scaling.short, rope_factors_long=scaling.long)
        return {f"{name}.weight": np.array(values, np.float32) for name, values in lists.items()}
    if isinstance(scaling, Llama3Scaling):
        (rope,) = config.ropes
        plain, scaled = (r.frequencies(config.head_size) for r in (Rope(rope.base), rope))
        return {"rope_freqs.weight": (plain / scaled).float().numpy()}
    return {}


def _tokenizer(tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """The tokenizer as GGUF's fields. Raises ValueError if llama.cpp has no such."""
    stated = json.loads(tokenizer.files()["tokenizer.json"])
    model, special = stated["model"], {t["id"]: t["special"] for t in stated["added_tokens"]}
    hf = tokenizer.hf
    texts = [hf.id_to_token(i) for i in range(config.vocab_size)]
    kinds = [
        UNUSED if text is None else UNKNOWN if text == model.get("unk_token")
        else (CONTROL if special[i] else USER_DEFINED) if i in special
        else BYTE if model.get("byte_fallback") and text.startswith("<0x") and len(text) == 6 else NORMAL
        for i, text in enumerate(texts)
    ]  # fmt: skip
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    fields = dict(tokens=[f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)], token_type=kinds)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        rank = {merge.replace(" ", ""): i for i, merge in reversed([*enumerate(merges)])}
        scores = [0.0 if text is None else -float(rank.get(text, 0)) for text in texts]
        has_prefix = hf.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        fields |= dict(model="llama", scores=scores, add_space_prefix=has_prefix)
    elif model["type"] == "BPE":
        fields |= dict(model="gpt2", merges=merges, pre=_rule(hf, bool(model.get("ignore_merges"))))
    else:
        raise ValueError(f"a tokenizer of the kind {model['type']} is not known to llama.cpp as we write it")
    ends = dict(zip(("eos_token_id", "eot_token_id"), tokenizer.stop_ids))
    fields |= ends | dict(add_bos_token=bool(tokenizer.bos))
    fields |= dict(bos_token_id=tokenizer.bos_id) if tokenizer.bos else {}
    template = dict(chat_template=tokenizer.chat_template) if tokenizer.chat_template else {}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | {
        f"tokenizer.{name}": value for name, value in template.items()
    }


def _rule(hf: Any, takes_whole_words: bool) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE splits a text."""
    found = hf.pre_tokenizer.pre_tokenize_str(PROBE)
    for name in sorted(_SPLITS, key=lambda name: (name == "llama-bpe") != takes_whole_words):
        if pre_tokenizers.Sequence(_SPLITS[name]).pre_tokenize_str(PROBE) == found:
            return name
    raise ValueError("its tokenizer splits words by a rule that is not known")
