"""N processes compute what one does: the same loss, the same gradients, whatever the method, over the same batch."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FAMILIES, ROOT, randomize
from safetensors.torch import load_file

from finetune.devices import launch
from lit_model import model
from lit_model.load import save_checkpoint

WORLDS = [(2, "ddp"), (2, "fsdp"), pytest.param(4, "ddp", marks=pytest.mark.slow), (4, "fsdp")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, fields in FAMILIES.items():
        torch.manual_seed(0)
        base = randomize(model.GPT(model.Config(**fields)), std=0.05)
        save_checkpoint(folder / name, base.config, base.state_dict(), {})
    return folder


def in_ranks(n: int, *args: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    command += [str(ROOT / "tests/ranks.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def computed(folder, n: int, strategy: str) -> dict:
    out = folder / f"{strategy}-{n}.pt"
    if not out.exists():
        in_ranks(n, folder, strategy, out)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("n, strategy", WORLDS, ids=["ddp-2", "fsdp-2", "ddp-4", "fsdp-4"])
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_under_fsdp_a_process_reads_only_its_slices(tmp_path):
    config = model.Config(vocab_size=97, n_layer=3, n_head=16, n_embd=2048, n_hidden=8192)
    gpt = model.GPT(config).bfloat16()
    save_checkpoint(tmp_path / "large", config, gpt.state_dict(), {})
    size = sum(p.nbytes for p in gpt.parameters())
    in_ranks(2, tmp_path, "fsdp", tmp_path / "slices")
    for rank in range(2):
        grown = json.loads((tmp_path / f"slices-{rank}.json").read_text())
        print({name: f"{bytes / size:.2f} of the network" for name, bytes in grown.items()})
        assert grown["RssFile"] < 0.75 * size and grown["RssAnon"] < 0.6 * size  # pages read, and the slices themselves


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_runs_out_of_memory_while_it_is_planned_is_agreed_on_and_forgotten(folder, tmp_path, strategy):
    in_ranks(2, folder, strategy, tmp_path / "memory")
    assert [path.read_text() for path in tmp_path.glob("memory-*.txt")] == ["fine", "fine"]


# ------------------------------------------------------------------------------------------------------ real processes

START = "--train.lr=1e-2 --train.batch_size=8 --train.sample= --dtype=float32 --train.eval_interval=4"


def started(tiny, out, more: str, by: str = "") -> subprocess.Popen:
    args = f"--checkpoint_dir={tiny}/base --data={tiny}/data.json --out_dir={out} {START} {more}".split()
    launcher = [sys.executable, "-m", *by.split()] if by else [sys.executable]
    return subprocess.Popen(
        [*launcher, str(ROOT / "finetune/lora.py"), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"
FABRIC_RUN = {
    "LT_CLI_USED": "1",
    "LT_ACCELERATOR": "cpu",
    "LT_DEVICES": "2",
    "LT_NUM_NODES": "1",
}  # what it tells torchrun


@pytest.mark.parametrize(
    "by, more, environment",
    [
        ("", "--devices cpu:2", {}),
        (TORCHRUN, "--devices cpu --strategy fsdp", {}),
        (TORCHRUN, "--devices cpu", FABRIC_RUN),  # which can start only one process itself without a GPU
    ],
    ids=["devices", "torchrun", "fabric-run"],
)
def test_every_launcher_starts_one_job_that_trains_as_one_process(tiny, tmp_path, by, more, environment, monkeypatch):
    one = started(tiny, tmp_path / "one", "--devices cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    two = started(tiny, tmp_path / "two", more, by)
    said, _ = one.communicate(timeout=200)
    out, err = two.communicate(timeout=200)
    assert one.returncode == two.returncode == 0, err[-3000:]
    assert out.count("steps of 8, 2 x cpu") == 1 and out.count("saved ") == 1  # one process speaks, and writes
    a, b = (load_file(tmp_path / name / "lit_method.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)
    lines = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")]
    assert len(lines[0]) == len(lines[1])


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def ended(pids: list[int], within: float) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        states = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(map(str, pids))], capture_output=True, text=True)
        if all(state.startswith("Z") for state in states.stdout.split()):
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize("who", [pytest.param("first", marks=pytest.mark.slow), "other"])
def test_a_process_that_dies_ends_the_whole_job_and_the_next_start_goes_on(tiny, tmp_path, who):
    """Under FSDP also with another number of processes, and it ends as if nothing had happened."""
    more = "--train.epochs=40 --train.max_steps=60"
    job = started(tiny, tmp_path / "run", f"--devices cpu:2 --strategy fsdp --train.save_every_minutes=0 {more}")
    end = time.monotonic() + 100
    while not list((tmp_path / "run/state").glob("step-*[0-9]")) and time.monotonic() < end:
        time.sleep(0.01)
    (other,) = children(job.pid)
    os.kill(job.pid if who == "first" else other, signal.SIGKILL)
    assert ended([job.pid, other], within=60)
    _, err = job.communicate(timeout=60)
    assert any(word in err for word in ("is gone", "terminated with code", "onnection", "remote worker")), err
    again = started(tiny, tmp_path / "run", f"--devices cpu:1 --strategy fsdp {more}")
    whole = started(tiny, tmp_path / "whole", f"--devices cpu {more}")
    assert re.search(r"going on after step \d+", again.communicate(timeout=300)[0])
    whole.communicate(timeout=300)
    a, b = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert all(torch.allclose(a[name], b[name], rtol=1e-2, atol=1e-4) for name in a)


def test_a_disk_that_is_full_for_one_process_stops_none(tiny, tmp_path):
    """The first one writes the last file of a state alone."""
    (tmp_path / "full.py").write_text(
        f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from finetune import lora, state
from lit_model.cli import cli
write, n = state._write, iter(range(99))

def full(path, content):
    if path.name == "state.json" and next(n) == 1:
        raise OSError(28, "No space left on device")
    write(path, content)

state._write = full
cli(lora.main, lora.Options, "")
"""
    )
    args = f"--checkpoint_dir={tiny}/base --data={tiny}/data.json --out_dir={tmp_path}/run --devices cpu {START}"
    command = [sys.executable, "-m", *TORCHRUN.split(), str(tmp_path / "full.py"), *args.split(), "--train.epochs=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("step-8 could not be written, the state before it is kept") == 1


@pytest.mark.parametrize(
    "devices, environment, says",
    [
        ("two", {}, "--devices is 'two'; it must be auto, cpu, a number of GPUs"),
        ("cpu:0", {}, "--devices is 'cpu:0'; it must be"),
        ("64", {}, "--devices 64, but this machine has "),
        ("cpu:2", {"WORLD_SIZE": "3"}, "--devices cpu:2 makes 2 processes, but WORLD_SIZE is 3"),
        ("cpu:2", {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, "but 4 processes were started on this machine"),
    ],
)
def test_numbers_that_disagree_are_refused(devices, environment, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(says)):
        launch(devices, "auto")


@pytest.mark.parametrize(
    "by, more", [("", "--devices cpu:2"), (TORCHRUN, "--devices cpu")], ids=["devices", "torchrun"]
)
def test_a_mistake_is_told_once(tiny, tmp_path, by, more):
    job = started(tiny, tmp_path / "run", f"{more} --prompt.max_length 3", by)
    _, err = job.communicate(timeout=200)
    assert job.returncode == (1 if by else 2)  # torchrun's own
    assert err.count("error: ") == 1, err


def test_a_strategy_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="--strategy is 'dpp'; it must be one of auto, ddp, fsdp, fsdp_offload"):
        launch("cpu:2", "dpp")
