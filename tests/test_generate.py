"""Decoding: reproducible, within its limits, and streamed as whole characters."""

import json
from itertools import takewhile

import numpy as np
import pytest
import torch
from conftest import LLAMA, fail, randomize, say

from generate import base
from generate.base import Options, stop_texts
from lit_model import generate, load, model
from lit_model.data.tokenizer import Tokenizer
from lit_model.decode import Decoder, Request
from lit_model.generate import TextStream, generate_batch, stream_text
from lit_model.sampling import Sampler, Sampling, gumbel


@pytest.fixture
def gpt() -> model.GPT:
    return randomize(model.GPT(model.Config(**{**LLAMA, "block_size": 32}))).eval()


def test_a_seed_repeats_the_tokens(gpt):
    a, b, c = (list(generate(gpt, [1, 2, 3], 20, temperature=1.0, seed=s)) for s in (7, 7, 8))
    assert a == b != c and len(a) == 20


def test_several_prompts_are_answered_at_a_time(gpt):
    found = [[], []]
    for i, token in generate(gpt, [[1, 2, 3], [4]], 8, seed=7):
        found[i].append(token)
    assert found == [list(generate(gpt, ids, 8, seed=7 + i)) for i, ids in enumerate(([1, 2, 3], [4]))]


def test_it_ends_where_the_context_is_full(gpt):
    assert len(list(generate(gpt, [1] * 10, 1000, temperature=0))) == 22
    with pytest.raises(ValueError, match="the prompt has 32 tokens; it needs .* the context of 32"):
        next(generate(gpt, [1] * 32, 5))
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        next(generate(gpt, [], 5))


def test_it_ends_before_a_stop_token(gpt):
    tokens = list(generate(gpt, [1, 2, 3], 20, temperature=0))
    stop = tokens[4]
    assert list(generate(gpt, [1, 2, 3], 20, temperature=0, stop_ids=[stop])) == tokens[: tokens.index(stop)]


def draws(p: list[float], n: int = 400, seen: tuple = (), **way) -> list[int]:
    """Tokens of n sequences, each with a seed of its own, from the same probabilities."""
    ways = [Sampling(**way, seed=seed) for seed in range(n)]
    sampler = Sampler(n, len(p), torch.device("cpu"))
    sampler.put([Request(seen, 1, way) for way in ways])
    return sampler(torch.tensor(p).log().expand(n, -1), torch.arange(n), slice(n)).tolist()


def test_what_is_left_out_is_never_drawn():
    p = [0.4, 0.3, 0.2, 0.1]
    assert {*draws(p)} == {0, 1, 2, 3}
    assert {*draws(p, top_k=2)} == {0, 1} == {*draws(p, top_p=0.65)} == {*draws(p, min_p=0.7)}
    assert {*draws(p, top_p=0.75)} == {0, 1, 2} == {*draws(p, min_p=0.45)}
    assert {*draws(p, top_p=0.01)} == {0} == {*draws(p, top_k=1)} == {*draws(p, temperature=0)}
    assert {*draws(p, top_k=3, top_p=0.7)} == {0, 1}  # of 4/9, 3/9, 2/9
    assert {*draws([0.6, 0.4], temperature=0, seen=(0,), repetition_penalty=2.0)} == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature):
    p, n = [0.5, 0.25, 0.15, 0.1], 20000
    expected = (torch.tensor(p).log() / temperature).softmax(-1)
    drawn = torch.tensor(draws(p, n, temperature=temperature)).bincount(minlength=4) / n
    assert (drawn - expected).abs().max() < 4 * (0.25 / n) ** 0.5
    assert {*draws(p, 50, temperature=1e-6)} == {0} == {*draws(p, 50, temperature=1e-40)}


def test_one_seed_draws_anew_at_every_token():
    noise = torch.cat([gumbel(torch.tensor([[7]]), torch.tensor([[n]]), torch.arange(500)) for n in range(20)])
    assert noise.isfinite().all() and abs(noise.mean().item() - 0.5772) < 0.05 and abs(noise.var().item() - 1.645) < 0.1
    assert (torch.corrcoef(noise) - torch.eye(20)).abs().max() < 0.2


LENGTHS = (3, 11, 1, 20, 7)


@pytest.mark.parametrize("way", [Sampling(0), Sampling(seed=1), Sampling(0.8, 20, 0.9, 0.02, 1.3, 5)], ids=str)
def test_a_batch_is_each_alone(checkpoint, way):
    """Prompts of many lengths, of which some begin alike; one of them ends early."""
    gpt = load(checkpoint)
    start = torch.randint(0, 97, (25,)).tolist()
    prompts = [torch.randint(0, 97, (n,)).tolist() for n in LENGTHS] + [start + [i, i + 1] for i in range(3)] + [start]
    alone = [list(generate_batch(gpt, [ids], 12, [way])) for ids in prompts]
    stop = alone[1][4][1]
    expected = [list(takewhile(lambda token: token != stop, (t for _, t in made))) for made in alone]
    found = [[] for _ in prompts]
    for i, token in generate_batch(gpt, prompts, 12, [way] * len(prompts), [stop]):
        found[i].append(token)
    assert found == expected and any(len(tokens) == 12 for tokens in found)


def test_what_prompts_share_is_stored_once(gpt):
    prompts = [[*range(20, 45), i] for i in range(4)]
    segments, ids, leaves = Decoder._tree(prompts, None)
    assert [s.length for s in segments] == [25, 1, 1, 1, 1] and len(leaves) == 4 and len(ids) == 5


