"""A file may say anything. Whatever is wrong with one ends in one line that names it and exit code 2: no traceback, no
hang, no memory for what a header only claims, no code run, nothing written or left behind. corpus.py has the files.

With -s each kind prints how many files were tried and how they ended.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpus import CASES, KINDS, MARKER, Case, valid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_model.data import chat, dataset
from lit_model.cli import cli
from lit_model.data.rows import _KNOWN, PromptOptions
from lit_model.data.tokenizer import Tokenizer

SECONDS, BYTES = 10, 500 * 2**20  # that a file may take


class Hangs(BaseException):
    """Nothing but the test catches it."""


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """The valid files."""
    folder = tmp_path_factory.mktemp("valid")
    valid(folder, tiny)
    return folder


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
    """Memory that is asked for in vain fails at once; templates get a second; no run is kept for the next one."""
    monkeypatch.setattr(chat, "SECONDS", 1)
    monkeypatch.setattr(dataset, "WORTH_KEEPING", float("inf"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 3 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def memory(what: str) -> int:
    return int(re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@contextlib.contextmanager
def timed(seconds: int) -> Iterator[None]:
    """Interrupts what computes for so long."""

    def stop(*_: object) -> None:
        raise Hangs(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@dataclass
class End:
    """How a script ended."""

    code: object
    """exit code; None: by itself; else what it raised, as text"""
    err: str
    seconds: float
    bytes: int
    """that it had more than before at its peak"""

    @property
    def lines(self) -> list[str]:
        """What is left on the screen of stderr, without progress bars."""
        shown = (line.rsplit("\r", 1)[-1].strip() for line in self.err.split("\n"))
        return [line for line in shown if line]


def run(module, args: list[str], monkeypatch) -> End:
    """Calls a script's main as its command line does."""
    monkeypatch.setattr(sys, "argv", ["script", *args])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    err, before, began, code = io.StringIO(), memory("VmRSS"), time.perf_counter(), None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), timed(2 * SECONDS):
            with warnings.catch_warnings(record=True) as warned:
                cli(module.main, module.Options, module.__doc__)
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(e.__traceback__)[-1]
        code = f"{type(e).__name__} at {Path(where.filename).name}:{where.lineno}: {str(e)[:200]}"
    for warning in warned:  # a user would see them
        err.write(f"{warning.category.__name__}: {warning.message}\n")
    return End(code, err.getvalue(), time.perf_counter() - began, memory("VmHWM") - before)


