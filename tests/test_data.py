"""Text in, examples out: what is learned, what is cut, what is refused."""

import json
import re

import numpy as np
import pytest

from lit_model import dataset
from lit_model.data import PromptOptions, read_rows, split_rows
from lit_model.dataset import read_dataset
from lit_model.examples import check_style, render, tokenize
from lit_model.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny / "base")


@pytest.mark.parametrize("style", ["alpaca", "chatml"])
def test_only_the_response_and_its_end_are_learned(tokenizer, rows, style):
    for row, e in zip(rows, tokenize(rows, tokenizer, PromptOptions(style=style, max_length=500))):
        prompt = [tokenizer.bos_id] + tokenizer.encode(render(style, row["instruction"], row["input"]))
        assert e.ids[: e.first_target].tolist() == prompt  # the very ids that generation starts from
        assert tokenizer.decode(e.ids[e.first_target :]) == row["output"]
        assert e.ids[-1] == tokenizer.eos_id
        assert e.ids.tolist().count(tokenizer.bos_id) == 1


def test_no_token_spans_the_boundary(tokenizer):
    """Joined as text, prompt and response may be cut elsewhere: then a mask by length would be off by a token."""
    row = dict(instruction="a", input="", output="\n\nb")
    (e,) = tokenize([row], tokenizer, PromptOptions(max_length=500))
    assert tokenizer.decode(e.ids[e.first_target :]) == "\n\nb"
    joined = [tokenizer.bos_id] + tokenizer.encode(render("alpaca", "a") + "\n\nb")
    prompt = [tokenizer.bos_id] + tokenizer.encode(render("alpaca", "a"))
    assert e.ids[: len(prompt)].tolist() == prompt and len(joined) <= len(e.ids)


def test_unmasked_prompts_are_learned_too(tokenizer, rows):
    examples = tokenize(rows, tokenizer, PromptOptions(mask=False, max_length=500))
    assert all(e.first_target == 1 for e in examples)


def test_a_cut_response_still_ends_in_eos(tokenizer, capsys):
    row = dict(instruction="a", input="", output="apple river stone " * 20)
    full = tokenize([row], tokenizer, PromptOptions(max_length=500))[0]
    (cut,) = tokenize([row], tokenizer, PromptOptions(max_length=full.first_target + 10), "rows")
    assert len(cut.ids) == full.first_target + 10 and cut.ids[-1] == tokenizer.eos_id
    assert (cut.ids[:-1] == full.ids[: len(cut.ids) - 1]).all()
    assert "1 of 1 rows cut to prompt.max_length" in capsys.readouterr().out


def test_rows_without_output_or_room_are_left_out_and_counted(tokenizer, capsys):
    rows = [dict(instruction="a", input="", output=o) for o in ("b", "", " ")]
    rows.append(dict(instruction="stone " * 300, input="", output="b"))
    assert len(tokenize(rows, tokenizer, PromptOptions(max_length=200))) == 1
    said = capsys.readouterr().out
    assert (
        "2 of 4 rows left out: they have nothing to learn" in said
        and "1 of 4 rows left out: their prompt alone" in said
    )


