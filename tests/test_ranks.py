"""N processes compute what one does: the same loss, the same gradients, whatever the method, over the same batch."""

import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, ROOT, randomize
from safetensors.torch import load_file

from lit_model import model
from lit_model.checkpoint import save_checkpoint

WORLDS = [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, fields in FAMILIES.items():
        torch.manual_seed(0)
        base = randomize(model.GPT(model.Config(**fields)), std=0.05)
        save_checkpoint(folder / name, base.config, base.state_dict(), {})
    return folder


def computed(folder, n: int, strategy: str) -> dict:
    out = folder / f"{strategy}-{n}.pt"
    if not out.exists():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        args = [str(ROOT / "tests/ranks.py"), str(folder), strategy, str(out)]
        done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("n, strategy", WORLDS, ids=[f"{s}-{n}" for n, s in WORLDS])
def test_n_processes_compute_what_one_does(folder, n, strategy):
    one, many = computed(folder, 1, "auto"), computed(folder, n, strategy)
    worst = dict(loss=0.0, norm=0.0, grads=0.0, val=0.0)
    for case, spread in many.items():
        alone = one[case]
        for value in ("loss", "norm", "val"):
            worst[value] = max(worst[value], abs(alone[value] - spread[value]) / abs(alone[value]))
        assert alone["grads"].keys() == spread["grads"].keys(), case
        differences = []
        for name, grad in alone["grads"].items():
            assert torch.equal(alone["trained"][name], spread["trained"][name]), (case, name)
            differences.append((grad - spread["grads"][name]).norm())
            assert differences[-1] <= 1e-5 * max(grad.norm(), 1e-3), (case, name, differences[-1])
        worst["grads"] = max(worst["grads"], torch.stack(differences).norm().item() / alone["norm"])
    print(f"| {strategy} | {n} | {len(many)} | " + " | ".join(f"{value:.1e}" for value in worst.values()) + " |")
    assert max(worst.values()) < 1e-6
    for path in (folder / "auto-1").rglob("*.safetensors"):
        theirs = folder / f"{strategy}-{n}" / path.relative_to(folder / "auto-1")
        if theirs.parent.name in {case[0] for case in many}:
            a, b = load_file(path), load_file(theirs)
            assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a), path
