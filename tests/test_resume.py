"""Whatever interrupts a run, no finished work is lost and the result is the same."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fail
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import loop, lora, pissa, report, state
from finetune.lora import Options, main
from finetune.run import RunOptions, Train
from lit_model.methods.lora import LoRA
from lit_model.methods.pissa import PiSSA
from lit_model.weights.folder import Folder, save_folder, tokenizer_files


def settings(tiny: Path, out_dir: Path) -> Options:
    train = Train(lr=1e-2, batch_size=8, sample="", epochs=3, eval_interval=3)
    paths = dict(checkpoint_dir=tiny / "base", data=str(tiny / "data.json"), out_dir=out_dir)
    return Options(**paths, train=train, devices="cpu", dtype="float32", lora=LoRA(dropout=0.1))


@pytest.fixture
def options(tiny, tmp_path) -> Options:
    return settings(tiny, tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> Path:
    """The out_dir of the run of `options` that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    main(settings(tiny, out_dir))
    return out_dir


class Killed(BaseException):
    pass


def run_until(step: int, options: RunOptions, monkeypatch, main=main) -> None:
    """The run, which ends without a word in the middle of this step."""
    take = loop.train_step

    def train_step(run, network, optimizer, this, rows):
        if this.number == step:
            raise Killed
        take(run, network, optimizer, this, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "train_step", train_step)
        main(options)


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in ("lit_method", "last")}


def metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


def saved(options: RunOptions) -> dict:
    """The progress that the state of a run holds; {} without one."""
    path = state.state_file(options.out_dir)
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])["progress"] | dict(n_tensors=len(file.keys()))


def test_a_resumed_run_ends_as_the_uninterrupted_one(options, uninterrupted, monkeypatch, capsys):
    """Bit for bit: tensors, the best among them, metrics.csv; with dropout."""
    for step in (5, 11, 18):
        run_until(step, options, monkeypatch)
    capsys.readouterr()
    main(options)
    assert "resumed after step 15: " in capsys.readouterr().out
    assert tensors(options.out_dir) == tensors(uninterrupted)
    assert metrics(options.out_dir) == metrics(uninterrupted)
    assert saved(options)["is_finished"] and saved(options)["n_tensors"] == 0


def test_what_starts_from_the_base_is_resumed(options, tmp_path, monkeypatch):
    """PiSSA's start is an SVD, which may differ next time: it is part of a state."""
    of_all = {f.name: getattr(options, f.name) for f in fields(RunOptions)}
    options = pissa.Options(**of_all, pissa=PiSSA(r=4))
    pissa.main(replace(options, out_dir=tmp_path / "whole"))
    run_until(11, options, monkeypatch, pissa.main)
    svd = torch.linalg.svd

    def other_signs(*args, **more):
        u, s, v = svd(*args, **more)
        return -u, s, -v

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    pissa.main(options)
    assert tensors(options.out_dir) == tensors(tmp_path / "whole")


def test_labels_and_a_linear_head_are_resumed(options, labelled, tmp_path, monkeypatch):
    options = replace(options, data=str(labelled), head="linear")
    main(replace(options, out_dir=tmp_path / "whole"))
    run_until(20, options, monkeypatch)
    main(options)
    assert tensors(options.out_dir) == tensors(tmp_path / "whole")
    assert metrics(options.out_dir) == metrics(tmp_path / "whole")


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_run_again(options, uninterrupted, capsys):
    before = files(uninterrupted)
    with pytest.raises(SystemExit) as end:
        main(replace(options, out_dir=uninterrupted))
    assert end.value.code == 0 and "which ended after step 24: there is nothing to do" in capsys.readouterr().out
    assert files(uninterrupted) == before


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(lora=LoRA(r=4, dropout=0.1)), "lora.r 8 there and 4 here"),
        (dict(train=dict(lr=1.0)), "train.lr 0.01 there and 1.0 here"),
        (dict(train=dict(seed=3)), "train.seed 0 there and 3 here"),
        (dict(train=dict(batch_size=4)), "train.batch_size 8 there and 4 here"),
        (dict(train=dict(max_examples=30)), "train.max_examples None there and 30 here"),
        (dict(data="other rows"), "another examples"),
        (dict(checkpoint_dir="another base"), "another base network"),
    ],
)
def test_another_run_is_refused_with_the_difference(options, tiny, tmp_path, monkeypatch, change, says):
    run_until(5, options, monkeypatch)
    before = files(options.out_dir)
    if "data" in change:
        rows = json.loads((tiny / "data.json").read_text())
        rows[7]["output"] += " more"
        (tmp_path / "other.json").write_text(json.dumps(rows))
        change = dict(data=str(tmp_path / "other.json"))
    if "checkpoint_dir" in change:
        base = Folder(tiny / "base")
        tensors = {name: 2 * base.tensor(name) for name in base.names}
        save_folder(tmp_path / "base", base.config, tensors, tokenizer_files(tiny / "base"))
        change = dict(checkpoint_dir=tmp_path / "base")
    change = {**change, "train": replace(options.train, **change.get("train", {}))}
    with pytest.raises(ValueError, match=f"holds a run with {re.escape(says)}"):
        main(replace(options, **change))
    assert files(options.out_dir) == before


