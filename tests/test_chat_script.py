"""generate/chat.py: a conversation in the terminal."""

import pytest
from test_serve import folders  # noqa: F401  a fixture

from generate import chat
from lit_model import generate, load
from lit_model.data.examples import chat_ids
from lit_model.data.tokenizer import Tokenizer


@pytest.fixture
def talk(tiny, folders, monkeypatch, capsys):  # noqa: F811
    """What it prints for lines that are typed."""

    def talk(*lines: str, method_dir: str = "") -> list[str]:
        typed = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or end())
        options = chat.Options(
            checkpoint_dir=tiny / "base", method_dir=method_dir, max_new_tokens=10, temperature=0, device="cpu"
        )
        chat.main(options)
        return capsys.readouterr().out.split("\n")[1:]

    def end() -> str:
        raise EOFError

    return talk


def answer(tiny, messages: list[tuple[str, str]], method=None, style: str = "chat") -> str:
    tokenizer = Tokenizer(tiny / "base")
    ids = chat_ids(tokenizer, style, [dict(role=role, content=text) for role, text in messages])
    tokens = generate(load(tiny / "base", method), ids, 10, temperature=0, stop_ids=tokenizer.stop_ids)
    return tokenizer.decode(list(tokens))


def test_it_remembers_until_it_is_reset(tiny, talk):
    first = answer(tiny, [("user", "Say so")])
    second = answer(tiny, [("user", "Say so"), ("assistant", first), ("user", "Why?")])
    system = answer(tiny, [("system", "Be short"), ("user", "Say so")])
    printed = talk("Say so", "Why?", "/reset", "Say so", "/system Be short", "Say so", "/reset", "Say so")
    assert "\n".join(printed).strip() == "\n".join([first, second, first, system, system])


def test_the_method_answers_until_another_is_named(tiny, talk, folders):  # noqa: F811
    pairs = ",".join(f"{name}={path}" for name, path in folders.items())
    expected = [
        answer(tiny, [("user", "Say so")], folders["fr"], "alpaca"),
        answer(tiny, [("user", "Say so")]),
        answer(tiny, [("user", "Say so")], folders["de"], "alpaca"),
    ]
    lines = "Say so", "/reset", "/method base", "Say so", "/reset", "/method de", "Say so"
    assert "\n".join(talk(*lines, method_dir=pairs)).strip() == "\n".join(expected)


def test_mistakes_are_said_and_end_nothing(talk):
    printed = "\n".join(talk("/method x", "/none", "/help", "word " * 600, "Say so"))
    for said in ("there is no method 'x'", "there is no command /none", "/reset begins anew", "error: the prompt has"):
        assert said in printed


def test_ctrl_c_stops_an_answer(talk, monkeypatch):
    def interrupted(*args):
        yield 0, 300
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "generate_batch", interrupted)
    assert any("(stopped)" in line for line in talk("Say so", "/reset"))
