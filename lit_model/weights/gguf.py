"""Weights in: a GGUF file, whole or in parts, becomes a Hugging Face folder, with its tokenizer and chat template.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): fields, a table of tensors, their data. Every
text and list states its length; each is read from the mapped file, which ends where a length lies. The gguf package
dequantizes, and knows the names of tensors. to_gguf.py writes such files, and reads its fields back through `shape_of`.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, dequantize, get_tensor_name_map, quant_shape_to_byte_shape
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from lit_model.config import Config
from lit_model.families import FAMILIES, Family, read_config
from lit_model.files import cast, reading, refuse_pointer, refuse_used
from lit_model.rope import Llama3Scaling, Rope
from lit_model.weights.folder import network_shapes, save_folder
from lit_model.weights.sentencepiece import begin_with, tokenizer_of, with_added_tokens

ARCHITECTURES = {  # model_type -> GGUF's name; of two with one name the second has the field in MARKS
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "olmo3": "olmo2", "olmoe": "olmoe",
    "granite": "granite", "smollm3": "smollm3", "seed_oss": "seed_oss", "gpt2": "gpt2",
}  # fmt: skip
MARKS = dict(mixtral="expert_count", olmo3="attention.sliding_window")
SIZES = {  # a field, after the name of the architecture -> Config's, where the family has it
    "context_length": "block_size", "block_count": "n_layer", "embedding_length": "n_embd",
    "feed_forward_length": "n_hidden", "attention.head_count": "n_head", "attention.head_count_kv": "n_kv_head",
    "attention.key_length": "head_size", "attn_logit_softcapping": "attn_softcap",
    "final_logit_softcapping": "logit_softcap", "embedding_scale": "embedding_scale",
    "residual_scale": "residual_scale", "attention.scale": "attn_scale", "logit_scale": "logit_divisor",
}  # fmt: skip
WINDOWED = "gemma2", "gemma3", "phi3", "olmo2"
PLUS_ONE = "gemma2", "gemma3"  # norms are stored as 1 + weight
META_ROPE = "llama", "granite", "smollm3"  # q and k are stored in Meta's rope order
NUMBERS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


def convert_gguf(src: Path, out_dir: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Converts a GGUF file of one of ARCHITECTURES, its weights dequantized into `dtype`. Of several parts `src` is the
    first.

    Raises FileNotFoundError or ValueError: no such file, no GGUF file, or of an unknown kind.
    """
    refuse_used(out_dir)
    with reading(src):
        refuse_pointer(src)
        gguf = GGUF(src)
        arch = gguf.fields["general.architecture"]
        if arch not in ARCHITECTURES.values():
            raise ValueError(f"its architecture is {arch!r}; known are {', '.join({*ARCHITECTURES.values()})}")
        family, config, hf = shape_of(gguf.fields, gguf.shapes, gguf.tensor)
        shapes, names = network_shapes(config), their_names(family, config, arch)
        if odd := [n for n in gguf.shapes if n not in names.values() and not n.startswith("rope_")]:
            raise ValueError(f"its tensor {odd[0]} has no place in the network")

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for theirs, fused in {names[name]: family.fused(name) for name in names}.items():
                parts = gguf.tensor(theirs).split([shapes[name][0] for name in fused])
                for name, t in zip(fused, parts, strict=True):
                    yield name, cast(name, converted(name, t, config, arch), dtype)

        save_folder(out_dir, config, tensors(), _tokenizer_files(gguf.fields, arch), hf)


