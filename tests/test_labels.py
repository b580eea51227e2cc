"""Classification: a label's score is its log-probability, however rows are laid out; heads train and load."""

import csv
import json
import re
import shutil
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import FAMILIES, fail, randomize, say
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

import generate.base as generate_base
from finetune import features as finetune_features
from lit_model import load, model
from lit_model.cli import cli
from lit_model.config import Layer
from lit_model.data import labels
from lit_model.data.dataset import read_dataset
from lit_model.data.examples import ExampleOptions, render
from lit_model.data.rows import read_rows, split_rows
from lit_model.data.score import judge, scores
from lit_model.data.tokenizer import Tokenizer
from lit_model.load import METHODS, method_header, save_method
from lit_model.methods import prefix, prompt
from lit_model.packing import Example
from lit_model.rope import LongScaling, Rope
from lit_model.weights.folder import Folder
from scripts import evaluate, inspect_prompt, merge

CLASSES = ("apple", "river", "stone")
SCRIPTS = {name: import_module(f"finetune.{name}") for name in METHODS}


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
    continuations = [[3], [8, 2, 5], [8, 4]]
    got = scores(gpt, prompts, continuations, row_tokens=30, before=before)
    for i, ids in enumerate(prompts):
        for k, label in enumerate(continuations):
            whole = torch.tensor([*before, *ids, *label])
            log_p = gpt(whole[None])[0].log_softmax(-1)
            at = torch.arange(len(whole) - len(label) - 1, len(whole) - 1)
            expected = log_p[at, whole[-len(label) :]].sum()
            torch.testing.assert_close(got[i, k], expected.float(), rtol=1e-5, atol=1e-5)


def test_a_linear_head_reads_the_last_token():
    gpt = model.GPT(model.Config(**FAMILIES["llama"]))
    idx = torch.randint(0, 97, (9,))
    assert gpt(idx[None]).shape == (1, 9, 97)
    labels.install(gpt, 3)
    randomize(gpt)
    got = scores(gpt, [idx.numpy()], [[0], [1], [2]], row_tokens=30)
    torch.testing.assert_close(got[0], gpt(idx[None])[0, -1].log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["labels", "linear"])
def test_labels_are_learned_saved_and_loaded(head, labelled, tiny, tmp_path, capsys, monkeypatch):
    args = f"--checkpoint_dir {tiny}/base --data {labelled} --out_dir {tmp_path}/run --head {head} --devices cpu"
    more = "--train.epochs 12 --examples.val_fraction 0.2 --dtype float32 --selective.what last_blocks --selective.n 3"
    monkeypatch.setattr(sys, "argv", f"x {args} {more} --train.lr 3e-3".split())
    cli(SCRIPTS["selective"].main, SCRIPTS["selective"].Options, "")
    said = capsys.readouterr().out
    assert (tmp_path / "run/confusion.png").stat().st_size > 5000
    accuracy = float(re.search(r"after \(best\): .*accuracy ([\d.]+)", said)[1])
    assert accuracy > 0.6, said
    gpt, task = load(tiny / "base", tmp_path / "run"), method_header(tmp_path / "run")["task"]
    assert task.classes == ["apple", "river", "stone"] and task.head == head
    tokenizer = Tokenizer(tiny / "base")
    _, rows = split_rows(read_rows(labelled), 0.2, seed=0)
    examples = labels.examples(rows, tokenizer, ExampleOptions(), task)
    verdict = judge(gpt, examples, task, labels.label_ids(task, tokenizer), 4096)
    assert verdict.accuracy == pytest.approx(accuracy, abs=1e-4)
    with open(tmp_path / "run/metrics.csv") as file:
        assert max(float(row["accuracy"]) for row in csv.DictReader(file) if row["accuracy"]) >= accuracy - 1e-4


