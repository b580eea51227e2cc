"""A run is made to fit into the memory of a GPU. The GPU here is a pretended one, of which it is known what it needs;
that it holds on a real one is tested in test_gpu.py."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune import memory
from finetune.run import Run
from lit_model import GPT, Config
from lit_model.methods import lora
from lit_model.packing import Example

MIB = 2**20
KEPT = {"off": 3.0, "on": 0.25, "offload": 0.05}  # MiB a token


@pytest.fixture
def plan(monkeypatch, capsys):
    """memory.plan for 4 batches of 16 examples of 100 tokens, on a GPU of this many MiB. The weights take 1000."""
    config = Config(vocab_size=50, block_size=512, n_layer=2, n_head=2, n_embd=16, n_hidden=32)
    gpt = GPT(config).requires_grad_(False)
    lora.install(gpt, lora.LoRA())
    rng = np.random.default_rng(0)
    batches = [[Example(rng.integers(0, 50, 101).astype(np.int32), 10) for _ in range(16)] for _ in range(4)]
    peak = size = 0

    def forward(idx, packed):
        nonlocal peak
        peak = (1000 + KEPT[gpt.recompute] * len(idx)) * MIB
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
        """(row_tokens, recompute, line, limits)"""
        nonlocal size
        size = mib
        fabric, options = SimpleNamespace(backward=lambda loss: loss.backward()), SimpleNamespace(memory_gb=memory_gb)
        more = dict(row_tokens=1600, rank=0, world=1, device=torch.device("cpu"))
        run = SimpleNamespace(fabric=fabric, options=options, **more)
        run.rows = partial(Run.rows, run)
        memory.plan(run, gpt, batches, share=True)
        assert all(p.grad is None for p in gpt.parameters())
        return run.row_tokens, gpt.recompute, capsys.readouterr().out.strip(), limits

    return run


def test_what_fits_is_left_alone(plan):
    assert plan(16000)[:3] == (1600, "off", "training needs 5.7 GiB of 15.6: rows of 1,600 tokens")


def test_shorter_rows_first_then_recomputing_then_the_host(plan):
    assert plan(5000)[:3] == (800, "off", "training needs 3.3 GiB of 4.9: rows of 800 tokens")
    assert plan(2300)[:2] == (400, "off")
    assert plan(1600)[:3] == (1600, "on", "training needs 1.4 GiB of 1.6: rows of 1,600 tokens, blocks recomputed")
    tokens, recompute, line, _ = plan(1110)
    assert (tokens, recompute) == (1600, "offload") and line.endswith("and their inputs kept on the host")


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
    _, recompute, _, limits = plan(8000, memory_gb=1.6)
    assert recompute == "on" and limits == [pytest.approx(1.6 * 1024 / 8000)]


def test_a_word_for_what_does_not_fit(plan):
    with pytest.raises(ValueError, match=r"400 tokens at a time do not fit into 1\.0 GiB: lower --train.*nf4"):
        plan(1010)