MAY_DIFFER = (
    "checkpoint_dir data val_data out_dir devices strategy memory_gb overwrite dry_run train.max_time train.row_tokens "
    "train.sample"
)


def test_what_may_differ_says_so_itself_and_everything_else_refuses(options):
    """Where a run is, where it computes, and what it prints; what the paths hold is compared by its contents."""

    def leaves(options, prefix=""):
        for f in fields(options):
            if is_dataclass(f.type):
                yield from leaves(getattr(options, f.name), f"{prefix}{f.name}.")
            else:
                yield prefix + f.name

    compared = state.identity(options, "base", [])
    assert {*leaves(options)} - compared.keys() == set(MAY_DIFFER.split())


def test_options_that_change_nothing_are_accepted(options, uninterrupted, tiny, tmp_path, monkeypatch):
    run_until(5, options, monkeypatch)
    shutil.copy(tiny / "data.json", tmp_path / "moved.json")
    train = replace(options.train, max_time=60.0, sample="apple")
    main(replace(options, data=str(tmp_path / "moved.json"), train=train, strategy="ddp"))
    assert tensors(options.out_dir) == tensors(uninterrupted)


def test_overwrite_starts_anew(options, monkeypatch):
    run_until(5, options, monkeypatch)
    main(replace(options, overwrite=True, lora=LoRA(r=2)))
    assert load_file(options.out_dir / "last.safetensors")["blocks.0.attn.q_proj.deltas.lora.A"].shape[0] == 2
    assert saved(options)["is_finished"]


@pytest.fixture(scope="module")
def ten_steps(tiny, tmp_path_factory) -> Path:
    """The out_dir of a run that was killed in its tenth step."""
    out_dir = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_until(10, settings(tiny, out_dir), patch)
    return out_dir


@pytest.fixture
def interrupted(options, ten_steps) -> Options:
    """`options`, and the run of them that was killed in its tenth step."""
    shutil.copytree(ten_steps, options.out_dir)
    return options


@pytest.mark.parametrize("size", [0, 100, -8])
def test_a_broken_state_is_named_and_nothing_is_thrown_away(interrupted, size):
    path = state.state_file(interrupted.out_dir)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    before = files(interrupted.out_dir)
    with pytest.raises(ValueError, match=r"state.safetensors \(--overwrite starts anew\): it is broken"):
        main(interrupted)
    assert files(interrupted.out_dir) == before


def test_a_full_disk_loses_nothing(options, uninterrupted, monkeypatch, capsys):
    """The third state does not fit; a folder of its own that small would need rights that a test has not."""
    write, calls = state.stream_tensors, []

    def full(path, tensors, *args):
        calls.append(path)
        if len(calls) == 4:  # the first one marks the beginning
            next(iter(tensors))
            raise OSError(28, "No space left on device")
        return write(path, tensors, *args)

    monkeypatch.setattr(state, "stream_tensors", full)
    main(options)
    assert tensors(options.out_dir) == tensors(uninterrupted)
    assert "state.safetensors could not be written, the state before it is kept" in capsys.readouterr().out


def test_a_run_that_is_to_stop_says_where_its_state_does_not_fit(options, monkeypatch):
    """The state before it is kept."""
    take = loop.train_step

    def train_step(*args):
        take(*args)
        if args[3].number == 8:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(state, "stream_tensors", full)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(OSError, match="could not be written, the state before it is kept .*No space left"):
        main(options)
    assert saved(options)["step"] == 6


# ------------------------------------------------------------------------------------------------------ real processes


