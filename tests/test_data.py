"""Text in, examples out: what is learned, what is cut, what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, save_tokenizer

from lit_model.data.dataset import read_dataset
from lit_model.data.examples import ExampleOptions, prompt_ids, render, tokenize, validate_options, validate_style
from lit_model.data.rows import read_rows
from lit_model.data.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny / "base")


@pytest.mark.parametrize("style", ["alpaca", "chatml"])
def test_only_the_response_and_its_end_are_learned(tokenizer, rows, style):
    for row, e in zip(rows, tokenize(rows, tokenizer, ExampleOptions(style=style, max_length=500))):
        prompt = prompt_ids(tokenizer, style, render(style, row["instruction"], row["input"]))
        assert e.ids[: e.first_target].tolist() == prompt  # the very ids that generation starts from
        assert tokenizer.decode(e.ids[e.first_target :]) == row["output"]
        assert e.ids[-1] == tokenizer.eos_id
        assert e.ids.tolist().count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("prompt, answer", [("### Response:\n", "\n\nb"), ("apple ri", "ver stone"), ("a ", " b")])
def test_ids_are_those_of_the_whole_text(tokenizer, prompt, answer):
    """A token that spans the boundary is learned, and no token of the prompt alone is."""
    (e,) = tokenize([dict(prompt=prompt, completion=answer)], tokenizer, ExampleOptions(max_length=500))
    assert e.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(prompt + answer), tokenizer.eos_id]
    learned = tokenizer.decode(e.ids[e.first_target :])
    assert learned.endswith(answer) and (prompt + answer).endswith(learned)
    before = tokenizer.decode(e.ids[: e.first_target + 1])
    assert len(before) > len(prompt)


def test_unmasked_prompts_are_learned_too(tokenizer, rows):
    examples = tokenize(rows, tokenizer, ExampleOptions(mask=False, max_length=500))
    assert all(e.first_target == 1 for e in examples)


def test_a_cut_response_still_ends_in_eos(tokenizer, capsys):
    row = dict(instruction="a", input="", output="apple river stone " * 20)
    full = tokenize([row], tokenizer, ExampleOptions(max_length=500))[0]
    (cut,) = tokenize([row], tokenizer, ExampleOptions(max_length=full.first_target + 10), "rows")
    assert len(cut.ids) == full.first_target + 10 and cut.ids[-1] == tokenizer.eos_id
    assert (cut.ids[:-1] == full.ids[: len(cut.ids) - 1]).all()
    assert "1 of 1 rows cut to examples.max_length" in capsys.readouterr().out


def test_rows_without_output_or_room_are_left_out_and_counted(tokenizer, capsys):
    rows = [dict(instruction="a", input="", output=o) for o in ("b", "", " ")]
    rows.append(dict(instruction="stone " * 300, input="", output="b"))
    assert len(tokenize(rows, tokenizer, ExampleOptions(max_length=200))) == 1
    said = capsys.readouterr().out
    assert (
        "2 of 4 rows left out: they have nothing to learn" in said
        and "1 of 4 rows left out: their prompt alone" in said
    )


def test_a_text_of_nothing_is_left_out_and_counted(tokenizer, capsys):
    rows = [dict(text=text) for text in ("apple", "", " ")]
    assert len(tokenize(rows, tokenizer, ExampleOptions())) == 1
    assert "2 of 3 rows left out: they have nothing to learn" in capsys.readouterr().out


def test_a_preamble_is_shared_in_real_prompts(tokenizer, rows):
    from lit_model.packing import pack

    examples = tokenize(rows, tokenizer, ExampleOptions(max_length=500))
    ((idx, packed),) = pack(examples, 10**6)
    alone = sum(len(e.ids) for e in examples)
    assert len(idx) < 0.6 * alone
    assert len(packed.targets) == sum(e.n_targets for e in examples)
    assert np.unique([q for q, _ in packed.lengths]).size > 2


def test_prompt_and_completion_are_taken_as_they_stand(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\n"apple river:"," stone"\n"",green\n')
    rows = read_rows(tmp_path / "a.csv")
    first, second = tokenize(rows, tokenizer, ExampleOptions(max_length=50))
    assert first.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("apple river:"), *tokenizer.encode(" stone"), 1]
    assert tokenizer.decode(first.ids[first.first_target :]) == " stone" and second.first_target == 1


def test_plain_text_is_learned_whole_in_pieces(tokenizer, tmp_path):
    """Every token is learned once, and each but the first sees the one before it."""
    paragraphs = [" ".join(["apple river stone"] * 40) + f" {i}" for i in range(9)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    rows = read_rows(tmp_path / "a.txt")
    assert 1 < len(rows) < 9 and "\n\n".join(row["text"] for row in rows) == "\n\n".join(paragraphs)
    examples = tokenize(rows, tokenizer, ExampleOptions(max_length=50))
    assert all(e.first_target == 1 and len(e.ids) <= 50 for e in examples)
    learned = np.concatenate([e.ids[1:] for e in examples]).tolist()
    assert learned == [i for row in rows for i in [*tokenizer.encode(row["text"]), tokenizer.eos_id]]


def test_a_template_of_ones_own(tokenizer, rows):
    assert render("Q: {instruction}{input}\\nA:", "{input}", "b") == "Q: {input}b\nA:"  # what is put in stays as it is
    validate_style("Q: {instruction}", tokenizer)
    with pytest.raises(ValueError, match="'alpacca' cannot be taken: known are alpaca, chat, chatml"):
        validate_style("alpacca", tokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        validate_style("chat", tokenizer)


@pytest.fixture
def files(tmp_path, rows):
    for name, part in (("a.json", rows[:40]), ("b.json", rows[40:])):
        (tmp_path / name).write_text(json.dumps(part))
    return tmp_path


def test_files_are_mixed_by_weight(files, tokenizer):
    make = lambda data, **more: read_dataset(data, tokenizer, ExampleOptions(val_fraction=0.1), **more)  # noqa: E731
    mixed = make(f"{files}/a.json:0.5,{files}/b.json:2")
    assert (len(mixed.train), len(mixed.val)) == (18 + 36, 4 + 2)
    seen = [e.ids.tobytes() for e in mixed.train]
    assert len(set(seen)) == 18 + 18 and not {e.ids.tobytes() for e in mixed.val} & set(seen)
    again = make(f"{files}/a.json:0.5,{files}/b.json:2")
    assert [e.ids.tobytes() for e in again.train] == seen
    given = make(files / "a.json", val_data=files / "b.json")
    assert (len(given.train), len(given.val)) == (40, 20)
    with pytest.raises(FileNotFoundError, match="b.json:-1 is not there"):
        make(f"{files}/a.json,{files}/b.json:-1")
    with pytest.raises(FileNotFoundError, match="c.json is not there"):
        make(f"{files}/a.json,{files}/c.json")
    (files / "l.csv").write_text("text,label\na,b\nc,d\n")
    with pytest.raises(ValueError, match="a.json, .*l.csv: 2 of 42 rows have text and label; to classify"):
        make(f"{files}/a.json,{files}/l.csv")


def test_a_row_of_two_files_is_not_in_both_parts(files, rows, tokenizer):
    (files / "c.json").write_text(json.dumps(rows[5:30]))
    made = read_dataset(f"{files}/a.json,{files}/c.json,{files}/a.json:2", tokenizer, ExampleOptions(val_fraction=0.3))
    val = [e.ids.tobytes() for e in made.val]
    assert len(set(val)) == len(val) and not set(val) & {e.ids.tobytes() for e in made.train}


def test_validation_rows_are_not_trained_on(files, tokenizer, rows, capsys):
    (files / "all.json").write_text(json.dumps(rows))
    made = read_dataset(files / "all.json", tokenizer, ExampleOptions(), val_data=files / "b.json")
    assert (len(made.train), len(made.val)) == (40, 20)
    assert "20 rows left out of training" in capsys.readouterr().out


def test_a_text_of_the_validation_file_is_not_trained_on_under_another_label(tokenizer, tmp_path):
    for name, labels in (("a.csv", "xyxyxy"), ("val.csv", "yx")):
        (tmp_path / name).write_text("text,label\n" + "".join(f"text {i},{c}\n" for i, c in enumerate(labels)))
    data = read_dataset(tmp_path / "a.csv", tokenizer, ExampleOptions(), val_data=tmp_path / "val.csv")
    assert len(data.train) == 4 and len(data.val) == 2


def test_validation_rows_without_anything_to_learn_are_named(files, tokenizer):
    (files / "empty.json").write_text(json.dumps([dict(instruction=str(i), output=" ") for i in range(3)]))
    with pytest.raises(ValueError, match="a.json: none of the 3 validation rows is left to learn from"):
        read_dataset(files / "a.json", tokenizer, ExampleOptions(), val_data=files / "empty.json")
    with pytest.raises(ValueError, match="a.json: none of the 0 training rows is left to learn from"):
        read_dataset(files / "a.json", tokenizer, ExampleOptions(), val_data=files / "a.json")
    with pytest.raises(ValueError, match="1 rows are too few to keep 1 for"):
        (files / "one.json").write_text(json.dumps([dict(instruction="a", output="b")]))
        read_dataset(files / "one.json", tokenizer, ExampleOptions())


@pytest.mark.parametrize("options", [dict(val_fraction=1.0), dict(val_fraction=-0.1), dict(max_length=1)])
def test_options_that_make_no_sense_are_refused(options, tokenizer):
    validate_options(ExampleOptions(), tokenizer)
    with pytest.raises(ValueError, match="they must be at least 0 and below 1, and at least 2"):
        validate_options(ExampleOptions(**options), tokenizer)


def test_data_without_labels_or_chats_imports_neither(files, rows):
    """What a run does not need costs it neither time at its start nor a file to read."""
    save_tokenizer(files / "base", rows)
    code = f"""
import sys
from lit_model.data.dataset import read_dataset
from lit_model.data.examples import ExampleOptions
from lit_model.data.tokenizer import Tokenizer
read_dataset({str(files / "a.json")!r}, Tokenizer({str(files / "base")!r}), ExampleOptions())
print([name for name in ("sklearn", "lit_model.data.labels", "lit_model.data.chat", "lit_model.data.score")
       if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
