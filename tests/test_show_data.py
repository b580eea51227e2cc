"""What a run is trained on, as scripts/show_data.py prints it; and inputs that have gone wrong, each one of a kind."""

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from conftest import ROOT, fail, say

from finetune import lora
from generate import base
from lit_model.data.chat import CHATML, chat_text
from lit_model.data.examples import ExampleOptions, prompt_ids, tokenize
from lit_model.data.rows import Row
from lit_model.packing import pack
from scripts import show_data

THINKING = (  # as Qwen 3's: earlier turns lose their thinking
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


def turn(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


def write(path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


CHATS = [
    {"messages": [turn("user", f"apple {i}"), turn("assistant", "river", reasoning_content="hm"),
                  turn("user", "stone " * 20), turn("assistant", "green", reasoning_content="so"),
                  turn("user", "seven"), turn("assistant", "quiet", reasoning_content="ah")]}
    for i in range(12)
]  # fmt: skip


def test_each_turn_is_trained_as_it_will_be_asked(chat_checkpoint, tmp_path, capsys, monkeypatch):
    """A template that renders earlier turns otherwise than the last one, as Qwen 3's."""
    tokenizer = chat_checkpoint(THINKING)
    examples = tokenize([Row(chat) for chat in CHATS], tokenizer, ExampleOptions(max_length=500))
    assert [e.follows for e in examples] == [False, True, True] * len(CHATS)
    for e, i in zip(examples, (1, 3, 5)):
        asked = prompt_ids(tokenizer, "chat", chat_text(tokenizer, "chat", CHATS[0]["messages"][:i], asks=True))
        trained = e.ids.tolist()
        assert trained[: e.first_target] == asked
        print(f"asked:   {tokenizer.decode(asked, special=True)!r}")
        print(f"trained: {tokenizer.decode(trained, special=True)!r}")
        thinking, answer = CHATS[0]["messages"][i]["reasoning_content"], CHATS[0]["messages"][i]["content"]
        told = f"<think>\n{thinking}\n</think>\n\n{answer}<|im_end|>"
        assert tokenizer.decode(trained[e.first_target :], special=True) == told
    ((idx, packed),) = pack(examples[:3], 10_000)
    alone = sum(len(e.ids) - 1 for e in examples[:3])
    assert len(idx) < 0.7 * alone and len(packed.targets) == sum(e.n_targets for e in examples[:3])
    write(tmp_path / "chats.jsonl", CHATS)
    said = say(lora, capsys, monkeypatch, f"--checkpoint_dir {tmp_path}/model --data {tmp_path}/chats.jsonl --out_dir "
               f"{tmp_path}/out --train.batch_size 4 --examples.max_length 500 --devices cpu")  # fmt: skip
    assert "33 examples, 3 steps of 4" in said
    assert "[[<think>\nhm\n</think>\n\nriver<|im_end|>]]" in said  # the first example


def test_one_object_an_example_and_nothing_else(chat_checkpoint, tmp_path, capsys, monkeypatch):
    tokenizer = chat_checkpoint(CHATML)
    rows = [*CHATS[:2], {"messages": 7}, {"instruction": "apple", "output": "river"}, {"prompt": "a", "completion": ""}]
    write(tmp_path / "a.jsonl", rows)
    args = f"--checkpoint_dir {tmp_path}/model --data {tmp_path}/a.jsonl --n 99"
    monkeypatch.setattr(sys, "argv", ["show_data.py", *args.split(), "--format", "jsonl"])
    show_data.cli(show_data.main, show_data.Options, show_data.__doc__)
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 3 and all(len(e["ids"]) == len(e["learned"]) for e in found)
    for e in found:
        assert e["text"] == tokenizer.decode(e["ids"], special=True) and {*e["learned"]} == {True, False}
    assert "4 rows read, 3 examples in the style 'chat'" in err and "1 of 5 rows left out: messages is no list" in err
    assert f"(first: {tmp_path}/a.jsonl, line 3: " in err
    assert "2 of 4 rows have keys that are not read: reasoning_content (first: " in err
    said = say(show_data, capsys, monkeypatch, args + " --examples.max_length 30")
    assert "--- example 1: 26 tokens, 3 learned" in said and "[[river<|im_end|>]]" in said
    assert "2 of 4 rows cut to examples.max_length" in said
    says = fail(show_data, capsys, monkeypatch, args + " --examples.strict")
    assert says == f"error: {tmp_path}/a.jsonl, line 3: messages is no list of objects (it is 7)"


def test_a_conversation_that_the_template_refuses_is_left_out(chat_checkpoint, tmp_path, capsys):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = chat_checkpoint(template)
    rows = [Row(messages=[turn("system", "a"), *CHATS[0]["messages"]]), Row(CHATS[0])]
    rows[0].place = "a.jsonl, line 1"
    assert len(tokenize(rows, tokenizer, ExampleOptions(max_length=500))) == 1
    says = "1 of 2 rows left out: their conversation cannot be rendered (first: a.jsonl, line 1: the checkpoint's chat"
    assert says in capsys.readouterr().out
    with pytest.raises(ValueError, match="a.jsonl, line 1: .*no system role"):
        tokenize(rows, tokenizer, ExampleOptions(strict=True))


def test_a_row_of_several_examples_is_counted_once(chat_checkpoint, capsys):
    """What is cut is no row that is left out."""
    tokenizer = chat_checkpoint(THINKING)
    rows = [Row(CHATS[0]), Row(messages=[turn("user", "stone " * 40), turn("assistant", "river")])]
    for i, row in enumerate(rows):
        row.place = f"a.jsonl, line {i}"
    (e,) = tokenize(rows, tokenizer, ExampleOptions(max_length=24))
    assert not e.follows
    said = capsys.readouterr().out.splitlines()
    assert "1 of 2 rows cut to examples.max_length (first: a.jsonl, line 0)" in said
    assert "1 of 2 rows left out: their prompt alone fills examples.max_length (first: a.jsonl, line 1)" in said


def test_a_turn_that_is_asked_otherwise_than_it_is_written_is_named(chat_checkpoint, capsys):
    asks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = chat_checkpoint(asks)
    (e,) = tokenize([Row(CHATS[0])], tokenizer, ExampleOptions(max_length=500))
    assert r"with a turn that the template asks for with '<think>\n', and writes without it" in capsys.readouterr().out
    assert tokenizer.decode(e.ids[e.first_target :][: e.learned.argmin()], special=True) == "river<|im_end|>"


def test_a_text_that_a_template_has_rendered_begins_and_ends_once(chat_checkpoint, tmp_path, tiny):
    text = "<bos><|im_start|>user\napple<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = chat_checkpoint(CHATML)
    tokenizer.bos = [0]
    rows = [dict(text=f"{text}river<|im_end|>"), dict(prompt=text, completion="river<|im_end|>"),
            dict(prompt=text, completion="river")]  # fmt: skip
    first, second, third = (e.ids.tolist() for e in tokenize(rows, tokenizer, ExampleOptions()))
    assert first == second == third == tokenizer.encode(text + "river<|im_end|>")
    assert first.count(0) == 1 and prompt_ids(tokenizer, "none", text) == tokenizer.encode(text)
    (bare,) = tokenize([dict(text="apple")], tokenizer, ExampleOptions())
    assert bare.ids.tolist() == [0, *tokenizer.encode("apple"), tokenizer.eos_id]


@pytest.mark.parametrize("style, says", [
    (r"Q: {instruction}\nA:", r"has no {input} in it: the input 'stone' would be left out"),
    (r"Q: {question} {instruction}\nA:", r"it names {question}, and can name {input}, {instruction}, {text}"),
    (r"Q: {instruction} {output}", r"it names {output}"),
])  # fmt: skip
def test_a_style_that_leaves_out_or_invents_is_refused(style, says, tiny, tmp_path, capsys, monkeypatch):
    write(tmp_path / "a.jsonl", [dict(instruction="apple", input="stone", output="river")] * 3)
    monkeypatch.setattr(sys, "argv", ["x", "--checkpoint_dir", f"{tiny}/base", "--data", f"{tmp_path}/a.jsonl",
                                      "--examples.style", style])  # fmt: skip
    with pytest.raises(SystemExit):
        show_data.cli(show_data.main, show_data.Options, "")
    assert says in capsys.readouterr().err


def test_a_terminal_that_lacks_a_character_ends_nothing(chat_checkpoint, tmp_path):
    chat_checkpoint(CHATML)
    write(tmp_path / "a.jsonl", [dict(text="apple 🙂 日本")])
    command = [
        sys.executable,
        "scripts/show_data.py",
        "--checkpoint_dir",
        f"{tmp_path}/model",
        "--data",
        f"{tmp_path}/a.jsonl",
    ]
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
    assert b"apple ? ??" in done.stdout


def test_a_run_whose_template_tells_the_date_resumes_after_midnight(chat_checkpoint, tmp_path, capsys, monkeypatch):
    chat_checkpoint(DATED)
    write(tmp_path / "chats.jsonl", CHATS)
    args = (
        f"--checkpoint_dir {tmp_path}/model --data {tmp_path}/chats.jsonl --out_dir {tmp_path}/out --devices cpu "
        "--train.batch_size 4 --train.eval_interval 1 --train.max_time 0"
    )
    today = f"{datetime.now():%d %b %Y}"
    assert f"{today}\n<|im_start|>user" in say(lora, capsys, monkeypatch, args)

    class Tomorrow(datetime):
        @classmethod
        def now(cls) -> datetime:
            return datetime.now() + timedelta(days=1)

    monkeypatch.setattr("lit_model.data.tokenizer.datetime", Tomorrow)
    said = say(lora, capsys, monkeypatch, args.replace("max_time 0", "max_time 9"))
    assert "resumed after step 1" in said and f"{today}\n<|im_start|>user" in said
    tomorrow = f"{Tomorrow.now():%d %b %Y}"
    assert f"{tomorrow}\n<|im_start|>user" in say(lora, capsys, monkeypatch, args + " --overwrite")


def test_a_system_prompt_and_stops_in_generation(chat_checkpoint, tmp_path, capsys, monkeypatch):
    tokenizer = chat_checkpoint(CHATML)
    asked = []

    def generate_batch(gpt, prompts, n, ways, stop_ids):
        asked.append((prompts[0], stop_ids))
        return ((0, i) for i in prompts[0])

    monkeypatch.setattr(base, "generate_batch", generate_batch)
    args = ["x", "--checkpoint_dir", f"{tmp_path}/model", "--prompt", "apple", "--device", "cpu"]
    for more in (["--style", "chat", "--system", "stone", "--stop", "<think>"], ["--stop", " "]):
        monkeypatch.setattr(sys, "argv", args + more)
        base.cli(base.main, base.Options, "")
    messages = [turn("system", "stone"), turn("user", "apple")]
    (ids, stop_ids), (plain, plain_stops) = asked
    assert plain_stops == tokenizer.stop_ids
    assert ids == tokenizer.encode(chat_text(tokenizer, "chat", messages, asks=True))
    assert set(stop_ids) - set(tokenizer.stop_ids) == set(tokenizer.encode("<think>"))
    assert plain == [0, *tokenizer.encode("apple")]
    monkeypatch.setattr(sys, "argv", [*args, "--system", "stone"])
    with pytest.raises(SystemExit):
        base.cli(base.main, base.Options, "")
    assert "a system prompt goes with the styles chat and chatml" in capsys.readouterr().err
