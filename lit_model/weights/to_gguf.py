"""Weights out: a network becomes a GGUF file, which llama.cpp and its kin serve; gguf.py reads it back.

Tensors are written one after the other, so that one at a time is held in memory. What is one-dimensional stays in
float32, and so do positions and routers; rows that no block of a quantized kind fits into are stored in half precision.
"""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from tokenizers import pre_tokenizers

from lit_model.config import Config
from lit_model.data.tokenizer import Tokenizer
from lit_model.families import Family
from lit_model.files import replacing
from lit_model.merge import Loss, Merged
from lit_model.rope import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling
from lit_model.weights.folder import Folder, network_shapes
from lit_model.weights.gguf import _SPLITS, ARCHITECTURES, SIZES, WINDOWED, converted, shape_of, their_names
from lit_model.weights.peft import Methods, Modules, plain_lora
from lit_model.weights.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

UNUSED, BYTE = 5, 6  # kinds of tokens, beside sentencepiece's
PROBE = "It's 12345 of_them,\n\n\n  DON'T 7.5 \tà la carte 你好 (x)\r\n ok"


def write_gguf(out: Path, merged: Merged, kind: str = "Q8_0") -> Loss:
    """Writes a merged network. Returns what its storage loses.

    Args:
        kind: that of matrices, as gguf calls it: F32, Q8_0, ...
    Raises:
        ValueError: llama.cpp has no such network, or no such tokenizer.
    """
    config, family, loss = merged.config, merged.base.family, Loss()
    arch, shapes = _arch(merged.base), network_shapes(config)
    names, extra = their_names(family, config, arch), _extra(config)
    fields = _sizes(config, family, arch) | _tokenizer(merged.tokenizer, config)
    _check(fields | {"general.architecture": arch}, shapes, names, extra, config)
    plan = {name: _plan([shapes[part] for part in family.fused(name)], name, kind) for name in names}
    with replacing(out) as aside:
        writer = gguf.GGUFWriter(aside, arch)
        for name, value in fields.items():
            vtype = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            if value != []:  # merges of a tokenizer without any: gguf stores no empty list
                writer.add_key_value(name, value, vtype)
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, np.dtype("f4"), 4 * len(values))
        for name, (shape, stored) in plan.items():
            if name == family.fused(name)[0]:
                in_bytes = gguf.quant_shape_to_byte_shape(shape, stored)
                n = int(np.prod(in_bytes))
                writer.add_tensor_info(names[name], in_bytes, np.dtype("u1"), n, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values.astype(np.float32))
        waiting = defaultdict(list)  # what lies in one tensor of theirs, and the base's
        for name, exact, before in merged.tensors():
            if name not in plan:  # an output layer that is the embedding
                continue
            sides = (exact,) if exact is before else (exact, before)
            sides = [converted(name, t.float(), config, arch, out=True) for t in sides]
            waiting[names[name]].append((sides[0], sides[-1]))
            if name == family.fused(name)[-1]:
                group = waiting.pop(names[name])
                exact, before = (side[0] if len(side) == 1 else torch.cat(side) for side in zip(*group, strict=True))
                stored = quantize(exact.numpy(), plan[name][1])
                writer.write_tensor_data(stored)
                if any(a is not b for a, b in group):
                    loss.add(exact, torch.from_numpy(dequantize(stored, plan[name][1])), before)
        writer.close()
    return loss


def _check(
    fields: dict[str, Any], shapes: dict[str, Any], names: dict[str, str], extra: dict[str, Any], config: Config
) -> None:
    """Raises ValueError if these fields do not say the shape: llama.cpp would answer otherwise."""
    theirs = {names[name]: shape for name, shape in shapes.items()} | {name: v.shape for name, v in extra.items()}
    _, written, _ = shape_of(fields, theirs, lambda name: torch.from_numpy(extra[name]))
    arch, layers = fields["general.architecture"], config.layers
    if arch not in WINDOWED:  # the context ends where a window would begin
        layers = tuple(replace(layer, window=None) for layer in layers)
    if replace(written, block_size=config.block_size) != replace(config, layers=layers):
        raise ValueError(f"a GGUF file of {arch} cannot say this network's shape: llama.cpp would answer otherwise")


