"""A run is made to fit into the memory of a GPU. The GPU here is a pretended one, of which it is known what it needs;
that the estimate holds on a real one is tested in test_gpu.py."""

import numpy as np
import pytest
import torch

from finetune import memory
from lit_model.methods import lora
from lit_model import model
from lit_model.load import freeze
from lit_model.packing import Example

MIB = 2**20
KEPT = {"off": 3.0, "on": 0.25, "offload": 0.05}  # MiB a token


@pytest.fixture
def plan(monkeypatch):
    """memory.plan for 4 batches of 16 examples of 100 tokens, on a GPU of so many MiB. The weights take 1000."""
    config = model.Config(vocab_size=50, block_size=512, n_layer=2, n_head=2, n_embd=16, n_hidden=32)
    gpt = lora.GPT(lora.Config(**vars(config)))
    freeze(gpt, lora.trainable)
    rng = np.random.default_rng(0)
    batches = [[Example(rng.integers(0, 50, 101).astype(np.int32), 10) for _ in range(16)] for _ in range(4)]
    peak = gaps = 0

    def forward(idx, packed):
        nonlocal peak
        peak = (1000 + KEPT[gpt.recompute] * len(idx)) * MIB
        if peak * (1 + gaps) > size * MIB:
            raise torch.OutOfMemoryError
        return next(p for p in gpt.parameters() if p.requires_grad).sum()

    size, limits = 0, []
    monkeypatch.setattr(gpt, "forward", forward)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size * MIB, size * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, device: limits.append(f))
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)

    def run(mib: int, memory_gb: float | None = None, n: int = 16, lost: float = 0):
        nonlocal size, gaps
        size, gaps = mib, lost
        some = [batch[:n] for batch in batches]
        made = memory.plan(gpt, lambda loss: loss.backward(), some, 4096, True, memory_gb, 1, gpt.wte.weight.device)
        assert all(p.grad is None for p in gpt.parameters())
        return made, gpt.recompute, limits

    return run


def test_what_fits_is_left_alone(plan):
    made, recompute, _ = plan(16000)
    assert (made.row_tokens, recompute) == (4096, "off")
    assert made.report == "training needs 5.7 GiB of 15.6"


def test_shorter_rows_first_then_recomputing_then_the_host(plan):
    made, recompute, _ = plan(5000)
    assert recompute == "off" and made.row_tokens == pytest.approx((0.98 * 5000 - 1000) / 3, abs=2)
    assert made.report == f"training needs 5.7 GiB of 4.9; rows of {made.row_tokens:,} tokens instead of 1,600"
    made, recompute, _ = plan(2500)
    assert (made.row_tokens, recompute) == (4096, "on")
    assert made.report == "training needs 5.7 GiB of 2.4, blocks recomputed"
    made, recompute, _ = plan(1160)
    assert (made.row_tokens, recompute) == (pytest.approx((0.98 * 1160 - 1000) / 0.05, abs=20), "offload")
    assert made.report.endswith("blocks recomputed and their inputs kept on the host")


def test_rows_are_tried_where_memory_is_tight(plan, monkeypatch):
    """Gaps between tensors take half as much as the tensors: only trying shows it."""
    monkeypatch.setattr(memory, "SHORTEST", 100)
    assert 800 < plan(3700)[0].row_tokens < 1600  # two rows of 800 tokens, which need 3400 MiB
    made, recompute, _ = plan(3700, lost=0.5)
    assert recompute == "off" and 400 <= made.row_tokens < 800


def test_no_room_for_the_optimizer_shows_in_trying(plan, monkeypatch):
    def empty(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory, "SHORTEST", 100)
    monkeypatch.setattr(torch, "empty", empty)
    assert 400 <= plan(3700)[0].row_tokens < 800  # where it is roomy, nothing is tried


def test_rows_below_a_quarter_are_not_worth_it(plan, monkeypatch):
    monkeypatch.setattr(memory, "SHORTEST", 100)
    assert plan(1170)[1] == "on"  # 450 of 1600 tokens
    assert plan(1100)[1] == "offload"  # instead of 312 tokens


def test_a_batch_of_one_example_gives_a_line_too(plan):
    made, recompute, _ = plan(8000, n=1)
    assert recompute == "off" and made.row_tokens == pytest.approx((0.98 * 8000 - 1000) / 3, abs=2)
    assert made.report == "training needs 1.3 GiB of 7.8"


def test_no_more_than_allowed(plan):
    _, recompute, limits = plan(8000, memory_gb=2.5)
    assert recompute == "on" and limits == [pytest.approx(2.5 * 1024 / 8000)]


def test_a_word_for_what_does_not_fit(plan):
    with pytest.raises(ValueError, match=r"rows of 1,600 tokens do not fit into 1\.0 GiB.*100 tokens less.*nf4"):
        plan(1010)
