"""A file may hold anything. Whatever is wrong ends in one line that names it and exit code 2: no traceback, no hang, no
memory for what a header only claims, no code run, nothing lost or left behind. corpus.py has the files."""

import contextlib
import io
import os
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
from corpus import CASES, MARKER, READERS, Case, valid

from lit_model.cli import cli
from lit_model.data import chat

SECONDS, BYTES = 5, 300 * 2**20  # of the processor and of memory that a file may take


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Path:
    """The valid files."""
    folder = tmp_path_factory.mktemp("valid")
    valid(folder, tiny)
    return folder


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """Memory asked for in vain fails at once, and loops of a template end soon."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 3 * 2**30, before[1]))
    monkeypatch.setattr(chat, "MAX_STEPS", 10_000)
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def memory(name: str) -> int:
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def run(script, args: list[str], monkeypatch) -> tuple[object, list[str]]:
    """Calls a script as its command line does. Returns its exit code, or where an exception came from, and what is left
    on stderr: progress bars go."""
    monkeypatch.setattr(sys, "argv", ["script", *args])
    stderr, code = io.StringIO(), 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        with warnings.catch_warnings(record=True) as warned:
            try:
                cli(script.main, script.Options, script.__doc__)
            except SystemExit as e:
                code = e.code
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt):
                    raise
                where = traceback.extract_tb(e.__traceback__)[-1]
                code = f"{type(e).__name__} at {Path(where.filename).name}:{where.lineno}: {str(e)[:200]}"
    lines = (line.rsplit("\r", 1)[-1].strip() for line in stderr.getvalue().split("\n"))
    return code, [line for line in lines if line] + [str(warning.message) for warning in warned]


def fault(case: Case, home: Path, folder: Path, monkeypatch) -> str | None:
    """What there is against the promise where a script reads the changed file."""
    reader = case.file.split("/")[0]
    script, args = READERS[reader]
    (folder / "work").mkdir(parents=True)
    (folder / "secret").write_text("secret")
    for name in {reader, *({"base", "data.json"} if reader in ("run", "c.yaml", "data.json") else ())}:
        (shutil.copytree if (home / name).is_dir() else shutil.copy)(home / name, folder / "work" / name)
    case.change(folder / "work" / case.file, *case.args)
    (folder / "work/evil.py").write_text(f"import os\nos.mkdir({MARKER!r})")
    monkeypatch.chdir(folder / "work")
    monkeypatch.syspath_prepend(folder / "work")
    before = {path: path.lstat().st_ino for path in folder.rglob("*")}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    in_use, began = memory("VmRSS"), time.process_time()
    code, lines = run(script, args.split(), monkeypatch)
    seconds, peak = time.process_time() - began, memory("VmHWM") - in_use
    after = {path: path.lstat().st_ino for path in folder.rglob("*") if "new" not in path.parts or code}
    if any(MARKER in path.parts for path in after):
        return "it ran code"
    if after != before or (folder / "secret").read_text() != "secret":
        return f"it changed {sorted({*before.items()} ^ {*after.items()})}"
    if seconds > SECONDS or peak > BYTES:
        return f"it took {seconds:.1f} s and {peak >> 20} MB"
    if code == 0:
        return "it was taken without an error" if case.refused else None
    if code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or not lines[0].isprintable():
        return f"{code}, {lines}"
    names = (reader, Path(case.file).name, "train.lr", "style", "chat template")
    return None if any(name in lines[0] for name in names) else f"it names no file: {lines[0]}"


@pytest.mark.parametrize("file", dict.fromkeys(case.file for case in CASES))
def test_each_change_ends_in_one_line_that_names_the_file(file, home, tmp_path, monkeypatch):
    cases, faults = [case for case in CASES if case.file == file], []
    for i, case in enumerate(cases):
        if found := fault(case, home, tmp_path / str(i), monkeypatch):
            faults.append(f"{case.what}: {found}")
        shutil.rmtree(tmp_path / str(i))
        os.chdir(tmp_path)
    print(f"\n{file}: {len(cases)} changes, {len(faults)} against the promise")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("reader", READERS)
def test_the_valid_files_are_read(reader, home, tmp_path, monkeypatch):
    case = Case(reader, "nothing", lambda path: None, refused=False)
    assert fault(case, home, tmp_path, monkeypatch) is None