@pytest.mark.parametrize(
    "pairs, says",
    [
        ([("a", "x"), ("b", "x")], "all rows have the label 'x'; there is nothing to classify"),
        ([("a", "apple"), ("b", "apple river")], "the label 'apple river' begins with 'apple': take --head linear"),
        ([("a", "x"), ("b",)], "1 of 2 rows have text and label; to classify"),
    ],
)
def test_labels_that_make_no_sense(pairs, says, tiny, tmp_path, capsys, monkeypatch):
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *pairs])
    args = f"--checkpoint_dir {tiny}/base --data {tmp_path}/rows.csv --out_dir {tmp_path}/run --devices cpu"
    monkeypatch.setattr(sys, "argv", f"x {args} --examples.val_fraction 0".split())
    with pytest.raises(SystemExit):
        cli(SCRIPTS["lora"].main, SCRIPTS["lora"].Options, "")
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_linear_head_is_kept_whatever_the_method(name, labelled, tiny, tmp_path, capsys, monkeypatch):
    """And lm_head, in whose place it stands, is neither trained nor counted."""
    args = f"--checkpoint_dir {tiny}/base --data {labelled} --out_dir {tmp_path}/run --head linear --devices cpu"
    args += " --train.max_steps 3 --dtype float32 --examples.val_fraction 0.2 --train.lr 1e-2"
    summary = say(SCRIPTS[name], capsys, monkeypatch, args)
    tensors = load_file(tmp_path / "run/lit_method.safetensors")
    assert "heads.linear.weight" in tensors and not any(n.startswith("lm_head") for n in tensors)
    gpt, tokenizer = load(tiny / "base", tmp_path / "run"), Tokenizer(tiny / "base")
    task = method_header(tmp_path / "run")["task"]
    _, rows = split_rows(read_rows(labelled), 0.2, seed=0)
    asked = labels.examples(rows, tokenizer, ExampleOptions(), task)
    found = scores(gpt, [e.ids[: e.first_target] for e in asked], [[0], [1], [2]], 4096)
    loss = -found[range(len(rows)), [e.ids[-1] for e in asked]].mean()
    assert f"after (best): validation loss {loss:.4f}" in summary and "try:  python scripts/evaluate.py" in summary
    assert "by scripts/evaluate.py, and writes no text" in fail(
        generate_base, capsys, monkeypatch, f"--checkpoint_dir {tiny}/base --method_dir {tmp_path}/run --prompt a"
    )


@pytest.mark.parametrize("name, rest", [("lora", "full"), ("adapter_v2", "adapter")])
def test_what_is_merged_still_classifies(name, rest, labelled, tiny, tmp_path, capsys, monkeypatch):
    args = f"--checkpoint_dir {tiny}/base --data {labelled} --out_dir {tmp_path}/run --head linear --devices cpu"
    say(SCRIPTS[name], capsys, monkeypatch, f"{args} --train.max_steps 3 --dtype float32 --train.lr 1e-2")
    args = f"--checkpoint_dir {tiny}/base --method_dir {tmp_path}/run --out_dir {tmp_path}/merged"
    assert f"--method_dir {tmp_path}/merged/{rest}, too" in say(merge, capsys, monkeypatch, args)
    idx = torch.randint(0, 400, (2, 9))
    merged = load(tmp_path / "merged", tmp_path / f"merged/{rest}")
    torch.testing.assert_close(merged(idx), load(tiny / "base", tmp_path / "run")(idx), rtol=1e-4, atol=1e-5)
    assert method_header(tmp_path / f"merged/{rest}")["task"].classes == ["apple", "river", "stone"]


def test_label_words_have_no_space_of_their_own_in_llama_tokenizers(tmp_path):
    """Their tokenizers begin every text with a space; behind another text the word alone follows."""
    text = "a good film\nbad plot indeed\nSentiment: good\nSentiment: bad\n" * 50
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer, task = Tokenizer(tmp_path), labels.Task(["bad", "good"], "labels", "{text}\\nSentiment:")
    (row,) = labels.examples([dict(text="a good film", label="good")], tokenizer, ExampleOptions(), task)
    assert row.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("a good film\nSentiment: good")]
    assert [len(label) for label in labels.label_ids(task, tokenizer)] == [1, 1]


def test_a_style_of_ones_own_stands_around_the_text(labelled, tiny, tmp_path):
    """In training, in what is saved of it, and in generation; the default is used where the style has no {text}."""
    tokenizer, style = Tokenizer(tiny / "base"), "Review: {text}\\nSentiment:"
    data = read_dataset(labelled, tokenizer, ExampleOptions(style=style, val_fraction=0.2))
    assert data.style == data.task.style == style
    assert labels.Task(**json.loads(json.dumps(vars(data.task)))) == data.task
    for e in data.train:
        text = tokenizer.decode(e.ids)
        assert text.startswith("Review: ") and re.search(r"(apple|river|stone)\nSentiment: \1$", text)
        asked = text.removeprefix("Review: ").split("\nSentiment:")[0]
        assert [tokenizer.bos_id, *tokenizer.encode(render(style, asked))] == e.ids[: e.first_target].tolist()
    cut = ExampleOptions(style=style, max_length=len(tokenizer.encode("Review: \nSentiment: apple")) + 4)
    for e in labels.examples(read_rows(labelled), tokenizer, cut, data.task):  # the text loses its end, the style not
        text = tokenizer.decode(e.ids)
        assert text.startswith("Review: ") and "\nSentiment: " in text and len(e.ids) <= cut.max_length
    with pytest.raises(ValueError, match="examples.max_length 9 leaves no room for a text beside 'Review: {text}"):
        labels.examples(read_rows(labelled), tokenizer, ExampleOptions(max_length=9), data.task)
    plain = read_dataset(labelled, tokenizer, ExampleOptions(style="alpaca"))
    assert plain.style == "{text}\nLabel:"


