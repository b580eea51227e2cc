"""A packed row computes exactly what a naive loop over its examples computes: in float64, loss and gradients, for every
kind of neighbour that a token can see. Everything else is built on this."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LLAMA, decoded, randomize
from torch import Tensor, nn

from lit_model import attention, model, packing
from lit_model.config import Layer
from lit_model.kernels import cpu
from lit_model.methods import adapter, prefix, prompt
from lit_model.packing import Example, pack
from lit_model.rope import LongScaling, Rope, YarnScaling


def naive(gpt: model.GPT, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one example, head by head and query by query, from the formulas and gpt's weights alone."""
    c, w = gpt.config, dict(gpt.named_parameters(remove_duplicate=False))

    def linear(name, x):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def normed(name, x):
        if c.arch == "gpt2":
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + c.norm_eps).sqrt()
            return x * w[f"{name}.weight"] + w[f"{name}.bias"]
        weight = w[f"{name}.weight"] + (1 if c.norm_plus_one else 0)
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def rotated(x, pos, rope):  # one vector (hs,): pair (i, i + r/2) as a complex number times e^(i angle)
        size = int(len(x) * rope.share)
        half, s = size // 2, rope.scaling
        inverse = rope.base ** (-torch.arange(half).double() / half)
        if isinstance(s, YarnScaling):  # a pair's index grows as its rotations in the original context fall
            fast, slow = (
                half * np.log(s.original_max_position_embeddings / (2 * np.pi * turns)) / np.log(rope.base)
                for turns in (s.beta_fast, s.beta_slow)
            )
            fast, slow = max(np.floor(fast), 0), min(np.ceil(slow), size - 1)
            for i in range(half):
                slower = min(max((i - fast) / (slow - fast), 0), 1)
                inverse[i] = slower * inverse[i] / s.factor + (1 - slower) * inverse[i]
        z = torch.complex(x[:half], x[half:size]) * torch.polar(torch.ones(half).double(), pos * inverse)
        z = z * (s.attention_factor if isinstance(s, YarnScaling) else 1)
        return torch.cat((z.real, z.imag, x[size:]))

    def grown(q, pos, rope):
        if not isinstance(rope.scaling, YarnScaling):
            return q
        s = rope.scaling
        return q * (1 + s.llama_4_scaling_beta * np.log(1 + pos // s.original_max_position_embeddings))

    def gelu(u):
        return 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))

    def activation(u):
        return gelu(u) if c.activation == "gelu" else u * torch.sigmoid(u)

    def softmax_sum(q, keys, values):
        scores = keys @ q * c.attn_scale
        scores = scores if c.attn_softcap is None else c.attn_softcap * torch.tanh(scores / c.attn_softcap)
        return scores.softmax(0) @ values

    x = w["wte.weight"][ids] * c.embedding_scale
    if "prompt" in gpt.virtual_tokens:
        x = torch.cat((w["virtual_tokens.prompt.embedding"], x))
    start = gpt.n_virtual_keys
    if c.arch == "gpt2":
        x = x + w["wpe.weight"][start : start + len(x)]
    for i in range(c.n_layer):
        name = f"blocks.{i}.attn"
        layer = c.layers[i]
        h = normed(f"blocks.{i}.norm_1", x)
        q, k, v = (linear(f"{name}.{p}_proj", h) for p in "qkv")
        if c.qk_norm == "all":
            q, k = normed(f"{name}.q_norm", q), normed(f"{name}.k_norm", k)
        q, k, v = (z.unflatten(-1, (-1, c.head_size)) for z in (q, k, v))
        if c.arch == "llama" and layer.rope is not None:
            q, k = (
                torch.stack([rotated(h, start + t, layer.rope) for t, row in enumerate(z) for h in row]).view_as(z)
                for z in (q, k)
            )
            q = torch.stack([grown(row, start + t, layer.rope) for t, row in enumerate(q)])
        if gpt.n_virtual_keys:
            k, v = (torch.cat((front, own)) for front, own in zip(w["virtual_keys.prefix.kv"][i], (k, v)))
        out = []
        for t in range(len(x)):
            heads = []
            for head in range(c.n_head):
                group = head * c.n_kv_head // c.n_head
                seen = slice(max(0, start + t + 1 - layer.window) if layer.window else 0, start + t + 1)
                y = softmax_sum(q[t, head], k[seen, group], v[seen, group])
                if f"{name}.deltas.adapter.gate" in w:
                    prompt = w[f"{name}.deltas.adapter.prompt"]
                    pk, pv = (linear(f"{name}.{p}_proj", prompt) for p in "kv")
                    pk = normed(f"{name}.k_norm", pk) if c.qk_norm == "all" else pk
                    pk, pv = (z.unflatten(-1, (-1, c.head_size))[:, group] for z in (pk, pv))
                    y = y + w[f"{name}.deltas.adapter.gate"][head].tanh() * softmax_sum(q[t, head], pk, pv)
                heads.append(y)
            out.append(torch.cat(heads))
        h = linear(f"{name}.o_proj", torch.stack(out))
        x = x + c.residual_scale * (normed(f"blocks.{i}.post_norm_1", h) if c.norm_place == "both" else h)
        h = normed(f"blocks.{i}.norm_2", x)
        mlp = f"blocks.{i}.mlp"
        if c.arch == "gpt2":
            h = linear(f"{mlp}.down_proj", gelu(linear(f"{mlp}.up_proj", h)))
        elif layer.experts is None:
            h = linear(f"{mlp}.down_proj", activation(linear(f"{mlp}.gate_proj", h)) * linear(f"{mlp}.up_proj", h))
        else:
            tokens = []
            for token in h:
                p = linear(f"{mlp}.router", token).softmax(0)
                best = p.argsort(descending=True)[: layer.experts.n_active].tolist()
                gate, up, down = (w[f"{mlp}.experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
                outs = [p[e] * (down[e] @ (activation(gate[e] @ token) * (up[e] @ token))) for e in best]
                tokens.append(sum(outs) / sum(p[e] for e in best))
            h = torch.stack(tokens)
        x = x + c.residual_scale * (normed(f"blocks.{i}.post_norm_2", h) if c.norm_place == "both" else h)
    logits = normed("norm_f", x) @ w["lm_head.weight"].T / c.logit_divisor
    logits = logits if c.logit_softcap is None else c.logit_softcap * torch.tanh(logits / c.logit_softcap)
    return logits[gpt.n_virtual_tokens :]


METHODS = ["plain", "adapter", "prefix", "prompt", "adapter+prefix+prompt"]


def build(family: dict, methods: str) -> model.GPT:
    gpt = model.GPT(model.Config(**{**family, "n_layer": max(2, len(family.get("layers", ())))}))
    if "adapter" in methods:
        adapter.install(gpt, adapter.Adapter(prompt_length=3, start_layer=1))
    if "prefix" in methods:
        prefix.install(gpt, prefix.Prefix(length=5))
    if "prompt" in methods:
        prompt.install(gpt, prompt.Prompt(length=4))
    return randomize(gpt).double()


def examples(n_shared: int) -> list[Example]:
    """Six examples of which two pairs begin alike, one pair inside the other's beginning."""
    rng = np.random.default_rng(0)
    outer, inner = rng.integers(0, 97, n_shared), rng.integers(0, 97, n_shared)
    heads = [[outer], [outer], [outer, inner], [outer, inner], [], [rng.integers(0, 97, 9)]]
    made = []
    for i, head in enumerate(heads):
        ids = np.concatenate([*head, rng.integers(0, 97, 3 + i)]).astype(np.int32)
        made.append(Example(ids, first_target=max(1, len(ids) - 2 - i)))
    return made


def gradients(gpt: model.GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    gpt.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("methods", METHODS)
def test_packed_loss_and_gradients_equal_a_naive_loop(family, methods, share, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED", 3)
    gpt = build(family, methods)
    data = examples(n_shared=5)
    expected = torch.zeros((), dtype=torch.float64)
    for e in data:
        ids = torch.from_numpy(e.ids).long()
        expected = expected + F.cross_entropy(
            naive(gpt, ids)[e.first_target - 1 : -1], ids[e.first_target :], reduction="sum"
        )
    expected_grads = gradients(gpt, expected)

    rows = pack(
        data, row_tokens=1000, n_virtual_tokens=gpt.n_virtual_tokens, n_virtual_keys=gpt.n_virtual_keys, share=share
    )
    assert len(rows) == 1
    n_tokens = gpt.n_virtual_tokens + sum(len(e.ids) - 1 for e in data) - (5 * 3 + 5 if share else 0)
    assert len(rows[0][1].pos) == n_tokens  # what is shared is computed once, and no example's last token
    loss = sum(gpt(*row) for row in rows)
    assert abs(loss - expected) < 1e-9
    for name, grad in gradients(gpt, loss).items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert len(expected_grads) == len(list(gpt.parameters()))


@pytest.mark.parametrize("methods", METHODS)
def test_cached_decoding_equals_one_pass(family, methods, monkeypatch):
    """Two examples decoded together, one token a step, from prompts of different length."""
    gpt = build(family, methods)
    sequences, starts = [torch.randint(0, 97, (n,)) for n in (11, 8)], [6, 3]
    with torch.no_grad():
        expected = [gpt(s[None])[0] for s in sequences]
    torch.testing.assert_close(expected[0], naive(gpt, sequences[0]), rtol=1e-9, atol=1e-9)
    for got, whole, n in zip(decoded(gpt, sequences, starts, monkeypatch), expected, starts, strict=True):
        torch.testing.assert_close(got, whole[n - 1 :], rtol=1e-9, atol=1e-9)


def test_rows_hold_every_example_once_and_no_padding():
    rng = np.random.default_rng(1)
    data = [Example(np.full(n, i, dtype=np.int32), 1) for i, n in enumerate(rng.integers(2, 60, 50))]
    rows = pack(data, row_tokens=100)
    sizes = [len(idx) for idx, _ in rows]
    n_tokens = sum(len(e.ids) - 1 for e in data)  # the last token of an example is only ever a target
    assert sum(sizes) == n_tokens and len(sizes) == -(-n_tokens // 100) and max(sizes) < 100 + 60
    counts = torch.cat([idx for idx, _ in rows]).bincount()
    assert counts.tolist() == [len(e.ids) - 1 for e in data]
    assert sum(len(p.targets) for _, p in rows) == sum(e.n_targets for e in data)


@pytest.mark.parametrize("methods", ["plain", "prompt", "prefix"])
def test_long_examples_turn_in_another_way_than_short_ones_and_share_no_row(methods):
    """LongRoPE has two lists of factors; each example takes the same one alone and packed."""
    scaling = LongScaling(
        tuple(range(1, 9)), tuple(range(2, 18, 2)), original_max_position_embeddings=12, attention_factor=1.3
    )
    gpt = build(dict(LLAMA, layers=(Layer(rope=Rope(scaling=scaling)),)), methods)
    rng, virtual = np.random.default_rng(0), (gpt.n_virtual_tokens, gpt.n_virtual_keys)
    head = rng.integers(0, 97, 4)
    data = [np.concatenate((head, rng.integers(0, 97, n))).astype(np.int32) for n in (3, 2, 20, 12)]
    pack_all = partial(pack, short_context=gpt.config.short_context)
    rows = pack_all([Example(ids, 3) for ids in data], 1000, *virtual)
    assert len(rows) == 2
    alone = sum(gpt(*row) for ids in data for row in pack_all([Example(ids, 3)], 1000, *virtual))
    torch.testing.assert_close(sum(gpt(*row) for row in rows), alone, rtol=1e-10, atol=1e-10)
    mixed = pack([Example(ids, 3) for ids in data], 1000, *virtual)
    assert len(mixed) == 1 and abs(gpt(*mixed[0]) - alone) > 1e-3  # the test can fail


def test_a_preamble_is_shared_up_to_the_token_before_the_first_target():
    ids = np.arange(30, dtype=np.int32)
    ((idx, packed),) = pack([Example(ids, 25), Example(ids, 25)], row_tokens=100)
    assert [q for q, _ in packed.lengths] == [24, 5, 5]
    ((idx, packed),) = pack([Example(ids, 1), Example(ids, 1)], row_tokens=100)  # prompts are trained on
    assert [q for q, _ in packed.lengths] == [29, 29]


def test_long_examples_stay_whole_if_they_share_little():
    """So that a kernel for whole examples can take them; where they begin and end stays on the CPU."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 97, 2500)
    for shared, whole in ((30, True), (2500, False)):
        ids = [np.concatenate((start[:shared], rng.integers(0, 97, 3000 - shared))).astype(np.int32) for _ in "ab"]
        ((_, packed),) = pack([Example(i, 2800) for i in ids], row_tokens=8192)
        assert len(packed.lengths) == (2 if whole else 3)
        if whole:
            assert packed.to(torch.device("meta")).bounds.tolist() == [0, 2999, 5998] and packed.last.bounds is None
        else:
            assert packed.bounds is None
    assert pack([Example(ids[0][:500], 400)], row_tokens=8192)[0][1].bounds is None


def test_chunks_of_the_loss_change_nothing(monkeypatch):
    from lit_model import loss

    sizes, one_chunk = [], loss.chunk_loss_

    def chunk_loss_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(logits))
        return one_chunk(logits, targets)

    head, targets = nn.Linear(8, 50).double(), torch.randint(0, 50, (21,))
    x = torch.randn(21, 8).double().requires_grad_()
    expected = F.cross_entropy(head(x), targets, reduction="sum")
    expected_grads = torch.autograd.grad(expected, (x, *head.parameters()))
    monkeypatch.setattr(loss, "CHUNK", 5 * 50)
    monkeypatch.setattr(loss, "chunk_loss_", chunk_loss_)
    row = SimpleNamespace(targets=targets)
    got = loss.cross_entropy(head, x, row)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, (x, *head.parameters())), expected_grads):
        torch.testing.assert_close(a, b)
    assert sum(sizes) == 21 and max(sizes) == 5
    monkeypatch.setattr(loss, "CPU_ROWS", 2)
    torch.testing.assert_close(loss.cross_entropy(head, x, row), expected)


def test_training_attention_on_the_cpu_agrees_with_the_fused_one(monkeypatch):
    lengths = [(40, 40), (1, 12), (7, 12), (64, 64), (33, 50)]
    n_q, n_k = (sum(n) for n in zip(*lengths))
    q, k, v = (torch.randn(n, heads, 16).double().requires_grad_() for n, heads in ((n_q, 4), (n_k, 2), (n_k, 2)))
    expected = attention._attend_each(q, k, v, SimpleNamespace(lengths=lengths), 0.2)
    got = cpu.SegmentsAttention.apply(q, k, v, lengths, 0.2)
    towards = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), towards), torch.autograd.grad(expected, (q, k, v), towards)):
        torch.testing.assert_close(a, b)

    short = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    assert cpu.can_take(short[0], lengths) and not cpu.can_take(q, lengths)
    taken = attention._attend_each(*short, SimpleNamespace(lengths=lengths), 0.2)
    assert type(taken.grad_fn).__name__ == "SegmentsAttentionBackward"
    assert (taken.double() - expected).norm() / expected.norm() < 1e-2
    monkeypatch.setattr(cpu, "MOST_SCORES", 1000)
    assert not cpu.can_take(short[0], lengths)


@pytest.mark.parametrize(
    "module, options, has",
    [
        (prompt, prompt.Prompt(length=3), "3 virtual tokens and 0"),
        (prefix, prefix.Prefix(length=3), "0 virtual tokens and 3"),
    ],
)
def test_rows_packed_for_another_network_are_refused(module, options, has):
    gpt = model.GPT(model.Config(**LLAMA))
    (row,) = pack([Example(np.arange(9, dtype=np.int32), 4)], 100)
    assert gpt(*row).isfinite()
    module.install(gpt, options)
    with pytest.raises(ValueError, match=f"packed for another network: this one has {has} virtual keys"):
        gpt(*row)