class GGUF:
    """An opened file: `fields` by name, `shapes` of the tensors by name, those of its other parts among them."""

    def __init__(self, path: Path, is_first: bool = True):
        self._data, self._at = np.memmap(path, np.uint8, "r"), 0
        if self._data[:4].tobytes() != b"GGUF" or self._data[4:8].tobytes() not in (b"\2\0\0\0", b"\3\0\0\0"):
            raise ValueError("it is no GGUF file of version 2 or 3")
        self._at = 8
        n_tensors, n_fields = self._numbers("<u8", 2).tolist()
        self.fields = {self._text(): self._value(self._number("<u4")) for _ in range(n_fields)}
        infos = [self._tensor_info() for _ in range(n_tensors)]
        self.shapes = {name: shape for name, shape, *_ in infos}
        alignment = self.fields.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self._stored = {}  # name of a tensor -> its rows of bytes, and their kind
        for name, shape, kind, offset in infos:
            in_bytes, self._at = quant_shape_to_byte_shape(shape, kind), start + offset
            self._stored[name] = self._numbers("u1", math.prod(in_bytes)).reshape(in_bytes), kind
        if is_first and self.fields.get("split.no"):
            raise ValueError("it is a part of several: name the first one")
        for i in range(2, self.fields.get("split.count", 1) * is_first + 1):
            part = GGUF(path.with_name(path.name.replace("-00001-of-", f"-{i:05}-of-")), is_first=False)
            self.shapes |= part.shapes
            self._stored |= part._stored

    def tensor(self, name: str) -> Tensor:
        """The tensor in float32."""
        return torch.tensor(dequantize(*self._stored[name]))

    def _numbers(self, kind: str, n: int) -> np.ndarray:
        """A view of the next n numbers. Raises ValueError if the file ends before."""
        numbers = np.frombuffer(self._data, kind, n, self._at)
        self._at += numbers.nbytes
        return numbers

    def _number(self, kind: str) -> Any:
        """A number of 32 bits is the shortest one that is stored so: 0.22, not 0.2199999988."""
        (number,) = self._numbers(kind, 1)
        return float(str(number)) if kind == "<f4" else number.item()

    def _text(self) -> str:
        return self._numbers("u1", self._number("<u8")).tobytes().decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            return self._number(NUMBERS[kind])
        kind, n = self._number("<u4"), self._number("<u8")
        return self._numbers(NUMBERS[kind], n) if kind in NUMBERS else [self._value(kind) for _ in range(n)]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, n_dims = self._text(), self._number("<u4")
        shape = tuple(reversed(self._numbers("<u8", n_dims).tolist()))
        return name, shape, GGMLQuantizationType(self._number("<u4")), self._number("<u8")


