"""GPT-2 and LLaMA in one file. Every batch is a packed row: a flat list of tokens plus a `Packed` that says which token
may see which (packing.py). There is no padding and no other attention path.

No finetuning method is known here. A method adds small modules to five slots:
  Linear.deltas                y = delta(linear, x, y)      after a linear layer (LoRA)
  CausalSelfAttention.deltas   k, v, gate = delta(attention, dtype)   what every token sees in a softmax of its
                               own, times a gate: (K, nkv, hs), (K, nkv, hs), (nh,) or (T, nh); or None (LLaMA-Adapter)
  GPT.virtual_tokens           x = virtual()                (P, C) embeddings in front of every example (soft prompt)
  GPT.heads                    logits = head(x)             in the place of the output layer (classification)
  GPT.virtual_keys             kv = virtual()               (layers, 2, P, nkv, hs) in front of every example: in
                               each layer so many keys and values (prefix tuning)
A virtual module states its number of positions P as `length`.

Letters in shapes: B examples of a batch, T tokens of a row, C n_embd, nh heads, nkv key/value heads, hs head size, P
virtual positions, S gathered keys, M tokens whose output is wanted.

Papers: GPT-2 (Radford et al., 2019), LLaMA (https://arxiv.org/abs/2302.13971), RMSNorm (https://arxiv.org/abs/1910.07467),
RoPE (https://arxiv.org/abs/2104.09864), SwiGLU (https://arxiv.org/abs/2002.05202), GQA (https://arxiv.org/abs/2305.13245).
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.attention import KVCache, Rope, attend, rotate, take_rows
from lit_model.files import blamed_on, check_types, read_json
from lit_model.loss import chunk_loss, linear_cross_entropy
from lit_model.packing import Packed, equal_examples
from lit_model.presets import PRESETS
from lit_model.recompute import Offload, recomputed


@dataclass
class RopeScaling:
    """LLaMA 3.1's way to a longer context: rotations that are slow in the original context get slower by `factor`."""

    factor: float
    low_freq_factor: float  # up to so many rotations in the original context: slower by all of `factor`
    high_freq_factor: float  # from so many on: as they are
    original_block_size: int

    def __post_init__(self):
        check_types(self, RopeScaling)


@dataclass
class Config:
    """The shape of a network. `None` means: derived from the other fields."""

    arch: Literal["llama", "gpt2"] = "llama"
    vocab_size: int = 32000
    block_size: int = 2048  # longest context in tokens, virtual ones included
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None  # None: n_head, which is multi-head attention; fewer: grouped-query attention
    n_embd: int = 4096
    n_hidden: int | None = None  # width of the MLP; None: the family's rule
    head_size: int | None = None  # None: n_embd / n_head
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    no_rope_every: int | None = None  # every so many layers one has no rotary positions (SmolLM3)
    window: int | None = None  # a token sees itself and the window - 1 tokens before it (Mistral); None: all
    norm_eps: float = 1e-5
    bias: bool | None = None  # of the linear layers of a block; None: the family's rule
    qkv_bias: bool | None = None  # of q, k and v (Qwen 2); None: as `bias`
    head_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and k (Qwen 3)
    tie: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):  # from a preset or a file
            self.rope_scaling = RopeScaling(**self.rope_scaling)
        check_types(self, Config)
        if self.n_layer > 1000:
            raise ValueError(f"n_layer is {self.n_layer}: no network has so many")
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_size is None:
            self.head_size = self.n_embd // self.n_head
        if self.n_hidden is None:  # LLaMA: two thirds of 4C, rounded up to a multiple of 256
            self.n_hidden = 4 * self.n_embd if self.arch == "gpt2" else 256 * math.ceil(8 * self.n_embd / 3 / 256)
        if self.bias is None:
            self.bias = self.arch == "gpt2"
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        sizes = dict(vocab_size=self.vocab_size, block_size=self.block_size, n_embd=self.n_embd, n_hidden=self.n_hidden)
        for name, n in (sizes | {"n_head * head_size": self.n_head * self.head_size}).items():
            if n > 2**30:
                raise ValueError(f"{name} is {n if n < 2**64 else 'beyond 2**64'}: no network has so many")
        if self.head_size < 1 or (self.arch == "llama" and self.head_size % 2):
            raise ValueError(f"head_size is {self.head_size}; it must be even: rotary positions turn pairs")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")

    def check_tokens(self, highest: int) -> None:
        """Raises ValueError if the network has no row for this token id."""
        if highest >= self.vocab_size:
            raise ValueError(f"the tokenizer has a token {highest}, and the network only {self.vocab_size}")

    @classmethod
    def from_name(cls, name: str, **changes: Any) -> Self:
        """The preset called `name`, with `changes`. Raises ValueError with all names if there is none."""
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def load(cls, checkpoint_dir: Path | str, **changes: Any) -> Self:
        """The shape that `checkpoint_dir/lit_config.json` states, with `changes`.

        Raises FileNotFoundError if it is not there, ValueError if it is not one of this version.
        """
        path = Path(checkpoint_dir) / "lit_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; scripts/download.py and scripts/convert_*.py make it")
        names = [f.name for f in fields(Config)]
        stored = read_json(path, *(name for name in names if name not in NEWER), "fingerprint")
        if unknown := stored.keys() - {*names, "fingerprint"}:
            raise ValueError(f"{path} has unknown fields: {', '.join(sorted(unknown))}")
        with blamed_on(path):
            return cls(**{name: stored[name] for name in names if name in stored} | changes)


