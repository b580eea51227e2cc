"""GPT-2 and LLaMA in one file. Every batch is a packed row: a flat list of tokens plus a `Packed` that says which token
may see which (packing.py). There is no padding and no other attention path. How a token meets the keys of its row is
the row's context (attention.py): `y = row.attend(q, k, v, prompts)`.

No finetuning method is known here. A method adds small modules to six slots:
  Linear.deltas                y = delta(linear, x, y)      after a linear layer (LoRA)
  Embedding.deltas             y = delta(embedding, idx, y) after the embedding of tokens (new tokens)
  CausalSelfAttention.deltas   k, v, gate = delta(attention, dtype)   what every token sees in a softmax of its
                               own, times a gate: (K, nkv, hs), (K, nkv, hs), (nh,) (LLaMA-Adapter)
  GPT.virtual_tokens           x = virtual()                (P, C) embeddings in front of every example (soft prompt)
  GPT.virtual_keys             kv = virtual()               (layers, 2, P, nkv, hs) in front of every example: P keys
                               and values in each layer (prefix tuning)
  GPT.heads                    logits = head(x)             in the place of the output layer (classification)
A virtual module states its number of positions P as `length`.

Letters in shapes: B examples of a batch, T tokens of a row, C n_embd, nh heads, nkv key/value heads, hs head size, P
virtual positions, S gathered keys, M tokens whose output is wanted.

Papers: GPT-2 (Radford et al., 2019), LLaMA (https://arxiv.org/abs/2302.13971), RMSNorm (https://arxiv.org/abs/1910.07467),
SwiGLU (https://arxiv.org/abs/2002.05202), GQA (https://arxiv.org/abs/2305.13245).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.attention import PackedRow, is_few
from lit_model.config import Config, Layer
from lit_model.kernels.cpu import Packed1, RMSNormCPU
from lit_model.loss import cross_entropy
from lit_model.packing import Packed, equal_examples
from lit_model.recompute import Offload, in_tiles, recomputed
from lit_model.rope import rope_angles

ACTIVATIONS = {"silu": F.silu, "gelu": partial(F.gelu, approximate="tanh")}


class Linear(nn.Linear):
    """nn.Linear with a slot for methods. Its own keys keep their names whatever hangs in the slot."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__(n_in, n_out, bias=bias)
        self.deltas = nn.ModuleDict()
        self.packed: Packed1 | None = None  # of a small network that decodes on a CPU

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    times = staticmethod(F.linear)  # a method's own product, x (T, n_in) and a weight (n_out, n_in) -> (T, n_out)

    def matmul(self, x: Tensor) -> Tensor:
        if is_few(x, 1) and self.weight.dtype is x.dtype:
            from lit_model.kernels.decode import few_times

            return few_times(x, self.weight)
        if self.packed is not None and self.packed.can_take(x, self.weight):
            return self.packed.times(x)
        return F.linear(x, self.weight.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x) if self.bias is None else self.matmul(x) + self.bias.to(x.dtype)
        for delta in self.deltas.values():
            y = delta(self, x, y)
        return y

    def dense(self) -> Tensor:
        """The weight in float32, (n_out, n_in), in whatever form it is kept."""
        return self.weight.float()


class Embedding(nn.Embedding):
    """nn.Embedding with a slot for methods, which may know ids beyond the last row."""

    bias = None  # as a Linear may have none

    def __init__(self, n: int, n_embd: int):
        super().__init__(n, n_embd)
        self.deltas = nn.ModuleDict()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        y = super().forward(idx.clamp(max=self.num_embeddings - 1) if self.deltas else idx)
        for delta in self.deltas.values():
            y = delta(self, idx, y)
        return y


