"""The training loop: what a step computes, what it must not do, and when it ends."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import loop, setup
from finetune.lora import Options, main
from finetune.report import Step
from lit_model import load
from lit_model.methods import lora
from lit_model.load import freeze, load_base
from lit_model.files import copy_file, write_text
from lit_model.methods.lora import LoRA


@pytest.fixture
def options(tiny, tmp_path) -> Options:
    train = setup.Train(lr=1e-2, batch_size=8, sample="")
    return Options(
        checkpoint_dir=tiny / "base", data=tiny / "data.json", out_dir=tmp_path / "run", train=train, devices="cpu",
        dtype="float32",
    )  # fmt: skip


def trained(options: Options) -> dict[str, torch.Tensor]:
    main(options)
    return load_file(options.out_dir / "last.safetensors")


def test_rows_of_any_size_train_the_same(options, tmp_path):
    """One row a step, or many that accumulate: the loss is per target token of the whole batch, not per row."""
    a = trained(options)
    b = trained(replace(options, out_dir=tmp_path / "b", train=replace(options.train, row_tokens=60)))
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)


def test_a_step_is_adamw_on_the_mean_over_target_tokens(options):
    """The first step written out: every example alone, one mean over all target tokens, clipping, AdamW."""
    run = setup.start(options)
    batch = next(loop.batches(run.train_examples, options.train))
    torch.manual_seed(0)
    gpt = lora.GPT(lora.Config.load(options.checkpoint_dir))
    load_base(gpt, options.checkpoint_dir, torch.float32)
    freeze(gpt, lora.trainable)
    losses = []
    for e in batch:
        ids = torch.from_numpy(e.ids).long()
        losses.append(
            F.cross_entropy(gpt(ids[None])[0, e.first_target - 1 : -1], ids[e.first_target :], reduction="none")
        )
    torch.cat(losses).mean().backward()
    params = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in params.items()}
    torch.nn.utils.clip_grad_norm_(params.values(), options.train.grad_clip)
    torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.02, betas=(0.9, 0.95)).step()

    gpt2 = lora.GPT(lora.Config.load(options.checkpoint_dir))
    load_base(gpt2, options.checkpoint_dir, torch.float32)
    freeze(gpt2, lora.trainable)
    for name, p in gpt2.named_parameters():
        if p.requires_grad:
            p.data.copy_(before[name])
    one_step = replace(options, train=replace(options.train, max_steps=1, warmup_steps=0, lr=1e-2, min_lr=1e-2))
    loop.fit(replace(run, options=one_step), gpt2, "lora", LoRA())
    for name, p in gpt2.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, params[name], rtol=1e-4, atol=1e-6)
            assert not torch.equal(p, before[name]) or name.endswith("A")


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
    run = setup.start(options)
    gpt = lora.GPT(lora.Config.load(options.checkpoint_dir))
    load_base(gpt, options.checkpoint_dir, torch.float32)
    freeze(gpt, lora.trainable)
    run, network, optimizer, _ = loop.prepare(run, gpt)
    n_logits = []
    gpt.lm_head.register_forward_hook(lambda module, args, out: n_logits.append(out.shape[0]))
    stream = loop.with_rows(loop.batches(run.train_examples, options.train), gpt, run, share=True)
    batch, rows = next(stream)
    step = Step(1, 1e-3, batch)
    with Syncs() as syncs:
        torch.ones(()).item()
        assert syncs.seen == ["_local_scalar_dense"]  # it would be noticed
        loop.train_step(run, network, optimizer, step, rows)
    assert syncs.seen == ["_local_scalar_dense"]
    assert sum(n_logits) == step.n_targets < step.n_computed < sum(len(e.ids) for e in batch)


def test_a_deterministic_run_repeats_bit_for_bit(options, tmp_path):
    try:
        a = trained(replace(options, deterministic=True))
        b = trained(replace(options, deterministic=True, out_dir=tmp_path / "b"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_epoch_takes_each_row_once_in_a_new_order():
    batches = loop.batches(list(range(10)), setup.Train(batch_size=4))
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert all(sorted(sum(epoch, [])) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_learning_rate_rises_to_lr_and_falls_to_min_lr():
    train = setup.Train(lr=1.0, min_lr=0.1)
    rates = [loop.learning_rate(step, 100, 10, train) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == max(rates) == 1.0  # it arrives at lr, and within the run
    assert 0.1 < rates[-1] < 0.101 and rates[55] == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    assert loop.learning_rate(1, 1, 0, setup.Train(lr=1.0)) == 1.0  # a run of one step learns


def test_vectors_do_not_decay(tiny):
    from lit_model.methods import adapter

    gpt = adapter.GPT(adapter.Config.load(tiny / "base"))
    gpt.requires_grad_(True)
    decay, none = loop.make_optimizer(gpt, setup.Train(weight_decay=0.3)).param_groups
    assert decay["weight_decay"] == 0.3 and none["weight_decay"] == 0.0
    names = {id(p): name for name, p in gpt.named_parameters()}
    still = {names[id(p)] for p in none["params"]}
    assert all(name.endswith(("gate", "bias")) or "norm" in name for name in still) and any("gate" in n for n in still)
    assert not any("norm" in names[id(p)] or "gate." in names[id(p)] + "." for p in decay["params"] if p.ndim == 1)


def test_frozen_parameters_are_not_given_to_the_optimizer(options):
    gpt = lora.GPT(lora.Config.load(options.checkpoint_dir))
    freeze(gpt, lora.trainable)
    given = sum(p.numel() for g in loop.make_optimizer(gpt, options.train).param_groups for p in g["params"])
    assert given == sum(p.numel() for name, p in gpt.named_parameters() if lora.trainable(name))


def test_validation_covers_every_row_and_rows_without_targets_do_no_harm(options):
    """The mean is over all target tokens, however the rows are cut."""
    run = setup.start(options)
    gpt = load(options.checkpoint_dir)
    whole = loop.evaluate(gpt, gpt, run)
    small = replace(run, row_tokens=50)
    assert loop.evaluate(gpt, gpt, small) == pytest.approx(whole, rel=1e-5)
    by_hand, n = 0.0, 0
    for e in run.val_examples:
        ids = torch.from_numpy(e.ids).long()
        by_hand += F.cross_entropy(gpt(ids[None])[0, e.first_target - 1 : -1], ids[e.first_target :], reduction="sum")
        n += e.n_targets
    assert whole == pytest.approx(by_hand.item() / n, rel=1e-5)


def test_validation_rows_are_never_trained_on(options):
    run = setup.start(options)
    seen = {e.ids.tobytes() for e in run.train_examples}
    assert len(run.val_examples) == 3 and len(run.train_examples) == 57
    assert not any(e.ids.tobytes() in seen for e in run.val_examples)
    again = setup.start(options)
    assert [e.ids.tobytes() for e in again.val_examples] == [e.ids.tobytes() for e in run.val_examples]
    other = setup.start(replace(options, train=replace(options.train, seed=1)))
    assert [e.ids.tobytes() for e in other.val_examples] != [e.ids.tobytes() for e in run.val_examples]


def test_the_best_is_kept_and_patience_ends_the_run(options, monkeypatch):
    losses = iter([3.0, 2.0, 1.0, 1.5, 1.7, 0.1])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    saved = []
    monkeypatch.setattr(loop, "save_method", lambda path, *_: saved.append(path.stem))
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
    main(replace(options, lora=LoRA(r=40, init="pissa", targets="q_proj"), train=replace(options.train, max_steps=1)))
    gpt = load(options.checkpoint_dir, options.out_dir)
    assert len(gpt.blocks[0].attn.q_proj.deltas["lora"].A) == 80


@pytest.mark.parametrize("val_fraction", [0.2, 0.0])
def test_what_was_good_is_kept_when_a_run_diverges(options, monkeypatch, val_fraction):
    """Step 3 takes a step to infinity. The files of step 2 stay, last.safetensors among them."""
    rate = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda step, *a: float("inf") if step == 3 else rate(step, *a))
    prompt = replace(options.prompt, val_fraction=val_fraction)
    train = replace(options.train, eval_interval=1 if val_fraction else 2)
    with pytest.raises(
        ValueError, match=r"(validation loss nan after step 3|at step 4): try a lower train.lr; .* keeps "
    ):
        main(replace(options, prompt=prompt, train=train))
    for name in ("lit_method", "last"):
        assert all(t.isfinite().all() for t in load_file(options.out_dir / f"{name}.safetensors").values())


def test_overwriting_leaves_nothing_of_the_old_run(options):
    main(replace(options, train=replace(options.train, max_steps=2)))
    (events,) = options.out_dir.glob("events*")
    main(replace(options, overwrite=True, lora=LoRA(r=2), train=replace(options.train, max_steps=1)))
    assert load_file(options.out_dir / "lit_method.safetensors")["blocks.0.attn.q_proj.deltas.lora.A"].shape[0] == 2
    assert events not in options.out_dir.glob("events*")


def test_compiled_training_equals_eager(options, tmp_path):
    if not __import__("shutil").which("g++"):
        pytest.skip("torch.compile on a CPU needs g++")
    short = replace(options, train=replace(options.train, max_steps=3))
    a = trained(short)
    b = trained(replace(short, out_dir=tmp_path / "b", compile="on"))
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-5) for name in a)
    assert np.isfinite(sum(t.sum().item() for t in b.values()))


def test_lora_plus_trains_b_faster(options, tmp_path):
    """In AdamW's first step every number that has a gradient moves by the learning rate; B starts at zero."""
    one = replace(options, train=replace(options.train, max_steps=1, warmup_steps=0))
    for ratio in (1.0, 16.0):
        b = trained(replace(one, out_dir=tmp_path / str(ratio), lora=LoRA(lr_ratio=ratio)))
        moved = b["blocks.0.attn.q_proj.deltas.lora.B"].abs().max().item()
        assert moved == pytest.approx(1e-2 * ratio, rel=1e-3)


