"""SwiGLU to fp8 in Triton, for a GPU: a row and its scale in one pass over memory, where torch's compiler took two
(docs/speed-log.md). The same in plain torch: `_to_fp8` in quantize.py; tests/test_kernels.py compares them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_fp8(row, x, to_ptr, scale_ptr, H, d):
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / 448.0
    tl.store(to_ptr + row.to(tl.int64) * H + d, (x * (1 / scale)).to(to_ptr.dtype.element_ty), mask=d < H)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _load_row(ptr, row, H, d):
    return tl.load(ptr + row.to(tl.int64) * H + d, mask=d < H, other=0.0).to(tl.float32)


@triton.jit
def _swiglu_forward(gate_ptr, up_ptr, h_ptr, scale_ptr, H, WIDTH: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, WIDTH)
    gate, up = _load_row(gate_ptr, row, H, d), _load_row(up_ptr, row, H, d)
    _store_fp8(row, gate * tl.sigmoid(gate) * up, h_ptr, scale_ptr, H, d)


@triton.jit
def _swiglu_backward(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dgate_scale_ptr, dup_ptr, dup_scale_ptr, H, WIDTH: tl.constexpr
):  # fmt: skip
    row, d = tl.program_id(0), tl.arange(0, WIDTH)
    gate, up, dh = _load_row(gate_ptr, row, H, d), _load_row(up_ptr, row, H, d), _load_row(dh_ptr, row, H, d)
    s = tl.sigmoid(gate)
    _store_fp8(row, dh * up * s * (1 + gate * (1 - s)), dgate_ptr, dgate_scale_ptr, H, d)
    _store_fp8(row, dh * gate * s, dup_ptr, dup_scale_ptr, H, d)


def _fp8_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("lit_model::swiglu_to_fp8", mutates_args=())
def swiglu_to_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up in fp8, and the scale of each row. gate, up: (T, H). Returns (T, H) and (T, 1)."""
    h, scale = _fp8_like(gate)
    H = gate.shape[1]
    _swiglu_forward[(len(gate),)](
        gate.contiguous(), up.contiguous(), h, scale, H, WIDTH=triton.next_power_of_2(H), num_warps=16
    )
    return h, scale


@swiglu_to_fp8.register_fake
def _(gate, up):
    return _fp8_like(gate)


@torch.library.custom_op("lit_model::swiglu_backward_to_fp8", mutates_args=())
def swiglu_backward_to_fp8(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of gate and up (T, H) in fp8, each with the scale of its rows (T, 1), from that of the result."""
    outputs, H = (*_fp8_like(gate), *_fp8_like(up)), gate.shape[1]
    _swiglu_backward[(len(gate),)](
        dh.contiguous(), gate, up, *outputs, H, WIDTH=triton.next_power_of_2(H), num_warps=32
    )
    return outputs


@swiglu_backward_to_fp8.register_fake
def _(dh, gate, up):
    return *_fp8_like(gate), *_fp8_like(up)
