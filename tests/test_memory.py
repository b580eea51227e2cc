"""A run is made to fit into the memory of a GPU. The GPU here is a pretended one, of which it is known what it needs;
that it holds on a real one is tested in test_gpu.py."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune import memory
from finetune.run import Run, RunOptions
from lit_model import GPT, Config
from lit_model.methods import lora
from lit_model.packing import Example

MIB, N = 2**20, 8
BLOCK, INPUT = 0.375, 0.03  # MiB a token, that a block keeps: all that it computes, or its input alone


@pytest.fixture
def plan(monkeypatch, capsys):
    """memory.plan for 4 batches of 16 examples of 100 tokens, on a GPU of this many MiB. The weights take 1000."""
    config = Config(vocab_size=50, block_size=512, n_layer=N, n_head=2, n_embd=16, n_hidden=32)
    gpt = GPT(config).requires_grad_(False)
    lora.install(gpt, lora.LoRA())
    rng = np.random.default_rng(0)
    batches = [[Example(rng.integers(0, 50, 101).astype(np.int32), 10) for _ in range(16)] for _ in range(4)]
    peak = size = 0
    tried = []

    def forward(idx, packed):
        nonlocal peak
        tried.append(len(idx))
        inputs = gpt.recompute - max(0, gpt.offload - 2)  # two are on their way
        of_token = BLOCK * (N - gpt.recompute) + INPUT * inputs
        if gpt.recompute:
            of_token = max(of_token, BLOCK + run.recomputing + INPUT * inputs)
        peak = (1000 + of_token * len(idx)) * MIB
        if peak > size * MIB:
            raise torch.OutOfMemoryError
        return next(p for p in gpt.parameters() if p.requires_grad).sum()

    limits = []
    monkeypatch.setattr(gpt, "forward", forward)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size * MIB, size * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, device: limits.append(f))
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)

    def run(mib: int, memory_gb: float | None = None):
        """(row_tokens, blocks recomputed, inputs on the host, line, limits)"""
        nonlocal size
        size = mib
        fabric, options = SimpleNamespace(backward=lambda loss: loss.backward()), RunOptions(memory_gb=memory_gb)
        more = dict(row_tokens=1600, rank=0, world=1, device=torch.device("cpu"))
        run = SimpleNamespace(fabric=fabric, options=options, **more)
        run.rows = partial(Run.rows, run)
        memory.plan(run, gpt, batches, share=True)
        assert all(p.grad is None for p in gpt.parameters())
        line = capsys.readouterr().out.strip()
        return run.row_tokens, gpt.recompute, gpt.offload, line, limits

    run.tried, run.gpt, run.recomputing = tried, gpt, 0.0
    return run


def test_what_fits_is_left_alone(plan):
    assert plan(16000)[:4] == (1600, 0, 0, "training needs 5.7 GiB of 15.6: rows of 1,600 tokens")


def test_shorter_rows_first_then_recomputing_then_the_host(plan):
    """As many blocks as must be: with 400 tokens three take 1786 MiB, two 1924, seven 1234."""
    assert plan(5000)[:4] == (800, 0, 0, "training needs 3.3 GiB of 4.9: rows of 800 tokens")
    assert plan(2300)[:3] == (400, 0, 0)
    line = "training needs 1.7 GiB of 1.9: rows of 400 tokens, 3 of 8 blocks recomputed"
    assert plan(1920)[:4] == (400, 3, 0, line)
    plan.tried.clear()
    assert plan(1300)[:3] == (400, 7, 0) and plan.tried[3:6] == [1600, 800, 198]  # 400 are not tried again
    assert plan(1240)[:3] == (400, 7, 4)
    tokens, recompute, offload, line, _ = plan(1215)
    assert (tokens, recompute, offload) == (400, 7, 6)
    assert line.endswith("rows of 400 tokens, 7 of 8 blocks recomputed, the inputs of 6 kept on the host")


def test_long_rows_with_all_blocks_recomputed_before_short_ones_with_a_few_kept(plan):
    """With 400 tokens five recomputed blocks take 1510 MiB, four 1648; seven with 800 tokens 1468, with 1600 1936."""
    assert plan(1700)[:3] == (400, 4, 0)
    plan.gpt.compile()
    line = "training needs 1.4 GiB of 1.6: rows of 800 tokens, 7 of 8 blocks recomputed"
    assert plan(1600)[:4] == (800, 7, 0, line) and memory.functorch_config.ban_recompute_materialized_backward


def test_compiled_blocks_keep_less_where_memory_is_short(plan):
    for mib, keeps_all in ((5000, True), (1920, False)):
        plan.gpt.compile()
        line = plan(mib)[3]
        assert memory.functorch_config.ban_recompute_materialized_backward is keeps_all
        assert ("norms and activations recomputed" in line) is not keeps_all


def test_a_long_row_is_not_tried(plan, monkeypatch):
    monkeypatch.setattr(memory, "LONG", 1000)
    monkeypatch.setattr(memory, "TRIED", 100)
    tokens, recompute, offload, line, _ = plan(5000)
    assert (tokens, recompute, offload) == (800, 0, 0)  # that fits, and is no long row
    monkeypatch.setattr(memory, "LONG", 300)
    plan.tried.clear()
    assert plan(1920)[:2] == (400, 3) and max(plan.tried) <= 400 and all(block.is_tiled for block in plan.gpt.blocks)
    assert plan(16000)[:2] == (400, 0) and max(plan.tried) <= 400


def test_memory_that_recomputing_takes_does_not_hide_that_of_kept_blocks(plan, monkeypatch):
    """With 400 tokens, four recomputed blocks take 1648 MiB, none 2200."""
    monkeypatch.setattr(memory, "LONG", 300)
    plan.recomputing = 0.3
    assert plan(1920)[:2] == (400, 4)


def test_a_little_is_spared_for_longer_rows(plan):
    """1600 tokens need 5800 MiB."""
    assert plan(5850)[0] == 800 and plan(5930)[0] == 1600


def test_no_room_for_the_optimizer_shows_in_trying(plan, monkeypatch):
    def empty(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match="do not fit"):
        plan(16000)


def test_no_more_than_allowed(plan):
    _, recompute, _, _, limits = plan(8000, memory_gb=1.75)
    assert recompute == 4 and limits == [pytest.approx(1.75 * 1024 / 8000)]


def test_a_word_for_what_does_not_fit(plan):
    with pytest.raises(ValueError, match=r"400 tokens at a time do not fit into 1\.1 GiB: lower --train.*nf4"):
        plan(1150)