@pytest.mark.parametrize("what", ["head", "last_blocks"])
def test_cached_features_train_the_same(options, tmp_path, what):
    """With an example's beginning shared with others or not, in other rows each epoch."""
    from finetune import selective

    given = {f.name: getattr(options, f.name) for f in fields(setup.Options)}
    chosen = selective.Selective(what=what, n=1)
    kept = []
    for cached in (False, True):
        run = replace(options, out_dir=tmp_path / str(cached), train=replace(options.train, epochs=2))
        given |= dict(out_dir=run.out_dir, train=run.train)
        selective.main(selective.Options(**given, selective=chosen, cache_features=cached))
        kept.append(load_file(run.out_dir / "last.safetensors"))
    assert all(torch.allclose(kept[0][name], kept[1][name], rtol=1e-3, atol=1e-5) for name in kept[0])


def test_cached_features_skip_the_frozen_blocks(options):
    from finetune import selective

    run = setup.start(options)
    gpt = setup.build(run, selective.selective, selective=selective.Selective(n=1))
    run = setup.cache_trunk(run, gpt)
    for block in gpt.blocks[:2]:
        block.forward = None  # whoever calls it fails
    idx, packed = next(loop.with_rows(loop.batches(run.train_examples, options.train), gpt, run, True))[1][0]
    gpt(idx, packed).backward()
    full = lora.GPT(lora.Config.load(options.checkpoint_dir))
    with pytest.raises(ValueError, match="the first ones are trained"):
        setup.cache_trunk(run, full)


def test_a_dry_run_says_what_the_run_needs_and_writes_nothing(options, capsys, monkeypatch):
    dry = replace(options, dry_run=True, train=replace(options.train, epochs=7))
    main(dry)
    said = capsys.readouterr().out
    assert "56 steps, about 6" in said and "ms a step" in said and "AdamW's two moments" in said
    assert not options.out_dir.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"has 0.0 GiB free, and the run wants"):
        main(dry)


def test_a_loss_that_jumps_is_told(options, monkeypatch, capsys):
    numbers = iter(range(1, 999))
    monkeypatch.setattr(Step, "receive", lambda step: [9.0 if next(numbers) == 60 else 4.0, 1.0, 0.0, 0.0, 0.0])
    main(replace(options, train=replace(options.train, epochs=9)))
    said = capsys.readouterr().out
    assert said.count("is more than twice that of the steps before") == 1 and "step 60: the loss of 9.000" in said


@pytest.mark.parametrize("links", [True, False])
def test_the_best_file_stays_when_the_last_is_replaced(tmp_path, monkeypatch, links):
    """Of one step they are one file under two names, where the file system knows that."""

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
