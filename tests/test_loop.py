"""The training loop: what a step computes, what it must not do, and when it ends."""

import csv
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fail
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import loop, lora, pissa, run
from finetune.lora import Options, main
from finetune.run import Train, build, start
from lit_model import load
from lit_model.cli import cli
from lit_model.files import copy_file, write_text
from lit_model.methods.lora import LoRA
from lit_model.methods.pissa import PiSSA
from lit_model.packing import Example, Packed


@pytest.fixture
def options(tiny, tmp_path) -> Options:
    train = Train(lr=1e-2, batch_size=8, sample="")
    return Options(
        checkpoint_dir=tiny / "base", data=str(tiny / "data.json"), out_dir=tmp_path / "run", train=train,
        devices="cpu", dtype="float32",
    )  # fmt: skip


def trained(options: Options) -> dict[str, torch.Tensor]:
    main(options)
    return load_file(options.out_dir / "last.safetensors")


def test_rows_of_any_size_train_the_same(options, tmp_path):
    """One row a step, or many that accumulate: the loss is per target token of the whole batch, not per row."""
    a = trained(options)
    b = trained(replace(options, out_dir=tmp_path / "b", train=replace(options.train, row_tokens=60)))
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)


def losses_by_hand(gpt, examples) -> Tensor:
    """-log p of all target tokens, every example alone."""
    losses = []
    for e in examples:
        ids = torch.from_numpy(e.ids).long()
        logits = gpt(ids[None])[0, e.first_target - 1 : -1]
        losses.append(F.cross_entropy(logits, ids[e.first_target :], reduction="none"))
    return torch.cat(losses)


def test_a_step_is_adamw_on_the_mean_over_target_tokens(options):
    """The first step written out: every example alone, one mean over all target tokens, clipping, AdamW."""
    options.train = replace(options.train, max_steps=1, warmup_steps=0)
    job = start(options)
    batch = next(run.batches(job.train_examples, options.train))
    by_hand, gpt = build(job, "lora", LoRA()), build(job, "lora", LoRA())
    gpt.load_state_dict(by_hand.state_dict())
    params = {name: p for name, p in by_hand.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in params.items()}
    losses_by_hand(by_hand, batch).mean().backward()
    torch.nn.utils.clip_grad_norm_(params.values(), options.train.grad_clip)
    torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.02, betas=(0.9, 0.95)).step()

    loop.fit(job, gpt, "lora", LoRA())
    for name, p in gpt.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, params[name], rtol=1e-4, atol=1e-6)
            assert not torch.equal(p, before[name]) or name.endswith("A")


def smoothed(head, x, row: Packed) -> Tensor:
    """Label smoothing: a tenth of the probability is for all tokens alike."""
    return F.cross_entropy(head(x), row.targets, reduction="sum", label_smoothing=0.1)