NEWER = ("bias", "qkv_bias", "head_bias", "rope_scaling", "no_rope_every", "window", "qk_norm")
# fields that a checkpoint may lack: it was made before there were any


class Linear(nn.Linear):
    """nn.Linear with a slot for methods. Its own keys keep their names whatever hangs in the slot."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias=bias)
        self.deltas = nn.ModuleDict()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x) if self.bias is None else self.matmul(x) + self.bias.to(x.dtype)
        for delta in self.deltas.values():
            y = delta(self, x, y)
        return y

    def dense(self) -> Tensor:
        """The weight in float32, (n_out, n_in), in whatever form it is kept."""
        return self.weight.float()

    def merge(self) -> None:
        """Folds deltas into weight and bias, in float32 and in the order in which they act, up to the first that cannot
        be. Such a delta has `merged(weight, bias)`. Raises ValueError for quantized weights."""
        for name, delta in list(self.deltas.items()):
            if not hasattr(delta, "merged"):
                return
            if self.weight is None:
                raise ValueError("merging into 4 or 8 bits would lose what was trained: load the base unquantized")
            bias = None if self.bias is None else self.bias.float()
            merged = delta.merged(self.weight.float(), bias)
            self.weight, self.bias = (None if t is None else nn.Parameter(t, requires_grad=False) for t in merged)
            del self.deltas[name]


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight, with the mean of 16-bit x in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu":
            return _RMSNormCPU.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class _RMSNormCPU(torch.autograd.Function):
    """The same in fewer operations: torch's own takes twice as long on a CPU, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        r = (norm.square() / x.shape[-1] + eps).rsqrt()  # (T, 1)
        ctx.save_for_backward(x, weight, r)
        return (x * r).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, r = ctx.saved_tensors
        short_r = r.to(x.dtype)
        grad_weight = (grad * x * short_r).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along_x = (grad * x).sum(-1, keepdim=True, dtype=r.dtype) * r**3 / x.shape[-1]  # (T, 1)
        return torch.addcmul(grad * short_r, x, along_x.to(x.dtype), value=-1), grad_weight, None


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norm(config: Config) -> nn.Module:
    return (LayerNorm if config.arch == "gpt2" else RMSNorm)(config.n_embd, eps=config.norm_eps)


def rope_frequencies(config: Config, dtype: torch.dtype = torch.float64, device: Any = None) -> Tensor:
    """(hs / 2,) radians that each pair of a head's numbers turns from one position to the next."""
    steps = torch.arange(0, config.head_size, 2, device=device).to(dtype)
    frequencies = config.rope_base ** (-steps / config.head_size)
    if (scaling := config.rope_scaling) is not None:
        rotations = scaling.original_block_size * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies


def rope_angles(pos: Tensor, config: Config, dtype: torch.dtype) -> Rope:
    """Of tokens at the positions (T,). Made again in every forward: a buffer would need care on the meta device and
    under changes of dtype, and the cost is negligible."""
    frequencies = rope_frequencies(config, torch.promote_types(dtype, torch.float32), pos.device)
    angles = (pos[:, None] * frequencies)[:, None, None]
    return angles.cos().to(dtype), torch.cat((-angles.sin(), angles.sin()), dim=2).to(dtype)