def shape_of(
    fields: dict[str, Any], shapes: dict[str, tuple], tensor: Callable[[str], Tensor]
) -> tuple[Family, Config, dict[str, Any]]:
    """The family, the shape, and config.json, of a file with these fields and tensors."""
    arch = fields["general.architecture"]
    fields = {name.removeprefix(f"{arch}."): value for name, value in fields.items()}
    kinds = [kind for kind, theirs in ARCHITECTURES.items() if theirs == arch]
    kind = next(kind for kind in reversed(kinds) if kind not in MARKS or fields.get(MARKS[kind]))
    family, n_embd, n_head = FAMILIES[kind], fields["embedding_length"], fields["attention.head_count"]
    head_size, context = fields.get("attention.key_length", n_embd // n_head), fields["context_length"]
    shape = {ours: fields[theirs] for theirs, ours in SIZES.items() if theirs in fields} | dict(
        vocab_size=shapes["token_embd.weight"][0],
        n_layer=min(fields["block_count"], len(shapes)),  # a billion would take long to miss
        head_size=head_size,
        norm_eps=fields[f"attention.layer_norm{'' if arch == 'gpt2' else '_rms'}_epsilon"],
        tie="output.weight" not in shapes,
    )
    hf = {theirs: shape[ours] for ours, theirs in family.fields.items() if ours in shape}
    hf["model_type"] = kind
    may_have = family.defaults
    if "rope_theta" in may_have:
        hf |= dict(rope_theta=fields.get("rope.freq_base", 10000.0), rope_scaling=_rope_scaling(fields, shapes, tensor))
    if "sliding_window" in may_have and not kind.startswith("qwen"):
        hf["sliding_window"] = fields.get("attention.sliding_window") or None
    if "query_pre_attn_scalar" in may_have:  # what the 27b networks have of their own is not stated
        hf["query_pre_attn_scalar"] = n_embd // n_head if shape["n_layer"] in (46, 62) else head_size
    if "partial_rotary_factor" in may_have:
        hf["partial_rotary_factor"] = fields.get("rope.dimension_count", head_size) / head_size
        hf["original_max_position_embeddings"] = fields.get("rope.scaling.original_context_length", context)
    if "num_experts_per_tok" in may_have:
        number = next(name for name in ("num_experts", "num_local_experts") if name in may_have)
        hf |= {number: fields["expert_count"], "num_experts_per_tok": fields["expert_used_count"]}
        hf |= dict(moe_intermediate_size=fields["expert_feed_forward_length"]) if kind == "qwen3_moe" else {}
        hf |= dict(norm_topk_prob=kind == "qwen3_moe") if kind != "mixtral" else {}  # as llama.cpp has it
    _, config = read_config(hf)
    return family, replace(config, qkv_bias="blk.0.attn_q.bias" in shapes or config.bias), hf


def their_names(family: Family, config: Config, arch: str) -> dict[str, str]:
    """Our name of each tensor of a network -> GGUF's; several may lie in one."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == arch)
    names, theirs = get_tensor_name_map(kind, config.n_layer), {}
    for name in network_shapes(config):
        module, _, end = family.full_name(family.stored(name)).replace(".{}", "").rpartition(".")
        theirs[name] = f"{names.get_name(module) or 'output'}.{end}"
    return theirs


def _rope_scaling(
    fields: dict[str, Any], shapes: dict[str, tuple], tensor: Callable[[str], Tensor]
) -> dict[str, Any] | None:
    """As config.json states it."""
    original = fields.get("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in shapes:
        short, long = (tensor(f"rope_factors_{name}.weight").tolist() for name in ("short", "long"))
        factor = fields.get("rope.scaling.attn_factor")
        return dict(rope_type="longrope", short_factor=short, long_factor=long, attention_factor=factor)
    if "rope_freqs.weight" in shapes:
        return _llama_3(fields.get("rope.freq_base", 10000.0), tensor("rope_freqs.weight").double())
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0
    kind = fields.get("rope.scaling.type", "linear")  # as llama.cpp takes a factor without a type
    return None if factor == 1 else dict(rope_type=kind, factor=factor, original_max_position_embeddings=original)


def _llama_3(base: float, slower: Tensor) -> dict[str, Any]:
    """LLaMA 3.1's and 3.2's scaling: the file has only its effect on each frequency, slower (hs / 2,)."""
    for factor in (8.0, 32.0):
        stated = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
        scaled = Rope(base, scaling=Llama3Scaling(**stated)).frequencies(2 * len(slower))
        if torch.allclose(Rope(base).frequencies(2 * len(slower)) / scaled, slower, rtol=1e-3):
            return dict(rope_type="llama3") | stated
    raise ValueError("rope_freqs.weight is not the rope scaling of LLaMA 3.1 or 3.2")


def converted(name: str, t: Tensor, config: Config, arch: str, out: bool = False) -> Tensor:
    """A tensor of ours as we have it, from what a file of this architecture has; out: the other way round."""
    if arch in META_ROPE and name.split(".")[-2] in ("q_proj", "k_proj"):  # there neighbours turn together
        pairs, halves = (-1, config.head_size // 2, 2), (-1, 2, config.head_size // 2)
        return t.unflatten(0, halves if out else pairs).transpose(1, 2).flatten(0, 2)
    return t + (1 if out else -1) if arch in PLUS_ONE and "norm" in name else t


# --------------------------------------------------------------------------------------------------------- tokenizers


def _tokenizer_files(fields: dict[str, Any], arch: str) -> dict[str, bytes]:
    """The tokenizer's files of a Hugging Face folder: name -> content."""
    fields = {name.removeprefix("tokenizer.").removeprefix("ggml."): value for name, value in fields.items()}
    tokens, kinds, model = fields["tokens"], fields["token_type"], fields["model"]
    rule = fields.get("pre", "gpt-2" if arch == "gpt2" else None)  # GPT-2's files are older than this field
    if model == "llama":
        spaces = "prepend" if fields.get("add_space_prefix", True) else "never"
        tokenizer = tokenizer_of(tokens, fields["scores"], kinds, spaces)
    elif model == "gpt2" and rule in _SPLITS:
        tokenizer = _byte_level_bpe(tokens, fields["merges"], kinds, rule)
    else:
        raise ValueError(f"its tokenizer is {model!r} and splits words by the rule {rule!r}, which is not supported")
    bos, ends = fields.get("bos_token_id"), [fields["eos_token_id"], fields.get("eot_token_id")]
    token_of = {i: token for token, i in tokenizer.get_vocab().items()} | {None: None}
    if bos is not None and fields.get("add_bos_token", model == "llama" or rule == "llama-bpe"):  # as llama.cpp does
        begin_with(tokenizer, token_of[bos])
    special = dict(bos_token=token_of[bos], eos_token=token_of[ends[0]], chat_template=fields.get("chat_template"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast") | special
    generation = dict(bos_token_id=bos, eos_token_id=[i for i in dict.fromkeys(ends) if i is not None])
    files = {"tokenizer_config.json": config, "generation_config.json": generation}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    return {name: text.encode() for name, text in (texts | {"tokenizer.json": tokenizer.to_str()}).items()}


def _words(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    """The split of GPT-4 and its heirs, for runs of this many digits."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_SPLITS = {  # tokenizer.ggml.pre: how text is split before pairs merge
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": _words(""),
    "llama-bpe": _words("{1,3}"),
    "dbrx": _words("{1,3}"),
}


def _byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], rule: str) -> Tokenizer:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    whole_first = rule == "llama-bpe"  # LLaMA 3 takes a word that is a token as it is
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=whole_first))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[rule])
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return with_added_tokens(tokenizer, tokens, kinds)