def test_a_linear_head_takes_the_place_of_the_output_layer():
    """Neither lm_head nor what a method has put there is trained; an embedding that is tied to it is."""
    for tie in (False, True):
        gpt = model.GPT(model.Config(**{**FAMILIES["llama"], "tie": tie}))
        labels.install(gpt, 3)
        trained = {name for name, p in gpt.named_parameters() if p.requires_grad}
        assert {"heads.linear.weight", "heads.linear.bias", "wte.weight"} <= trained
        assert not any(name.startswith("lm_head") for name in trained)


def test_demonstrations_begin_as_a_text_begins(labelled, tiny):
    tokenizer, rows = Tokenizer(tiny / "base"), read_rows(labelled)
    task = labels.task_of(rows, "labels")
    before = evaluate.demonstration_ids(rows[:3], tokenizer, ExampleOptions(), task)
    (asked,) = labels.examples(rows[3:4], tokenizer, ExampleOptions(), task, bos=False)
    assert [*before, *asked.ids].count(tokenizer.bos_id) == 1 and before[0] == tokenizer.bos_id
    assert evaluate.demonstration_ids([], tokenizer, ExampleOptions(), task) == []


def test_what_is_longer_than_the_context_is_refused(labelled, tiny):
    gpt = load(tiny / "base")
    with pytest.raises(ValueError, match="600 tokens, and the model's context of 512 has room for 512"):
        scores(gpt, [np.zeros(300, dtype=np.int32)], [[1], [2]], 4096, before=[3] * 300)
    with pytest.raises(ValueError, match="600 tokens"):
        finetune_features.features(gpt, [Example(np.zeros(600, dtype=np.int32), 599)], "last", 4096, "")


