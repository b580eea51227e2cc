"""On a GPU: rows, compiled blocks and recomputed ones give the CPU's numbers; memory, waiting, repeats."""

import copy
import os
import subprocess
import sys
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, ROOT, randomize
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune import loop, run
from finetune.report import Ask, Step
from lit_model import attention, generate, model, moe
from lit_model.decode import Decoder
from lit_model.generate import generate_batch
from lit_model.load import method_module, method_options
from lit_model.methods import lora
from lit_model.packing import Example, Segment, lay_out, pack
from lit_model.quantize import FP8MLP, quantize
from lit_model.sampling import Sampling

if torch.cuda.is_available():
    from lit_model.kernels.long_attention import long_attention
    from lit_model.kernels.packed_attention import packed_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def examples(n: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    head = np.random.default_rng(0).integers(0, 97, 20)
    lengths = rng.integers(5, 60, n)
    made = [np.concatenate((head if i % 3 else head[:2], rng.integers(0, 97, k))) for i, k in enumerate(lengths)]
    return [Example(ids.astype(np.int32), max(1, len(ids) - 5)) for ids in made]


def build(family: dict, method: str) -> model.GPT:
    gpt = model.GPT(model.Config(**family)).requires_grad_(False)
    options = dict(start_layer=1) if method == "adapter" else {}
    method_module(method).install(gpt, method_options(method, **options))
    return randomize(gpt, std=0.1)


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


def rounding(family: dict, usual: float) -> float:
    """Share by which bfloat16 may change gradients. In a random network with everything new every rounding grows: on a
    CPU, too, they differ by 0.06 to 0.26 from those in float32."""
    return 0.5 if "norm_place" in family else usual


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_bfloat16_rows_on_the_gpu_equal_float32_on_the_cpu(family, method):
    gpt = build(family, method)
    loss, grad = step(gpt, examples(20, 1))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, rounding(family, 3e-2))):
        other = copy.deepcopy(gpt).cuda()
        other.dtype = dtype
        got_loss, got_grad = step(other, examples(20, 1))
        error = ((got_grad - grad).norm() / grad.norm()).item()
        print(f"{method} {dtype}: loss {loss:.5f} {got_loss:.5f}, gradients differ by {error:.1e}")
        assert abs(got_loss - loss) < min(tolerance, 3e-2) * loss and error < tolerance


def test_grouped_products_equal_one_after_the_other():
    ends = torch.tensor([5, 5, 69, 70, 128], dtype=torch.int32, device="cuda")
    x, weight = torch.randn(128, 64, device="cuda"), torch.randn(5, 48, 64, device="cuda")
    x, weight = (t.bfloat16().requires_grad_() for t in (x, weight))
    ys = moe.Rows(ends).times(x, weight), moe._one_by_one(x, weight, ends)
    towards = torch.randn_like(ys[0])
    for pair in (ys, *zip(*(torch.autograd.grad(y, (x, weight), towards) for y in ys))):
        torch.testing.assert_close(*pair, rtol=2e-2, atol=5e-2)


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
        assert abs(got_loss - loss) < 1e-2 * loss
        assert (got_grad - grad).norm() < rounding(family, 5e-2) * grad.norm()
    print(f"{method}: {made} graphs for {len(gpt.blocks)} blocks")
    assert made[-1] == made[1]


@pytest.mark.parametrize("hs, lengths", [(64, [2500, 4000]), (96, [2600]), (128, [2560, 3000, 3000]), (256, [4000])])
def test_attention_of_long_examples(hs, lengths):
    """Beside torch's in float64; in a compiled function, too. The packed kernels may be off by as much."""
    packed = lay_out([Segment(n) for n in lengths]).to(torch.device("cuda"))
    torch.manual_seed(0)
    q, k, v, towards = (torch.randn(sum(lengths), n, hs, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2, 4))
    tensors, errors = [t.requires_grad_() for t in (q, k, v)], []
    expected = attention._attend_each(*(t.double() for t in tensors), packed, hs**-0.5)
    expected = expected, *torch.autograd.grad(expected, tensors, towards.double())
    compiled = torch.compile(long_attention, dynamic=True, fullgraph=True)
    bounds = torch.tensor([0, *np.cumsum(lengths)])
    kernels = partial(long_attention, bounds=bounds), partial(compiled, bounds=bounds)
    for attend in (partial(packed_attention, blocks=packed.blocks[None]), *(kernels if hs <= 128 else ())):
        y = attend(q, k, v, scale=hs**-0.5)
        got = y, *torch.autograd.grad(y, tensors, towards)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(got, expected)])
    print(*errors, sep="\n")
    assert np.max(errors) < 6e-3