class OutputLayer(Linear):
    """Logits, (M, C) -> (M, vocab_size)."""

    def __init__(self, config: Config):
        super().__init__(config.n_embd, config.vocab_size, config.head_bias)
        self.divisor, self.softcap = config.logit_divisor, config.logit_softcap

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.divisor != 1:
            y = y / self.divisor
        return y if self.softcap is None else self.softcap * (y / self.softcap).tanh()


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight, with the mean of 16-bit x in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x, self.weight.to(x.dtype))

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return RMSNormCPU.apply(x, weight, self.eps)
        if is_few(x):
            from lit_model.kernels.decode import rms_norm

            return rms_norm(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class RMSNormPlusOne(RMSNorm):
    """Gemma's: times 1 + weight, all in float32."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.normed(x.to(wide), 1 + self.weight.to(x.dtype).to(wide)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norm(config: Config, size: int | None = None) -> nn.Module:
    kind = LayerNorm if config.arch == "gpt2" else RMSNormPlusOne if config.norm_plus_one else RMSNorm
    return kind(size or config.n_embd, eps=config.norm_eps)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.head_size = config.head_size
        n_q, n_kv = config.n_head * config.head_size, config.n_kv_head * config.head_size
        self.q_proj = Linear(config.n_embd, n_q, config.qkv_bias)
        self.k_proj = Linear(config.n_embd, n_kv, config.qkv_bias)
        self.v_proj = Linear(config.n_embd, n_kv, config.qkv_bias)
        self.norms_all_heads = config.qk_norm == "all"
        self.q_norm, self.k_norm = (
            nn.Identity() if config.qk_norm == "none" else norm(config, n if self.norms_all_heads else config.head_size)
            for n in (n_q, n_kv)
        )
        self.o_proj = Linear(n_q, config.n_embd, config.bias)
        self.deltas = nn.ModuleDict()

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))  # (T, n * hs) -> (T, n, hs)

    def normed_heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        return self.split_heads(norm(x)) if self.norms_all_heads else norm(self.split_heads(x))  # (T, n, hs)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Without positions, (T, nkv, hs) each."""
        return self.normed_heads(self.k_proj(x), self.k_norm), self.split_heads(self.v_proj(x))

    def forward(self, x: Tensor, row: PackedRow) -> Tensor:
        q = self.normed_heads(self.q_proj(x), self.q_norm)  # (T, nh, hs)
        k, v = self.keys_and_values(x)  # (T, nkv, hs)
        prompts = [delta(self, x.dtype) for delta in self.deltas.values()]
        y = row.attend(q, k, v, prompts)  # (T, nh, hs); in the last layer (M, nh, hs)
        return self.o_proj(y.flatten(1))


class MLP(nn.Module):
    """LLaMA: down(silu(gate(x)) * up(x)). GPT-2: down(gelu(up(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        is_gated = config.arch != "gpt2"
        self.activation = ACTIVATIONS[config.activation if is_gated else "gelu"]
        self.gate_proj = Linear(config.n_embd, config.n_hidden, config.bias) if is_gated else None
        self.up_proj = Linear(config.n_embd, config.n_hidden, config.bias)
        self.down_proj = Linear(config.n_hidden, config.n_embd, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if is_few(x) and self.activation is F.silu:
            from lit_model.kernels.decode import swiglu

            return self.down_proj(swiglu(gate, up))
        return self.down_proj(self.activation(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config, layer: Layer):
        super().__init__()
        no_norm, before, after = nn.Identity(), config.norm_place != "after", config.norm_place != "before"
        self.norm_1 = norm(config) if before else no_norm
        self.attn = CausalSelfAttention(config)
        self.post_norm_1 = norm(config) if after else no_norm
        self.norm_2 = norm(config) if before else no_norm
        if layer.experts is None:
            self.mlp = MLP(config)
        else:
            from lit_model.moe import MoE

            self.mlp = MoE(config, layer.experts)
        self.post_norm_2 = norm(config) if after else no_norm
        self.scale = config.residual_scale
        self.is_tiled = False  # the MLP takes the tokens of a long row a tile at a time

    def forward(self, x: Tensor, row: PackedRow) -> Tensor:
        h = self.post_norm_1(self.attn(self.norm_1(x), row))  # (T, C); in the last layer (M, C)
        x = torch.add(row.narrow(x), h, alpha=self.scale)
        return in_tiles(self.feed, x) if self.is_tiled else self.feed(x)

    def feed(self, x: Tensor) -> Tensor:
        return torch.add(x, self.post_norm_2(self.mlp(self.norm_2(x))), alpha=self.scale)


class GPT(nn.Module):
    """The network. Also under `torch.device("meta")`; load.py then loads weights into it without a copy."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dtype: torch.dtype | None = None  # dtype of all activations; None: that of the embedding matrix
        self.objective = cross_entropy
        self.wte = Embedding(config.vocab_size, config.n_embd)  # tokens; GPT-2's names
        self.wpe = Embedding(config.block_size, config.n_embd) if config.arch == "gpt2" else None  # positions
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm_f = norm(config)
        self.lm_head = OutputLayer(config)
        self.virtual_tokens = nn.ModuleDict()
        self.virtual_keys = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.is_compiled = False
        self.recompute = self.offload = 0  # blocks, the first ones: less memory for more time (recompute.py)
        self.tie()

    def compile(self) -> None:
        """Compiles each block, which are all the same to the compiler. Rows may have any length."""
        torch.fx.experimental._config.use_duck_shape = False  # two sizes that agree in one row may differ in the next
        torch._dynamo.config.recompile_limit = 64  # blocks are one code, and with windows and odd ranks of many kinds
        torch._dynamo.config.specialize_float = True  # else eps and a LoRA's scale become inputs, computed on the host
        torch._functorch.config.ban_recompute_materialized_backward = True  # until memory is short (finetune/memory.py)
        torch._functorch.config.cse = True  # likewise
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # the next run starts sooner
        options = {
            "triton.multi_kernel": 3,  # reductions read a token once, not twice; 1 dies of its own cache in torch 2.11
            "shape_padding": False,  # would time what to pad in a row of one length
            "triton.mix_order_reduction_non_strict_mode": True,  # would compile anew for rows of 8192 tokens and more
            "pattern_matcher": False,  # would add to a product in place, for which it copies the sum so far first
        }
        torch._dynamo.reset()  # what was compiled with other settings
        self.is_compiled = True
        for block in self.blocks:
            block.compile(dynamic=True, options=options)
            block.feed = torch.compile(block.feed, dynamic=True, options=options)  # of a row in tiles

    def tie(self) -> None:
        if self.config.tie:
            self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the deltas of layers that have a `merged(weight, bias)` into weights and biases, in float32.

        Raises ValueError for quantized weights.
        """
        is_tied = self.lm_head.weight is self.wte.weight and self.lm_head.deltas.items() == self.wte.deltas.items()
        for m in (m for m in self.modules() if hasattr(m, "deltas")):
            for name, delta in list(m.deltas.items()):
                if not hasattr(delta, "merged"):
                    continue
                if m.weight is None:
                    raise ValueError("merging into 4 or 8 bits would lose what was trained: load the base unquantized")
                merged = delta.merged(m.weight.float(), None if m.bias is None else m.bias.float())
                m.weight, m.bias = (None if t is None else nn.Parameter(t, requires_grad=False) for t in merged)
                del m.deltas[name]
        if is_tied:
            self.lm_head.weight = self.wte.weight
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
        """Raises ValueError if examples of these lengths, with what methods put in front, exceed the context."""
        room = self.config.block_size - self.n_virtual_tokens - self.n_virtual_keys
        if (longest := max(lengths)) > room:
            raise ValueError(
                f"the longest example has {longest} tokens, and the model's context of {self.config.block_size} has "
                f"room for {room}: lower examples.max_length or take fewer demonstrations "
                f"({sum(n > room for n in lengths)} of {len(lengths)} examples are too long)"
            )

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

    def embed_tokens(self, idx: Tensor) -> Tensor:
        """(T,) -> (T, C)"""
        x = self.wte(idx)
        x = x.to(self.dtype or x.dtype)
        if self.config.embedding_scale == 1:
            return x
        return x * torch.tensor(self.config.embedding_scale, dtype=x.dtype).item()  # rounded, as Gemma was trained

    def embed(self, idx: Tensor, packed: Packed) -> Tensor:
        """(T, C) what goes into the first block."""
        x = self.embed_tokens(idx)
        if len(packed.pos) > len(idx):  # the row begins with the virtual tokens, which idx does not contain
            x = torch.cat([virtual().to(x.dtype) for virtual in self.virtual_tokens.values()] + [x])
        return x if self.wpe is None else x + self.wpe(packed.pos).to(x.dtype)

    def forward(self, idx: Tensor, packed: Packed | None = None) -> Tensor:
        """Logits, or the loss.

        Args:
            idx: (B, T) token ids of B examples of one length, or with `packed` one flat row (T,) of them. int64.
            packed: which token sees which in the row, which outputs are wanted, and their targets.
        Returns:
            (B, T, vocab_size) for a (B, T) batch; (M, vocab_size) for a row, at the M tokens that `packed` wants; or,
            where `packed` has targets, the float32 *sum* of the objective over them, by default the cross-entropy: the
            caller divides it by the number of targets of the whole batch, however many rows that is spread over.
        Raises:
            ValueError: `packed` was made without this network's virtual tokens, or for another number of virtual keys.
        """
        if packed is None:
            packed = equal_examples(*idx.shape, self.n_virtual_tokens, self.n_virtual_keys, self.config.windows)
            return self(idx.flatten(), packed.to(idx.device)).unflatten(0, idx.shape)
        if (len(packed.pos) - len(idx), packed.n_virtual_keys) != (self.n_virtual_tokens, self.n_virtual_keys):
            virtual = f"{self.n_virtual_tokens} virtual tokens and {self.n_virtual_keys} virtual keys"
            raise ValueError(f"the row was packed for another network: this one has {virtual}")
        x = self.embed(idx, packed)  # (T, C)
        n = self.recompute if torch.is_grad_enabled() else 0
        offload = Offload(x.device) if n and self.offload else None
        contexts = self.contexts(packed, packed.pos, packed.max_k, x.dtype)
        for i, (block, row) in enumerate(zip(self.blocks, contexts, strict=True)):
            x = recomputed(block, x, row, offload if i < self.offload else None) if i < n else block(x, row)
        if packed.wanted is not None and packed.last is None:  # otherwise the last block has taken them
            x = x[packed.wanted]
        x = self.norm_f(x)  # (M, C)
        if packed.targets is None:
            return self.head(x)
        return self.objective(self.head, x, packed)

    def contexts(self, packed: Packed | None, pos: Tensor, length: int, dtype: torch.dtype) -> Iterator[PackedRow]:
        """What each layer knows of a row at the positions pos (T,), whose longest example has `length` tokens. packed:
        None in a step of decoding."""
        c = self.config
        ropes = {rope: rope_angles(pos, rope, c.head_size, length, dtype) for rope in c.ropes}
        prefixes = [virtual().to(dtype) for virtual in self.virtual_keys.values()]
        prefix = torch.cat(prefixes, dim=2).unbind() if prefixes else [None] * c.n_layer
        for i, layer in enumerate(c.layers):
            window = None if packed and layer.window and packed.max_k <= layer.window else layer.window
            is_last = packed and packed.last and i == c.n_layer - 1
            seen, wanted = (packed.last, packed.wanted) if is_last else (packed, None)
            yield PackedRow(seen, ropes.get(layer.rope), prefix[i], window, c.attn_scale, c.attn_softcap, wanted)