def test_a_quote_left_open_does_not_swallow_the_rest(tmp_path):
    lines = ["instruction,output", 'a,"say ""hi"""', 'b,"Hello there', "c,d", "e,f"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="a.csv, line 2: not CSV .unexpected end of data"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("\n".join(lines[:2]))
    assert read_rows(tmp_path / "a.csv")[0]["output"] == 'say "hi"'


def test_a_text_of_nothing_is_left_out_and_counted(tokenizer, capsys):
    rows = [dict(text=text) for text in ("apple", "", " ")]
    assert len(tokenize(rows, tokenizer, PromptOptions())) == 1
    assert "2 of 3 rows left out: they have nothing to learn" in capsys.readouterr().out


def test_json_and_jsonl_are_read_alike(tmp_path, rows):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_rows(tmp_path / "a.json") == read_rows(tmp_path / "a.jsonl") == rows
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert read_rows(tmp_path / "b.jsonl") == [dict(instruction="a", input="", output="b")]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", "[{]", "a.json, line 1: not JSON"),
        ("a.json", '{"a": 1}', "a.json, row 1: a row needs instruction and output; it is "),
        ("a.json", "5", "a.json holds no list of rows"),
        ("a.json", "[]", "a.json holds no row"),
        ("a.csv", "text,label\n", "a.csv holds no row"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instr', "a.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            '{"instruction": "a", "text": "b"}',
            "line 1: a row needs instruction and output; it has instruction, ",
        ),
        ("a.json", '[{"instruction": "a", "output": ["b"]}]', "row 1: output is no text but "),
        ("a.json", b"\xff\xfe\x00", "a.json is not text in UTF-8"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        read_rows(tmp_path / name)


def test_the_split_is_seeded_and_drops_repeated_rows(rows):
    train, val = split_rows(rows + rows, 0.1, seed=3)
    assert (len(train), len(val)) == (54, 6)
    assert not [row for row in val if row in train]
    assert split_rows(rows + rows, 0.1, seed=3) == (train, val) != split_rows(rows, 0.1, seed=4)
    assert split_rows(rows, 0.0, seed=3)[1] == []


def test_a_preamble_is_shared_in_real_prompts(tokenizer, rows):
    from lit_model.packing import pack

    examples = tokenize(rows, tokenizer, PromptOptions(max_length=500))
    ((idx, packed),) = pack(examples, 10**6)
    alone = sum(len(e.ids) for e in examples)
    assert len(idx) < 0.6 * alone
    assert len(packed.targets) == sum(e.n_targets for e in examples)
    assert np.unique([q for q, _ in packed.lengths]).size > 2


def test_prompt_and_completion_are_taken_as_they_stand(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"apple river:"," stone"\n"",green\n')
    rows = read_rows(tmp_path / "a.csv")
    first, second = tokenize(rows, tokenizer, PromptOptions(max_length=50))
    assert first.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("apple river:"), *tokenizer.encode(" stone"), 1]
    assert tokenizer.decode(first.ids[first.first_target :]) == " stone" and second.first_target == 1


def test_plain_text_is_learned_whole_in_pieces(tokenizer, tmp_path):
    """Every token is learned once, and each but the first sees the one before it."""
    paragraphs = [" ".join(["apple river stone"] * 40) + f" {i}" for i in range(9)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    rows = read_rows(tmp_path / "a.txt")
    assert 1 < len(rows) < 9 and "\n\n".join(row["text"] for row in rows) == "\n\n".join(paragraphs)
    examples = tokenize(rows, tokenizer, PromptOptions(max_length=50))
    assert all(e.first_target == 1 and len(e.ids) <= 50 for e in examples)
    learned = np.concatenate([e.ids[1:] for e in examples]).tolist()
    assert learned == [i for row in rows for i in [*tokenizer.encode(row["text"]), tokenizer.eos_id]]


def test_a_template_of_ones_own(tokenizer, rows):
    assert render("Q: {instruction}{input}\\nA:", "{input}", "b") == "Q: {input}b\nA:"  # what is put in stays as it is
    check_style("Q: {instruction}", tokenizer)
    with pytest.raises(ValueError, match="'alpacca' is none of alpaca, chatml and chat"):
        check_style("alpacca", tokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        check_style("chat", tokenizer)


@pytest.fixture
def files(tmp_path, rows):
    for name, part in (("a.json", rows[:40]), ("b.json", rows[40:])):
        (tmp_path / name).write_text(json.dumps(part))
    return tmp_path


def test_files_are_mixed_by_weight(files, tokenizer):
    make = lambda data, **more: read_dataset(data, tokenizer, PromptOptions(val_fraction=0.1), **more)  # noqa: E731
    mixed = make(f"{files}/a.json:0.5,{files}/b.json:2")
    assert (len(mixed.train), len(mixed.val)) == (18 + 36, 4 + 2)
    seen = [e.ids.tobytes() for e in mixed.train]
    assert len(set(seen)) == 18 + 18 and not {e.ids.tobytes() for e in mixed.val} & set(seen)
    again = make(f"{files}/a.json:0.5,{files}/b.json:2")
    assert [e.ids.tobytes() for e in again.train] == seen
    given = make(files / "a.json", val_data=files / "b.json")
    assert (len(given.train), len(given.val)) == (40, 20)
    with pytest.raises(ValueError, match="the weight of .*b.json:-1 must be above 0"):
        make(f"{files}/a.json,{files}/b.json:-1")
    with pytest.raises(FileNotFoundError, match="c.json is not there"):
        make(f"{files}/a.json,{files}/c.json")
    (files / "l.csv").write_text("text,label\na,b\nc,d\n")
    with pytest.raises(ValueError, match="rows to tell apart go with no others"):
        make(f"{files}/a.json,{files}/l.csv")


def test_a_row_of_two_files_is_not_in_both_parts(files, rows, tokenizer):
    (files / "c.json").write_text(json.dumps(rows[5:30]))
    made = read_dataset(f"{files}/a.json,{files}/c.json,{files}/a.json:2", tokenizer, PromptOptions(val_fraction=0.3))
    val = [e.ids.tobytes() for e in made.val]
    assert len(set(val)) == len(val) and not set(val) & {e.ids.tobytes() for e in made.train}


def test_a_broken_file_of_the_cache_is_made_again(files, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "WORTH_KEEPING", 0.0)
    make = lambda: read_dataset(files / "a.json", tokenizer, PromptOptions(), cache_dir=files / "cache")  # noqa: E731
    make()
    (path,) = (files / "cache").glob("*.npz")
    path.write_bytes(path.read_bytes()[:500])
    assert len(make().train) == 38 and "is broken: its examples are made again" in capsys.readouterr().out
    make()
    assert "examples taken from" in capsys.readouterr().out


def test_validation_rows_are_not_trained_on(files, tokenizer, rows, capsys):
    (files / "all.json").write_text(json.dumps(rows))
    made = read_dataset(files / "all.json", tokenizer, PromptOptions(), val_data=files / "b.json")
    assert (len(made.train), len(made.val)) == (40, 20)
    assert "20 rows left out of training" in capsys.readouterr().out


def test_examples_are_kept_until_anything_changes(files, tokenizer, monkeypatch, capsys):
    """The second time they come from the cache, the same bit for bit, with the same words about what was left out."""
    monkeypatch.setattr(dataset, "WORTH_KEEPING", 0.0)
    rows = json.loads((files / "a.json").read_text()) + [dict(instruction="a", input="", output=" ")]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    (files / "m.json").write_text(json.dumps([{"messages": chat[: 2 + 2 * (i % 2)]} for i in range(2)]))
    (files / "a.json").write_text(json.dumps(rows))
    options = PromptOptions(max_length=500)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}<eos>{% endfor %}")

    def make(**more):
        arguments = dict(val_data=files / "b.json", cache_dir=files / "cache") | more
        made = read_dataset(f"{files}/a.json,{files}/m.json", tokenizer, **{"options": options, **arguments})
        return made, capsys.readouterr().out

    (first, said), (second, again) = make(), make()
    assert (
        again == said + f"examples taken from {next((files / 'cache').glob('*.npz'))}\n" and "nothing to learn" in said
    )
    for a, b in zip(first.train + first.val, second.train + second.val, strict=True):
        assert np.array_equal(a.ids, b.ids) and a.first_target == b.first_target and a.ids.dtype == b.ids.dtype
        assert np.array_equal(a.learned, b.learned) if a.learned is not None else b.learned is None
    assert any(e.learned is not None for e in second.train)
    for change in (dict(seed=1), dict(limit=3), dict(options=PromptOptions(max_length=400)), dict(val_data=None)):
        assert "examples taken from" not in make(**change)[1]
    (files / "b.json").write_text((files / "b.json").read_text().replace("apple", "apples"))
    assert "examples taken from" not in make()[1]
    assert not list((files / "cache").glob("*.partial"))


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", '{"text": "a"}\n{"text": "b"}', "line 2: not JSON .Extra data at column 1; a file of one object"),
        (
            "a.json",
            '[{"messages": [{"role": "robot", "content": "a"}]}]',
            "role is 'robot'; known are human",
        ),
        ("a.json", '[{"messages": [{"role": "assistant"}]}]', "a message's content is no text but null"),
        ("a.json", '[{"messages": ["a"]}]', 'a message is no object but "a"'),
        ("a.json", '[{"prompt": "a"}]', "row 1: a row needs instruction and output; it has prompt"),
        ("a.json", '[{"messages": [{"role": ["user"], "content": "a"}]}]', "a message's role is \\['user'\\]"),
        ("a.csv", "instruction,output\na,b, c\n", "a.csv, line 2: it has more fields than the first line has names"),
        ("a.txt", "a\0b", "a.txt is no text: it holds zero bytes"),
        ("a.txt", "\n\n", "a.txt holds no row"),
        ("a.csv", "a,b\n1,2\n", "a.csv, line 2: a row needs instruction and output; it has a, b"),
    ],
)
def test_other_broken_files_are_named_with_the_place(tmp_path, name, content, says):
    test_broken_files_are_named_with_the_place(tmp_path, name, content, says)


def test_a_text_of_the_validation_file_is_not_trained_on_under_another_label(tokenizer, tmp_path):
    for name, labels in (("a.csv", "xyxyxy"), ("val.csv", "yx")):
        (tmp_path / name).write_text("text,label\n" + "".join(f"text {i},{c}\n" for i, c in enumerate(labels)))
    data = read_dataset(tmp_path / "a.csv", tokenizer, PromptOptions(), val_data=tmp_path / "val.csv")
    assert len(data.train) == 4 and len(data.val) == 2


def test_a_cache_that_cannot_be_written_ends_nothing(tokenizer, files, capsys, monkeypatch):
    monkeypatch.setattr("lit_model.dataset.WORTH_KEEPING", 0)
    (files / "cache").write_text("no folder")
    assert len(read_dataset(files / "a.json", tokenizer, PromptOptions(), cache_dir=files / "cache").train) == 38
    assert "the examples are not kept for the next run" in capsys.readouterr().out


def test_a_text_file_is_cut_where_it_can_be(tmp_path):
    for text in ("word " * 3000, "line\n" * 3000, "x" * 9000):
        (tmp_path / "a.txt").write_text(text)
        pieces = [row["text"] for row in read_rows(tmp_path / "a.txt")]
        assert len(pieces) > 2 and all(len(piece) <= 2 * 2000 for piece in pieces)
        assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)
