"""The families: how config.json and the tensors of a Hugging Face folder become ours, and back.

One table a family, read in both directions: fields (Config's <-> config.json's), names (our modules <-> theirs), and
which tensors are fused or transposed. Below it the shapes of published networks; parameter counts are tested.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lit_model.model import Config


class Source(NamedTuple):
    """Where one of our tensors lies in a Hugging Face folder."""

    name: str  # without the family's prefix
    part: int | None = None  # 0, 1, 2 for q, k, v in GPT-2's c_attn; None: not fused
    transposed: bool = False  # stored as (n_in, n_out)


@dataclass(frozen=True)
class Family:
    architecture: str  # transformers' class
    fields: dict[str, str]  # field of Config -> field of config.json
    names: dict[str, str]  # our module -> theirs, without prefix and layer
    layers: str = "layers"
    prefix: str = "model."
    defaults: dict[str, Any] = field(default_factory=dict)  # where config.json is silent: its field -> value
    fixed: dict[str, Any] = field(default_factory=dict)  # what its networks always have: field of Config -> value
    only: dict[str, tuple] = field(default_factory=dict)  # field of config.json -> values supported; null always is
    fused: tuple[str, ...] = ()  # our modules whose tensors are one tensor of theirs, in order
    transposed: tuple[str, ...] = ()  # their modules with weights (n_in, n_out)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # ends of tensors without parameters

    def source(self, name: str) -> Source:
        """Where our tensor `name` lies."""
        layer, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        theirs = self.names[module]
        part = self.fused.index(module) if module in self.fused else None
        full_name = f"{self.layers}.{layer}.{theirs}.{kind}" if layer else f"{theirs}.{kind}"
        return Source(full_name, part, kind == "weight" and theirs in self.transposed)

    def full_name(self, source: Source) -> str:
        """The name with the prefix under which transformers stores it."""
        return source.name if source.name.startswith("lm_head.") else self.prefix + source.name


_LLAMA_NAMES = {
    "wte": "embed_tokens",
    "norm_f": "norm",
    "lm_head": "lm_head",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    **{f"attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"attn.{p}_norm": f"self_attn.{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
_LLAMA_FIELDS = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size", n_hidden="intermediate_size",
    head_size="head_dim", norm_eps="rms_norm_eps", tie="tie_word_embeddings",
)  # fmt: skip
_OPTIONAL = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "rope_theta": 10000.0}


def _llama_like(architecture: str, only: dict[str, tuple], more: dict[str, Any] | None = None, **fixed: Any) -> Family:
    only = dict(hidden_act=("silu", "swish")) | only
    return Family(architecture, _LLAMA_FIELDS, _LLAMA_NAMES, defaults=_OPTIONAL | (more or {}), fixed=fixed, only=only)


FAMILIES = {  # model_type -> family
    "llama": _llama_like("LlamaForCausalLM", {}, dict(attention_bias=False, mlp_bias=False)),
    "mistral": _llama_like("MistralForCausalLM", {}, dict(sliding_window=4096)),
    "qwen2": _llama_like("Qwen2ForCausalLM", dict(use_sliding_window=(False,)), qkv_bias=True),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM", dict(attention_bias=(False,), use_sliding_window=(False,)), qk_norm=True
    ),
    "smollm3": _llama_like(
        "SmolLM3ForCausalLM",
        dict(use_sliding_window=(False,)),
        dict(attention_bias=False, mlp_bias=False, tie_word_embeddings=True, rope_theta=2e6, no_rope_layer_interval=4),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        fields=dict(
            vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
            n_hidden="n_inner", norm_eps="layer_norm_epsilon", tie="tie_word_embeddings",
        ),
        names={
            "wte": "wte", "wpe": "wpe", "norm_f": "ln_f", "lm_head": "lm_head", "norm_1": "ln_1", "norm_2": "ln_2",
            "attn.q_proj": "attn.c_attn", "attn.k_proj": "attn.c_attn", "attn.v_proj": "attn.c_attn",
            "attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
        },
        layers="h",
        prefix="transformer.",
        defaults=dict(tie_word_embeddings=True, n_inner=None),
        fixed=dict(arch="gpt2"),
        only=dict(
            activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
        ),
        fused=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks
    ),
}  # fmt: skip


def read_config(hf: dict[str, Any]) -> tuple[Family, Config]:
    """The family and the shape that a config.json of transformers 4 or 5 states. Raises ValueError, with the name of
    the field, for what is not supported."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}; known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    only = family.only | dict(quantization_config=())
    odd = [name for name, values in only.items() if hf.get(name) is not None and hf[name] not in values]
    if odd:
        raise ValueError(f"{odd[0]} is {hf[odd[0]]!r:.80}, which is not supported")
    stated = family.defaults | hf
    if missing := [theirs for theirs in family.fields.values() if theirs not in stated]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values = {ours: stated[theirs] for ours, theirs in family.fields.items()}
    values |= family.fixed
    if "rope_theta" in family.defaults:
        values |= _read_rope(stated)
    if "attention_bias" in family.defaults:
        if stated["attention_bias"] != stated["mlp_bias"]:
            raise ValueError(f"attention_bias is {stated['attention_bias']} and mlp_bias is not: that is not supported")
        values["bias"] = stated["mlp_bias"]
    if "sliding_window" in family.defaults:
        values["window"] = stated["sliding_window"]
    if "no_rope_layer_interval" in family.defaults:
        values["no_rope_every"] = _read_no_rope(stated)
    return family, Config(**values)