@dataclass
class Row:
    """A packed row on its way through a layer: what the layer needs to know beside x."""

    packed: Packed
    layer: int
    rope: Rope | None
    cache: KVCache | None
    virtual_keys: Tensor | None = None  # (2, P, nkv, hs) of this layer
    only: Tensor | None = None  # (M,) the tokens that go on from here, in the last layer; None: all
    window: int | None = None  # see Config; None also where no segment is longer


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_size, config.qkv_bias)
        self.k_proj = Linear(config.n_embd, config.n_kv_head * config.head_size, config.qkv_bias)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * config.head_size, config.qkv_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )
        self.o_proj = Linear(config.n_head * config.head_size, config.n_embd, config.bias)
        self.deltas = nn.ModuleDict()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))  # (T, n * hs) -> (T, n, hs)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Without positions, (T, nkv, hs) each."""
        return self.k_norm(self.heads(self.k_proj(x))), self.heads(self.v_proj(x))

    def forward(self, x: Tensor, row: Row) -> Tensor:
        q, (k, v) = self.q_norm(self.heads(self.q_proj(x))), self.keys_and_values(x)
        rope = row.rope
        if rope is not None and not (row.cache is None and row.virtual_keys is None and row.only is None):
            q, k, rope = rotate(q, rope), rotate(k, rope), None  # otherwise `attend` does it, in fewer passes
        if row.cache is not None:
            k, v = row.cache.store(row.layer, row.packed.slots, k, v)  # (slots, nkv, hs): every slot, used or not
        if row.virtual_keys is not None:
            k, v = (torch.cat((virtual, own)) for virtual, own in zip(row.virtual_keys, (k, v)))
        if row.only is not None:
            q = take_rows(q, row.only)
        prompts = [delta(self, x.dtype) for delta in self.deltas.values()]
        prompts = [prompt for prompt in prompts if prompt is not None]
        y = attend(q, k, v, row.packed, rope, prompts, row.window)  # (T, nh, hs)
        return self.o_proj(y.flatten(1))