def command(options: Options, *more: str) -> list[str]:
    """A run that saves a state in every step."""
    args = dict(lr=1e-2, batch_size=8, sample="", epochs=4, eval_interval=1)
    args = [f"--train.{name}={value}" for name, value in args.items()]
    args += [f"--{name}={getattr(options, name)}" for name in ("checkpoint_dir", "data", "out_dir", "devices", "dtype")]
    return [sys.executable, str(ROOT / "finetune/lora.py"), *args, "--lora.dropout=0.1", *more]


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_the_same(options, tmp_path, n):
    """SIGKILL at random moments of a run that saves after every step, so that many fall into a save: no state that is
    there is lost. Run with -s to see the table."""
    subprocess.run(command(replace(options, out_dir=tmp_path / "whole")), check=True, capture_output=True)
    rng, lines = random.Random(n), []
    for _ in range(n):
        before = saved(options)
        process = subprocess.Popen(command(options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while process.poll() is None and saved(options) == before:
            time.sleep(0.005)
        moment = rng.uniform(0, 0.2)
        time.sleep(moment)
        process.kill()
        resumed = re.search(r"resumed after step (\d+)", process.communicate()[0])
        if before.get("is_finished"):
            break
        assert not before.get("step") or int(resumed[1]) == before["step"]
        cut_off = any(options.out_dir.glob("*.partial"))
        lines.append(f"| {1e3 * moment:.0f} ms after a save | {resumed and resumed[1]} | {cut_off and 'in a save'} |")
    done = subprocess.run(command(options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    is_same = tensors(options.out_dir) == tensors(tmp_path / "whole")
    print("\n".join(lines), f"\nbit-identical: {'yes' if is_same else 'no'}")
    assert is_same and metrics(options.out_dir) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_signal_saves_and_evaluates_nothing(options, uninterrupted, monkeypatch, capfd, name, code):
    """It comes in the middle of step 4; the run ends after it, and goes on as if nothing had happened."""
    take = loop.train_step

    def train_step(*args):
        take(*args)
        if args[3].number == 4:
            os.kill(os.getpid(), getattr(signal, name))

    handler = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(loop, "train_step", train_step)
        main(options)
    stdout, stderr = capfd.readouterr()
    assert end.value.code == code and f"\n{name}: the run ends after this step" in stderr
    assert f"stopped by {name} after step 4; the same command without --overwrite resumes it\n" in stdout
    assert saved(options)["step"] == 4
    assert [row["step"] for row in metrics(options.out_dir) if row["val_loss"]] == ["0", "3"]
    assert signal.getsignal(getattr(signal, name)) == handler
    main(options)
    assert tensors(options.out_dir) == tensors(uninterrupted)
    assert metrics(options.out_dir) == metrics(uninterrupted)


def test_a_state_is_saved_when_the_last_one_is_old(options, monkeypatch):
    """Beside those of the evaluations."""
    monkeypatch.setattr(report.Watch, "SAVE_SECONDS", 0)
    run_until(6, options, monkeypatch)
    assert saved(options)["step"] == 5


def test_the_line_for_a_used_folder(interrupted, monkeypatch, capsys):
    names = ("checkpoint_dir", "data", "out_dir", "devices")
    args = " ".join(f"--{name} {getattr(interrupted, name)}" for name in names)
    assert "holds a run with" in fail(lora, capsys, monkeypatch, args)


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_place_that_is_no_folder_is_left_as_it_is(options, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        main(replace(options, out_dir=tmp_path / place))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_whose_time_was_over_is_resumed_with_more(options, uninterrupted, capsys):
    some = replace(options.train, max_time=1e-9)
    main(replace(options, train=some))
    with pytest.raises(SystemExit) as end:
        main(replace(options, train=some))
    assert end.value.code == 0 and "a higher one resumes it" in capsys.readouterr().out
    main(options)
    assert "resumed after step 1" in capsys.readouterr().out and tensors(options.out_dir) == tensors(uninterrupted)


def test_two_runs_do_not_write_to_one_folder(options, monkeypatch):
    seen, take = [], loop.train_step

    def train_step(*args):
        if args[3].number == 8 and not seen:
            seen.append(saved(options)["step"])
            with pytest.raises(ValueError, match="another run is writing to"):
                main(replace(options, overwrite=True))
            seen.append(saved(options)["step"])
        take(*args)

    monkeypatch.setattr(loop, "train_step", train_step)
    main(options)
    assert seen == [6, 6] and saved(options)["is_finished"]


def test_killed_in_its_first_save_it_begins_again_and_another_run_is_refused(options, uninterrupted, monkeypatch):
    """The trained tensors of the first evaluation are there, but no state yet."""

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(state.State, "save", killed)
        main(options)
    assert (options.out_dir / "lit_method.safetensors").is_file()
    with pytest.raises(ValueError, match="holds a run with train.lr 0.01 there and 0.5 here"):
        main(replace(options, train=replace(options.train, lr=0.5)))
    main(options)
    assert tensors(options.out_dir) == tensors(uninterrupted)


def test_a_state_without_tensors_can_be_read_whatever_its_length(tmp_path):
    """Room is kept for the header in steps of 64 bytes."""
    for n in range(130):
        state.stream_tensors(tmp_path / "x.safetensors", [], {}, dict(state="a" * n))
        with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
            assert file.metadata() == dict(state="a" * n)


def test_a_file_of_something_else_in_the_place_of_a_state_is_named(options):
    save_file({"x": torch.zeros(1)}, options.out_dir.parent / "x.safetensors")
    options.out_dir.mkdir()
    shutil.copy(options.out_dir.parent / "x.safetensors", state.state_file(options.out_dir))
    with pytest.raises(ValueError, match=r"state.safetensors \(--overwrite starts anew\): it is broken"):
        main(options)