def write_config(config: Config, like: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """A config.json that states this shape: that of the family of `like`, or else of the first family that can; None if
    there is none."""
    like = like or {}
    order = sorted(FAMILIES, key=lambda kind: kind != like.get("model_type"))
    for kind in order:
        family = FAMILIES[kind]
        hf = {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
        if "rope_theta" in family.defaults:
            hf |= dict(hidden_act="silu", rope_theta=config.rope_base, rope_scaling=_write_rope(config))
        else:
            hf |= dict(activation_function="gelu_new", n_ctx=config.block_size)
        if "attention_bias" in family.defaults:
            hf |= dict(attention_bias=config.bias, mlp_bias=config.bias)
        if "sliding_window" in family.defaults:
            hf["sliding_window"] = config.window
        if "no_rope_layer_interval" in family.defaults:
            every = config.no_rope_every
            hf["no_rope_layers"] = [int(not every or (i + 1) % every > 0) for i in range(config.n_layer)]
        hf |= {name: like.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if kind == like.get("model_type"):  # what it says beside the shape, and how it says rope, stays
            hf = like | {name: value for name, value in hf.items() if not name.startswith("rope_")}
        hf |= dict(architectures=[family.architecture], model_type=kind)
        if read_config(hf)[1] == config:
            return hf
    return None


def _read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5; 4
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"rope scaling of type {kind!r} or partial rotary positions are not supported")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("its rope parameters are not one set for all layers, which is not supported")
    base = dict(rope_base=rope.get("rope_theta") or hf["rope_theta"])
    if kind == "default":
        return base
    return base | dict(rope_scaling={ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()})


def _write_rope(config: Config) -> dict[str, Any] | None:
    if (scaling := config.rope_scaling) is None:
        return None
    return dict(rope_type="llama3") | {theirs: getattr(scaling, ours) for ours, theirs in _ROPE_SCALING.items()}


_ROPE_SCALING = dict(
    factor="factor", low_freq_factor="low_freq_factor", high_freq_factor="high_freq_factor",
    original_block_size="original_max_position_embeddings",
)  # fmt: skip


def _read_no_rope(hf: dict[str, Any]) -> int | None:
    n = hf["num_hidden_layers"]
    has_rope = [bool(x) for x in hf.get("no_rope_layers") or []]  # 1: this layer has rope, in spite of the name
    if not has_rope:
        return hf["no_rope_layer_interval"]
    every = has_rope.index(False) + 1 if False in has_rope else None
    if has_rope != [every is None or (i + 1) % every > 0 for i in range(n)]:
        raise ValueError(f"no_rope_layers is {hf['no_rope_layers']}: not every n-th layer is without rope")
    return every


# --------------------------------------------------------------------------------------------- published networks


_GPT2 = dict(arch="gpt2", vocab_size=50257, block_size=1024, tie=True)
_LLAMA_2 = dict(block_size=4096)
_LLAMA_3 = dict(vocab_size=128256, block_size=8192, n_kv_head=8, rope_base=500000.0)
_SCALING = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_block_size=8192)
_LLAMA_31 = _LLAMA_3 | dict(block_size=131072, rope_scaling=_SCALING | dict(factor=8.0))
_LLAMA_32 = _LLAMA_3 | dict(block_size=131072, rope_scaling=_SCALING | dict(factor=32.0), tie=True)
_SMOLLM2 = dict(vocab_size=49152, block_size=8192, tie=True)
_MISTRAL = dict(block_size=32768, n_kv_head=8)
_QWEN2 = dict(vocab_size=151936, block_size=32768, n_kv_head=2, rope_base=1e6, norm_eps=1e-6, qkv_bias=True)
_QWEN3 = dict(
    vocab_size=151936, block_size=40960, n_kv_head=8, head_size=128, rope_base=1e6, norm_eps=1e-6, qk_norm=True,
)  # fmt: skip


def _preset(
    base: dict[str, Any], n_layer: int, n_head: int, n_embd: int, n_hidden: int | None = None, **more: Any
) -> dict[str, Any]:
    return base | dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_hidden=n_hidden) | more