@pytest.mark.parametrize(
    "script, args, says",
    [
        (evaluate, "--shots -1", "--shots and --shots_from go together"),
        (evaluate, "--shots 2", "--shots and --shots_from go together"),
        (finetune_features, "--classifier sklearn.nothing", "sklearn.nothing: it is broken"),
        (finetune_features, "--out_dir {used}", "used is not empty"),
        (SCRIPTS["selective"], "--selective.regex qkv", "selective.regex 'qkv' finds no parameter"),
        (SCRIPTS["prefix"], "--prefix.text=", "prefix.text is empty"),
        (SCRIPTS["lora"], "--lora.alpha 0", "lora.alpha is 0.0"),
        (
            SCRIPTS["lora"],
            "--head linear --data {instructions}",
            "0 of 60 rows have text and label; to classify, as with --head linear, all",
        ),
        (SCRIPTS["lora"], "--data {empty}", "empty.csv: 1 of 2 rows have text and label"),
    ],
)
def test_mistakes_end_in_one_line(script, args, says, labelled, tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/mine.txt").write_text("mine")
    (tmp_path / "empty.csv").write_text("text,label\na,\nb,x\n")
    (tmp_path / "more.csv").write_text("text,label\n" + "".join(f"{i},{'xy'[i % 2]}\n" for i in range(9)))
    paths = dict(used=tmp_path / "used", empty=tmp_path / "empty.csv", more=tmp_path / "more.csv")
    given = {"--checkpoint_dir": f"{tiny}/base", "--data": labelled}
    if "--out_dir" not in args and script is not evaluate:
        given["--out_dir"] = tmp_path / "run"
    words = args.format(**paths, instructions=tiny / "data.json") if "{}" not in args else args
    said = fail(script, capsys, monkeypatch, " ".join(f"{k} {v}" for k, v in given.items()) + " " + words)
    assert says in said


@pytest.mark.parametrize(
    "script, more", [(evaluate, ""), (finetune_features, "--out_dir {}/run")], ids=["eval", "features"]
)
def test_a_token_that_the_network_has_not_is_named(script, more, labelled, tiny, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny / "base", tmp_path / "base")
    stated, weights = tmp_path / "base/config.json", tmp_path / "base/model.safetensors"
    stated.write_text(stated.read_text().replace('"vocab_size": 400', '"vocab_size": 300'))
    tensors = {name: t[:300].clone() if len(t) == 400 else t for name, t in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    said = fail(
        script, capsys, monkeypatch, f"--checkpoint_dir {tmp_path}/base --data {labelled} {more.format(tmp_path)}"
    )
    assert re.search(r"the tokenizer has a token 3\d\d, and the network only 300", said)


def test_demonstrations_are_not_those_that_are_judged(labelled, tiny, capsys, monkeypatch):
    args = f"--checkpoint_dir {tiny}/base --data {labelled} --shots 2 --shots_from {labelled}"
    assert "there are 0 rows to show" in fail(evaluate, capsys, monkeypatch, args)


def test_a_label_that_was_never_seen_is_named(tiny):
    task = labels.Task(["good", "bad"], "labels")
    with pytest.raises(ValueError, match="the label 'fair' was never seen; there are good, bad"):
        labels.examples([dict(text="x", label="fair")], Tokenizer(tiny / "base"), ExampleOptions(), task)


def test_rows_of_json_may_have_labels_too(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([dict(text="a", label=0), dict(text="b", label=" two ")]))
    assert read_rows(tmp_path / "x.json") == [dict(text="a", label="0"), dict(text="b", label="two")]


def test_a_label_among_other_columns_does_not_make_a_classifier(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([dict(instruction="a", output="b", label=1)]))
    assert read_rows(tmp_path / "x.json") == [dict(instruction="a", input="", output="b")]


def test_zero_shot_few_shot_and_features(labelled, tiny, tmp_path, capsys, monkeypatch):
    args = f"--checkpoint_dir {tiny}/base --data {labelled} --device cpu"
    assert "on 120 rows\n" in say(evaluate, capsys, monkeypatch, args)
    with open(tmp_path / "others.csv", "w") as file:
        file.write("text,label\n" + "".join(f"{word} number {i},{word}\n" for i in range(3) for word in CLASSES))
    more = f"{args} --shots 4 --shots_from {tmp_path}/others.csv --draw {tmp_path}/x.png"
    said = say(evaluate, capsys, monkeypatch, more)
    assert "on 120 rows, 4 demonstrations of" in said and (tmp_path / "x.png").stat().st_size > 5000
    shown = evaluate.demonstrations(read_rows(labelled), 7, seed=0)
    counts = [[row["label"] for row in shown].count(name) for name in CLASSES]
    assert sorted(counts) == [2, 2, 3]

    args += f" --out_dir {tmp_path}/features --examples.val_fraction 0.25"
    for pool, classifier in (("mean", ""), ("last", "--classifier sklearn.neighbors.KNeighborsClassifier")):
        more = f"{args} --pool {pool} {classifier} --overwrite true"
        said = say(finetune_features, capsys, monkeypatch, more)
        assert float(said.split("val: accuracy ")[1].split(",")[0]) > 0.4
    kept = np.load(tmp_path / "features/features.npz")
    assert kept["train_features"].shape == (90, 64) and kept["val_labels"].shape == (30,)


def test_features_are_those_of_the_last_layer(tiny, labelled):
    gpt, tokenizer = load(tiny / "base"), Tokenizer(tiny / "base")
    rows = read_rows(labelled)[:9]
    made = labels.examples(rows, tokenizer, ExampleOptions(), labels.task_of(rows, "linear"))
    seen = []
    gpt.norm_f.register_forward_hook(lambda module, args, out: seen.append(out))
    for e in made:
        gpt(torch.from_numpy(e.ids[:-1]).long()[None])
    for pool, expected in (("last", [x[-1] for x in seen]), ("mean", [x.mean(0) for x in seen])):
        got = finetune_features.features(load(tiny / "base"), made, pool, 100, "")
        torch.testing.assert_close(torch.from_numpy(got), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_features_stand_in_the_order_of_their_examples():
    """With LongRoPE too, where long examples share no row with short ones."""
    scaling = LongScaling(tuple(range(1, 9)), tuple(range(2, 18, 2)), 12, attention_factor=1.3)
    config = model.Config(**{**FAMILIES["llama"], "layers": (Layer(rope=Rope(scaling=scaling)),)})
    gpt, rng = randomize(model.GPT(config)), np.random.default_rng(0)
    examples = [Example(rng.integers(0, 97, n).astype(np.int32), n - 1) for n in (20, 5, 13, 30, 9, 14, 13)]
    for pool in ("last", "mean"):
        got = finetune_features.features(gpt, examples, pool, 40, "")
        alone = [finetune_features.features(gpt, [e], pool, 40, "") for e in examples]
        np.testing.assert_allclose(got, np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_a_prompt_made_of_words_is_nearest_to_them(tiny, tmp_path, capsys, monkeypatch):
    tokenizer = Tokenizer(tiny / "base")
    ids = tokenizer.encode("apple river")
    for module, name, options in (
        (prompt, "prompt", prompt.Prompt(length=len(ids))), (prefix, "prefix", prefix.Prefix(length=len(ids))),
    ):  # fmt: skip
        gpt = load(tiny / "base")
        module.install(gpt, options)
        module.init_from_base(gpt, ids)
        save_method(tmp_path / f"{name}.safetensors", gpt, name, options, Folder(tiny / "base").identity)
        args = f"--checkpoint_dir {tiny}/base --method_dir {tmp_path}/{name}.safetensors --k 2 --draw {tmp_path}/x.png"
        said = say(inspect_prompt, capsys, monkeypatch, args).splitlines()
        for i, line in zip(ids, said):
            assert f"{repr(repr(tokenizer.decode([i]))[1:-1])} 1.00" in line
