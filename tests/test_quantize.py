"""Quantized layers: the codes are bitsandbytes', the gradients are right, and training works over all of them. On a GPU
if there is one: its fp8 products are others than a CPU's."""

from functools import partial

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition, nop
from test_methods import METHODS, NAMES, build, save, shake, trained
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from lit_model import load, model, quantize
from lit_model.packing import Example, pack

KINDS = ("nf4", "int8", "fp8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OVER = [*(name for name in NAMES if name in METHODS and name != "full"), "selective-last-block", "selective-bitfit"]
ERROR = {"nf4": 0.11, "int8": 0.02, "fp8": 0.05}  # relative, of a product: that of the weights, and in fp8 of x too


@pytest.fixture(autouse=True)
def on_the_gpu_if_there_is_one():
    with torch.device(DEVICE):
        yield


def quantized(weight: torch.Tensor, kind: str) -> model.Linear:
    linear = model.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight)
    holder = nn.ModuleList([linear])
    quantize.quantize(holder, kind)
    return linear


@pytest.mark.parametrize("shape", [(64, 256), (192, 576), (1000, 640)])
def test_nf4_codes_are_those_of_bitsandbytes(shape):
    oracle = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape) * 0.02
    weight[3, :70] = 0  # a block of zeros only
    codes, state = oracle.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    linear = quantized(weight, "nf4")
    assert torch.equal(linear.codes.flatten(), codes.flatten())
    assert torch.equal(linear.levels, state.code) and torch.equal(linear.scale_levels, state.state2.code)
    assert torch.equal(linear.offset, state.offset)
    # the scales' codes: ours is always the nearest level; theirs is a neighbour for a few that lie half-way
    ours, theirs = linear.scale_codes.flatten()[: state.absmax.numel()].int(), state.absmax.int()
    assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 0.01
    torch.testing.assert_close(
        linear.dequantized(torch.float32), oracle.dequantize_4bit(codes, state), atol=1e-3, rtol=0
    )


def test_bits_per_weight():
    for kind, bits in (("nf4", 4.13), ("int8", 8.02), ("fp8", 16.04)):
        linear = quantized(torch.randn(1536, 1536), kind)
        got = 8 * sum(p.numel() * p.element_size() for p in linear.parameters()) / 1536**2
        assert abs(got - bits) < 0.01, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_product_and_its_gradient(kind):
    weight, x = torch.randn(96, 128, dtype=torch.float64) * 0.02, torch.randn(48, 128, dtype=torch.float64)
    towards = torch.randn(48, 96, dtype=torch.float64)
    linear, short = quantized(weight.float(), kind), x.bfloat16().requires_grad_()
    y = linear(short)
    (grad,) = torch.autograd.grad(y, short, towards.bfloat16())
    for got, expected in ((y, x @ weight.T), (grad, towards @ weight)):
        error = (got.double() - expected).norm() / expected.norm()
        print(f"{kind}: relative error {error:.4f}")
        assert 0.001 < error < ERROR[kind]


def test_fp8_gradient_against_the_dequantized_weight_in_float64():
    """What is left is the rounding of the gradient's own rows to 3 bits of mantissa: 2^-4 at most, 2.6 % on average."""
    linear, towards = quantized(torch.randn(96, 128), "fp8"), torch.randn(48, 96)
    x = torch.zeros(48, 128, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x), x, towards.bfloat16())
    exact = towards.bfloat16().double() @ (linear.codes_t.double() * linear.scale_t.double()).T
    assert (grad.double() - exact).norm() < 0.03 * exact.norm()
    rows, scale = quantize._to_fp8(towards.bfloat16())
    rounded = (rows.double() * scale.double()) @ (linear.codes_t.double() * linear.scale_t.double()).T
    assert (grad.double() - rounded).norm() < 0.003 * rounded.norm()  # bfloat16 of the result


def test_fp8_weights_have_the_scale_that_rounds_them_best():
    weight = torch.randn(64, 512) * 0.02
    errors = []
    for codes, scale in (quantize._to_fp8(weight), quantize._weight_to_fp8(weight)):
        errors.append((codes.float() * scale - weight).square().sum(-1))
        assert (codes.float().abs().amax(-1) > 224).all() and codes.float().isfinite().all()  # half the range is used
    assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.92 * errors[0].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OVER)