PRESETS = {
    "gpt2": _preset(_GPT2, 12, 12, 768),
    "gpt2-medium": _preset(_GPT2, 24, 16, 1024),
    "gpt2-large": _preset(_GPT2, 36, 20, 1280),
    "gpt2-xl": _preset(_GPT2, 48, 25, 1600),
    "llama-7b": _preset({}, 32, 32, 4096, norm_eps=1e-6),
    "llama-13b": _preset({}, 40, 40, 5120, norm_eps=1e-6),
    "llama-30b": _preset({}, 60, 52, 6656, norm_eps=1e-6),
    "llama-65b": _preset({}, 80, 64, 8192, norm_eps=1e-5),
    "llama-2-7b": _preset(_LLAMA_2, 32, 32, 4096),
    "llama-2-13b": _preset(_LLAMA_2, 40, 40, 5120),
    "llama-2-70b": _preset(_LLAMA_2, 80, 64, 8192, 28672, n_kv_head=8),
    "llama-3-8b": _preset(_LLAMA_3, 32, 32, 4096, 14336),
    "llama-3-70b": _preset(_LLAMA_3, 80, 64, 8192, 28672),
    "llama-3.1-8b": _preset(_LLAMA_31, 32, 32, 4096, 14336),
    "llama-3.1-70b": _preset(_LLAMA_31, 80, 64, 8192, 28672),
    "llama-3.2-1b": _preset(_LLAMA_32, 16, 32, 2048, 8192),
    "llama-3.2-3b": _preset(_LLAMA_32, 28, 24, 3072, 8192),
    "tinyllama-1.1b": _preset({}, 22, 32, 2048, 5632, n_kv_head=4),
    "smollm2-135m": _preset(_SMOLLM2, 30, 9, 576, 1536, n_kv_head=3, rope_base=100000.0),
    "smollm2-360m": _preset(_SMOLLM2, 32, 15, 960, 2560, n_kv_head=5, rope_base=100000.0),
    "smollm2-1.7b": _preset(_SMOLLM2, 24, 32, 2048, 8192, rope_base=130000.0),
    "smollm3-3b": _preset(
        {}, 36, 16, 2048, 11008, vocab_size=128256, block_size=65536, n_kv_head=4, rope_base=5e6, norm_eps=1e-6,
        tie=True, no_rope_every=4,
    ),
    "mistral-7b-v0.1": _preset(_MISTRAL, 32, 32, 4096, 14336, window=4096),
    "mistral-7b-v0.3": _preset(_MISTRAL, 32, 32, 4096, 14336, vocab_size=32768, rope_base=1e6),
    "qwen2.5-0.5b": _preset(_QWEN2, 24, 14, 896, 4864, tie=True),
    "qwen2.5-1.5b": _preset(_QWEN2, 28, 12, 1536, 8960, tie=True),
    "qwen2.5-3b": _preset(_QWEN2, 36, 16, 2048, 11008, tie=True),
    "qwen2.5-7b": _preset(_QWEN2, 28, 28, 3584, 18944, n_kv_head=4, vocab_size=152064),
    "qwen3-0.6b": _preset(_QWEN3, 28, 16, 1024, 3072, tie=True),
    "qwen3-1.7b": _preset(_QWEN3, 28, 16, 2048, 6144, tie=True),
    "qwen3-4b": _preset(_QWEN3, 36, 32, 2560, 9728, tie=True),
    "qwen3-8b": _preset(_QWEN3, 36, 32, 4096, 12288),
    "qwen3-14b": _preset(_QWEN3, 40, 40, 5120, 17408),
    "qwen3-32b": _preset(_QWEN3, 64, 64, 5120, 25600),
}  # fmt: skip
