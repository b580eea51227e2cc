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
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fail
from safetensors.torch import load_file

from finetune import interrupt, loop, lora, setup, state
from finetune.lora import Options, main
from lit_model.methods.lora import LoRA


@pytest.fixture
def options(tiny, tmp_path) -> Options:
    train = setup.Train(lr=1e-2, batch_size=8, sample="", epochs=3, eval_interval=3)
    return Options(
        checkpoint_dir=tiny / "base", data=str(tiny / "data.json"), out_dir=tmp_path / "run", train=train,
        devices="cpu", dtype="float32", lora=LoRA(dropout=0.1),
    )  # fmt: skip


class Killed(BaseException):
    pass


def run_until(step: int, options: Options, monkeypatch) -> None:
    """The run, which ends without a word in the middle of this step."""
    take = loop.train_step

    def killed(run, network, optimizer, this, rows, asked=None):
        if this.number == step:
            raise Killed
        take(run, network, optimizer, this, rows, asked)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "train_step", killed)
        main(options)


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in ("lit_method", "last")}


def metrics(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


@pytest.fixture
def whole(options, tmp_path) -> Path:
    """The same run, never interrupted."""
    main(replace(options, out_dir=tmp_path / "whole"))
    return tmp_path / "whole"


@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(options, tmp_path, monkeypatch, capsys, init):
    """Bit for bit: tensors, the best among them, metrics.csv; with dropout, and where LoRA starts from the base."""
    options.lora = replace(options.lora, init=init)
    monkeypatch.setattr(state, "PIECE", 1000)
    main(replace(options, out_dir=tmp_path / "whole"))
    for step in (5, 11, 18):
        run_until(step, options, monkeypatch)
    capsys.readouterr()
    main(options)
    assert "going on after step 15: " in capsys.readouterr().out
    assert tensors(options.out_dir) == tensors(tmp_path / "whole")
    assert metrics(options.out_dir) == metrics(tmp_path / "whole")
    assert [path.name for path in (options.out_dir / "state").iterdir()] == ["finished.json"]


def test_labels_and_a_linear_head_are_resumed(options, labelled, tmp_path, monkeypatch):
    options = replace(options, data=str(labelled), head="linear")
    main(replace(options, out_dir=tmp_path / "whole"))
    run_until(20, options, monkeypatch)
    main(options)
    assert tensors(options.out_dir) == tensors(tmp_path / "whole")
    assert metrics(options.out_dir) == metrics(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(options, whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        main(replace(options, out_dir=whole))
    assert end.value.code == 0 and "which ended after step 24: there is nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(lora=LoRA(r=4, dropout=0.1)), "lora.r 8 there and 4 here"),
        (dict(train=dict(lr=1.0)), "train.lr 0.01 there and 1.0 here"),
        (dict(train=dict(seed=3)), "train.seed 0 there and 3 here"),
        (dict(train=dict(batch_size=4)), "train.batch_size 8 there and 4 here"),
        (dict(train=dict(max_examples=30)), "train.max_examples None there and 30 here, other examples"),
    ],
)
def test_another_run_is_refused_with_the_difference(options, monkeypatch, change, says):
    run_until(5, options, monkeypatch)
    before = {path: path.read_bytes() for path in options.out_dir.rglob("*") if path.is_file()}
    change = {**change, "train": replace(options.train, **change.get("train", {}))}
    with pytest.raises(ValueError, match=f"holds a run with {re.escape(says)}"):
        main(replace(options, **change))
    assert {path: path.read_bytes() for path in options.out_dir.rglob("*") if path.is_file()} == before


def test_other_rows_and_another_base_are_refused(options, tiny, tmp_path, monkeypatch):
    run_until(5, options, monkeypatch)
    rows = json.loads((tiny / "data.json").read_text())
    rows[7]["output"] += " more"
    (tmp_path / "other.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="holds a run with other examples"):
        main(replace(options, data=str(tmp_path / "other.json")))
    shutil.copytree(tiny / "base", tmp_path / "base")
    stated = tmp_path / "base/lit_config.json"
    stated.write_text(re.sub(r'"fingerprint": "..', '"fingerprint": "zz', stated.read_text()))
    with pytest.raises(ValueError, match="holds a run with other base network"):
        main(replace(options, checkpoint_dir=tmp_path / "base"))


def test_options_that_change_nothing_are_accepted(options, whole, tiny, tmp_path, monkeypatch):
    run_until(5, options, monkeypatch)
    shutil.copy(tiny / "data.json", tmp_path / "moved.json")
    train = replace(options.train, max_time=60.0, save_every_minutes=0.0, sample="apple")
    main(replace(options, data=str(tmp_path / "moved.json"), train=train, strategy="ddp"))
    assert tensors(options.out_dir) == tensors(whole)


def test_never_and_overwrite_start_anew(options, monkeypatch):
    run_until(5, options, monkeypatch)
    with pytest.raises(ValueError, match="holds a run already"):
        main(replace(options, resume="never"))
    main(replace(options, overwrite=True, lora=LoRA(r=2)))
    assert load_file(options.out_dir / "last.safetensors")["blocks.0.attn.q_proj.deltas.lora.A"].shape[0] == 2
    assert [path.name for path in (options.out_dir / "state").iterdir()] == ["finished.json"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


BREAK = {
    "cut": lambda d: os.truncate(next((d / "tensors").iterdir()), 100),
    "a-bit": lambda d: flip(next((d / "tensors").iterdir())),
    "random-numbers": lambda d: flip(d / "random-0.safetensors"),
    "a-number": lambda d: change(d / "state.json", '"step": 9', '"step": 8'),
    "empty": lambda d: (d / "state.json").write_text(""),
    "missing": lambda d: shutil.rmtree(d / "tensors"),
    "half-written": lambda d: (d / "state.json").unlink(),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_state_is_named_and_the_one_before_it_taken(options, whole, monkeypatch, capsys, how):
    run_until(10, options, monkeypatch)
    BREAK[how](options.out_dir / "state/step-9")
    capsys.readouterr()
    main(options)
    said = capsys.readouterr().out
    assert re.search(r"step-9 is not used: .*(sha256|is missing|No such file|Expecting value)", said)
    assert "going on after step 6" in said and tensors(options.out_dir) == tensors(whole)


def test_where_no_state_is_whole_nothing_is_thrown_away(options, monkeypatch):
    run_until(10, options, monkeypatch)
    for path in (options.out_dir / "state").glob("step-*"):
        flip(next((path / "tensors").iterdir()))
    with pytest.raises(ValueError, match="no state in .* is whole: start anew with --overwrite"):
        main(options)
    assert (options.out_dir / "lit_method.safetensors").is_file()


@pytest.mark.parametrize("then, where", [("go_on", "random"), ("go_on", "tensors"), ("stop", "tensors")])
def test_a_full_disk_loses_nothing(options, whole, monkeypatch, capsys, then, where):
    """The third state does not fit; a folder of its own that small would need rights that a test has not."""
    options.train = replace(options.train, full_disk=then)
    of, name = {"random": (state, "save_file"), "tensors": (state.HuggingFaceStorageWriter, "write_data")}[where]
    write, n = getattr(of, name), iter(range(99))

    def full(*args):
        if next(n) == 2:
            raise OSError(28, "No space left on device")
        return write(*args)

    monkeypatch.setattr(of, name, full)
    if then == "stop":
        with pytest.raises(OSError, match="step-9 could not be written, the state before it is kept .*No space left"):
            main(options)
        assert {path.name for path in (options.out_dir / "state").glob("step-*")} == {"step-3", "step-6"}
    main(options)
    assert tensors(options.out_dir) == tensors(whole)
    if then == "go_on":
        assert "step-9 could not be written, the state before it is kept" in capsys.readouterr().out


def test_the_last_two_states_are_kept_and_nothing_is_pickled(options, monkeypatch):
    monkeypatch.setattr(state, "PIECE", 4000)
    run_until(14, options, monkeypatch)
    assert len(list((options.out_dir / "state/step-12/tensors").iterdir())) > 1
    assert {path.name for path in (options.out_dir / "state").glob("step-*")} == {"step-9", "step-12"}
    files = {path.suffix for path in (options.out_dir / "state").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}


def test_a_step_whose_gradient_is_not_finite_is_left_out(options, tmp_path, monkeypatch, capsys):
    """Nothing moves in it, not even by AdamW's momentum, and resuming knows how many steps were taken."""
    clip, n, seen = torch.nn.utils.clip_grad_norm_, iter(range(999)), []

    def broken(params, most):
        seen.append([p.detach().clone() for p in params])
        return clip(params, most) * (float("nan") if next(n) == 4 else 1.0)

    options.train = replace(options.train, nonfinite="skip")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    main(options)
    said = capsys.readouterr().out
    assert "step 5 is left out: loss" in said and "1 of 24 steps were left out" in said
    assert all(torch.equal(a, b) for a, b in zip(seen[4], seen[5]))
    assert any(not torch.equal(a, b) for a, b in zip(seen[5], seen[6]))


# ------------------------------------------------------------------------------------------------------ real processes


def command(options: Options, *more: str) -> list[str]:
    args = dict(lr=1e-2, batch_size=8, sample="", epochs=8, eval_interval=20, save_every_minutes=0)
    args = [f"--train.{name}={value}" for name, value in args.items()]
    args += [f"--{name}={getattr(options, name)}" for name in ("checkpoint_dir", "data", "out_dir", "devices", "dtype")]
    return [sys.executable, str(ROOT / "finetune/lora.py"), *args, "--lora.dropout=0.1", *more]


def states(options: Options) -> set[str]:
    return {path.name for path in (options.out_dir / "state").glob("step-*")}


def after_a_state(process: subprocess.Popen, options: Options, before: set[str] = frozenset()) -> None:
    """Waits until the process has saved a state that was not there `before`."""
    end = time.monotonic() + 100
    while process.poll() is None and not {n for n in states(options) - before if not n.endswith(".partial")}:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("n", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_the_same(options, tmp_path, n):
    """SIGKILL at random moments of a run that saves after every step, so that many fall into a save. Run with -s to see
    the table."""
    subprocess.run(command(replace(options, out_dir=tmp_path / "whole")), check=True, capture_output=True)
    rng, found = random.Random(n), []
    for _ in range(n):
        before = states(options)
        process = subprocess.Popen(command(options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        after_a_state(process, options, before)
        moment = rng.uniform(0, 0.2)
        time.sleep(moment)
        process.kill()
        said = re.search(r"going on after step (\d+)", process.communicate()[0])
        found.append((moment, said and said[1], ", ".join(sorted(states(options)))))
    done = subprocess.run(command(options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same = tensors(options.out_dir) == tensors(tmp_path / "whole")
    for moment, went_on, left in found:
        print(f"| {1e3 * moment:.0f} ms after a save | {went_on or 'the start'} | {left} |")
    print(f"bit-identical: {'yes' if same else 'no'}")
    assert same and metrics(options.out_dir) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run_after_its_step_with_the_state_saved(options, name, code):
    process = subprocess.Popen(
        command(options, "--train.save_every_minutes=60", "--train.epochs=2000", "--overwrite"), stdout=subprocess.PIPE,
        text=True, stderr=subprocess.PIPE,
    )  # fmt: skip
    after_a_state(process, options)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    said = re.search(rf"^stopped by {name} after step (\d+); this goes on from there: (python .*)$", out, re.MULTILINE)
    assert f"\n{name}: the run ends after this step" in err and "--train.epochs=2000" in said[2]
    assert "overwrite" not in said[2]  # or it would begin anew
    step = int(said[1])
    assert process.returncode == code and f"step-{step}" in states(options)


def test_the_line_for_a_used_folder(options, monkeypatch, capsys):
    run_until(5, options, monkeypatch)
    args = f"--checkpoint_dir {options.checkpoint_dir} --data {options.data} --out_dir {options.out_dir} --devices cpu"
    assert "holds a run with" in fail(lora, capsys, monkeypatch, args)


def test_what_lies_beside_the_states_stays(options):
    (options.out_dir / "state").mkdir(parents=True)
    mine = [options.out_dir / "state" / name for name in ("mine.txt", "step-notes.txt", "step-x/mine.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    main(options)
    main(replace(options, overwrite=True))
    assert {path.read_text() for path in mine} == {"mine"}


@pytest.mark.parametrize("place", ["file", "file/run", "run-whose-state-is-a-file"])
def test_a_place_that_is_no_folder_is_named_before_anything_is_done(options, tmp_path, place):
    (tmp_path / "run-whose-state-is-a-file").mkdir()
    for file in (tmp_path / "file", tmp_path / "run-whose-state-is-a-file/state"):
        file.write_text("mine")
    with pytest.raises(ValueError, match="is no folder that can be written to; name another --out_dir"):
        main(replace(options, out_dir=tmp_path / place, data="not-read"))


def test_the_command_that_goes_on_begins_nothing_anew(monkeypatch, capsys):
    """As it is printed, whatever the options are called."""
    given = "lora.py --overwrite true --train.sample {} --resume never --lora.r 4 --overwrite --resume=never".split()
    for more, end in (([], ""), (["--config", "a.yaml"], " --config a.yaml --overwrite=false")):
        monkeypatch.setattr(sys, "argv", [*(arg.format("say --resume it") for arg in given), *more])
        with pytest.raises(SystemExit):
            interrupt.leave(signal.SIGTERM, 3, 0)
        said = capsys.readouterr().out
        assert f"from there: python lora.py --train.sample 'say --resume it' --lora.r 4{end}\n" in said


def test_a_run_whose_time_was_over_goes_on_with_more(options, whole, monkeypatch, capsys):
    some = replace(options.train, max_time=1e-9)
    main(replace(options, train=some))
    with pytest.raises(SystemExit) as end:
        main(replace(options, train=some))
    assert end.value.code == 0 and "a higher one goes on" in capsys.readouterr().out
    main(options)
    assert "going on after step 1" in capsys.readouterr().out and tensors(options.out_dir) == tensors(whole)


def test_two_runs_do_not_write_to_one_folder(options, monkeypatch):
    other, take = [], loop.train_step

    def step(*args):
        if args[3].number == 8 and not other:
            other.append(states(options))
            with pytest.raises(ValueError, match="another run is writing to"):
                main(replace(options, overwrite=True))
            assert states(options) == other[0]
        take(*args)

    monkeypatch.setattr(loop, "train_step", step)
    main(options)
    assert other == [{"step-3", "step-6"}] and (options.out_dir / "state/finished.json").is_file()


def test_killed_in_its_first_save_it_begins_again_and_another_run_is_refused(options, whole, monkeypatch):
    """The trained tensors of the first evaluation are there, but no state yet."""
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def killed(*args):
            raise Killed

        patch.setattr(state, "save_file", killed)
        main(options)
    assert (options.out_dir / "lit_method.safetensors").is_file()
    with pytest.raises(ValueError, match="holds a run with train.lr 0.01 there and 0.5 here"):
        main(replace(options, train=replace(options.train, lr=0.5)))
    main(options)
    assert tensors(options.out_dir) == tensors(whole)
