"""LoRA: low-rank adaptation (https://arxiv.org/abs/2106.09685), and its relatives.

A frozen linear layer W (n_out, n_in) gets a correction of rank r beside it:

    y = W x  +  (alpha / r) * B A x          A (r, n_in), B (n_out, r)

    B = 0 at the start makes it the base model exactly; A is kaiming-uniform with a = sqrt(5), as in the authors' code.

Trained: A and B of every layer that `targets` names; on LLaMA-7B with r = 8 on q and v: 32 * 2 * 8 * (4096 + 4096) =
4,194,304 numbers. The paper's dropout on x defaults to 0 here: with it, a preamble that examples share would have to be
computed for each of them again (packing.py). Its relatives are options:

    rslora   (https://arxiv.org/abs/2312.03732) alpha / sqrt(r) instead, so that the size of the correction does not
             shrink with the rank
    dora     (https://arxiv.org/abs/2402.09353) y = (m / |W + s B A|) * (W + s B A) x, with |.| the norms of the rows,
             without gradient (the paper's section 4.3), and m trained. Kept is m - |W|: zero at the start, too.
    lr_ratio LoRA+ (https://arxiv.org/abs/2402.12354): B learns so many times as fast as A
    init     pissa (https://arxiv.org/abs/2404.02948): A and B begin as the r largest singular values of W; olora
             (https://arxiv.org/abs/2406.01775): as the first r columns of Q and rows of R of W = Q R. The papers take
             that part out of W; here it is subtracted beside W, which is the same: W x + s (B A - B0 A0) x. Over a
             quantized W it is not: the papers quantize what is left of W, here it is W.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model import model

TINY = 1e-30  # DoRA's row of zeros, such as a pruned one, stays one


@dataclass
class LoRA:
    """LoRA."""

    r: int = 8
    """rank of the correction"""
    alpha: float = 16.0
    """size of the correction: it is multiplied by alpha / r"""
    targets: str = "q_proj,v_proj"
    """which linear layers get one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, or regular
    expressions of whole names such as blocks.[0-3].mlp.*; :rank or :rank:alpha behind one is for these layers only"""
    dropout: float = 0.0
    """share of the inputs of A that is dropped in training"""
    rslora: bool = False
    """multiply by alpha / sqrt(r) instead of alpha / r"""
    dora: bool = False
    """DoRA: train the size of each row of the weights apart from its direction"""
    lr_ratio: float = 1.0
    """LoRA+: the learning rate of B as a multiple of A's; the paper has 16"""
    init: Literal["zero", "pissa", "olora"] = "zero"
    """B zero, or A and B made from the weights by PiSSA or OLoRA"""


@dataclass
class Config(model.Config):
    lora: LoRA = field(default_factory=LoRA)


