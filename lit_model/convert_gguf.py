"""Weights in: a GGUF file becomes a checkpoint folder, with its tokenizer and chat template.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the gguf package reads and dequantizes it. For
the llama architecture q and k stand in Meta's rope order there, for qwen2 in ours.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from lit_model.checkpoint import save_checkpoint
from lit_model.convert import renamed
from lit_model.files import blamed_on, refuse_pointer, refuse_used
from lit_model.model import Config, rope_frequencies

_GGUF_NAMES = {
    "token_embd": "wte",
    "position_embd": "wpe",
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
    """Converts a GGUF file of the architectures llama, qwen2 and gpt2: weights dequantized into `dtype`.

    Raises FileNotFoundError or ValueError: no such file, no GGUF file, or of a kind that is not known here.
    """
    refuse_used(out_dir)
    if not src.is_file():
        raise FileNotFoundError(f"{src} is not there")
    refuse_pointer(src)
    try:
        with np.errstate(over="raise"):  # offsets beyond 2**64
            reader = _Reader(src)
        if sum(t.n_bytes for t in reader.tensors) > len(reader.data):
            raise ValueError("its tensors lie on top of each other")
    except Exception as e:  # a broken one can raise nearly anything
        raise ValueError(f"{src} is not a whole GGUF file: {e}") from None
    with blamed_on(src):
        fields = _Fields({name: field.contents() for name, field in reader.fields.items()})
        fields.path = src
        arch = fields.get("general.architecture")
        if arch not in ("llama", "qwen2", "gpt2"):
            raise ValueError(f"{src}: its architecture is {arch!r}; known are llama, qwen2 and gpt2")
        config = _config(reader, fields, arch)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for t in reader.tensors:
                if t.name != "rope_freqs.weight":
                    yield from _ours(t.name, _unpacked(src, t).to(dtype), config, arch)

        save_checkpoint(out_dir, config, tensors(), _gguf_tokenizer(fields))


class _Reader(GGUFReader):
    """Believes no length, and reads a list in one go: a piece of its own for each item takes 12 us and 700 bytes."""

    n_pieces = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends before what its header says is there")
        self.n_pieces += 1
        if self.n_pieces > 100_000:
            raise ValueError("it has more fields, tensors and lists in lists than any network")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple:
        if raw_type == GGUFValueType.ARRAY:
            kind, n = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            types = [GGUFValueType.ARRAY, GGUFValueType(int(kind[0]))]
            if types[1] in self.gguf_scalar_to_np:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[types[1]], n[0])
                return 12 + values.nbytes, [kind, n, values], [2], types
            if types[1] == GGUFValueType.STRING:
                content, at, texts = memoryview(self.data), orig_offs + 12, []
                for _ in range(int(n[0])):
                    end = at + 8 + int.from_bytes(content[at : at + 8], "little" if self.byte_order == "I" else "big")
                    if end > len(content):
                        raise ValueError("it ends before what its header says is there")
                    texts.append(content[at + 8 : end])
                    at = end
                return at - orig_offs, [kind, n, *texts], list(range(2, len(texts) + 2)), types
        return super()._get_field_parts(orig_offs, raw_type)


def _config(reader: GGUFReader, fields: "_Fields", arch: str) -> Config:
    src = fields.path
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{src} has no tensor token_embd.weight")
    n_head = fields[f"{arch}.attention.head_count"]
    sizes = dict(
        vocab_size=shapes["token_embd.weight"][0],
        block_size=fields[f"{arch}.context_length"],
        n_layer=fields[f"{arch}.block_count"],
        n_head=n_head,
        n_embd=fields[f"{arch}.embedding_length"],
        n_hidden=fields[f"{arch}.feed_forward_length"],
        tie="output.weight" not in shapes,
    )
    if arch == "gpt2":
        return Config(arch="gpt2", norm_eps=_float(fields[f"{arch}.attention.layer_norm_epsilon"]), **sizes)
    factors = (fields.get(f"{arch}.rope.{name}", 0.0) for name in ("scaling.factor", "scale_linear"))
    scaling = fields.get(f"{arch}.rope.scaling.type", "linear" if {*factors} - {0.0, 1.0} else "none")
    if scaling != "none":
        raise ValueError(f"{src}: rope scaling of type {scaling!r} is not supported")
    config = Config(
        n_kv_head=fields.get(f"{arch}.attention.head_count_kv", n_head),
        head_size=fields.get(f"{arch}.attention.key_length"),
        rope_base=fields.get(f"{arch}.rope.freq_base", 10000.0),
        norm_eps=_float(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
        qkv_bias=arch == "qwen2",
        **sizes,
    )
    if slower := [t for t in reader.tensors if t.name == "rope_freqs.weight"]:
        config.rope_scaling = _rope_scaling(src, config, torch.tensor(np.array(slower[0].data, np.float64)))
    return config


def _float(stored: float) -> float:
    """Written as float32: 9.99999974e-06 was 1e-5."""
    return round(stored, 12)


def _rope_scaling(src: Path, config: Config, slower: Tensor) -> Any:
    """LLaMA 3.1's and 3.2's scaling, of which the file has only what it makes of each frequency."""
    plain = rope_frequencies(config)
    for factor in (8.0, 32.0):
        scaled = Config(
            head_size=config.head_size, rope_base=config.rope_base,
            rope_scaling=dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=8192),
        )  # fmt: skip
        if torch.allclose(plain / rope_frequencies(scaled), slower, rtol=1e-3):
            return scaled.rope_scaling
    raise ValueError(f"{src}: rope_freqs.weight is not the rope scaling of LLaMA 3.1 or 3.2")


def _unpacked(src: Path, t: Any) -> Tensor:
    try:
        return torch.tensor(dequantize(t.data, t.tensor_type)).view(tuple(int(n) for n in reversed(t.shape)))
    except NotImplementedError:
        raise ValueError(f"{src}: {t.name} is of the type {t.tensor_type.name}, which gguf cannot unpack") from None


def _ours(name: str, t: Tensor, config: Config, arch: str) -> Iterator[tuple[str, Tensor]]:
    """Under our names, in our order of rows."""
    if ".attn_qkv." in name:  # of gpt2, one below the other
        _, layer, _, kind = name.split(".")
        yield from ((f"blocks.{layer}.attn.{p}_proj.{kind}", part) for p, part in zip("qkv", t.chunk(3), strict=True))
        return
    if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        t = half_split(t, config.head_size)
    yield renamed(name, _GGUF_NAMES), t


class _Fields(dict):
    """Fields of a GGUF file; one that is missing is an error that names file and field."""

    path: Path

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.path} has no field {name}")


def half_split(weight: Tensor, head_size: int) -> Tensor:
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
    adds_bos = kind == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"  # as llama.cpp has it
    stated = {
        "bos_token": None if bos is None else tokens[bos],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", adds_bos),
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    return files | {"tokenizer_config.json": (json.dumps(stated, indent=2) + "\n").encode()}


def _words(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    """The split of GPT-4 and its heirs, for runs of so many digits."""
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
}


def _byte_level_bpe(fields: _Fields) -> Tokenizer:
    old = fields.get("general.architecture") == "gpt2"  # its files were made before there was this field
    rule = fields.get("tokenizer.ggml.pre", "gpt-2" if old else None)  # how text is split before pairs merge
    if rule not in _SPLITS:
        raise ValueError(f"{fields.path}: it splits words by the rule {rule!r}; known are {', '.join(_SPLITS)}")
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocabulary, pairs = {t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]
    whole_first = rule == "llama-bpe"  # LLaMA 3 takes a word that is a token as it is
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole_first))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[rule])
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
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