def test_methods_train_and_generate_over_quantized_layers(kind, name, checkpoint, tmp_path):
    with torch.device("cpu"):
        gpt = build(checkpoint, name, dtype=torch.bfloat16, device=DEVICE, quantize=kind)
    ours = trained(shake(gpt))
    last_mlp = f"blocks.{gpt.config.n_layer - 1}.mlp."
    for linear_name, m in gpt.blocks.named_modules(prefix="blocks"):
        if isinstance(m, model.Linear):
            left = kind == "fp8" and linear_name.startswith(last_mlp)
            assert (type(m) is model.Linear) == (left or f"{linear_name}.weight" in ours)
    example = Example(torch.randint(0, gpt.config.vocab_size, (30,), device="cpu").int().numpy(), 1)
    ((idx, packed),) = pack([example], 100, gpt.n_virtual_tokens, gpt.n_virtual_keys)
    idx, packed = idx.to(DEVICE), packed.to(DEVICE)
    gpt(idx, packed).backward()
    for parameter, p in gpt.named_parameters():
        assert (p.grad is not None and p.grad.norm() > 0) == (parameter in ours), parameter
    file = save(tmp_path / "lit_method.safetensors", gpt, name, checkpoint)
    loaded = load(checkpoint, file, dtype=torch.bfloat16, device=DEVICE, quantize=kind)
    with torch.no_grad():
        torch.testing.assert_close(loaded(idx[None]), gpt.eval()(idx[None]), rtol=0, atol=0)


def test_a_quantized_network_is_close_to_its_base(checkpoint, family):
    """Norms after attention and MLP bring what 4 bits lose in small outputs to the size of the others."""
    idx, share = torch.randint(0, 97, (2, 30)), 0.6 if "norm_place" in family else 0.3
    base = load(checkpoint, device=DEVICE)(idx)
    for kind in KINDS:
        dtype = torch.float32 if kind != "fp8" else torch.bfloat16
        error = load(checkpoint, quantize=kind, dtype=dtype, device=DEVICE)(idx) - base
        assert 0 < error.norm() < share * base.norm(), kind


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_few_bits_is_refused(kind, checkpoint, tmp_path):
    file = save(tmp_path / "m.safetensors", build(checkpoint, "lora"), "lora", checkpoint)
    quantized = load(checkpoint, file, device=DEVICE, quantize=kind)
    with pytest.raises(ValueError, match="4 or 8 bits would lose what was trained"):
        quantized.merge()


def test_unfit_shapes_are_refused():
    with pytest.raises(ValueError, match="64 weights"):
        quantized(torch.randn(3, 30), "nf4")
    with pytest.raises(ValueError, match="multiples of 16"):
        quantized(torch.randn(30, 32), "fp8")


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_equal_eager_ones_at_any_length(kind):
    linear = quantized(torch.randn(96, 128), kind)
    compiled = torch.compile(linear, backend="aot_eager", dynamic=True)
    for n in (20, 33, 57):
        x = torch.randn(n, 128, dtype=torch.bfloat16, requires_grad=True)
        (grad,), (expected,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, linear))
        assert expected.norm() > 0 and torch.equal(grad, expected)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_decoding_in_bfloat16_on_a_cpu_is_near_the_plain_products(kind, tiny):
    """int8 codes go through torch's own product of them; the rounding is bfloat16's."""
    gpt = load(tiny / "base", dtype=torch.bfloat16, quantize=kind)
    ids = torch.randint(0, 400, (2, 9))
    expected = gpt(ids).float()
    with torch.no_grad():
        got = gpt(ids).float()
    assert (got - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.skipif(DEVICE == "cuda", reason="as on a CPU")
@pytest.mark.parametrize("kind, cse", [("none", True), ("int8", True), ("nf4", False)])
def test_what_compiled_layers_keep_where_memory_is_short(kind, cse):
    """With the settings of finetune/memory.py the input and what `a` makes of it: no matrix that was dequantized, and
    no activation."""
    torch._dynamo.reset()
    layers, kept = nn.ModuleDict(dict(a=model.Linear(64, 96), b=model.Linear(96, 64))).bfloat16(), []
    layers.requires_grad_(False)
    if kind != "none":
        quantize.quantize(layers, kind)
    how = partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=how)
    run = torch.compile(lambda x: layers["b"](F.silu(layers["a"](F.silu(x)))), backend=backend, dynamic=True)
    x, own = torch.randn(7, 64).bfloat16().requires_grad_(), {t.data_ptr() for t in layers.state_dict().values()}
    settings = functorch_config.patch(ban_recompute_materialized_backward=False, cse=cse)
    with settings, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x)
    assert sorted(t.shape for t in kept if t.data_ptr() not in own) == [(7, 64), (7, 96)]
