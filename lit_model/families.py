"""The families: how config.json and the tensors of a Hugging Face folder become ours, and back.

One table a family, read in both directions: fields (Config's <-> config.json's), names (our modules <-> theirs), and
which tensors are fused, transposed or one for each expert. A field means the same in every family that has it. The
shapes of published networks stand in presets.json, as their config.json states them; parameter counts are tested.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_model.config import Config, Experts, Layer
from lit_model.rope import LinearScaling, Llama3Scaling, LongScaling, Rope, YarnScaling


@dataclass
class Family:
    architecture: str  # transformers' class
    fields: dict[str, str]  # field of Config -> field of config.json
    names: dict[str, str]  # our module -> theirs, without prefix and layer; {}: one tensor for each expert
    layers: str = "layers"
    prefix: str = "model."
    defaults: dict[str, Any] = field(default_factory=dict)  # where config.json is silent: its field -> value
    fixed: dict[str, Any] = field(default_factory=dict)  # what its networks always have: field of Config -> value
    only: dict[str, tuple] = field(default_factory=dict)  # field of config.json -> values supported; null always is
    transposed: tuple[str, ...] = ()  # their modules with weights (n_in, n_out)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # ends of tensors without parameters

    @cached_property
    def known(self) -> set[str]:
        """The fields of config.json that are understood."""
        more = {"rope_scaling", "rope_parameters"} if "rope_theta" in self.defaults else set()
        more |= {"num_experts", "num_local_experts"} if "num_experts_per_tok" in self.defaults else set()
        return {*self.fields.values(), *self.defaults, *self.only} | more

    def stored(self, name: str) -> str:
        """Name of the tensor that holds our tensor `name`, without the prefix."""
        layer, module, kind = _parts(name)
        return f"{self.layers}.{layer}.{self.names[module]}.{kind}" if layer else f"{self.names[module]}.{kind}"

    def fused(self, name: str) -> list[str]:
        """Our tensors that lie in the same tensor as `name`, one below the other."""
        layer, module, kind = _parts(name)
        modules = [m for m, theirs in self.names.items() if theirs == self.names[module]]
        return [f"blocks.{layer}.{m}.{kind}" for m in modules] if len(modules) > 1 else [name]

    def is_transposed(self, name: str) -> bool:
        _, module, kind = _parts(name)
        return kind == "weight" and self.names[module] in self.transposed

    def full_name(self, stored: str) -> str:
        """The name with the prefix under which transformers stores it."""
        return stored if stored.startswith("lm_head.") else self.prefix + stored


def _parts(name: str) -> tuple[str | None, str, str]:
    """(layer, module, kind) of a tensor of ours."""
    return re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()


_LLAMA_NAMES = {
    "wte": "embed_tokens", "norm_f": "norm", "lm_head": "lm_head",
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "mlp.router": "mlp.gate",
    **{f"attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"attn.{p}_norm": f"self_attn.{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
    **{f"mlp.experts.{p}_proj": f"mlp.experts.{{}}.{p}_proj" for p in ("gate", "up", "down")},
}  # fmt: skip
_FOUR_NORMS = {
    "norm_2": "pre_feedforward_layernorm", "post_norm_1": "post_attention_layernorm",
    "post_norm_2": "post_feedforward_layernorm",
}  # fmt: skip
_NORMS_AFTER = _FOUR_NORMS | {"norm_1": "", "norm_2": ""}  # there are none
_MIXTRAL = {"mlp.router": "block_sparse_moe.gate"} | {
    f"mlp.experts.{p}_proj": f"block_sparse_moe.experts.{{}}.w{i}" for i, p in enumerate(("gate", "down", "up"), 1)
}
_FUSED = {f"attn.{p}_proj": "self_attn.qkv_proj" for p in "qkv"} | {
    f"mlp.{p}_proj": "mlp.gate_up_proj" for p in ("gate", "up")
}
_LLAMA_FIELDS = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", n_embd="hidden_size", n_hidden="intermediate_size",
    head_size="head_dim", norm_eps="rms_norm_eps", tie="tie_word_embeddings",
)  # fmt: skip
_MULTIPLIERS = dict(
    embedding_scale="embedding_multiplier", residual_scale="residual_multiplier", attn_scale="attention_multiplier",
    logit_divisor="logits_scaling",
)  # fmt: skip
_CAPS = dict(attn_softcap="attn_logit_softcapping", logit_softcap="final_logit_softcapping")


def _llama_like(
    architecture: str, only: Mapping[str, tuple], defaults: Mapping[str, Any], names: Mapping[str, str] = {},
    more_fields: Mapping[str, str] = {}, **fixed: Any,
) -> Family:  # fmt: skip
    stated = dict(num_key_value_heads=None, head_dim=None, tie_word_embeddings=False, rope_theta=10000.0) | defaults
    only, names = dict(hidden_act=("silu", "swish")) | only, _LLAMA_NAMES | names
    return Family(architecture, _LLAMA_FIELDS | more_fields, names, "layers", "model.", stated, fixed, only)


_BIAS, _NO_BIAS = dict(attention_bias=False, mlp_bias=False), dict(attention_bias=(False,))
_QWEN_WINDOW = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None)
_NO_WINDOW = dict(use_sliding_window=(False,))
_GELU = dict.fromkeys(("hidden_act", "hidden_activation"), ("gelu_pytorch_tanh",)) | _NO_BIAS
_GEMMA = dict(norm_place="both", norm_plus_one=True, activation="gelu")
_GEMMA_SAYS = dict(  # what a config.json that says nothing means
    hidden_size=2304, num_hidden_layers=26, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256, rms_norm_eps=1e-6, query_pre_attn_scalar=256, sliding_window=4096, layer_types=None,
    tie_word_embeddings=True,
)  # fmt: skip

FAMILIES = {  # model_type -> family
    "llama": _llama_like("LlamaForCausalLM", dict(activation=("swiglu",)), _BIAS),
    "mistral": _llama_like("MistralForCausalLM", {}, dict(sliding_window=4096)),
    "ministral3": _llama_like("Ministral3ForCausalLM", {}, dict(sliding_window=None, llama_4_scaling_beta=None)),
    "qwen2": _llama_like("Qwen2ForCausalLM", dict(use_mrope=(False,)), _QWEN_WINDOW, qkv_bias=True),
    "qwen3": _llama_like("Qwen3ForCausalLM", _NO_BIAS, _QWEN_WINDOW, qk_norm="head"),
    "smollm3": _llama_like("SmolLM3ForCausalLM", _NO_WINDOW, _BIAS | dict(
        tie_word_embeddings=True, rope_theta=2e6, no_rope_layer_interval=4, no_rope_layers=None, layer_types=None,
    )),
    "seed_oss": _llama_like("SeedOssForCausalLM", {}, _BIAS | dict(attention_bias=True, attention_out_bias=False)),
    "granite": _llama_like(
        "GraniteForCausalLM", {}, _BIAS | dict.fromkeys(_MULTIPLIERS.values(), 1.0), {}, _MULTIPLIERS,
    ),
    "olmo2": _llama_like("Olmo2ForCausalLM", _NO_BIAS, {}, _NORMS_AFTER, norm_place="after", qk_norm="all"),
    "olmo3": _llama_like("Olmo3ForCausalLM", _NO_BIAS, dict(
        rope_theta=5e5, rope_local_base_freq=None, sliding_window=4096, sliding_window_pattern=4, layer_types=None,
    ), _NORMS_AFTER, norm_place="after", qk_norm="all"),
    "gemma2": _llama_like("Gemma2ForCausalLM", _GELU, _GEMMA_SAYS | dict(
        max_position_embeddings=8192, sliding_window_pattern=2, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ), _FOUR_NORMS, _CAPS, **_GEMMA),
    "gemma3_text": _llama_like(
        "Gemma3ForCausalLM", _GELU | dict(use_bidirectional_attention=(False,)), _GEMMA_SAYS | dict(
            vocab_size=262208, max_position_embeddings=131072, sliding_window_pattern=6, rope_theta=1e6,
            rope_local_base_freq=1e4, attn_logit_softcapping=None, final_logit_softcapping=None,
        ), _FOUR_NORMS, _CAPS, qk_norm="head", **_GEMMA,
    ),
    "phi3": _llama_like("Phi3ForCausalLM", _NO_BIAS, dict(
        sliding_window=None, partial_rotary_factor=1.0, original_max_position_embeddings=4096,
    ), _FUSED),
    "qwen3_moe": _llama_like("Qwen3MoeForCausalLM", _NO_BIAS | _NO_WINDOW, dict(
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False, decoder_sparse_step=1,
        mlp_only_layers=None, sliding_window=None, max_window_layers=None,
    ), qk_norm="head"),
    "olmoe": _llama_like("OlmoeForCausalLM", _NO_BIAS | dict(clip_qkv=()), dict(
        num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
    ), qk_norm="all"),
    "mixtral": _llama_like("MixtralForCausalLM", {}, dict(
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None, rope_theta=1e6,
    ), _MIXTRAL),
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
            scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
        ),
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ignored=(".attn.bias", ".attn.masked_bias"),  # causal masks
    ),
}  # fmt: skip

_NO_MATTER = re.compile(  # fields of config.json that do not change what an untrained forward pass gives
    r"_.*|architectures|model_type|auto_map|transformers.*|(torch_)?dtype|.*_token_id|.*_token_index|use_cache"
    r"|initializer_range|.*_?dropout|.*_pdrop|pretraining_tp|output_.*|(use_)?return_dict.*|id2label|label2id"
    r"|problem_type|chunk_size_feed_forward|is_encoder_decoder|task_specific_params|summary_.*|n_ctx|torchscript"
    r"|gradient_checkpointing|reorder_and_upcast_attn|router_(aux_loss_coef|jitter_noise)|unsloth_.*|use_bfloat16"
    r"|temperature|top_[kp]|do_sample|max_length|tokenizer_class|finetuning_task|cache_implementation|num_labels"
)


def read_config(hf: dict[str, Any]) -> tuple[Family, Config]:
    """The family and the shape that a config.json of transformers 4 or 5 states. Raises ValueError, with the name of
    the field, for what is not supported."""
    family, values = read_fields(hf)
    return family, Config(**values)


def read_fields(hf: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family, and what config.json states as fields of Config."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}; known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    for name, value in hf.items():
        fits = name in family.known and value in family.only.get(name, (value,))
        if value is not None and not fits and not _NO_MATTER.fullmatch(name):
            raise ValueError(f"{name} is {value!r:.80}, which is not supported")
    stated = family.defaults | hf
    if missing := [theirs for theirs in family.fields.values() if theirs not in stated]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values = {ours: stated[theirs] for ours, theirs in family.fields.items()} | family.fixed
    if "rope_theta" in family.defaults:
        values["layers"] = _read_layers(stated, family)
    if "mlp_bias" in family.defaults:
        values |= dict(qkv_bias=stated["attention_bias"], bias=stated["mlp_bias"])
        if stated.get("attention_out_bias", stated["attention_bias"]) != stated["mlp_bias"]:
            raise ValueError(f"attention_bias is {stated['attention_bias']} and mlp_bias is not: that is not supported")
    if "query_pre_attn_scalar" in family.defaults:
        values |= dict(attn_scale=stated["query_pre_attn_scalar"] ** -0.5, embedding_scale=stated["hidden_size"] ** 0.5)
    return family, values


def write_config(config: Config, like: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """A config.json that states this shape. What stands there of layers, and beside the shape, is what `like` says.

    It is of the family of `like`, or else of LLaMA; without `like`, of the first family that can. None if none can.
    """
    for kind in dict.fromkeys((like["model_type"], "llama")) if like else FAMILIES:
        family = FAMILIES[kind]
        hf = {name: value for name, value in (like or {}).items() if name in family.known or _NO_MATTER.fullmatch(name)}
        hf |= {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
        biases = dict(attention_bias=config.qkv_bias, attention_out_bias=config.bias, mlp_bias=config.bias)
        hf |= {name: bias for name, bias in biases.items() if name in family.defaults}
        hf = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | hf  # transformers' own may not fit
        hf |= dict(architectures=[family.architecture], model_type=kind)
        try:
            if read_config(hf)[1] == config:
                return hf
        except ValueError:  # it cannot say this
            continue
    return None


# -------------------------------------------------------------------------------------------------------------- layers


def _read_layers(hf: dict[str, Any], family: Family) -> tuple[Layer, ...]:
    n, types = min(hf["num_hidden_layers"], 2**16), hf.get("layer_types")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    every, first = hf.get("sliding_window_pattern"), hf.get("max_window_layers") or 0
    if types is None:
        types = ["full_attention" if (every and (i + 1) % every == 0) or i < first else "sliding_attention"
                 for i in range(n)]  # fmt: skip
    if len(types) != n or {*types} - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types is {types!r:.80}, which is not supported")
    ropes = _read_ropes(hf, family)
    has_rope = hf.get("no_rope_layers") or []  # 1: this layer has rope, in spite of the name
    if not has_rope and (interval := hf.get("no_rope_layer_interval")):
        has_rope = [(i + 1) % interval > 0 for i in range(n)]
    experts, step = None, hf.get("decoder_sparse_step") or 1
    if "num_experts_per_tok" in hf:
        n_experts = hf.get("num_local_experts") or hf["num_experts"]
        n_hidden = hf.get("moe_intermediate_size") or hf["intermediate_size"]
        experts = Experts(n_experts, hf["num_experts_per_tok"], n_hidden, hf.get("norm_topk_prob", True))
    return tuple(
        Layer(
            window=window if kind == "sliding_attention" else None,
            rope=ropes[kind] if not has_rope or has_rope[i] else None,
            experts=None if (i + 1) % step or i in (hf.get("mlp_only_layers") or ()) else experts,
        )
        for i, kind in enumerate(types)
    )


_SCALINGS = dict(linear=LinearScaling, llama3=Llama3Scaling, yarn=YarnScaling, longrope=LongScaling)
_ROPE_FIELDS = {f.name for kind in _SCALINGS.values() for f in fields(kind)}
_ROPE_FIELDS -= {"llama_4_scaling_beta"}  # of one family only
_ROPE_FIELDS |= {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim", "max_position_embeddings",
}  # fmt: skip


def _read_ropes(hf: dict[str, Any], family: Family) -> dict[str, Rope]:
    """Type of layer -> its rotary positions."""
    stated = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5; 4
    if not isinstance(stated, dict):
        raise ValueError(f"rope scaling is {stated!r:.80}, which is not supported")
    full = local = stated
    if "rope_local_base_freq" in family.defaults:  # only full layers are scaled
        full = stated.get("full_attention", stated)
        local_base = hf["rope_local_base_freq"] or full.get("rope_theta") or hf["rope_theta"]
        local = stated.get("sliding_attention", dict(rope_theta=local_base))
    return dict(full_attention=_read_rope(full, hf, family), sliding_attention=_read_rope(local, hf, family))


def _read_rope(rope: dict[str, Any], hf: dict[str, Any], family: Family) -> Rope:
    kind = "longrope" if "short_factor" in rope else rope.get("rope_type", rope.get("type", "default"))
    share = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    known = _ROPE_FIELDS | family.defaults.keys()
    if odd := [name for name in rope if name not in known and rope[name] is not None]:
        raise ValueError(f"{odd[0]} of its rope parameters is {rope[odd[0]]!r:.80}, which is not supported")
    is_odd_share = share != 1 and "partial_rotary_factor" not in family.defaults
    if is_odd_share or kind not in (*_SCALINGS, "default", "dynamic"):
        raise ValueError(f"rope scaling of type {kind!r}, of {share} of a head's numbers, is not supported")
    base = rope.get("rope_theta") or hf["rope_theta"]
    if kind in ("default", "dynamic"):  # the latter changes only what is longer than block_size, which we refuse
        return Rope(base, share)
    context = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    stated = dict(original_max_position_embeddings=context or hf["max_position_embeddings"])
    if kind in ("yarn", "longrope"):
        stated["attention_factor"] = _attention_factor(kind, rope, hf["max_position_embeddings"], *stated.values())
    stated = {name: tuple(v) if isinstance(v, list) else v for name, v in (rope | stated).items() if v is not None}
    names = {f.name for f in fields(_SCALINGS[kind])} & stated.keys()
    return Rope(base, share, _SCALINGS[kind](**{name: stated[name] for name in names}))


def _attention_factor(kind: str, rope: dict[str, Any], context: int, original: int) -> float:
    """What cosines and sines are multiplied by, where it is not stated (YaRN's equation 22, LongRoPE's section 3)."""
    factor = rope.get("factor") or context / original
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    wide, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if wide and all_dim:
        return (0.1 * wide * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


# --------------------------------------------------------------------------------------------- published networks


PRESETS: dict[str, dict[str, Any]] = {}  # name -> what its config.json says of the shape
for _name, _stated in json.loads(Path(__file__).with_name("presets.json").read_text()).items():
    PRESETS[_name] = PRESETS.get(_stated.pop("like", ""), {}) | _stated
