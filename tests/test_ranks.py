"""N processes compute what one does: the same loss, the same gradients, whatever the method, over the same batch.

Nothing here waits for a time that a busy machine could exceed: PATIENCE only ends what hangs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from conftest import FAMILIES, NEWER_SAYS, ROOT, randomize
from safetensors.torch import load_file

from finetune import full, lora
from finetune.devices import launch
from finetune.run import Train
from lit_model import GPT, Config, generate, load
from lit_model.data.examples import prompt_ids, render
from lit_model.data.tokenizer import Tokenizer
from lit_model.weights.folder import save_folder

PATIENCE = 1800  # seconds
TORCHRUN = "torch.distributed.run --standalone"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of each family."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, fields in FAMILIES.items():
        torch.manual_seed(0)
        base = randomize(GPT(Config(**fields)), std=0.05)
        save_folder(folder / name, base.config, base.state_dict(), {}, NEWER_SAYS if name == "newer" else None)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """What this process computes."""
    ranks.compute_all(folder, "auto", folder / "alone.pt")
    return torch.load(folder / "alone.pt", weights_only=True)


def in_ranks(n: int, *args: object) -> None:
    command = [sys.executable, "-m", *TORCHRUN.split(), "--nproc_per_node", str(n), str(ROOT / "tests/ranks.py")]
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "n, strategy", [(2, "ddp"), (2, "fsdp"), pytest.param(4, "ddp", marks=pytest.mark.slow), (4, "fsdp")]
)
def test_n_processes_compute_what_one_does(folder, alone, n, strategy):
    """Two of them also run out of memory while it is planned."""
    in_ranks(n, folder, strategy, folder / f"{strategy}-{n}.pt")
    many = torch.load(folder / f"{strategy}-{n}.pt", weights_only=True)
    worst = dict(loss=0.0, norm=0.0, grads=0.0, val=0.0)
    for case, ours in many.items():
        expected = alone[case]
        for value in ("loss", "norm", "val"):
            worst[value] = max(worst[value], abs(expected[value] - ours[value]) / abs(expected[value]))
        assert expected["grads"].keys() == ours["grads"].keys(), case
        differences = []
        for name, grad in expected["grads"].items():
            assert torch.equal(expected["trained"][name], ours["trained"][name]), (case, name)
            differences.append((grad - ours["grads"][name]).norm())
            assert differences[-1] <= 1e-5 * max(grad.norm(), 1e-3), (case, name, differences[-1])
        worst["grads"] = max(worst["grads"], torch.stack(differences).norm().item() / expected["norm"])
    print(f"| {strategy} | {n} | {len(many)} | " + " | ".join(f"{value:.1e}" for value in worst.values()) + " |")
    assert max(worst.values()) < 1e-6
    for family, name, *_ in many:
        files = [folder / out / family / f"{name}.safetensors" for out in ("alone", f"{strategy}-{n}")]
        a, b = map(load_file, files)
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a), files


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_under_fsdp_a_process_reads_only_its_slices(tmp_path):
    config = Config(vocab_size=97, n_layer=2, n_head=16, n_embd=2048, n_hidden=8192)
    gpt = GPT(config).bfloat16()
    save_folder(tmp_path / "large", config, gpt.state_dict(), {})
    size = sum(p.nbytes for p in gpt.parameters())
    in_ranks(2, tmp_path, "fsdp", tmp_path / "slices")
    for rank in range(2):
        grown = json.loads((tmp_path / f"slices-{rank}.json").read_text())
        print({name: f"{n / size:.2f} of the network" for name, n in grown.items()})
        assert grown["RssFile"] < 0.75 * size and grown["RssAnon"] < 0.6 * size  # pages read, and the slices themselves


# ------------------------------------------------------------------------------------------------------ real processes

TWO = f"{TORCHRUN} --nproc_per_node 2"
TRAIN = dict(lr=1e-3, batch_size=8, epochs=5, eval_interval=4, sample="")


def command(script: str | Path, tiny: Path, out_dir: Path, more: str, launcher: str = "") -> list[str]:
    train = " ".join(f"--train.{name}={value}" for name, value in TRAIN.items())
    args = f"--checkpoint_dir={tiny}/base --data={tiny}/data.json --out_dir={out_dir} --dtype=float32 {train} {more}"
    python = [sys.executable, "-m", *launcher.split()] if launcher else [sys.executable]
    return [*python, str(ROOT / script), *args.split()]


def run(command: list[str], code: int = 0) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory):
    """script -> out_dir of its run in this process"""
    out_dirs = {}

    def out_dir(script) -> Path:
        if script not in out_dirs:
            out_dirs[script] = tmp_path_factory.mktemp("one") / "run"
            paths = dict(checkpoint_dir=tiny / "base", data=str(tiny / "data.json"), out_dir=out_dirs[script])
            script.main(script.Options(**paths, train=Train(**TRAIN), devices="cpu", dtype="float32"))
        return out_dirs[script]

    return out_dir


def assert_close(a: Path, b: Path) -> None:
    a, b = load_file(a / "last.safetensors"), load_file(b / "last.safetensors")
    assert a.keys() == b.keys()
    for name, t in a.items():
        torch.testing.assert_close(b[name], t, rtol=1e-2, atol=1e-4)


FABRIC_RUN = dict(LT_CLI_USED="1", LT_ACCELERATOR="cpu", LT_DEVICES="2", LT_NUM_NODES="1")  # what it tells torchrun


@pytest.mark.parametrize(
    "launcher, more, environment",
    [
        ("", "--devices=cpu:2", {}),
        pytest.param(TWO, "--devices=cpu", {}, marks=pytest.mark.slow),
        pytest.param(TWO, "--devices=cpu", FABRIC_RUN, marks=pytest.mark.slow),  # it can start one process on a CPU
    ],
    ids=["devices", "torchrun", "fabric-run"],
)
def test_every_launcher_starts_one_job_that_trains_as_one_process(
    tiny, tmp_path, one_process, launcher, more, environment, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stdout, _ = run(command("finetune/lora.py", tiny, tmp_path / "two", more, launcher))
    assert stdout.count("steps of 8, 2 x cpu") == 1 and stdout.count("saved ") == 1  # one process speaks, and writes
    one = one_process(lora)
    assert_close(one, tmp_path / "two")
    assert len((one / "metrics.csv").read_text().splitlines()) == len(
        (tmp_path / "two/metrics.csv").read_text().splitlines()
    )


def test_under_fsdp_a_sample_is_answered_as_by_one_process(tiny, tmp_path):
    more = "--devices=cpu:2 --strategy=fsdp --train.sample=apple --train.max_steps=1"
    out, _ = run(command("finetune/lora.py", tiny, tmp_path / "run", more))
    tokenizer = Tokenizer(tiny / "base")
    ids = prompt_ids(tokenizer, "alpaca", render("alpaca", "apple"))
    tokens = generate(load(tiny / "base"), ids, 64, temperature=0, stop_ids=tokenizer.stop_ids)
    assert f"-> {' '.join(tokenizer.decode(list(tokens)).split())}\n" in out


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def is_running(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout) and not done.stdout.startswith("Z")


@pytest.mark.parametrize("victim", [pytest.param("first", marks=pytest.mark.slow), "other"])
def test_a_process_that_dies_ends_the_whole_job_and_another_number_resumes_it(tiny, tmp_path, one_process, victim):
    """Under FSDP, where each of them has a slice of what is trained; it ends as if nothing had happened."""
    out_dir, more = tmp_path / "run", "--save_hf=false --strategy=fsdp"
    first = command("finetune/full.py", tiny, out_dir, f"{more} --devices=cpu:2")
    job = subprocess.Popen(first, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    state = out_dir / "state.safetensors"
    while job.poll() is None and not (state.is_file() and state.stat().st_size > 10**5):  # with tensors
        time.sleep(0.01)
    (other,) = children(job.pid)
    os.kill(job.pid if victim == "first" else other, signal.SIGKILL)
    _, err = job.communicate(timeout=PATIENCE)
    while is_running(other):
        time.sleep(0.1)
    assert any(word in err for word in ("is gone", "terminated with code", "onnection", "remote worker")), err
    stdout, _ = run(command("finetune/full.py", tiny, out_dir, f"{more} --devices=cpu:1"))
    assert re.search(r"resumed after step \d+", stdout)
    assert_close(one_process(full), out_dir)


def test_a_disk_that_is_full_for_one_process_stops_none(tiny, tmp_path, one_process):
    """The first one writes; under FSDP the others lend it their slices, whether it can write them or not."""
    (tmp_path / "full_disk.py").write_text(
        """import json
