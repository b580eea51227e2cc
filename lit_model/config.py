"""The shape of a network. What its layers have in common stands in `Config`, what one has of its own in `Layer`."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from lit_model.files import validate_fields
from lit_model.rope import LongScaling, Rope


@dataclass(frozen=True)
class Experts:
    """A layer whose MLP is one of many for each token (moe.py)."""

    n: int
    n_active: int  # that a token goes through
    n_hidden: int  # width of each
    normalize: bool = True  # the weights of those that a token goes through add up to 1


@dataclass(frozen=True)
class Layer:
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all
    rope: Rope | None = Rope()  # None: no rotary positions
    experts: Experts | None = None  # None: one MLP for all tokens

    def __post_init__(self):
        validate_fields(self)
        if self.experts is not None:
            validate_fields(self.experts)


@dataclass
class Config:
    """The shape of a network. `None` means: derived from the other fields."""

    arch: Literal["llama", "gpt2"] = "llama"  # gpt2: LayerNorm, learned positions, an MLP without a gate
    vocab_size: int = 32000
    block_size: int = 2048  # longest context in tokens, virtual ones included
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None  # None: n_head, which is multi-head attention; fewer: grouped-query attention
    n_embd: int = 4096
    n_hidden: int | None = None  # width of the MLP; None: the family's rule
    head_size: int | None = None  # None: n_embd / n_head
    layers: tuple = (Layer(),)  # from the first one on, repeated or cut to n_layer
    norm_eps: float = 1e-5
    norm_place: Literal["before", "after", "both"] = "before"  # of attention and of the MLP
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight (Gemma)
    qk_norm: Literal["none", "head", "all"] = "none"  # RMSNorm of each head of q and k, or of all heads together
    activation: Literal["silu", "gelu"] = "silu"  # of LLaMA's MLP; gelu is its tanh approximation
    attn_scale: float | None = None  # of the scores before the softmax; None: 1 / sqrt(head_size)
    attn_softcap: float | None = None  # scores stay between this and its negative; None: anywhere
    logit_softcap: float | None = None  # so do logits
    logit_divisor: float = 1.0  # of the output layer
    embedding_scale: float = 1.0  # what the embeddings of tokens are multiplied by
    residual_scale: float = 1.0  # what attention and MLP are multiplied by before they are added
    bias: bool | None = None  # biases in the linear layers of a block; None: the family's rule
    qkv_bias: bool | None = None  # biases of q, k and v (Qwen 2); None: as `bias`
    head_bias: bool = False
    tie: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        self.layers = tuple(self.layers)
        validate_fields(self)
        self.layers = tuple(self.layers[i % len(self.layers)] for i in range(min(self.n_layer, 2**16)))
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_size is None:
            self.head_size = self.n_embd // self.n_head
        if self.attn_scale is None:
            self.attn_scale = max(self.head_size, 1) ** -0.5
        if self.n_hidden is None:  # LLaMA: two thirds of 4C, rounded up to a multiple of 256
            self.n_hidden = 4 * self.n_embd if self.arch == "gpt2" else 256 * math.ceil(8 * self.n_embd / 3 / 256)
        if self.bias is None:
            self.bias = self.arch == "gpt2"
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        turned = {int(self.head_size * rope.share) for rope in self.ropes}  # in pairs
        if self.head_size < 1 or any(n % 2 for n in turned) or self.n_head % self.n_kv_head:
            heads = f"head_size is {self.head_size}, n_head {self.n_head}, n_kv_head {self.n_kv_head}"
            raise ValueError(f"{heads}: head_size must be even, and n_head a multiple of n_kv_head")

    @property
    def ropes(self) -> set[Rope]:
        """The kinds of rotary positions that its layers have."""
        return {layer.rope for layer in self.layers if layer.rope is not None} if self.arch == "llama" else set()

    @property
    def windows(self) -> set[int | None]:
        """The windows that its layers have."""
        return {layer.window for layer in self.layers}

    @property
    def short_context(self) -> int | None:
        """Length beyond which the positions of an example turn in another way (LongRoPE): of all of a row, or none."""
        lengths = (r.scaling.original_max_position_embeddings for r in self.ropes if isinstance(r.scaling, LongScaling))
        return next(lengths, None)

    def check_tokens(self, highest: int) -> None:
        """Raises ValueError if the network has no row for this token id."""
        if highest >= self.vocab_size:
            raise ValueError(f"the tokenizer has a token {highest}, and the network only {self.vocab_size}")

    @classmethod
    def from_name(cls, name: str, **changes: Any) -> Self:
        """The preset called `name`, with `changes`. Raises ValueError with all names if there is none."""
        from lit_model.families import PRESETS, read_fields

        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**read_fields(PRESETS[name])[1] | changes)