class LoRADelta(nn.Module):
    def __init__(self, linear: model.Linear, r: int, alpha: float, options: LoRA):
        super().__init__()
        self.first = options.dora  # DoRA takes y for W x + b
        self.scale = alpha / (math.sqrt(r) if options.rslora else r)
        self.dropout = options.dropout
        self.A = nn.Parameter(torch.empty(r, linear.in_features))
        self.B = nn.Parameter(torch.empty(linear.out_features, r))
        self.magnitude = nn.Parameter(torch.empty(linear.out_features)) if options.dora else None
        for name in ("A0", "B0"):  # of PiSSA and OLoRA: A and B at the start, whose product the base has already
            self.register_buffer(name, None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        if self.magnitude is not None:
            nn.init.zeros_(self.magnitude)

    def forward(self, linear: model.Linear, x: Tensor, y: Tensor) -> Tensor:  # x (T, n_in), y (T, n_out)
        x = F.dropout(x, self.dropout, self.training)
        A, B = self.factors()
        update = F.linear(F.linear(x, A.to(x.dtype)) * self.scale, B.to(x.dtype))
        if self.magnitude is None:
            return y + update
        size = self.row_sizes(linear, x.dtype).to(y.dtype)
        bias = 0 if linear.bias is None else linear.bias.to(y.dtype)
        return (y - bias + update) * size + bias

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.with_start(self.A, self.B)

    def with_start(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        if self.A0 is None:
            return A, B
        A0, B0 = self.A0.to(A.device), self.B0.to(B.device)
        return torch.cat((A, A0)), torch.cat((B, -B0), dim=1)

    def row_sizes(self, linear: model.Linear, dtype: torch.dtype) -> Tensor:
        """DoRA's m / |W + s B A|, (n_out,), without making B A: with p = W A^T the squared norm of a row is
        |W|^2 + 2 s p . B + s^2 B (A A^T) . B."""
        with torch.no_grad():
            A, B = (t.to(dtype) for t in self.factors())
            p = linear.matmul(A).T  # (n_out, r)
            base = linear.dense().to(self.B.dtype).square().sum(-1)
            square = base + ((2 * self.scale) * p + (self.scale**2) * (B @ (A @ A.T))).mul(B).sum(-1)
        return (base.sqrt() + self.magnitude) / square.clamp(min=TINY).sqrt()

    def delta_weight(self) -> Tensor:
        """The correction as a matrix (n_out, n_in), in float32."""
        A, B = self.factors()
        return B.float() @ A.float() * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        merged = weight + self.delta_weight()
        if self.magnitude is not None:
            merged *= ((weight.norm(dim=-1) + self.magnitude) / merged.norm(dim=-1).clamp(min=TINY**0.5))[:, None]
        return merged, bias


def install(gpt: model.GPT, options: LoRA) -> None:
    """Adds a LoRA to every linear layer that `options.targets` names.

    Raises ValueError, with the names that there are, if one is unknown, and for a rank below 1.
    """
    if not 0 <= options.dropout < 1:
        raise ValueError(f"lora.dropout is {options.dropout}; it must be at least 0 and below 1")
    if not options.lr_ratio > 0:
        raise ValueError(f"lora.lr_ratio is {options.lr_ratio}; it must be above 0")
    linears = {name: m for name, m in gpt.named_modules() if isinstance(m, model.Linear)}
    for name, (r, alpha) in sizes(list(linears), options).items():
        linears[name].deltas["lora"] = LoRADelta(linears[name], r, alpha, options)


def sizes(names: list[str], options: LoRA) -> dict[str, tuple[int, float]]:
    """Of each layer that gets a LoRA: its rank and alpha. `names` are those of all linear layers."""
    known, found = sorted({name.split(".")[-1] for name in names}), {}
    for pattern, r, alpha in _parsed(options):
        if r < 1:
            raise ValueError(f"lora.r is {r}; it must be at least 1")
        if not alpha > 0:
            raise ValueError(f"lora.alpha is {alpha}; it must be above 0")
        try:
            hit = [name for name in names if name.split(".")[-1] == pattern or re.fullmatch(pattern, name)]
        except re.error:
            hit = []
        if not hit:
            raise ValueError(f"lora.targets: no layer is called {pattern}; there are {', '.join(known)}")
        found |= dict.fromkeys(hit, (r, alpha))
    if not found:
        raise ValueError(f"lora.targets is empty; there are {', '.join(known)}")
    return found


def _parsed(options: LoRA) -> list[tuple[str, int, float]]:
    """The targets, each with its rank and alpha."""
    targets = [t.strip() for t in re.split(r",(?![^{]*})", options.targets) if t.strip()]  # not at the comma of {1,3}
    number = r"\d+\.?\d*(?:e[+-]?\d+)?"
    parts = [re.fullmatch(rf"(.*?)(?::(\d+))?(?::({number}))?", target).groups() for target in targets]
    return [(name, int(r or options.r), float(alpha or options.alpha)) for name, r, alpha in parts]


def check(gpt: model.GPT) -> None:
    """Raises ValueError for a rank that adds nothing. Files may have one: PiSSA's rank doubles when it is saved."""
    for name, m in gpt.named_modules():
        if isinstance(m, LoRADelta) and len(m.A) > (most := min(m.A.shape[1], len(m.B))):
            layer = name.removesuffix(".deltas.lora")
            raise ValueError(f"lora.r is {len(m.A)}, but {layer} is a matrix of rank {most} at most: more adds nothing")


class GPT(model.GPT):
    def __init__(self, config: Config):
        super().__init__(config)
        install(self, config.lora)


def trainable(name: str, config: model.Config | None = None) -> bool:
    return ".deltas.lora." in name


def lr_scale(name: str, config: Config) -> float:
    """What the learning rate of a trained tensor is multiplied by: LoRA+."""
    return config.lora.lr_ratio if name.endswith(".deltas.lora.B") else 1.0


@torch.no_grad()
def start(gpt: model.GPT, options: LoRA) -> None:
    """Gives A and B their values by PiSSA or OLoRA, once the base weights are there.

    Raises ValueError if a layer is too small for the rank.
    """
    if options.init == "zero":
        return
    for linear in (m for m in gpt.modules() if isinstance(m, model.Linear) and "lora" in m.deltas):
        delta = linear.deltas["lora"]
        weight, r = linear.dense(), len(delta.A)
        if r > min(weight.shape):
            raise ValueError(f"lora.r is {r}, too much for {options.init} of a layer of {tuple(weight.shape)}")
        if options.init == "pissa":
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            root = (s[:r] / delta.scale).sqrt()
            delta.A.copy_(root[:, None] * v[:r])
            delta.B.copy_(u[:, :r] * root)
        else:
            q, upper = torch.linalg.qr(weight)
            delta.A.copy_(upper[:r])
            delta.B.copy_(q[:, :r])
        delta.A0, delta.B0 = delta.A.detach().clone(), delta.B.detach().clone()


def finish(gpt: model.GPT, tensors: dict[str, Tensor], options: LoRA) -> tuple[dict[str, Tensor], LoRA]:
    """What a method file holds: PiSSA and OLoRA as a plain LoRA of twice the rank, B A - B0 A0."""
    if options.init == "zero":
        return tensors, options
    for name, linear in ((n, m) for n, m in gpt.named_modules() if isinstance(m, model.Linear) and "lora" in m.deltas):
        keys = [f"{name}.deltas.lora.{letter}" for letter in "AB"]
        whole = linear.deltas["lora"].with_start(*(tensors[key] for key in keys))
        tensors |= {key: t.contiguous() for key, t in zip(keys, whole, strict=True)}
    grown = math.sqrt(2) if options.rslora else 2  # so that the scale stays what it is
    targets = ",".join(f"{name}:{2 * r}:{grown * alpha}" for name, r, alpha in _parsed(options))
    return tensors, replace(options, targets=targets, init="zero")
