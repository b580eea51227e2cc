"""On a GPU: rows, compiled blocks and recomputed ones give the CPU's numbers; memory, waiting, repeats."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from lightning_fabric import Fabric
from safetensors.torch import load_file

from finetune import loop, setup
from finetune.report import Step
from lit_model.methods import adapter, full, lora
from lit_model import generate, model
from lit_model.load import freeze
from lit_model.packing import Example, pack
from lit_model.quantize import FP8MLP, quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def examples(n: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    head = np.random.default_rng(0).integers(0, 97, 20)
    lengths = rng.integers(5, 60, n)
    made = [np.concatenate((head if i % 3 else head[:2], rng.integers(0, 97, k))) for i, k in enumerate(lengths)]
    return [Example(ids.astype(np.int32), max(1, len(ids) - 5)) for ids in made]


def build(family: dict, method: str) -> model.GPT:
    gpt = model.GPT(model.Config(**family))
    methods = {"adapter": (adapter, adapter.Adapter(start_layer=1)), "full": (full, None), "lora": (lora, lora.LoRA())}
    module, options = methods[method]
    module.install(gpt, options)
    randomize(gpt, std=0.1)
    freeze(gpt, module.trainable)
    return gpt


def step(gpt: model.GPT, data: list[Example]) -> tuple[float, torch.Tensor]:
    """(loss per target, all gradients in one vector)"""
    device, n = gpt.wte.weight.device, sum(e.n_targets for e in data)
    gpt.zero_grad()
    total = 0.0
    for idx, packed in pack(data, row_tokens=300):
        loss = gpt(idx.to(device), packed.to(device)) / n
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten().cpu() for p in gpt.parameters() if p.requires_grad])


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_bfloat16_rows_on_the_gpu_equal_float32_on_the_cpu(family, method):
    gpt = build(family, method)
    loss, grad = step(gpt, examples(20, 1))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        other = copy.deepcopy(gpt).cuda()
        other.dtype = dtype
        got_loss, got_grad = step(other, examples(20, 1))
        error = ((got_grad - grad).norm() / grad.norm()).item()
        print(f"{method} {dtype}: loss {loss:.5f} {got_loss:.5f}, gradients differ by {error:.1e}")
        assert abs(got_loss - loss) < tolerance * loss and error < tolerance


@pytest.mark.parametrize("method", ["adapter", "full", "lora"])
def test_compiled_blocks_equal_eager_ones_and_rows_of_new_shapes_compile_nothing(family, method):
    gpt = build(family, method).cuda()
    gpt.dtype = torch.bfloat16
    sizes = (20, 33, 7, 50, 41)
    eager = [step(gpt, examples(n, n)) for n in sizes]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    gpt.compile()
    made = []
    for n, (loss, grad) in zip(sizes, eager):
        got_loss, got_grad = step(gpt, examples(n, n))
        made.append(graphs["unique_graphs"])
        assert abs(got_loss - loss) < 1e-2 * loss and (got_grad - grad).norm() < 5e-2 * grad.norm()
    print(f"{method}: {made} graphs for {len(gpt.blocks)} blocks")
    assert made[-1] == made[1]


@pytest.fixture
def deterministic():
    """torch's attention, which serves blocks with a window, adds up gradients in any order otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recompute", ["on", "offload"])
def test_recomputed_blocks_give_the_same_gradients(family, recompute, deterministic):
    gpt = build(family, "lora").cuda()
    gpt.dtype = torch.bfloat16
    loss, grad = step(gpt, examples(20, 1))
    gpt.recompute = recompute
    for _ in range(3):
        got_loss, got_grad = step(gpt, examples(20, 1))
        assert got_loss == loss and torch.equal(got_grad, grad)


def wide(quantize_to: str = "none") -> model.GPT:
    """A network wide enough for its memory to be measured."""
    config = dict(vocab_size=4096, n_layer=8, n_head=8, n_embd=1024, n_hidden=2816)
    with torch.device("cuda"):
        gpt = model.GPT(model.Config(**config)).bfloat16()
        lora.install(gpt, lora.LoRA())
    gpt.dtype = torch.bfloat16
    if quantize_to != "none":
        for block in gpt.blocks:
            quantize(block, quantize_to)
    freeze(gpt, lora.trainable)
    return gpt


