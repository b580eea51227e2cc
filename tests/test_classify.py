"""Telling texts apart: a label's score is its log-probability, however rows are laid out; heads train and load."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from conftest import FAMILIES, WORDS, randomize

from finetune import features as finetune_features
from finetune import ia3 as finetune_ia3
from finetune import lora as finetune_lora
from finetune import selective as finetune_selective
from finetune import setup
from lit_model import classify, ia3, load, model, prefix, prompt
from lit_model.checkpoint import fingerprint_of, freeze, load_base, method_header, save_method, task_in
from lit_model.cli import cli
from lit_model.data import PromptOptions, read_rows, split_rows
from lit_model.tokenizer import Tokenizer
from scripts import compare, eval_data, inspect_prompt, peers


@pytest.mark.parametrize("virtual", ["none", "prefix", "prompt"])
@pytest.mark.parametrize("shots", [0, 7])
def test_scores_are_log_probabilities(family, virtual, shots):
    gpt = model.GPT(model.Config(**family))
    if virtual == "prefix":
        prefix.install(gpt, prefix.Prefix(length=3))
    if virtual == "prompt":
        prompt.install(gpt, prompt.Prompt(length=4))
    gpt = randomize(gpt).double()
    rng = np.random.default_rng(0)
    before = rng.integers(0, 97, shots).tolist()
    prompts = [rng.integers(0, 97, n) for n in (5, 12, 3, 20, 9)]
    labels = [[3], [8, 2, 5], [8, 4]]
    got = classify.scores(gpt, prompts, labels, row_tokens=30, before=before)
    for i, ids in enumerate(prompts):
        for k, label in enumerate(labels):
            whole = torch.tensor([*before, *ids, *label])
            log_p = gpt(whole[None])[0].log_softmax(-1)
            at = torch.arange(len(whole) - len(label) - 1, len(whole) - 1)
            expected = log_p[at, whole[-len(label) :]].sum()
            torch.testing.assert_close(got[i, k], expected.float(), rtol=1e-5, atol=1e-5)


def test_a_linear_head_reads_the_last_token():
    gpt = model.GPT(model.Config(**FAMILIES["llama"]))
    idx = torch.randint(0, 97, (9,))
    assert gpt(idx[None]).shape == (1, 9, 97)
    classify.install(gpt, 3)
    randomize(gpt)
    got = classify.scores(gpt, [idx.numpy()], [[0], [1], [2]], row_tokens=30)
    torch.testing.assert_close(got[0], gpt(idx[None])[0, -1].log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.fixture
def labelled(tmp_path):
    """Rows whose label is in the text."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "labelled.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(120):
            label = ("apple", "river", "stone")[i % 3]
            writer.writerow([f"{i}, {' '.join(rng.choice(WORDS[3:], 4))} {label}\n", label])
    return tmp_path / "labelled.csv"


@pytest.mark.parametrize("head", ["labels", "linear"])
def test_labels_are_learned_saved_and_loaded(head, labelled, tiny, tmp_path, capsys, monkeypatch):
    args = f"--checkpoint_dir {tiny}/base --data {labelled} --out_dir {tmp_path}/run --head {head} --devices cpu"
    more = "--train.epochs 12 --prompt.val_fraction 0.2 --dtype float32 --selective.what last_blocks --selective.n 3"
    monkeypatch.setattr(sys, "argv", f"x {args} {more} --train.lr 3e-3".split())
    cli(finetune_selective.main, finetune_selective.Options, "")
    said = capsys.readouterr().out
    assert (tmp_path / "run/confusion.png").stat().st_size > 5000
    accuracy = float(said.split("after: accuracy ")[1].split(",")[0])
    assert accuracy > 0.6, said
    gpt, task = load(tiny / "base", tmp_path / "run"), task_in(method_header(tmp_path / "run"))
    assert task.classes == ["apple", "river", "stone"] and task.head == head
    tokenizer = Tokenizer(tiny / "base")
    _, rows = split_rows(read_rows(labelled), 0.2, seed=0)
    examples = classify.examples(rows, tokenizer, PromptOptions(), task)
    verdict = classify.judge(gpt, examples, task, classify.label_ids(task, tokenizer), 4096)
    assert verdict.accuracy == pytest.approx(accuracy, abs=1e-4)
    with open(tmp_path / "run/metrics.csv") as file:
        assert max(float(row["accuracy"]) for row in csv.DictReader(file) if row["accuracy"]) >= accuracy - 1e-4


