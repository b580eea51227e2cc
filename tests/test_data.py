"""Text in, examples out: what is learned, what is cut, what is refused."""

import json

import numpy as np
import pytest

from lit_model.data import PromptOptions, read_rows, render, split_rows, tokenize
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
    assert "2 of 4 rows left out: their output is empty" in said and "1 of 4 rows left out: their prompt alone" in said


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