def prepared(gpt: model.GPT, **options) -> tuple:
    train = setup.Train(batch_size=100)
    fabric = Fabric(accelerator="cuda", devices=1)
    fabric.launch()
    rng = np.random.default_rng(0)
    data = [Example(rng.integers(0, 4096, k).astype(np.int32), 20) for k in rng.integers(30, 200, 1600)]
    run = setup.Run(setup.Options(train=train, compile="off", **options), fabric, gpt.dtype, None, data, [], 16384)
    return loop.prepare(run, gpt)


def steps(run, network, optimizer, gpt, n: int) -> list[Step]:
    stream = loop.with_rows(loop.batches(run.train_examples, run.options.train), gpt, run, share=True)
    done = []
    for number, (batch, rows) in zip(range(n), stream):
        done.append(Step(number, 1e-3, batch))
        loop.train_step(run, network, optimizer, done[-1], rows)
    torch.cuda.synchronize()
    return done


@pytest.mark.parametrize("memory_gb", [None, 1.2, 0.6])
def test_a_run_needs_the_memory_that_was_estimated(memory_gb):
    gpt = wide()
    run, network, optimizer, plan = prepared(gpt, memory_gb=memory_gb)
    torch.cuda.reset_peak_memory_stats()
    steps(run, network, optimizer, gpt, 10)
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.set_per_process_memory_fraction(1.0)
    print(f"{plan.report}; peak {peak:.2f} GiB")
    if memory_gb is None:
        estimate = float(plan.report.split("needs ")[1].split(" GiB")[0])
        assert gpt.recompute == "off" and peak == pytest.approx(estimate, rel=0.15, abs=0.1)
    else:
        assert peak <= memory_gb and (gpt.recompute != "off" or "rows of" in plan.report)


def test_a_step_never_waits_for_the_gpu():
    gpt = wide()
    run, network, optimizer, _ = prepared(gpt)
    steps(run, network, optimizer, gpt, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones((), device="cuda").item()
        stream = loop.with_rows(loop.batches(run.train_examples, run.options.train), gpt, run, share=True)
        batch, rows = next(stream)
        step = Step(1, 1e-3, batch)
        loop.train_step(run, network, optimizer, step, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(step.receive()))


@pytest.mark.parametrize("bias", [None, "gate_proj", "up_proj", "down_proj"])
def test_an_fp8_mlp_equals_its_layers(bias):
    """A bias, as selective finetuning trains one, is added in whichever of the three layers it is."""
    torch.manual_seed(0)
    mlp = model.MLP(model.Config(n_head=2, n_embd=64, n_hidden=160)).cuda()
    quantize(mlp, "fp8")
    assert type(mlp) is FP8MLP
    if bias:
        linear = getattr(mlp, bias)
        linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, device="cuda"))
    x = torch.randn(48, 64, device="cuda", requires_grad=True)
    got, expected = mlp(x), model.MLP.forward(mlp, x)
    towards = torch.randn_like(expected)
    for a, b in zip(
        (got, *torch.autograd.grad(got, x, towards)), (expected, *torch.autograd.grad(expected, x, towards))
    ):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("kind", ["none", "fp8", "nf4"])
def test_steps_repeat_bit_for_bit(kind):
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        gpt = wide(kind)
        run, network, optimizer, _ = prepared(gpt)
        steps(run, network, optimizer, gpt, 3)
        seen.append(torch.cat([p.detach().flatten() for p in gpt.parameters() if p.requires_grad]))
    assert torch.equal(*seen)


def test_a_deterministic_run_repeats_bit_for_bit(tiny, tmp_path):
    """Each in a process of its own: cuBLAS reads its setting once."""
    script = Path(__file__).parents[1] / "finetune" / "lora.py"
    flags = (
        f"--checkpoint_dir {tiny}/base --data {tiny}/data.json --deterministic true --compile on --train.max_steps 4"
    )
    for name in "ab":
        subprocess.run([sys.executable, script, *flags.split(), "--out_dir", tmp_path / name], check=True)
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_greedy_decoding_on_the_gpu_equals_the_cpu(family):
    gpt = build(family, "adapter").eval()
    expected = list(generate(gpt, [1, 2, 3], 40, temperature=0))
    assert list(generate(gpt.cuda(), [1, 2, 3], 40, temperature=0)) == expected
