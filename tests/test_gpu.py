"""On a GPU: the variable-length attention kernel, with shared segments and grouped heads, agrees with the CPU."""

import copy

import numpy as np
import pytest
import torch
from conftest import randomize

from lit_model import adapter, generate, lora, model
from lit_model.checkpoint import freeze
from lit_model.packing import Example, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def examples(n: int, seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    head = np.random.default_rng(0).integers(0, 97, 20)
    lengths = rng.integers(5, 60, n)
    made = [np.concatenate((head if i % 3 else head[:2], rng.integers(0, 97, k))) for i, k in enumerate(lengths)]
    return [Example(ids.astype(np.int32), max(1, len(ids) - 5)) for ids in made]


def build(family: dict, method: str) -> model.GPT:
    gpt = model.GPT(model.Config(**family))
    module, options = {"adapter": (adapter, adapter.Adapter(start_layer=1)), "lora": (lora, lora.LoRA())}[method]
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


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_compiled_blocks_equal_eager_ones_and_rows_of_new_shapes_compile_nothing(family, method):
    gpt = build(family, method).cuda()
    gpt.dtype = torch.bfloat16
    sizes = (20, 33, 7, 50, 41)
    eager = [step(gpt, examples(n, n)) for n in sizes]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for block in gpt.blocks:
        block.compile(dynamic=True)
    made = []
    for n, (loss, grad) in zip(sizes, eager):
        got_loss, got_grad = step(gpt, examples(n, n))
        made.append(graphs["unique_graphs"])
        assert abs(got_loss - loss) < 1e-2 * loss and (got_grad - grad).norm() < 5e-2 * grad.norm()
    print(f"{method}: {made} graphs for {len(gpt.blocks)} blocks")
    assert made[-1] == made[1]


def test_greedy_decoding_on_the_gpu_equals_the_cpu(family):
    gpt = build(family, "adapter").eval()
    expected = list(generate(gpt, [1, 2, 3], 40, temperature=0))
    assert list(generate(gpt.cuda(), [1, 2, 3], 40, temperature=0)) == expected