from finetune import full, state
from lit_model.cli import cli

stream_tensors = state.stream_tensors

def full_at_step_8(path, tensors, shapes, header):
    if json.loads(header["state"])["progress"]["step"] == 8:
        next(tensors)
        raise OSError(28, "No space left on device")
    stream_tensors(path, tensors, shapes, header)

state.stream_tensors = full_at_step_8
cli(full.main, full.Options, "")
"""
    )
    more = "--devices=cpu --strategy=fsdp --save_hf=false"
    stdout, stderr = run(command(tmp_path / "full_disk.py", tiny, tmp_path / "run", more, TWO))
    assert (stdout + stderr).count("state.safetensors could not be written, the state before it is kept") == 1
    assert stdout.count("steps of 8, 2 x cpu") == 1 and stdout.count("saved ") == 1
    assert_close(one_process(full), tmp_path / "run")


@pytest.mark.parametrize(
    "devices, environment, says",
    [
        ("two", {}, "--devices is 'two'; it must be auto, cpu, a number of GPUs"),
        ("cpu:0", {}, "--devices is 'cpu:0'; it must be"),
        ("64", {}, "--devices 64, but this machine has "),
        ("cpu:2", {"WORLD_SIZE": "3"}, "--devices cpu:2 makes 2 processes, but 3 were started"),
        (
            "cpu:2",
            {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"},
            "--devices cpu:2 makes 2 processes, but 4 were started",
        ),
    ],
)
def test_numbers_that_disagree_are_refused(devices, environment, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(says)):
        launch(devices, "auto")


@pytest.mark.parametrize(
    "launcher, more, code",
    [("", "--devices=cpu:2", 2), pytest.param(TWO, "--devices=cpu", 1, marks=pytest.mark.slow)],
    ids=["devices", "torchrun"],
)
def test_a_mistake_is_told_once(tiny, tmp_path, launcher, more, code):
    more = f"{more} --examples.max_length=3"
    _, stderr = run(command("finetune/lora.py", tiny, tmp_path / "run", more, launcher), code)
    assert stderr.count("error: ") == 1, stderr
