"""Files as people have them, rows as the project knows them: every format and dialect, and what is wrong with some."""

import csv
import gzip
import json
import os
import re
import sys
from pathlib import Path

import pytest

from lit_model.data import formats
from lit_model.data.dataset import read_dataset
from lit_model.data.examples import ExampleOptions
from lit_model.data.rows import Notes, files_of, read_rows, split_rows

ROWS = [
    dict(instruction="Name a fruit, please", input="", output='"Apple"'),
    dict(instruction="Übersetze", input="river\nstone", output="Fluss; Stein"),
    dict(instruction="a\tb", input="", output="日本"),
]
QUESTION, ANSWER = dict(role="user", content="a"), dict(role="assistant", content="b")


def read(tmp_path: Path, *rows: object, **options) -> list[dict]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(tmp_path / "rows.jsonl", **options)


def messages(tmp_path: Path, *given: dict) -> list[dict]:
    (row,) = read(tmp_path, {"messages": given})
    return row["messages"]


def table(delimiter: str) -> str:
    lines = ['"instruction","input","output"'.replace(",", delimiter)]
    for row in ROWS:
        lines.append(delimiter.join('"' + text.replace('"', '""') + '"' for text in row.values()))
    return "\r\n".join(lines)


LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
LIST = json.dumps(ROWS, indent=1, ensure_ascii=False)
TEXTS = {
    "a.json": LIST,
    "a.jsonl": LINES,
    "b.jsonl": "\n" + LINES.replace("\n", "\r\n\r\n") + "\n \n",
    "a.ndjson": LINES,
    "A.JSONL": LINES,
    "a.csv": table(","),
    "b.csv": table(";"),
    "c.csv": table("\t"),
    "a.tsv": table("\t"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_read_in_every_format_and_encoding(name, encoding, tmp_path):
    content = TEXTS[name].encode(encoding)
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    assert read_rows(tmp_path / name) == read_rows(tmp_path / f"{name}.gz") == ROWS


def test_a_text_file_is_cut_where_it_can_be(tmp_path):
    for text in ("word " * 3000, "line\n" * 3000, "x" * 9000):
        (tmp_path / "a.txt").write_text(text)
        pieces = [row["text"] for row in read_rows(tmp_path / "a.txt")]
        assert len(pieces) > 2 and all(len(piece) <= 2 * 2000 for piece in pieces)
        assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)


def test_paragraphs_of_windows_are_paragraphs(tmp_path):
    paragraphs = "\n\n".join(["apple " * 400] * 3)
    (tmp_path / "a.txt").write_text(paragraphs)
    (tmp_path / "b.txt").write_bytes(paragraphs.replace("\n", "\r\n").encode())
    assert read_rows(tmp_path / "a.txt") == read_rows(tmp_path / "b.txt")
    assert len(read_rows(tmp_path / "b.txt")) == 3


def test_a_long_field_is_read(tmp_path):
    csv.field_size_limit(131072)  # as Python sets it
    (tmp_path / "a.csv").write_text(f"instruction,output\na,{'x' * 10**6}\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["output"]) == 10**6


def test_parquet_is_read_like_json(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    call = {"type": "function", "function": {"name": "sum", "arguments": {"x": 1}}}
    rows = [
        {"messages": [QUESTION, ANSWER], "tools": None, "id": 1},
        {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [call]},
    ]
    for name, given in (("alpaca", ROWS), ("chats", rows), ("many", ROWS * 200)):
        pq.write_table(pa.Table.from_pylist(given), tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
        assert read_rows(tmp_path / f"{name}.parquet") == read_rows(tmp_path / f"{name}.json")
    assert read_rows(tmp_path / "chats.parquet")[0] == {"messages": [QUESTION, ANSWER]}  # no keys of other messages
    numbers = pa.table({"text": ["a", "b", None], "label": [0.0, float("nan"), 1.0]})
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    assert read_rows(tmp_path / "numbers.parquet") == [dict(text="a", label="0.0"), dict(text="b")]


def test_without_pyarrow_a_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet: .*(ArrowInvalid|pip install pyarrow)"):
        read_rows(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="a.parquet: parquet files are read by pyarrow: pip install pyarrow"):
        read_rows(tmp_path / "a.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the Hub, with a data set of these files."""
    import huggingface_hub

    def add(**files: object) -> None:
        for name, content in files.items():
            path = tmp_path / "hub/data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))

    def list_repo_files(name: str, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        if name != "owner/set.v1":
            raise OSError(f"404 Client Error:\n{name} is nowhere")
        return sorted(str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*.*"))

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, repo_type: str(tmp_path / "hub" / file))
    monkeypatch.setitem(formats.READERS, ".parquet", formats._json_list)  # JSON is easier to write
    monkeypatch.chdir(tmp_path)
    return add


def test_a_data_set_of_the_hub_is_read_by_its_name(hub, tmp_path, capsys):
    hub(**{"README.md": "", "test.parquet": ROWS[:1]})
    assert read_rows("owner/set.v1") == ROWS[:1]  # it has no train split
    hub(**{"train-0.parquet": ROWS[1:2], "train-1.parquet": ROWS[2:]})
    assert read_rows(Path("owner/set.v1")) == ROWS[1:]
    assert "data set owner/set.v1 of the Hub: data/train-0.parquet, data/train-1" in capsys.readouterr().out
    assert files_of("owner/set.v1:0.5") == [(Path("owner/set.v1"), 0.5)]
    with pytest.raises(ValueError, match="owner/other is no file here, .*: OSError: 404 Client Error: owner/other is"):
        read_rows("owner/other")
    for path in (tmp_path / "hub").rglob("*.parquet"):
        path.unlink()
    with pytest.raises(ValueError, match="owner/set.v1 is no file .* it has no parquet files"):
        read_rows("owner/set.v1")


def test_what_is_no_name_of_a_data_set_is_not_asked_for(hub, tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/folder").mkdir()
    os.mkfifo(tmp_path / "owner/pipe.jsonl")
    (tmp_path / "rows.xlsx").write_text("a")
    for name, fault in (
        ("nothing.json", "not there"), ("owner/rows.jsonl", "not there"), ("owner/rows.csv.gz", "not there"),
        ("../set", "not there"), ("a/b/c", "not there"), ("/set", "not there"),
        ("owner/folder", "no file that can be read"), ("owner/pipe.jsonl", "no file that can be read"),
        ("rows.xlsx", "no file that can be read"),
    ):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=f"{name} is {fault}; --data wants .json, .jsonl, "):
            read_rows(name)


def test_a_compressed_file_is_whole(tmp_path):
    content = gzip.compress(LINES.encode())
    for name, broken in (("a.jsonl.gz", content[:-9]), ("b.jsonl.gz", LINES.encode()), ("c.csv.gz", b"")):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{name}(: it is broken or only partly written| holds no row)"):
            read_rows(tmp_path / name)
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert read_rows(tmp_path / "a.jsonl.gz") == ROWS


def test_a_value_that_is_none_means_the_same_everywhere(tmp_path):
    nothing = (dict(input=None), dict(input=float("nan")), dict(input=""), {}, dict(messages=None, text=None))
    rows = [dict(instruction="a", output="b", **more) for more in nothing]
    assert read(tmp_path, *rows) == [dict(instruction="a", input="", output="b")] * 5
    rows = [dict(text="a", **more) for more in (dict(label=None), dict(label=float("nan")), dict(label=" "), {})]
    assert read(tmp_path, *rows) == [dict(text="a")] * 4
    rows = [dict(messages=[QUESTION, ANSWER], **more) for more in (dict(tools=[]), dict(tools=None), dict(system=""))]
    assert read(tmp_path, *rows) == [dict(messages=[QUESTION, ANSWER])] * 3
    none = dict(name=None, tool_calls=None, reasoning_content="", weight=float("nan"))
    assert messages(tmp_path, QUESTION | none, ANSWER | none) == [QUESTION, ANSWER]
    notes = Notes()
    assert read(tmp_path, dict(instruction="a", output=None), dict(instruction="a", output=""), notes=notes) == [
        dict(instruction="a", input="", output="")
    ]
    assert next(iter(notes.first.values())).startswith(f"{tmp_path}/rows.jsonl, line 1: ")


def test_kinds_of_rows_may_be_mixed(tmp_path):
    chat = dict(messages=[QUESTION, ANSWER])
    rows = [ROWS[0], chat, dict(prompt="a", completion=" b"), dict(text="a"), dict(prompt="", completion="c")]
    assert read(tmp_path, *rows) == rows
    given = dict(instruction="a", output="b", text="a b", label=1)  # and which kind a row of several is
    assert read(tmp_path, given) == [dict(instruction="a", input="", output="b")]
    assert read(tmp_path, dict(text="a", label=0), dict(text="a", label=" b ", messages=None)) == [
        dict(text="a", label="0"),
        dict(text="a", label="b"),
    ]


def test_rows_to_classify_are_all_or_none(tmp_path, tiny):
    from lit_model.data.tokenizer import Tokenizer

    read(tmp_path, *(dict(text=f"{i}", label=i % 2) for i in range(9)), dict(text="a"))
    with pytest.raises(ValueError, match="rows.jsonl: 9 of 10 rows have text and label; to classify, "):
        read_dataset(tmp_path / "rows.jsonl", Tokenizer(tiny / "base"), ExampleOptions())


def test_a_message_keeps_its_keys(tmp_path):
    more = dict(reasoning_content="hm", name="x", tool_call_id="7", custom={"a": [None]})
    assert messages(tmp_path, ANSWER | more) == [ANSWER | more]
    for name in ("thinking", "reasoning"):  # names in use for the same
        assert messages(tmp_path, ANSWER | {name: "hm"}) == [ANSWER | dict(reasoning_content="hm")]
    parts = [dict(type="text", text="a"), dict(type="text", text="b")]
    assert messages(tmp_path, dict(role="user", content=parts)) == [dict(role="user", content="ab")]
    assert messages(tmp_path, dict(role="developer", content="")) == [dict(role="system", content="")]


@pytest.mark.parametrize("key", ["train", "weight", "loss_mask"])
def test_what_is_not_to_be_learned_has_weight_0(key, tmp_path):
    for value in (False, 0, 0.0):
        assert messages(tmp_path, ANSWER | {key: value}) == [ANSWER | {"weight": 0}]
    for value in (True, 1, 1.0, None):
        assert messages(tmp_path, ANSWER | {key: value}) == [ANSWER]
    assert messages(tmp_path, ANSWER | dict(train=True, weight=1, loss_mask=1) | {key: 0}) == [ANSWER | {"weight": 0}]


def test_the_arguments_of_a_call_become_an_object(tmp_path):
    def call(arguments: object) -> list[dict]:
        return [dict(id="7", type="function", function=dict(name="sum", arguments=arguments))]

    for given, expected in (('{"x": null}', {"x": None}), ({"x": 1}, {"x": 1}), ("x = 1", "x = 1"), ("5", "5")):
        for calls in (call(given), json.dumps(call(given))):
            said = dict(role="assistant", content=None, tool_calls=calls)
            assert messages(tmp_path, said) == [dict(role="assistant", content="", tool_calls=call(expected))]
    short = dict(role="assistant", content="a", tool_calls=[dict(name="sum", arguments='{"x": 1}')])
    assert messages(tmp_path, short)[0]["tool_calls"] == [dict(name="sum", arguments={"x": 1})]


def test_sharegpt_is_read_as_messages(tmp_path):
    call = dict(name="sum", arguments='{"x": 1}')
    turns = [
        ("system", "be kind"), ("human", "a"), ("function_call", json.dumps(call)), ("observation", "3"), ("gpt", "b"),
        ("user", "a"), ("function_call", json.dumps([call, call])), ("function", "4"), ("tool", "5"),
        ("chatgpt", "b"), ("model", "c"), ("function_call", "no call"), ("developer", "d"),
    ]  # fmt: skip
    tools = [dict(type="function", function=dict(name="sum"))]
    row = dict(conversations=[{"from": role, "value": text} for role, text in turns], tools=json.dumps(tools))
    (made,) = read(tmp_path, row)
    made, found = made["messages"], made["tools"]
    assert found == tools and [message["content"] for message in made[:5]] == ["be kind", "a", "", "3", "b"]
    assert [message["role"] for message in made] == [
        "system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool", "tool",
        "assistant", "assistant", "assistant", "system",
    ]  # fmt: skip
    called = dict(type="function", function=dict(name="sum", arguments={"x": 1}))
    assert made[2]["tool_calls"] == [called] and made[6]["tool_calls"] == [called] * 2
    assert made[11] == dict(role="assistant", content="no call")
    weighted = {"from": "gpt", "value": "b", "weight": 0}
    assert read(tmp_path, dict(conversations=[weighted], system="s"))[0]["messages"] == [
        dict(role="system", content="s"),
        ANSWER | dict(weight=0),
    ]


def test_of_a_prompt_of_messages_nothing_is_learned(tmp_path):
    row = dict(prompt=[QUESTION, ANSWER, QUESTION], completion=[ANSWER], tools=[dict(name="x")])
    (made,) = read(tmp_path, row)
    assert [message.pop("weight", 1) for message in made["messages"]] == [0, 0, 0, 1]
    assert made == dict(messages=[QUESTION, ANSWER, QUESTION, ANSWER], tools=[dict(name="x")])


FAULTS = [  # a row; why it is left out
    ("hello", "a row is an object with names"),
    ([1], "a row is an object with names"),
    (dict(question="a", answer="b"), "a row needs instruction and output, or messages, or "),
    (dict(instruction="a", text="b"), "a row needs instruction and output, or "),
    (dict(prompt="a"), "a row needs instruction and output, or "),
    (dict(prompt="a", chosen="b", rejected="c"), "a row needs instruction and output, or "),
    (dict(prompt="a", completion="b", label=False), "a completion with a label is not learned"),
    (dict(instruction="a", output=["b"]), "output is no text"),
    (dict(prompt="a", completion=[ANSWER]), "completion is no text"),
    (dict(text="\ud800"), "they hold what is no text"),
    (dict(messages=["a"]), "messages is no list of objects"),
    (dict(messages="a"), "messages is no list of objects"),
    (dict(messages=[QUESTION], tools="a"), "tools is no list of objects"),
    (dict(messages=[dict(content="a")]), "a message needs a role (user, human, assistant, "),
    (dict(messages=[dict(role="robot", content="a")]), "a message needs a role (user, human, assistant, "),
    (dict(messages=[dict(role=["user"], content="a")]), "a message needs a role (user, human, assistant, "),
    (dict(messages=[dict(role="assistant")]), "a message needs content that is a text"),
    (dict(messages=[dict(role="assistant", content=5)]), "a message needs content that is a text"),
    (dict(messages=[dict(role="user", content=[dict(type="image")])]), "a message needs content that is a text"),
    (dict(messages=[ANSWER | dict(tool_calls=[1])]), "tool_calls is no list of objects"),
    (dict(messages=[ANSWER | dict(thinking="\ud800")]), "they hold what is no text"),
]


@pytest.mark.parametrize("row, why", FAULTS)
def test_a_row_that_cannot_be_used_is_left_out_and_counted(row, why, tmp_path, capsys):
    assert read(tmp_path, ROWS[0], row, ROWS[0], row) == [ROWS[0]] * 2
    said = capsys.readouterr().out
    assert said.startswith(f"2 of 4 rows left out: {why}")
    assert f"(first: {tmp_path}/rows.jsonl, line 2: " in said
    for given in (dict(strict=True), {}):  # or it is all that there is
        rows = [ROWS[0], row] if given else [row]
        with pytest.raises(ValueError, match=f"rows.jsonl, line {len(rows)}: .+\\(.+\\)|surrogates"):
            read(tmp_path, *rows, **given)


@pytest.mark.parametrize(
    "name, content, why, place",
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "not JSON", "line 3"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, "not JSON", "line 2"),
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "9" * 5000 + "}", "not JSON", "line 2"),
        ("a.csv", 'text,id\na,1\n\n"b\nc",2\nd,3, 4\n', "it has more fields than the first line has names", "line 6"),
        ("a.csv", 'text,id\na,1\n"b" c,2\nd,3\n', "not CSV", "line 3"),
        ("a.csv", "text,id\na,1\n,\n", None, None),  # a text of nothing is counted where examples are made
    ],
)
def test_a_broken_line_is_left_out_and_counted(name, content, why, place, tmp_path):
    (tmp_path / name).write_text(content)
    notes = Notes()
    assert read_rows(tmp_path / name, notes)[0] == dict(text="a")
    left_out = {what: n for what, n in notes.counts.items() if what.startswith("left out")}
    assert left_out == ({f"left out: {why}": 1} if why else {})
    assert place is None or notes.first[f"left out: {why}"].startswith(f"{tmp_path / name}, {place}: {why}")


def test_a_quote_left_open_does_not_swallow_the_rest(tmp_path):
    lines = ["instruction,output", 'a,"say ""hi"""', 'b,"Hello there', "c,d", "e,f"]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="a.csv, line 3: not CSV .a quote is opened and never closed"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("\n".join(lines[:2]))
    assert read_rows(tmp_path / "a.csv")[0]["output"] == 'say "hi"'


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", "[{]", "a.json, line 1: not JSON .Expecting property name .* at column 3"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "line 2: not JSON .Extra data at column 1; a file of one object a "),
        ("a.json", '{"a": 1}', "a.json holds no list of rows; a file of one object a line is a .jsonl file"),
        ("a.json", "5", "a.json holds no list of rows"),
        ("a.json", "[" * 100_000, "a.json: it is broken or only partly written .RecursionError"),
        ("a.json", "[]", "a.json holds no row"),
        ("a.json", '[{"a": 1}, 5]', "a.json, row 1: a row needs instruction and output, or .* .it is {'a': 1}"),
        ("a.jsonl", "[1,\n2]", "a.jsonl, line 1: not JSON .Expecting value at column 4"),
        ("a.csv", "text,label\n", "a.csv holds no row"),
        ("a.csv", "", "a.csv holds no row"),
        ("a.csv", "a,b\n1,2\n", "a.csv, line 2: a row needs instruction and output, or .*'a': '1', 'b': '2'"),
        ("a.csv", "instruction,output\na,b, c\n", "line 2: it has more fields than the first line has names .put quot"),
        ("a.txt", "\n\n", "a.txt holds no row"),
        ("a.txt", "a\0b", "a.txt is not text in UTF-8 or UTF-16 .it holds zero bytes.: save it as UTF-8"),
        ("a.csv", b"text\n\xe4pfel\n", "a.csv is not text in UTF-8 or UTF-16 .invalid continuation byte"),
        ("a.json", b"\xff\xfe\x00", "a.json is not text in UTF-8 or UTF-16 .truncated data"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-32"), "a.jsonl is not text in UTF-8 or UTF-16"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1", "a.jsonl is a pointer of Git LFS"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as e:
        read_rows(tmp_path / name)
    assert len(str(e.value).splitlines()) == 1


def test_notes_say_each_reason_once(tmp_path, capsys):
    notes, broken = Notes(), dict(text=5 * [1])
    more = [dict(text="a", id=1, source="x"), dict(text="a", id=0, source=""), broken, dict(text="a", id=None), broken]
    for _ in range(2):
        assert len(read(tmp_path, *more, notes=notes)) == 3
    assert capsys.readouterr().out == "" and notes.seen == 10
    unread = "have keys that are not read: id"
    # a row is counted once, however often one after the other
    assert notes.counts == {"left out: text is no text": 4, unread: 1, f"{unread}, source": 1}
    for _ in range(3):
        notes.add("cut", "")
    notes.say(10, "rows")
    assert capsys.readouterr().out.splitlines() == [
        f"1 of 10 rows {unread}, source (first: {tmp_path}/rows.jsonl, line 1)",
        f"1 of 10 rows {unread} (first: {tmp_path}/rows.jsonl, line 2)",
        f"4 of 10 rows left out: text is no text (first: {tmp_path}/rows.jsonl, line 3: text is no text "
        "(it is [1, 1, 1, 1, 1]))",
        "3 of 10 rows cut",
    ]


def test_the_split_is_seeded_and_drops_repeated_rows(rows):
    train, val = split_rows(rows + rows, 0.1, seed=3)
    assert (len(train), len(val)) == (54, 6)
    assert not [row for row in val if row in train]
    assert split_rows(rows + rows, 0.1, seed=3) == (train, val) != split_rows(rows, 0.1, seed=4)
    assert split_rows(rows, 0.0, seed=3)[1] == []
