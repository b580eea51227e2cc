"""Promises about the code itself. Run with -s to see what they count; budget.py prints the whole table."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import budget
import peft
import pytest
import torch
from budget import CORE, ROOT, files, functions, n_code_lines, n_lines, n_raises
from conftest import LLAMA
from torch import nn

from lit_model import model
from lit_model.methods import lora

LIBRARY = files(ROOT, "lit_model", "finetune", "generate")
SCRIPTS = files(ROOT, "scripts")


@pytest.mark.parametrize(
    "what, count, most",
    [
        # 7,900 before the families of 2026 (+ 500), the ways out (+ 700; to be 350), decoding (+ 970; to be 650), the
        # server (+ 850; to be 350); then 260 were thrown out; long rows (+ 221, scripts + 17, of 300)
        ("lines of lit_model, finetune and generate", lambda: n_lines(LIBRARY), 10881),
        ("lines of scripts", lambda: n_lines(SCRIPTS), 2137),
        ("lines of the core list", lambda: n_lines([ROOT / name for name in CORE if (ROOT / name).exists()]), 1350),
        ("lines of model.py", lambda: n_lines([ROOT / "lit_model/model.py"]), 400),
        ("lines of fit", lambda: dict((name, n) for n, name in functions(LIBRARY))["fit in loop.py"], 60),
        ("lines of the longest function", lambda: functions(LIBRARY + SCRIPTS)[0][0], 60),
        ("lines of the longest method file", lambda: max(n_lines([p]) for p in files(ROOT, "lit_model/methods")), 110),
        (
            "raises in 1,000 code lines",
            lambda: 1000 * n_raises(LIBRARY + SCRIPTS) / n_code_lines(LIBRARY + SCRIPTS),
            20,
        ),
        ("own files behind finetune/lora.py", lambda: budget.own_files(ROOT), 30),
        ("options of finetune/lora.py", lambda: len(budget.options(ROOT)), 39),
        ("lines of the README", lambda: len((ROOT / "README.md").read_text().splitlines()), 150),
        ("words of the README", lambda: len((ROOT / "README.md").read_text().split()), 1500),
    ],
)
def test_the_budget_holds(what, count, most):
    n = count()
    print(f"{what}: {n:.6g} of {most}")
    assert n <= most, f"{what}: {n}, and the budget is {most}"


def test_no_file_imports_itself_through_others():
    """Imports at the top of a file; one inside a function waits until it is called."""
    imports = {}
    for path in LIBRARY:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        imports[name] = budget.top_imports(path)
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done and name in imports:
            for other in imports[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in imports:
        visit(name, ())


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
    for name, calls in (("ours", ours), (f"peft {peft.__version__}", theirs)):
        print(f"\n{name}: {len(calls)} functions in {len({file for file, _ in calls})} files", end="")
    assert "lora" in gpt.blocks[0].attn.q_proj.deltas and len(ours) <= 10 and len({file for file, _ in ours}) <= 2


def test_the_library_imports_no_script_and_no_method():
    code = (
        "import lit_model, sys; print([m for m in sys.modules if m.split('.')[0] in ('finetune', 'generate', 'scripts')"
    )
    code += " or m.startswith(('lit_model.methods.', 'lit_model.weights.gguf', 'gguf'))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_script_hides_a_module_that_something_imports():
    """A script's own folder comes first on sys.path."""
    scripts = {
        p.stem for folder in ("finetune", "generate", "scripts", "scripts/bench") for p in (ROOT / folder).glob("*.py")
    }
    assert not scripts & set(sys.stdlib_module_names)
    assert not [name for name in scripts if name in {m.split(".")[0] for m in sys.modules} - {"finetune", "generate"}]


def test_no_slot_is_a_class_attribute():
    """`deltas = None` in a class body would shadow the registered submodule and switch every method off."""
    for cls in (model.Linear, model.CausalSelfAttention, model.GPT):
        assert not {"deltas", "virtual_tokens", "virtual_keys"} & vars(cls).keys()


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
