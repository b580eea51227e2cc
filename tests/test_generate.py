"""Decoding: reproducible, within its limits, and streamed as whole characters."""

import pytest
import torch
from conftest import LLAMA, randomize

from generate.base import Options, prompt_style, stop_texts
from lit_model import generate, model
from lit_model.generate import sample, stream_text


@pytest.fixture
def gpt() -> model.GPT:
    return randomize(model.GPT(model.Config(**{**LLAMA, "block_size": 32}))).eval()


def test_a_seed_repeats_the_tokens(gpt):
    a, b, c = (list(generate(gpt, [1, 2, 3], 20, temperature=1.0, seed=s)) for s in (7, 7, 8))
    assert a == b != c and len(a) == 20


def test_it_ends_where_the_context_is_full(gpt):
    assert len(list(generate(gpt, [1] * 10, 1000, temperature=0))) == 22
    with pytest.raises(ValueError, match="the prompt has 32 tokens; it needs .* the model's context of 32"):
        next(generate(gpt, [1] * 32, 5))
    with pytest.raises(ValueError, match="the prompt has 0 tokens"):
        next(generate(gpt, [], 5))


def test_it_ends_before_a_stop_token(gpt):
    tokens = list(generate(gpt, [1, 2, 3], 20, temperature=0))
    stop = tokens[4]
    assert list(generate(gpt, [1, 2, 3], 20, temperature=0, stop_ids=[stop])) == tokens[: tokens.index(stop)]


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    draws = lambda **kw: {sample(logits, 1.0, kw.get("k"), kw.get("p"), None).item() for _ in range(200)}  # noqa: E731
    assert draws() == {0, 1, 2, 3}
    assert draws(k=2) == {0, 1}
    assert draws(p=0.65) == {0, 1}
    assert draws(p=0.75) == {0, 1, 2}
    assert draws(p=0.01) == {0} == draws(k=1)
    assert sample(logits, 0, None, None, None).item() == 0


def test_temperature_scales_the_logits():
    logits, n = torch.tensor([1.0, 0.0]), 4000
    assert {sample(logits, t, None, None, None).item() for t in (0, 1e-40, 1e-6, 1e-4)} == {0}
    share = sum(sample(logits, 2.0, None, None, None).item() == 0 for _ in range(n)) / n
    assert abs(share - torch.sigmoid(torch.tensor(0.5)).item()) < 0.03


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


def test_a_style_of_ones_own_is_taken_as_it_stands():
    styles = ("auto", "none", "An automobile: {instruction}")
    assert [prompt_style(Options(style=style)) for style in styles] == ["none", "none", styles[2]]


def test_stops_are_a_text_or_a_list():
    given = {"###": ["###"], "[INST]": ["[INST]"], '["###", "Q:"]': ["###", "Q:"], "": [], "- a": ["- a"]}
    given |= {"[a, b]": ["[a, b]"], r"\n": ["\n"], r'["\n", "日"]': ["\n", "日"], "['#', [": ["['#', ["]}
    given['["###", ""]'] = ["###"]
    assert {text: stop_texts(text) for text in given} == given
