"""The README and docs/ tell the truth: every command that they print is one that its script takes, every file that they
link to is there."""

import ast
import importlib
import inspect
import re
import shlex
import sys
import textwrap

import pytest
from conftest import ROOT

from lit_model.cli import cli
from lit_model.methods.lora import LoRADelta

FOLDERS = ("finetune", "generate", "scripts", "scripts/bench")
SCRIPTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """All `python script.py ...` of the pages, in blocks and in sentences, and of the scripts' own first lines."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ").replace("\\|", "|")
        text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
        blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
        lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in lines:
            found += [" ".join(part.split()) for part in line.split("&&") if part.strip().startswith("python ")]
    for script in SCRIPTS:
        text = ast.get_docstring(ast.parse(script.read_text())).replace("\\\n", " ")
        found += [re.split(r"   | && ", line)[0] for line in map(str.strip, text.splitlines()) if line[:7] == "python "]
    return list(dict.fromkeys(c for c in found if not c.endswith("--help") and not c.startswith("python -c")))


@pytest.mark.parametrize("command", commands())
def test_a_printed_command_is_one_that_its_script_takes(command, monkeypatch):
    _, script, *args = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    positional = re.search(r"positional=\((.*?)\)", (ROOT / script).read_text())
    names = re.findall(r'"(\w+)"', positional[1]) if positional else ()
    monkeypatch.setattr(sys, "argv", [script, *args])
    monkeypatch.chdir(ROOT)
    if "--config" not in args and hasattr(module, "Options"):  # a file has to be there; start_time.py passes them on
        cli(lambda options: None, module.Options, "", tuple(names))


def test_commands_are_found():
    assert len(commands()) > 30 and "python finetune/adapter.py" in commands()


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_shows_the_forward_of_lora_and_counts_the_lines_of_the_methods():
    readme = (ROOT / "README.md").read_text()
    assert textwrap.dedent(inspect.getsource(LoRADelta.forward)).strip() in readme
    counted = re.findall(r"^\| .*? \| (\w+\.py) \| (\d+) \|", readme, re.MULTILINE)
    assert len(counted) >= 10
    for name, n in counted:
        assert len((ROOT / "lit_model/methods" / name).read_text().splitlines()) == int(n), name