def snapshot(folder: Path) -> dict[str, tuple]:
    """What lies in a folder, and in which version."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (about.st_mode, 0 if path.is_dir() else about.st_size, about.st_ino)
    return found


def wrong(end: End, names: tuple[str, ...], legal: bool, size: int) -> str | None:
    """What the end of a script has against the promise; `size` is that of the files."""
    if end.seconds > SECONDS:
        return f"it took {end.seconds:.1f} s"
    if end.bytes > BYTES + 100 * size:  # tokenizers takes 80 bytes for each of a text
        return f"it took {end.bytes / 2**20:.0f} MB"
    if legal:
        return None if end.code is None else f"it is legal, and ended with {end.code}: {end.err[-300:]}"
    if end.code is None:
        return "it was taken without an error"
    if end.code != 2:
        return str(end.code)
    if len(end.lines) != 1 or not end.lines[0].startswith("error: "):
        return f"no single line: {end.lines}"
    line = end.lines[0]
    if len(line) > 700 or not line.isprintable():
        return f"a line of {len(line)} characters: {line[:200]!r}"
    if not any(name in line for name in names):
        return f"it names none of {names}: {line}"
    return None


def tried(case: Case, home: Path, folder: Path, monkeypatch) -> tuple[End, str | None]:
    """Makes the file, has it read, and returns what is against the promise."""
    kind = KINDS[case.kind]
    folder.mkdir()
    (folder / "outside").mkdir()
    (folder / "outside/secret").write_text("secret")
    work = folder / "work"
    work.mkdir()
    for name in kind.copied:
        (shutil.copytree if (home / name).is_dir() else shutil.copy)(home / name, work / name)
    monkeypatch.chdir(work)
    case.make(work)
    before = snapshot(folder)
    size = sum(about[1] for about in before.values())
    data = case.more[1] if case.kind == "data" else ""
    args = kind.args.format(data=data).split() + ([] if case.kind == "data" else list(case.more))
    end = run(kind.script, args, monkeypatch)
    said = wrong(end, tuple(name.format(data=data) for name in kind.names), case.legal, size)
    after = snapshot(folder)
    if MARKER in "".join(after):
        said = "it ran code"
    elif lost := [name for name in before if before[name] != after.get(name) and "new/" not in name]:
        said = said or f"it changed {lost}"
    elif (more := after.keys() - before.keys()) and not (case.legal and all("/new" in n or "/out" in n for n in more)):
        said = said or f"it left {sorted(more)}"
    if (folder / "outside/secret").read_text() != "secret" or len(list((folder / "outside").iterdir())) > 1:
        said = "it wrote outside its folder"
    return end, said


@pytest.mark.parametrize("kind", KINDS)
def test_each_malformed_file_ends_in_one_line_that_names_it(kind, home, tmp_path, monkeypatch):
    cases = [case for case in CASES if case.kind == kind]
    ends, found, slowest, most = Counter(), [], 0.0, 0
    for i, case in enumerate(cases):
        end, said = tried(case, home, tmp_path / str(i), monkeypatch)
        if said:
            found.append(f"{case.what}: {said}")
        ends["wrong" if said else "legal" if case.legal else "clear"] += 1
        slowest, most = max(slowest, end.seconds), max(most, end.bytes)
        if os.environ.get("LIT_SHOW"):  # the lines, to be read
            print(f"  {case.what}: {end.seconds:.1f} s, {end.bytes >> 20} MB, {' '.join(end.lines)[:300]}")
        os.chdir(tmp_path)
        shutil.rmtree(tmp_path / str(i))
    print(
        f"\n{kind}: files tried {len(cases)}, clear errors {ends['clear']}, legal {ends['legal']}, anything else "
        f"{ends['wrong']}; the slowest {slowest:.1f} s, most memory {most / 2**20:.0f} MB"
    )
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)


def test_the_corpus_has_files_of_every_kind():
    counts = Counter(case.kind for case in CASES)
    legal = sum(case.legal for case in CASES)
    print(f"\n{len(CASES)} files, {legal} of them odd but legal: {dict(counts)}")
    assert set(counts) == set(KINDS) and min(counts.values()) >= 10 and len(CASES) - legal >= 200
    assert max(Counter((case.kind, case.what) for case in CASES).values()) == 1


# --------------------------------------------------------------------------------------------- files damaged at random


@dataclass
class ReadOptions:
    """Options."""

    data: Path
    base: Path


def read(options: ReadOptions) -> None:
    dataset.read_dataset(options.data, Tokenizer(options.base), PromptOptions(style="{instruction}", val_fraction=0))


READER = SimpleNamespace(main=read, Options=ReadOptions, __doc__="Reads data, and trains on nothing.")
damage = st.tuples(  # bytes are replaced, among the first ones or anywhere, or cut out, or the end is missing
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255), st.booleans()), max_size=6),
    st.one_of(st.none(), st.floats(0, 1)),
    st.one_of(st.none(), st.tuples(st.floats(0, 1), st.integers(1, 9))),
)
often = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([2**63, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def damaged(content: bytes, how: tuple) -> bytes:
    made, (flips, end, gap) = bytearray(content), how
    for where, byte, early in flips:
        made[int(where * (min(len(made), 600) if early else len(made)))] = byte
    if gap is not None:
        at = int(gap[0] * len(made))
        del made[at : at + gap[1]]
    return bytes(made if end is None else made[: int(end * len(made))])


def check_end(end: End, names: tuple[str, ...]) -> None:
    assert wrong(end, names, legal=end.code is None, size=0) is None, (wrong(end, names, end.code is None, 0), end.err)


ROWS = [{"instruction": "a é 日", "output": 'b "c", d\n'}, {"instruction": "e", "output": "f"}]
DATA = {
    "json": json.dumps(ROWS, ensure_ascii=False),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "csv": 'instruction,output\n"a é","b ""c"", d\n"\ne,f\n',
    "txt": "apple river\n\nstone é\n",
}
DAMAGED = [  # the kind of its script and of its folder, and the file
    ("gguf", "m.gguf"),
    ("checkpoint", "base/lit_model.safetensors"),
    ("method", "run/lit_method.safetensors"),
    ("hf safetensors", "hf/model.safetensors"),
    ("meta", "meta/consolidated.00.pth"),
    ("sentencepiece", "sp/tokenizer.model"),
    ("tokenizer", "base/tokenizer.json"),
    ("tokenizer", "base/tokenizer_config.json"),
    ("lit_config", "base/lit_config.json"),
    ("hf config", "hf/config.json"),
    ("meta", "meta/params.json"),
]


@pytest.fixture
def work(home, tmp_path, monkeypatch) -> Path:
    """A copy of the valid files, and there we are."""
    folder = shutil.copytree(home, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("kind, name", DAMAGED, ids=[name for _, name in DAMAGED])
def test_a_file_damaged_at_random_is_read_or_named(kind, name, work, monkeypatch):
    content, args = (work / name).read_bytes(), KINDS[kind].args.split()

    @often
    @given(damage)
    def check(how):
        (work / name).write_bytes(damaged(content, how))
        end = run(KINDS[kind].script, args, monkeypatch)
        check_end(end, (*KINDS[kind].names, name.split("/")[0]))
        assert end.code is None or not (work / "new").exists()
        shutil.rmtree(work / "new", ignore_errors=True)

    check()


@pytest.mark.parametrize("ending", DATA)
def test_data_damaged_at_random_are_read_or_named(ending, work, monkeypatch):
    name = f"d.{ending}"

    @often
    @given(damage)
    def check(how):
        (work / name).write_bytes(damaged(DATA[ending].encode(), how))
        check_end(run(READER, ["--data", name, "--base", "base"], monkeypatch), (name,))

    check()


@often
@given(rows=st.lists(st.one_of(anything, st.dictionaries(st.sampled_from(sorted(_KNOWN)), anything)), max_size=4))
def test_rows_of_anything_are_read_or_named(rows, work, monkeypatch):
    (work / "d.json").write_text(json.dumps(rows))
    check_end(run(READER, ["--data", "d.json", "--base", "base"], monkeypatch), ("d.json",))


@pytest.mark.parametrize("kind, name", [(k, n) for k, n in DAMAGED if n.endswith(("config.json", "params.json"))])
def test_fields_of_anything_are_read_or_named(kind, name, work, monkeypatch):
    stated = json.loads((work / name).read_text())

    @often
    @given(st.dictionaries(st.sampled_from([*stated, "rope_scaling", "chat_template", "window"]), anything, min_size=1))
    def check(changes):
        (work / name).write_text(json.dumps(stated | changes))
        check_end(run(KINDS[kind].script, KINDS[kind].args.split(), monkeypatch), KINDS[kind].names)
        shutil.rmtree(work / "new", ignore_errors=True)

    check()