@pytest.mark.parametrize("hs", [96, 128, 256])
@pytest.mark.parametrize("window, softcap", [(200, None), (None, 20.0), (200, 20.0)])
def test_windows_and_caps_in_bfloat16(hs, window, softcap):
    """Of parents and children, as the packed kernels compute them, beside float64."""
    root = Segment(100)
    packed = lay_out([root, Segment(400, root), Segment(300, root), Segment(90)], windows=(window,))
    packed = packed.to(torch.device("cuda"))
    q, k, v, towards = (torch.randn(890, n, hs, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2, 4))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    q64, *kv64 = (t.double() for t in tensors)
    expected = attention._attend_each(q64, *(t[packed.kv_index] for t in kv64), packed, hs**-0.5, window, softcap)
    expected = expected, *torch.autograd.grad(expected, tensors, towards.double())
    y = packed_attention(q, k, v, packed.blocks[window], hs**-0.5, window=window, softcap=softcap)
    for got, right in zip((y, *torch.autograd.grad(y, tensors, towards)), expected):
        assert (got - right).norm() < 6e-3 * right.norm()


def test_gradients_of_32_thousand_tokens():
    """Of both kernels beside torch's own attention, which is as far from them as they are from each other."""
    packed = lay_out([Segment(32768)]).to(torch.device("cuda"))
    q, k, v, towards = (torch.randn(32768, n, 128, device="cuda", dtype=torch.bfloat16) for n in (4, 1, 1, 4))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads = [t.transpose(0, 1)[None] for t in (q, k.expand(-1, 4, -1), v.expand(-1, 4, -1))]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)
    expected = torch.autograd.grad(y, tensors, towards)
    for y in (
        packed_attention(q, k, v, packed.blocks[None], 128**-0.5),
        long_attention(q, k, v, torch.tensor([0, 32768]), 128**-0.5),
    ):
        for a, b in zip(torch.autograd.grad(y, tensors, towards), expected):
            assert (a - b).norm() < 1e-2 * b.norm()