def write_gguf_lora(out: Path, methods: Methods, base: Folder) -> None:
    """Writes a LoRA alone. Raises ValueError if it is none, or one that llama.cpp cannot take."""
    arch, modules = _arch(base), Modules(base)
    layers, names = plain_lora(methods, modules), their_names(base.family, base.config, arch)
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
            writer.add_tensor(f"{names[name]}.lora_a", A.numpy())
            writer.add_tensor(f"{names[name]}.lora_b", converted(name, B, base.config, arch, out=True).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _arch(base: Folder) -> str:
    kinds = ARCHITECTURES | dict(mistral="llama")
    if (kind := base.hf["model_type"]) not in kinds:
        raise ValueError(f"a GGUF file of {kind} is not supported; known are {', '.join(kinds)}")
    return kinds[kind]


def _plan(fused: list[torch.Size], name: str, kind: str) -> tuple[tuple[int, ...], gguf.GGMLQuantizationType]:
    """Shape and kind of the tensor that begins with ours of this name, and holds all of these shapes."""
    shape = (sum(rows for rows, *_ in fused), *fused[0][1:])
    if len(shape) == 1 or name == "wpe.weight" or ".router." in name:
        kind = "F32"
    elif kind.startswith(("Q4", "Q5")) and name in ("wte.weight", "lm_head.weight"):
        kind = "Q8_0"  # what all tokens meet
    if kind.startswith("Q") and shape[-1] % 32:
        kind = "F16"
    return shape, gguf.GGMLQuantizationType[kind]


def _sizes(config: Config, family: Family, arch: str) -> dict[str, Any]:
    """The shape as GGUF's fields."""
    eps = "layer_norm_epsilon" if arch == "gpt2" else "layer_norm_rms_epsilon"
    windows, context = {layer.window for layer in config.layers} - {None}, config.block_size
    fields = {theirs: getattr(config, ours) for theirs, ours in SIZES.items() if ours in family.fields}
    fields |= {"vocab_size": config.vocab_size, f"attention.{eps}": config.norm_eps}
    if windows and arch in WINDOWED:
        fields["attention.sliding_window"] = min(windows)
    elif windows:  # llama.cpp has none here: up to there it answers as the network does
        context = min(context, *windows)
    fields["context_length"] = context
    if experts := next((layer.experts for layer in config.layers if layer.experts), None):
        fields |= dict(expert_count=experts.n, expert_used_count=experts.n_active)
        fields |= dict(expert_feed_forward_length=experts.n_hidden)
    if rope := next((layer.rope for layer in reversed(config.layers) if config.ropes and layer.rope), None):
        fields |= {"rope.freq_base": float(rope.base), "rope.dimension_count": int(config.head_size * rope.share)}
        fields["attention.value_length"] = config.head_size
        scaling = rope.scaling
        if isinstance(scaling, LinearScaling | YarnScaling):
            fields["rope.scaling.type"] = "yarn" if isinstance(scaling, YarnScaling) else "linear"
            fields["rope.scaling.factor"] = float(scaling.factor)
        if isinstance(scaling, YarnScaling | LongScaling):
            fields["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        if isinstance(scaling, LongScaling):
            fields["rope.scaling.attn_factor"] = float(scaling.attention_factor)
    named = {f"{arch}.{name}": value for name, value in fields.items() if value is not None}
    return {"general.quantization_version": 2} | named


def _extra(config: Config) -> dict[str, np.ndarray]:
    """Tensors beside the network's: by what each frequency of the positions is divided."""
    scaling = next((rope.scaling for rope in config.ropes if rope.scaling is not None), None)
    if isinstance(scaling, LongScaling):
        lists = dict(rope_factors_short=scaling.short_factor, rope_factors_long=scaling.long_factor)
        return {f"{name}.weight": np.array(values) for name, values in lists.items()}
    if isinstance(scaling, Llama3Scaling):
        (rope,) = config.ropes
        plain, scaled = (r.frequencies(config.head_size) for r in (Rope(rope.base), rope))
        return {"rope_freqs.weight": (plain / scaled).numpy()}
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
    fields |= ends | dict(add_bos_token=bool(tokenizer.bos), bos_token_id=tokenizer.bos_id)
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    named["tokenizer.chat_template"] = tokenizer.chat_template or None
    return {name: value for name, value in named.items() if value is not None}


def _rule(hf: Any, takes_whole_words: bool) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE splits a text."""
    found = hf.pre_tokenizer.pre_tokenize_str(PROBE)
    for name in sorted(_SPLITS, key=lambda name: (name == "llama-bpe") != takes_whole_words):
        if pre_tokenizers.Sequence(_SPLITS[name]).pre_tokenize_str(PROBE) == found:
            return name
    raise ValueError("its tokenizer splits words by a rule that is not known")