@pytest.mark.parametrize(
    "pairs, says",
    [
        ([("a", "x"), ("b", "x")], "all rows have the label 'x'; there is nothing to tell apart"),
        ([("a", "apple"), ("b", "apple river")], "the label 'apple river' begins with 'apple': take --head linear"),
        ([("a", "x"), ("b",)], "line 3: a row needs text and label"),
    ],
)
def test_labels_that_make_no_sense(pairs, says, tiny, tmp_path, capsys, monkeypatch):
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *pairs])
    args = f"--checkpoint_dir {tiny}/base --data {tmp_path}/rows.csv --out_dir {tmp_path}/run --devices cpu"
    monkeypatch.setattr(sys, "argv", f"x {args} --prompt.val_fraction 0".split())
    with pytest.raises(SystemExit):
        cli(finetune_lora.main, finetune_lora.Options, "")
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_label_that_was_never_seen_is_named(tiny):
    task = classify.Task(["good", "bad"], "labels", "Label:")
    with pytest.raises(ValueError, match="the label 'fair' was never seen; there are good, bad"):
        classify.examples([dict(text="x", label="fair")], Tokenizer(tiny / "base"), PromptOptions(), task)


def test_rows_of_json_may_have_labels_too(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([dict(text="a", label=1), dict(text="b", label="two")]))
    assert read_rows(tmp_path / "x.json") == [dict(text="a", label="1"), dict(text="b", label="two")]


def say(module, capsys, monkeypatch, args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["script", *args.split()])
    cli(module.main, module.Options, module.__doc__)
    return capsys.readouterr().out


def test_zero_shot_few_shot_and_features(labelled, tiny, tmp_path, capsys, monkeypatch):
    args = f"--checkpoint_dir {tiny}/base --data {labelled} --device cpu"
    assert "on 120 rows, 0 demonstrations of 0 tokens" in say(eval_data, capsys, monkeypatch, args)
    said = say(eval_data, capsys, monkeypatch, f"{args} --shots 4 --shots_from {labelled} --draw {tmp_path}/x.png")
    assert "on 120 rows, 4 demonstrations of" in said and (tmp_path / "x.png").stat().st_size > 5000
    shown = eval_data.demonstrations(read_rows(labelled), 7, seed=0)
    counts = [[row["label"] for row in shown].count(name) for name in ("apple", "river", "stone")]
    assert sorted(counts) == [2, 2, 3]

    args += f" --out_dir {tmp_path}/features --prompt.val_fraction 0.25"
    for pool, classifier in (("mean", ""), ("last", "--classifier sklearn.neighbors.KNeighborsClassifier")):
        more = f"{args} --pool {pool} {classifier}" + (" --classifier_options {}" if classifier else "")
        said = say(finetune_features, capsys, monkeypatch, more)
        assert float(said.split("val: accuracy ")[1].split(",")[0]) > 0.4
    kept = np.load(tmp_path / "features/features.npz")
    assert kept["train_features"].shape == (90, 64) and kept["val_labels"].shape == (30,)


