"""Frozen weights in 4 or 8 bits. Only `Linear.matmul` changes, so every method works over them: QLoRA is lora.py here.

    nf4   16 levels at the quantiles of a normal distribution, one scale per 64 weights, the scales themselves in 8 bit
          (QLoRA, https://arxiv.org/abs/2305.14314): 4.13 bits a weight. The same codes as bitsandbytes.
    int8  one scale a row: 8 bits a weight.
    fp8   e4m3, one scale a row, and multiplied as such: activations and gradients are rounded too, with one scale a
          token. Kept in both layouts, since the matrix units contract along the rows in forward and along the columns
          in backward: as many bytes as bfloat16, at up to twice the speed. GPUs from Ada (RTX 40) and Hopper (H100) on.
          The last MLP stays as it is: a quarter of what fp8 costs in loss comes from there (docs/speed-log.md).

nf4 and int8 are dequantized to the activations' dtype where they are multiplied, in forward and again in backward, so
that no dequantized matrix is kept. The embedding, the output layer and the norms stay as they are.
"""

from collections.abc import Container
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.attention import HAS_TRITON, is_few
from lit_model.model import ACTIVATIONS, MLP, Linear

Kind = Literal["none", "nf4", "int8", "fp8"]
FP8 = torch.float8_e4m3fn
PIECE = 2**18  # blocks of 64 weights that become nf4 at a time: a 70B's matrix in float32 and more would be 4 GiB
NF4_LEVELS = (  # from the paper's appendix
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize(block: nn.Module, kind: Kind, keep: Container[str] = (), last: bool = False) -> None:
    """Quantizes the linear layers of a block, in place, except for those whose weight's name in the block is in `keep`;
    of the `last` block under fp8 only those of its attention.

    Raises ValueError if the GPU or the shape of a layer does not allow it.
    """
    part = "attn." if last and kind == "fp8" else ""
    linears = {name: m for name, m in block.named_modules() if type(m) is Linear and name.startswith(part)}
    for linear in (m for name, m in linears.items() if f"{name}.weight" not in keep):
        weight = linear.weight.detach()
        linear.__class__ = KINDS[kind]  # the layer keeps its name and slots; only `matmul` and `dense` change
        linear.weight = None
        for name, tensor in linear.quantized(weight).items():
            setattr(linear, name, nn.Parameter(tensor, requires_grad=False))  # a parameter: sharding knows no buffers
    if kind == "fp8":
        for mlp in (m for m in block.modules() if type(m) is MLP):
            linears = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            if mlp.activation is ACTIVATIONS["silu"] and all(isinstance(linear, FP8Linear) for linear in linears):
                mlp.__class__ = FP8MLP


class _Product(torch.autograd.Function):
    """x W^T. Only the layer is kept for the backward pass; compiled code may keep W, too (finetune/memory.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: "_QuantizedLinear") -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.linear.product(grad, back=True), None


class _QuantizedLinear(Linear):
    def dense(self) -> Tensor:
        return self.dequantized(torch.float32)

    def matmul(self, x: Tensor) -> Tensor:
        return self.few_times(x) if is_few(x) and x.shape[-1] % 64 == 0 else _Product.apply(x, self)

    def product(self, x: Tensor, back: bool = False) -> Tensor:
        """x W^T of (T, n_in); back: x W of (T, n_out)."""
        weight = self.dequantized(x.dtype)
        return x @ weight if back else F.linear(x, weight)

    def few_times(self, x: Tensor) -> Tensor:
        from lit_model.kernels.decode import few_times

        return few_times(x, *self.stored())

    def stored(self) -> tuple[Tensor, ...]:
        """What kernels/decode.py reads."""
        return self.codes, self.scale


class Int8Linear(_QuantizedLinear):
    def matmul(self, x: Tensor) -> Tensor:
        is_few = len(x) <= 64 and not torch.is_grad_enabled()  # decoding; an evaluation multiplies as training does
        if is_few and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            return torch._weight_int8pack_mm(x, self.codes, self.scale.flatten().bfloat16())
        return super().matmul(x)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return dict(codes=(weight.float() / scale).round().to(torch.int8), scale=scale)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scale).to(dtype)


class NF4Linear(_QuantizedLinear):
    def stored(self) -> tuple[Tensor, ...]:
        if self.few_scales is None:  # half a bit a weight
            self.few_scales = self.scales()
        return self.codes, self.few_scales, self.levels

    few_scales = None  # made by the first product of few tokens

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.numel() % 64:
            raise ValueError(f"nf4 quantizes 64 weights at a time; {tuple(weight.shape)} is no multiple of that")
        blocks = weight.reshape(-1, 64)
        scale = blocks.abs().amax(-1, keepdim=True).float()  # (n, 1)
        levels, scale_levels = torch.tensor(NF4_LEVELS).to(weight.device), _scale_levels().to(weight.device)
        pieces = zip(blocks.split(PIECE), scale.split(PIECE), strict=True)
        codes = torch.cat([_nearest(part.float() * (1 / s.clamp(min=1e-30)), levels) for part, s in pieces])
        codes = codes[:, ::2] << 4 | codes[:, 1::2]  # two a byte, the first in the high half
        offset = scale.mean()
        centred = F.pad((scale - offset).flatten(), (0, -len(scale) % 256)).view(-1, 256)
        scale_of_scale = centred.abs().amax(-1, keepdim=True)
        scale_codes = _nearest(centred * (1 / scale_of_scale.clamp(min=1e-30)), scale_levels)
        return dict(
            codes=codes.view(len(weight), -1),  # (n_out, n_in / 2) uint8
            scale_codes=scale_codes,  # (n / 256, 256) uint8
            scale_of_scale=scale_of_scale,  # (n / 256, 1)
            offset=offset,
            levels=levels,
            scale_levels=scale_levels,
        )

    def scales(self) -> Tensor:
        """Of each 64 weights in a row of all, (n_out n_in / 64,) in float32."""
        scale = self.scale_levels[self.scale_codes.int()] * self.scale_of_scale + self.offset
        return scale.flatten()[: self.codes.numel() // 32]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        levels = self.levels[torch.stack((self.codes >> 4, self.codes & 15), dim=-1).int()]
        return (levels.view(-1, 64) * self.scales()[:, None]).to(dtype).view(self.out_features, self.in_features)


def _scale_levels() -> Tensor:
    """256 levels from -1 to 1, finer near 0: 2^e mantissas for each power of ten, from 10^-6 (e = 0) to 1 (e = 6)
    (8-bit Optimizers, https://arxiv.org/abs/2110.02861, dynamic quantization)."""
    means = [(torch.linspace(0.1, 1, 2**e + 1)[:-1] + torch.linspace(0.1, 1, 2**e + 1)[1:]) / 2 * 10.0 ** (e - 6)
             for e in range(7)]  # fmt: skip
    positive = torch.cat(means)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort()[0]


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of the ascending levels, as uint8."""
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x in fp8, and the scale of each (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(FP8).max
    return (x.float() * (1 / scale)).to(FP8), scale


def _weight_to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same for weights, which may take longer: of 8 scales of a row, within a factor of two, the one that rounds it
    best. An eighth less squared error than with the largest weight at the largest number."""
    weight = weight.float()
    largest = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    scales = largest * 2 ** (torch.arange(8, device=weight.device) / 8)  # (n_out, 8)
    errors = [((weight / s).to(FP8).float() * s - weight).square().sum(-1) for s in scales.split(1, dim=-1)]
    scale = scales.gather(-1, torch.stack(errors, dim=-1).argmin(-1, keepdim=True))  # (n_out, 1)
    return (weight / scale).to(FP8), scale


class FP8Linear(_QuantizedLinear):
    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
            raise ValueError(f"{torch.cuda.get_device_name()} has no fp8 products; use --quantize int8 or nf4")
        if any(n % 16 for n in weight.shape):
            raise ValueError(f"fp8 products want multiples of 16; a layer is {tuple(weight.shape)}")
        (codes, scale), (codes_t, scale_t) = _weight_to_fp8(weight), _weight_to_fp8(weight.t().contiguous())
        return dict(codes=codes, scale=scale, codes_t=codes_t, scale_t=scale_t)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return self.few_times(x) if is_few(x) else _Product.apply(x.bfloat16(), self).to(x.dtype)

    def product(self, x: Tensor, back: bool = False) -> Tensor:
        return self.product_of_fp8(*_to_fp8(x), back)

    def product_of_fp8(self, x8: Tensor, x_scale: Tensor, back: bool = False) -> Tensor:
        """Of x in fp8 with scales (T, 1), in bfloat16."""
        codes, scale = (self.codes_t, self.scale_t) if back else (self.codes, self.scale)
        return torch._scaled_mm(x8, codes.t(), x_scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


class FP8MLP(MLP):
    """LLaMA's MLP over fp8 layers: what lies between the products goes from and to fp8 in one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        linears = self.gate_proj, self.up_proj, self.down_proj
        plain = all(len(linear.deltas) == 0 and linear.bias is None for linear in linears)
        if is_few(x) or not (plain and x.is_cuda and HAS_TRITON):
            return super().forward(x)
        return _FP8SwiGLU.apply(x.bfloat16(), self).to(x.dtype)


class _FP8SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: FP8MLP) -> Tensor:
        from lit_model.kernels.swiglu_fp8 import swiglu_to_fp8

        x8 = _to_fp8(x)
        gate, up = mlp.gate_proj.product_of_fp8(*x8), mlp.up_proj.product_of_fp8(*x8)
        ctx.mlp = mlp
        ctx.save_for_backward(gate, up)
        return mlp.down_proj.product_of_fp8(*swiglu_to_fp8(gate, up))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        from lit_model.kernels.swiglu_fp8 import swiglu_backward_to_fp8

        mlp = ctx.mlp
        grad = mlp.down_proj.product(grad, back=True)
        gate8, gate_scale, up8, up_scale = swiglu_backward_to_fp8(grad, *ctx.saved_tensors)
        grad = mlp.gate_proj.product_of_fp8(gate8, gate_scale, back=True)
        return grad + mlp.up_proj.product_of_fp8(up8, up_scale, back=True), None


KINDS = {"nf4": NF4Linear, "int8": Int8Linear, "fp8": FP8Linear}