def test_long_rows_compile_nothing_anew(monkeypatch):
    config = dict(vocab_size=97, block_size=8192, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_hidden=96)
    gpt = build(config, "lora").cuda()
    gpt.dtype = torch.bfloat16
    rng = np.random.default_rng(0)
    sizes = [[2700, 2600], [4000], [2600], [2570, 3000, 2600], [5000], [70, 30], [6000]]
    rows = [[Example(rng.integers(0, 97, n).astype(np.int32), n // 2) for n in row] for row in sizes]
    gpt.recompute = 1
    with monkeypatch.context() as m:
        m.setattr(attention, "_has_cudnn", lambda q: False)
        expected = [step(gpt, row) for row in rows]
    torch._dynamo.reset()
    graphs, made = torch._dynamo.utils.counters["stats"], []
    graphs.clear()
    gpt.compile()
    for row, (loss, grad) in zip(rows, expected):
        got_loss, got_grad = step(gpt, row)
        made.append(graphs["unique_graphs"])
        assert abs(got_loss - loss) < 1e-2 * loss and (got_grad - grad).norm() < 5e-2 * grad.norm()
    print(made)
    assert made[4] == made[1] and made[-1] == made[-2]


@pytest.fixture
def deterministic():
    """torch's attention, which serves blocks with a window, adds up gradients in any order otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("offload", [0, 1, 2])
def test_recomputed_blocks_give_the_same_gradients(family, offload, deterministic, monkeypatch):
    monkeypatch.setattr("lit_model.recompute.PIECE", 2**14)
    gpt = build(family, "lora").cuda()
    gpt.dtype = torch.bfloat16
    loss, grad = step(gpt, examples(20, 1))
    gpt.recompute, gpt.offload = 2, offload
    for _ in range(3):
        got_loss, got_grad = step(gpt, examples(20, 1))
        assert got_loss == loss and torch.equal(got_grad, grad)


def wide(quantize_to: str = "none") -> model.GPT:
    """A network wide enough for its memory to be measured."""
    config = dict(vocab_size=4096, n_layer=8, n_head=8, n_embd=1024, n_hidden=2816)
    with torch.device("cuda"):
        gpt = model.GPT(model.Config(**config)).bfloat16().requires_grad_(False)
        lora.install(gpt, lora.LoRA())
    gpt.dtype = torch.bfloat16
    if quantize_to != "none":
        for block in gpt.blocks:
            quantize(block, quantize_to)
    return gpt


def prepared(gpt: model.GPT, device: str = "cuda", **options) -> tuple:
    """(run, network, optimizer) over random examples"""
    fabric = Fabric(accelerator=device, devices=1)
    fabric.launch()
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(0, 4096, k).astype(np.int32), 20) for k in rng.integers(30, 200, 1600)]
    a_run = run.Run(
        options=run.RunOptions(train=run.Train(batch_size=100), **options), fabric=fabric, dtype=gpt.dtype,
        base=SimpleNamespace(config=gpt.config), tokenizer=None, train_examples=examples, val_examples=[],
        row_tokens=16384, task=None, state=None, progress=None,
    )  # fmt: skip
    return a_run, *run.prepare(a_run, gpt, share=True)


def steps(a_run, network, optimizer, gpt: model.GPT, n: int) -> list[Step]:
    done = []
    for step, rows in islice(a_run.steps(gpt), n):
        loop.train_step(a_run, network, optimizer, step, rows)
        step.send(Ask.GO)
        done.append(step)
    return done


@pytest.mark.parametrize("memory_gb", [None, 1.2, 0.6])
def test_a_run_needs_the_memory_that_was_tried(memory_gb, capsys):
    gpt = wide()
    prepared_run = prepared(gpt, memory_gb=memory_gb)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    steps(*prepared_run, gpt, 10)
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.set_per_process_memory_fraction(1.0)
    line = capsys.readouterr().out.splitlines()[-1]
    print(f"{line}; peak {peak:.2f} GiB")
    if memory_gb is None:
        stated = float(line.split("needs ")[1].split(" GiB")[0])
        assert gpt.recompute == 0 and peak == pytest.approx(stated, rel=0.15, abs=0.1)
    else:
        assert peak <= memory_gb and (gpt.recompute or prepared_run[0].row_tokens < 16384)


def test_a_step_never_waits_for_the_gpu():
    gpt = wide()
    a_run, network, optimizer = prepared(gpt)
    steps(a_run, network, optimizer, gpt, 2)
    step, rows = next(a_run.steps(gpt))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones((), device="cuda").item()
        loop.train_step(a_run, network, optimizer, step, rows)
        step.send(Ask.GO)
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


@pytest.mark.parametrize("kind", ["none", "fp8", "nf4", "compiled"])
def test_steps_repeat_bit_for_bit(kind):
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        torch._dynamo.reset()
        gpt = wide("none" if kind == "compiled" else kind)
        if kind == "compiled":
            gpt.compile()
        steps(*prepared(gpt), gpt, 3)
        ends.append(torch.cat([p.detach().flatten() for p in gpt.parameters() if p.requires_grad]))
    assert torch.equal(*ends)


def test_a_run_repeats_bit_for_bit(tiny, tmp_path):
    """Each in a process of its own."""
    flags = f"--checkpoint_dir {tiny}/base --data {tiny}/data.json --train.max_steps 4 --train.sample="
    for name in "ab":
        command = [sys.executable, "finetune/lora.py", *flags.split(), "--out_dir", tmp_path / name]
        subprocess.run(
            command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        )
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_greedy_decoding_on_the_gpu_equals_the_cpu(family):
    gpt = build(family, "adapter").eval()
    expected = list(generate(gpt, [1, 2, 3], 40, temperature=0))
    assert list(generate(gpt.cuda(), [1, 2, 3], 40, temperature=0)) == expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_decodes_what_steps_do(name, dtype, monkeypatch):
    """In a batch and alone; and, in float32, what one pass finds likeliest."""
    gpt = randomize(model.GPT(model.Config(**FAMILIES[name])), std=0.1).to(dtype).cuda().eval()
    prompts, ways = [[5, 6, 7], [9] * 11, [1, 2]], [Sampling(0), Sampling(0.8, 20, seed=1), Sampling(seed=2)]

    def decoded(prompts: list, ways: list) -> list[list[int]]:
        found = [[] for _ in prompts]
        for i, token in generate_batch(gpt, prompts, 24, ways):
            found[i].append(token)
        return found

    graph = decoded(prompts, ways)
    if dtype is torch.float32:
        assert graph == [decoded([ids], [way])[0] for ids, way in zip(prompts, ways)]
        likeliest = gpt(torch.tensor([prompts[0] + graph[0]]).cuda())[0, 2:-1].argmax(-1)
        assert graph[0] == likeliest.tolist()

    @torch.no_grad()
    def step(self) -> None:
        self._step(self.size)

    monkeypatch.setattr(Decoder, "step", step)
    assert decoded(prompts, ways) == graph