def test_greedy_is_the_argmax_of_one_pass(checkpoint):
    gpt, ids = load(checkpoint), [5, 6, 7]
    tokens = list(generate(gpt, ids, 20, temperature=0))
    assert tokens == gpt(torch.tensor([ids + tokens]))[0, 2:-1].argmax(-1).tolist()


def test_a_prompt_as_long_as_the_context_leaves_room_for_one(gpt):
    assert len(list(generate(gpt, [1] * 31, 5))) == 1
    found = list(generate_batch(gpt, [[1] * 31, [2]], 5, [Sampling(0)] * 2))
    assert sorted(i for i, _ in found) == [0] + [1] * 5


def test_broken_weights_are_said(gpt):
    gpt.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        next(generate(gpt, [1, 2], 5))


def test_a_file_of_prompts_is_answered_in_order_and_resumed(tiny, tmp_path, capsys, monkeypatch):
    """In batches of any size the same answers, whatever was there before."""
    rows = [dict(instruction=f"Name {n} fruits.", input="now" * (n % 2)) for n in range(7)]
    rows += [dict(prompt="Say so.", note=1), dict(messages=[dict(role="user", content="Hello")])]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = f"--checkpoint_dir {tiny}/base --prompts {tmp_path}/in.jsonl --style alpaca --max_new_tokens 6 --seed 3"
    say(base, capsys, monkeypatch, f"{args} --out {tmp_path}/a.jsonl --batch_size 4")
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{**row, "answer": made["answer"]} for row, made in zip(rows, answers, strict=True)] == answers
    (tmp_path / "b.jsonl").write_text("".join((tmp_path / "a.jsonl").read_text().splitlines(True)[:3]) + '{"instr')
    assert "b.jsonl: 9 answers" in say(base, capsys, monkeypatch, f"{args} --out {tmp_path}/b.jsonl --batch_size 100")
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    (tmp_path / "in.jsonl").write_text(json.dumps(rows[1]))
    assert "a.jsonl: it holds answers to other prompts" in fail(
        base, capsys, monkeypatch, f"{args} --out {tmp_path}/a.jsonl"
    )
    (tmp_path / "in.jsonl").write_text('{"question": 1}')
    line = fail(base, capsys, monkeypatch, f"{args} --out {tmp_path}/c.jsonl")
    assert "in.jsonl: a row needs instruction, prompt, text or messages" in line


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("naïve — 日本", (), "naïve — 日本"),
        ("one##two###three", ("###",), "one##two"),
        ("a#", ("##",), "a#"),
        ("", (), ""),
    ],
)
def test_text_streams_as_whole_characters_and_ends_at_a_stop(text, stops, expected):
    pieces = list(stream_text(Bytes(), text.encode(), stops))
    assert "".join(pieces) == expected
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) >= min(2, len(expected)) - 1


def test_a_style_of_ones_own_is_taken_as_it_stands(tiny, monkeypatch):
    styles, taken = ("auto", "none", "An automobile: {instruction}"), []
    monkeypatch.setattr(base, "validate_style", lambda style, _: taken.append(style))
    for style in styles:
        base.main(Options(checkpoint_dir=tiny / "base", style=style, max_new_tokens=1, device="cpu"))
    assert taken == ["none", "none", styles[2]]


def test_stops_are_a_text_or_a_list():
    given = {"###": ["###"], "[INST]": ["[INST]"], '["###", "Q:"]': ["###", "Q:"], "": [], "- a": ["- a"]}
    given |= {"[a, b]": ["[a, b]"], r"\n": ["\n"], r'["\n", "日"]': ["\n", "日"], "['#', [": ["['#', ["]}
    given['["###", ""]'] = ["###"]
    assert {text: stop_texts(text) for text in given} == given


def test_weights_packed_for_one_token_are_the_weights(tiny):
    """On a CPU in bfloat16: until they change, and never where a gradient is wanted."""
    gpt = load(tiny / "base", dtype=torch.bfloat16)
    list(generate(gpt, [1, 2], 3, temperature=0))
    linear, x = gpt.blocks[0].mlp.up_proj, torch.randn(1, gpt.config.n_embd).bfloat16()
    with torch.no_grad():
        assert linear.packed.can_take(x, linear.weight)
        torch.testing.assert_close(linear(x), x @ linear.weight.T, rtol=1e-2, atol=1e-2)
        linear.weight.mul_(2)
        assert not linear.packed.can_take(x, linear.weight)
        torch.testing.assert_close(linear(x), x @ linear.weight.T, rtol=1e-2, atol=1e-2)
    list(generate(gpt, [1, 2], 3, temperature=0))
    linear(x.requires_grad_()).sum().backward()
    assert x.grad.any()


def test_ids_may_be_an_array(gpt):
    assert list(generate(gpt, np.array([1, 2, 3]), 5, temperature=0)) == list(
        generate(gpt, [1, 2, 3], 5, temperature=0)
    )


@pytest.mark.parametrize("stops", [(), ("\n\n", "###")])
def test_a_long_stream_is_its_text(tiny, stops):
    """Only the last tokens are decoded again and again; characters of many bytes lie across every border."""
    tokenizer = Tokenizer(tiny / "base")
    text = "".join(f"{n} 水🙂é, and so\n" for n in range(90))
    ids = tokenizer.encode(text)
    assert len(ids) > 600 and "".join(stream_text(tokenizer, ids, stops)) == text
    stream = TextStream(tokenizer, stops)
    assert "".join([stream.push(*ids[i : i + 7]) for i in range(0, len(ids), 7)] + [stream.end()]) == text
    assert len(stream.ids) <= 2 * TextStream.WINDOW + 7
    assert "".join(stream_text(tokenizer, tokenizer.encode(text + "###" + text), ("###",))) == text