def test_another_objective_is_a_function_given_to_fit(options):
    """Label smoothing. Training, and what is printed and decides which step is the best, is of this objective."""
    options.train = replace(options.train, max_steps=3, warmup_steps=0, eval_interval=1)
    job = start(options)
    by_hand, gpt = build(job, "lora", LoRA()), build(job, "lora", LoRA())
    gpt.load_state_dict(by_hand.state_dict())
    loop.fit(job, gpt, "lora", LoRA(), objective=smoothed)

    params = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.02, betas=(0.9, 0.95))
    losses = []
    for step, batch in zip(range(1, 4), run.batches(job.train_examples, options.train)):
        total = 0.0
        for e in batch:
            ids = torch.from_numpy(e.ids).long()
            log_p, targets = by_hand(ids[None])[0, e.first_target - 1 : -1].log_softmax(-1), ids[e.first_target :]
            of_target, of_all = log_p.gather(1, targets[:, None]).sum(), log_p.mean(1).sum()
            total -= 0.9 * of_target + 0.1 * of_all
        loss = total / sum(e.n_targets for e in batch)
        optimizer.param_groups[0]["lr"] = run.learning_rate(step, 3, 0, 1e-2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, options.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for p, expected in zip((p for p in gpt.parameters() if p.requires_grad), params, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-5)
    with open(options.out_dir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [float(row["loss"]) for row in rows] == pytest.approx(losses, rel=1e-4)


class Syncs(TorchDispatchMode):
    """Lists the operations for which a GPU would have to finish before the host goes on."""

    WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_gpu_and_computes_logits_at_targets_only(options):
    job = start(options)
    gpt = build(job, "lora", LoRA())
    network, optimizer = run.prepare(job, gpt, True)
    n_logits = []
    gpt.lm_head.register_forward_hook(lambda module, args, out: n_logits.append(out.shape[0]))
    step, rows = next(job.steps(gpt))
    with Syncs() as syncs:
        torch.ones(()).item()
        assert syncs.seen == ["_local_scalar_dense"]  # it would be noticed
        loop.train_step(job, network, optimizer, step, rows)
    assert syncs.seen == ["_local_scalar_dense"]
    n_computed = sum(len(packed.pos) for _, packed in rows)
    assert sum(n_logits) == step.n_targets < n_computed < sum(len(e.ids) for e in step.batch)


def test_an_epoch_takes_each_row_once_in_a_new_order():
    """The later turns of a conversation go with its first one."""
    examples = [Example(np.array([i, 0]), 1, follows=i in (3, 8, 9)) for i in range(10)]
    batches = run.batches(examples, Train(batch_size=4))
    epochs = [[[int(e.ids[0]) for e in next(batches)] for _ in range(2)] for _ in range(2)]
    assert all(sorted(sum(epoch, [])) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    for batch in (batch for epoch in epochs for batch in epoch):
        text = " ".join(map(str, batch)) + " "
        assert ("2" in text) == ("2 3 " in text) and ("7" in text) == ("7 8 9 " in text)
    assert [sum(i not in (3, 8, 9) for i in batch) for batch in epochs[0]] == [4, 3]


def test_learning_rate_rises_to_lr_and_falls_to_zero():
    rates = [run.learning_rate(step, 100, 10, 1.0) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == max(rates) == 1.0  # it arrives at lr, and within the run
    assert 0 < rates[-1] < 0.001 and rates[55] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    assert run.learning_rate(1, 1, 0, 1.0) == 1.0  # a run of one step learns


def test_vectors_do_not_decay_and_what_is_frozen_is_not_given_to_the_optimizer(options):
    from lit_model.methods.adapter import Adapter

    job = start(options)
    gpt = build(job, "adapter", Adapter()).requires_grad_(True)
    decay, none = run.make_optimizer(gpt, Train(weight_decay=0.3)).param_groups
    assert decay["weight_decay"] == 0.3 and none["weight_decay"] == 0.0
    names = {id(p): name for name, p in gpt.named_parameters()}
    still = {names[id(p)] for p in none["params"]}
    assert all(name.endswith(("gate", "bias")) or "norm" in name for name in still) and any("gate" in n for n in still)
    assert all(p.ndim > 1 for p in decay["params"])
    gpt = build(job, "lora", LoRA())
    given = [p for group in run.make_optimizer(gpt, Train()).param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in gpt.parameters() if p.requires_grad}


def test_validation_covers_every_row_and_rows_without_targets_do_no_harm(options):
    """The mean is over all target tokens, however the rows are cut."""
    job, gpt = start(options), load(options.checkpoint_dir)
    loss = loop.evaluate(job, gpt, gpt)["val_loss"]
    small = replace(job, row_tokens=50)
    assert loop.evaluate(small, gpt, gpt)["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert loss == pytest.approx(losses_by_hand(gpt, job.val_examples).mean().item(), rel=1e-5)


def test_validation_rows_are_never_trained_on(options):
    job = start(options)
    seen = {e.ids.tobytes() for e in job.train_examples}
    assert len(job.val_examples) == 3 and len(job.train_examples) == 57
    assert not any(e.ids.tobytes() in seen for e in job.val_examples)
    again = start(options)
    assert [e.ids.tobytes() for e in again.val_examples] == [e.ids.tobytes() for e in job.val_examples]
    other = start(replace(options, train=replace(options.train, seed=1)))
    assert [e.ids.tobytes() for e in other.val_examples] != [e.ids.tobytes() for e in job.val_examples]


def test_the_best_is_kept_and_patience_ends_the_run(options, monkeypatch):
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.7, 0.1])
    monkeypatch.setattr(loop, "evaluate", lambda *_: dict(val_loss=next(losses)))
    saved = []
    monkeypatch.setattr(loop, "save_method", lambda path, *_, **__: saved.append(path.stem))
    monkeypatch.setattr(loop, "copy_file", lambda source, target: saved.append(target.stem))
    main(replace(options, train=replace(options.train, epochs=9, eval_interval=2, patience=2)))
    assert saved == ["last", "lit_method"] * 2 + ["last"] * 2
    assert next(losses) == 0.1


def test_max_steps_and_max_time_end_a_run_with_a_saved_file(options, tmp_path):
    main(replace(options, train=replace(options.train, max_steps=2)))
    assert len((options.out_dir / "metrics.csv").read_text().splitlines()) == 1 + 1 + 2 + 2
    out = tmp_path / "b"
    main(replace(options, out_dir=out, train=replace(options.train, max_time=1e-6)))
    assert (out / "lit_method.safetensors").is_file()
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + 1 + 1 + 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(options):
    options.train = replace(options.train, lr=1e30, warmup_steps=0, grad_clip=0, eval_interval=1)
    with pytest.raises(ValueError, match=r"gradient norm (nan|inf) at step \d+.*nothing was saved yet"):
        main(replace(options, lora=LoRA(alpha=1e30)))
    assert not (options.out_dir / "lit_method.safetensors").exists()
    assert (options.out_dir / "loss.png").is_file()


def test_pissa_of_half_the_rank_and_more_is_saved_and_loads(options):
    """Its rank doubles in the file, and is more than any matrix there has."""
    settings = {f.name: getattr(options, f.name) for f in fields(run.RunOptions)}
    settings["train"] = replace(options.train, max_steps=1)
    pissa.main(pissa.Options(**settings, pissa=PiSSA(r=40, targets="q_proj")))
    gpt = load(options.checkpoint_dir, options.out_dir)
    assert len(gpt.blocks[0].attn.q_proj.deltas["lora"].A) == 80


@pytest.mark.parametrize("val_fraction", [0.2, 0.0])
def test_what_was_good_is_kept_when_a_run_diverges(options, monkeypatch, val_fraction):
    """Step 3 takes a step to infinity. The files of step 2 stay, last.safetensors among them."""
    rate = run.learning_rate
    monkeypatch.setattr(run, "learning_rate", lambda step, *a: float("inf") if step == 3 else rate(step, *a))
    examples = replace(options.examples, val_fraction=val_fraction)
    train = replace(options.train, eval_interval=1 if val_fraction else 2)
    with pytest.raises(
        ValueError, match=r"(validation loss nan after step 3|at step 4): try a lower train.lr; .* keeps "
    ):
        main(replace(options, examples=examples, train=train))
    for name in ("lit_method", "last"):
        assert all(t.isfinite().all() for t in load_file(options.out_dir / f"{name}.safetensors").values())


def test_overwriting_leaves_nothing_of_the_old_run(options):
    main(replace(options, train=replace(options.train, max_steps=2)))
    (events,) = options.out_dir.glob("events*")
    main(replace(options, overwrite=True, lora=LoRA(r=2), train=replace(options.train, max_steps=1)))
    assert load_file(options.out_dir / "lit_method.safetensors")["blocks.0.attn.q_proj.deltas.lora.A"].shape[0] == 2
    assert events not in options.out_dir.glob("events*")


def test_lora_plus_trains_b_faster(options, tmp_path):
    """In AdamW's first step every number that has a gradient moves by the learning rate; B starts at zero."""
    one = replace(options, train=replace(options.train, max_steps=1, warmup_steps=0))
    for ratio in (1.0, 16.0):
        b = trained(replace(one, out_dir=tmp_path / str(ratio), lora=LoRA(lr_ratio=ratio)))
        moved = b["blocks.0.attn.q_proj.deltas.lora.B"].abs().max().item()
        assert moved == pytest.approx(1e-2 * ratio, rel=1e-3)


def test_a_dry_run_says_what_the_run_needs_and_writes_nothing(options, capsys):
    main(replace(options, dry_run=True, train=replace(options.train, epochs=7)))
    stdout = capsys.readouterr().out
    assert "minutes for 56 steps" in stdout and "AdamW's two moments" in stdout and "GiB of disk at the end" in stdout
    assert not options.out_dir.exists()


@pytest.mark.parametrize("links", [True, False])
def test_the_best_file_stays_when_the_last_is_replaced(tmp_path, monkeypatch, links):
    """Those of one step are one file under two names, where the file system knows that."""

    def without(*_):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr("os.link", without)
    best, last = tmp_path / "best", tmp_path / "last"
    for text in ("one", "two"):
        write_text(last, text)
        copy_file(last, best)
        assert best.read_text() == text and best.samefile(last) == links
    write_text(last, "three")
    assert best.read_text() == "two" and sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]


# ------------------------------------------------------------------------------------------------------------- the door


@pytest.fixture
def command(options, monkeypatch) -> None:
    """lora.py's command line with these options."""
    args = [f"--{name}={getattr(options, name)}" for name in ("checkpoint_dir", "data", "out_dir", "devices", "dtype")]
    monkeypatch.setattr(sys, "argv", ["lora.py", *args, "--train.sample=", "--train.max_steps=1"])


def test_a_bug_gives_a_traceback(command, monkeypatch):
    """Only what goes wrong while a file is parsed, and what a user can mend, ends in one line."""

    def train_step(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(RuntimeError, match="a bug"):
        cli(main, Options, "")


def test_lit_traceback_shows_where_a_line_comes_from(tmp_path, command, monkeypatch, capsys):
    """The error that the line was made of is there as its cause, with the place that raised it."""
    broken = tmp_path / "broken.json"
    broken.write_text('[{"instruction": "a", "output"')
    assert f"error: {broken}" in fail(lora, capsys, monkeypatch, " ".join([*sys.argv[1:], f"--data={broken}"]))
    monkeypatch.setenv("LIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="broken.json") as error:
        cli(main, Options, "")
    assert error.traceback[-1].path.name in ("files.py", "rows.py")