def test_features_are_those_of_the_last_layer(tiny, labelled):
    gpt, tokenizer = load(tiny / "base"), Tokenizer(tiny / "base")
    rows = read_rows(labelled)[:9]
    made = classify.examples(rows, tokenizer, PromptOptions(), classify.task_of(rows, "linear", "Label:"))
    seen = []
    gpt.norm_f.register_forward_hook(lambda module, args, out: seen.append(out))
    for e in made:
        gpt(torch.from_numpy(e.ids[:-1]).long()[None])
    for pool, expected in (("last", [x[-1] for x in seen]), ("mean", [x.mean(0) for x in seen])):
        got = finetune_features.features(load(tiny / "base"), made, pool, 100, "")
        torch.testing.assert_close(torch.from_numpy(got), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_prompt_made_of_words_is_nearest_to_them(tiny, tmp_path, capsys, monkeypatch):
    tokenizer = Tokenizer(tiny / "base")
    ids = tokenizer.encode("apple river")
    for module, name, options in (
        (prompt, "prompt", prompt.Prompt(length=len(ids))), (prefix, "prefix", prefix.Prefix(length=len(ids))),
    ):  # fmt: skip
        gpt = module.GPT(module.Config.load(tiny / "base", **{name: options}))
        load_base(gpt, tiny / "base", torch.float32)
        freeze(gpt, module.trainable)
        module.start(gpt, ids)
        save_method(tmp_path / f"{name}.safetensors", gpt, name, options, fingerprint_of(tiny / "base"))
        args = f"--checkpoint_dir {tiny}/base --method_dir {tmp_path}/{name}.safetensors --k 2 --draw {tmp_path}/x.png"
        said = say(inspect_prompt, capsys, monkeypatch, args).splitlines()
        for i, line in zip(ids, said):
            assert f"{repr(repr(tokenizer.decode([i]))[1:-1])} 1.00" in line


def test_peft_in_the_comparison_is_the_same_network_trained_by_the_same_rule(tiny, labelled, tmp_path):
    """IA3 begins with ones in both: after some steps its vectors are those of peft, and so are the labels."""
    settings = dict(
        checkpoint_dir=tiny / "base", data=labelled, devices="cpu", dtype="float32",
        prompt=PromptOptions(val_fraction=0.2),
        train=setup.Train(lr=1e-2, batch_size=8, max_steps=6, epochs=9, eval_interval=3, sample="", weight_decay=0.5),
    )  # fmt: skip
    finetune_ia3.main(finetune_ia3.Options(**settings, out_dir=tmp_path / "ours"))
    run = setup.start(setup.Options(**settings, out_dir=tmp_path / "theirs"))
    config = ia3.Config.load(tiny / "base")
    network = peers.base(config, torch.float32, run.device)
    peers.copy_weights(network, tiny / "base")
    idx = torch.randint(0, 400, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(network(idx).logits, load(tiny / "base")(idx), rtol=1e-4, atol=1e-5)
    network = peers.attach(network, "ia3", config)
    val_loss, _, n_tokens = peers.fit(network, run)
    kept = list(csv.DictReader(open(tmp_path / "ours" / "metrics.csv")))
    assert n_tokens == max(int(r["tokens"] or 0) for r in kept)
    assert val_loss == pytest.approx(min(float(r["val_loss"]) for r in kept if r["val_loss"]), rel=1e-5)
    gpt = load(tiny / "base", tmp_path / "ours")
    moved, places = 0.0, {"self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj"}
    for layer, block in zip(network.base_model.model.model.layers, gpt.blocks):
        for name, mine in {**places, "mlp.down_proj": "mlp.up_proj"}.items():
            theirs = layer.get_submodule(name).ia3_l["default"].detach().flatten()
            ours = block.get_submodule(mine).deltas["ia3"].scale.detach()
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            moved = max(moved, (theirs - 1).abs().max().item())
    assert moved > 1e-2
    labels = classify.label_ids(run.task, run.tokenizer)
    ours = classify.judge(gpt, run.val_examples, run.task, labels, 400)
    assert peers.judge(network, run.val_examples, run.task, labels, run) == ours


def test_rates_to_search_hold_those_to_begin_with():
    assert {method.lr for method in compare.METHODS.values()} <= set(compare.RATES)


def test_a_comparison_goes_on_where_it_ended_and_says_what_to_take(labelled, tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "compare"
    args = f"--data {labelled} --checkpoint_dir {tiny}/base --out_dir {out} --devices cpu --n_test 30 --n_val 15"
    args += " --max_steps 4 --shots 2"
    say(compare, capsys, monkeypatch, f"{args} --methods zero-shot,lora --seeds 0,1")
    first = (out / "cells.jsonl").read_text()
    said = say(
        compare, capsys, monkeypatch, f"{args} --methods lora,few-shot,features,head --seeds 0,1 --search --peers"
    )
    assert (out / "cells.jsonl").read_text().startswith(first) and "==== lora, seed 0, lr 0.001" not in said
    cells = {c["cell"]: c for c in map(json.loads, (out / "cells.jsonl").read_text().splitlines())}
    losses = {c["lr"]: c["val_loss"] for c in cells.values() if c["method"] == "head" and c["seed"] == 0}
    best = min(losses, key=losses.get)
    tried = sorted(losses)
    assert len(tried) >= 3 and tried[0] < best < tried[-1] and f"head, seed 1, lr {best:g}" in cells
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ("lora", "peft-lora", "few-shot", "head")) and "Best: " in table
    assert (out / "tradeoff.png").stat().st_size > 5000 and not (out / "run").exists()
    lines = list(csv.DictReader(open(out / "table.csv")))
    assert [float(r["accuracy"]) for r in lines] == sorted((float(r["accuracy"]) for r in lines), reverse=True)
    head = next(r for r in lines if r["method"] == "head")
    assert head["seeds"] == "2" and int(head["trained"]) == 400 * 64

    said = say(compare, capsys, monkeypatch, f"{args} --methods lora,head --max_store_mb 0.05")
    assert "Best within 0.05 MB on disk: lora" in said  # the head is larger
    monkeypatch.setattr(sys, "argv", f"x {args} --methods lora --max_steps 5".split())
    with pytest.raises(SystemExit):
        cli(compare.main, compare.Options, "")
    assert "cells of other settings" in capsys.readouterr().err
