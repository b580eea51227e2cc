"""Promises about the code itself. Run with -s to see what they count."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from conftest import LLAMA, ROOT
from torch import nn

from lit_model.methods import lora
from lit_model import model


def entered(build: Callable[[], object], folder: Path) -> set[tuple[str, str]]:
    """(file, function) of all functions in `folder` that build() enters, without lambdas and comprehensions."""
    found = set()

    def enter(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(folder)) and not code.co_qualname.endswith(">"):
            found.add((code.co_filename, code.co_qualname))

    sys.setprofile(enter)
    try:
        build()
    finally:
        sys.setprofile(None)
    return found


def test_building_one_lora_layer_enters_few_functions_and_files():
    gpt = model.GPT(model.Config(**{**LLAMA, "n_layer": 1}))
    ours = entered(lambda: lora.install(gpt, lora.LoRA(targets="q_proj")), ROOT / "lit_model")
    layer, options = nn.ModuleDict({"q_proj": nn.Linear(8, 8)}), peft.LoraConfig(r=8, target_modules=["q_proj"])
    theirs = entered(lambda: peft.inject_adapter_in_model(options, layer), Path(peft.__file__).parent)
    for name, functions in (("ours", ours), (f"peft {peft.__version__}", theirs)):
        print(f"\n{name}: {len(functions)} functions in {len({file for file, _ in functions})} files", end="")
    assert "lora" in gpt.blocks[0].attn.q_proj.deltas and len(ours) <= 10 and len({file for file, _ in ours}) <= 2


def test_the_library_imports_no_script():
    scripts = ("finetune", "generate", "scripts")
    code = f"import lit_model, sys; print([m for m in sys.modules if m.split('.')[0] in {scripts}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_script_hides_a_module_that_something_imports():
    """A script's own folder comes first on sys.path."""
    scripts = {p.stem for folder in ("finetune", "generate", "scripts") for p in (ROOT / folder).glob("*.py")}
    assert not scripts & set(sys.stdlib_module_names)
    assert not [name for name in scripts if name in {m.split(".")[0] for m in sys.modules} - {"finetune", "generate"}]


def test_no_slot_is_a_class_attribute():
    """`deltas = None` in a class body would shadow the registered submodule and switch every method off."""
    for cls in (model.Linear, model.CausalSelfAttention, model.GPT):
        assert not {"deltas", "virtual_tokens", "virtual_keys"} & vars(cls).keys()


def test_every_file_is_in_the_readme_tree():
    readme = (ROOT / "README.md").read_text()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for path in tracked:
        if os.path.dirname(path) in ("lit_model", "finetune", "generate", "scripts") and not path.endswith(
            "__init__.py"
        ):
            folder = readme.split(f"\n{os.path.dirname(path)}/")[1].split("\ntests/")[0]
            assert os.path.basename(path) in folder, f"README's tree lacks {path}"


def test_the_readme_counts_the_lines_of_the_methods():
    counted = re.findall(r"^\| .*? \| (\w+\.py) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(counted) >= 9
    for name, n in counted:
        assert len((ROOT / "lit_model" / name).read_text().splitlines()) == int(n), name


def test_bfloat16_cannot_hold_a_small_step():
    """Why what is trained is float32: AdamW at lr 1e-3 leaves a bfloat16 weight of 1.0 where it is, in 100 steps."""
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.ones(1, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.AdamW([p], lr=1e-3, weight_decay=0)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved.append(1.0 - p.item())
    assert moved[0] == 0 and abs(moved[1] - 0.1) < 1e-3