class MLP(nn.Module):
    """LLaMA: down(silu(gate(x)) * up(x)). GPT-2: down(gelu(up(x))), with the tanh approximation of gelu."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = None if config.arch == "gpt2" else Linear(config.n_embd, config.n_hidden, config.bias)
        self.up_proj = Linear(config.n_embd, config.n_hidden, config.bias)
        self.down_proj = Linear(config.n_hidden, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, row: Row) -> Tensor:
        y = self.attn(self.norm_1(x), row)
        x = y + (x if row.only is None else take_rows(x, row.only))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """The network. Also under `torch.device("meta")`; checkpoint.py then loads weights into it without a copy."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dtype: torch.dtype | None = None  # dtype of all activations; None: that of the embedding matrix
        self.wte = Embedding(config.vocab_size, config.n_embd)  # tokens; GPT-2's names
        self.wpe = Embedding(config.block_size, config.n_embd) if config.arch == "gpt2" else None  # positions
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, config.head_bias)
        self.virtual_tokens = nn.ModuleDict()
        self.virtual_keys = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.chunk_loss = chunk_loss
        self.recompute: Literal["off", "on", "offload"] = "off"  # less memory for more time in training: recompute.py
        self.tie()

    def compile(self) -> None:
        """Compiles each block, which are all the same to the compiler, and the loss. Rows may have any length."""
        torch.fx.experimental._config.use_duck_shape = False  # two sizes that agree in one row may differ in the next
        torch._dynamo.config.recompile_limit = 64  # blocks are one code, and with windows and odd ranks of many kinds
        torch._dynamo.config.specialize_float = True  # else eps and a LoRA's scale become inputs, computed on the host
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # the next run starts sooner
        options = {
            "triton.multi_kernel": 3,  # reductions read a token once, not twice; 1 dies of its own cache in torch 2.11
            "shape_padding": False,  # would time what to pad in a row of one length
            "triton.mix_order_reduction_non_strict_mode": True,  # would compile anew for rows of 8192 tokens and more
            "pattern_matcher": False,  # would add to a product in place, for which it copies the sum so far first
        }
        for block in self.blocks:
            block.compile(dynamic=True, options=options)
        self.chunk_loss = torch.compile(chunk_loss, dynamic=True)

    def tie(self) -> None:
        if self.config.tie:
            self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Folds all deltas of linear layers into their weights that can be, see `Linear.merge`."""
        for linear in (m for m in self.modules() if isinstance(m, Linear)):
            linear.merge()
        self.config = replace(
            self.config,
            bias=self.blocks[0].attn.o_proj.bias is not None,
            qkv_bias=self.blocks[0].attn.q_proj.bias is not None,
            head_bias=self.lm_head.bias is not None,
            tie=self.lm_head.weight is self.wte.weight,
        )

    @property
    def head(self) -> Linear:
        """The output layer, or what a method has put in its place."""
        return next(iter(self.heads.values()), self.lm_head)

    def check_length(self, *lengths: int) -> None:
        """Raises ValueError if so many tokens, with what methods put in front, are more than the model's context."""
        room = self.config.block_size - self.n_virtual_tokens - self.n_virtual_keys
        if (longest := max(lengths)) > room:
            raise ValueError(
                f"the longest example has {longest} tokens, and the model's context of {self.config.block_size} has "
                f"room for {room}: lower prompt.max_length or take fewer demonstrations "
                f"({sum(n > room for n in lengths)} of {len(lengths)} examples are too long)"
            )

    def new_cache(self, slots: int) -> KVCache:
        """For so many keys and values, the virtual tokens' among them."""
        c, dtype = self.config, self.dtype or self.wte.weight.dtype
        return KVCache(c.n_layer, slots, c.n_kv_head, c.head_size, dtype, self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes. Matrices may wait somewhere else until they are needed (fsdp_offload)."""
        return self.norm_f.weight.device

    @property
    def n_virtual_tokens(self) -> int:
        """Number of virtual tokens in front of every example."""
        return sum(virtual.length for virtual in self.virtual_tokens.values())

    @property
    def n_virtual_keys(self) -> int:
        """Number of virtual keys and values in front of every example, in each layer."""
        return sum(virtual.length for virtual in self.virtual_keys.values())

    def embed(self, idx: Tensor, packed: Packed) -> Tensor:
        """(T, C) what goes into the first block."""
        x = self.wte(idx)
        x = x.to(self.dtype or x.dtype)
        if packed.has_virtual_tokens:
            x = torch.cat([virtual().to(x.dtype) for virtual in self.virtual_tokens.values()] + [x])
        return x if self.wpe is None else x + self.wpe(packed.pos).to(x.dtype)

    def forward(self, idx: Tensor, packed: Packed | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits, or the loss.

        Args:
            idx: (B, T) token ids of B examples of one length, or with `packed` one flat row (T,) of them. int64.
            packed: which token sees which in the row, which outputs are wanted, and their targets.
            cache: keys and values of earlier rows that `packed` refers to; this row's are stored in it.
        Returns:
            (B, T, vocab_size) for a (B, T) batch; (M, vocab_size) for a row, at the M tokens that `packed` wants; or,
            where `packed` has targets, the float32 *sum* of the cross-entropy over them: the caller divides it by the
            number of targets of the whole batch, however many rows that is spread over.
        Raises:
            ValueError: `packed` was made without this network's virtual tokens, or for another number of virtual keys.
        """
        if packed is None:
            packed = equal_examples(*idx.shape, self.n_virtual_tokens, self.n_virtual_keys).to(idx.device)
            return self(idx.flatten(), packed).unflatten(0, idx.shape)
        if packed.n_virtual_keys != self.n_virtual_keys:
            raise ValueError(f"packed for {packed.n_virtual_keys} virtual keys; the network has {self.n_virtual_keys}")
        if cache is None and packed.x is None and packed.has_virtual_tokens != bool(self.n_virtual_tokens):
            raise ValueError(f"packed with or without virtual tokens; the network has {self.n_virtual_tokens}")
        x = self.embed(idx, packed) if packed.x is None else packed.x  # (T, C)
        rope = None if self.wpe is not None else rope_angles(packed.pos, self.config, x.dtype)
        recompute = self.recompute != "off" and torch.is_grad_enabled()
        offload = Offload(x.device) if recompute and self.recompute == "offload" else None
        prefixes = [virtual().to(x.dtype) for virtual in self.virtual_keys.values()]
        prefix = torch.cat(prefixes, dim=2).unbind() if prefixes else [None] * len(self.blocks)
        window, no_rope_every = self.config.window, self.config.no_rope_every or len(self.blocks) + 1
        window = None if window is None or packed.max_k <= window else window
        for layer in range(packed.first_block, len(self.blocks)):
            angles = None if (layer + 1) % no_rope_every == 0 else rope
            block, row = self.blocks[layer], Row(packed, layer, angles, cache, prefix[layer], window=window)
            if packed.last is not None and layer == len(self.blocks) - 1:
                row = replace(row, packed=packed.last, only=packed.wanted)
            x = recomputed(block, x, row, offload) if recompute else block(x, row)
        if packed.wanted is not None and (packed.last is None or packed.first_block == len(self.blocks)):
            x = x[packed.wanted]  # otherwise the last block has taken them
        x = self.norm_f(x)  # (M, C)
        if packed.targets is None:
            return self.head(x)
        return linear_cross_entropy(self.head, x, packed.targets, self.chunk_loss)
