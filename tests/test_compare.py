"""compare.py: peft's share of it is the same network, trained by the same rule; it resumes where it was interrupted."""

import csv
import json

import pytest
import torch
from conftest import fail, say

from finetune import ia3, run
from lit_model import load
from lit_model.data import labels, score
from lit_model.data.examples import ExampleOptions
from lit_model.load import METHODS
from lit_model.weights.folder import save_folder, tokenizer_files
from scripts import compare
from scripts.bench import peers
from scripts.compare_report import draw, line_of, recommendation, table


def test_peft_in_the_comparison_is_the_same_network_trained_by_the_same_rule(tiny, labelled, tmp_path):
    """IA3 starts with ones in both: after some steps its vectors are those of peft, and so are the labels."""
    settings = dict(
        checkpoint_dir=tiny / "base", data=str(labelled), devices="cpu", dtype="float32",
        examples=ExampleOptions(val_fraction=0.2),
        train=run.Train(lr=1e-2, batch_size=8, max_steps=6, epochs=9, eval_interval=3, sample="", weight_decay=0.5),
    )  # fmt: skip
    summary = ia3.main(ia3.Options(**settings, out_dir=tmp_path / "ours"))
    theirs = run.start(run.RunOptions(**settings, out_dir=tmp_path / "theirs"))
    network = peers.load(tiny / "base", torch.float32, theirs.device)
    idx = torch.randint(0, 400, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(network(idx).logits, load(tiny / "base")(idx), rtol=1e-4, atol=1e-5)
    network = peers.attach(network, "ia3", None)
    val_loss, _, n_tokens = peers.fit(network, theirs)
    assert n_tokens == summary.n_tokens
    assert val_loss == pytest.approx(summary.val_loss, rel=1e-5)
    gpt = load(tiny / "base", tmp_path / "ours")
    places = {"self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
    moved = 0.0
    for layer, block in zip(network.base_model.model.model.layers, gpt.blocks):
        for there, here in places.items():
            vector = layer.get_submodule(there).ia3_l["default"].detach().flatten()
            torch.testing.assert_close(block.get_submodule(here).deltas["ia3"].scale, vector, rtol=1e-4, atol=1e-5)
            moved = max(moved, (vector - 1).abs().max().item())
    assert moved > 1e-2
    ids = labels.label_ids(theirs.task, theirs.tokenizer)
    verdict = score.judge(gpt, theirs.val_examples, theirs.task, ids, 400)
    assert peers.judge(network, theirs.val_examples, theirs.task, ids, theirs) == verdict


def test_all_methods_are_compared_from_rates_that_a_search_knows():
    assert {method.name for method in compare.METHODS.values()} == {*METHODS}
    assert {method.lr for method in compare.METHODS.values()} | {*compare.PEERS.values()} <= {*compare.RATES}


def cells_of(folder) -> dict[str, dict]:
    return {cell["cell"]: cell for cell in map(json.loads, (folder / "cells.jsonl").read_text().splitlines())}


QUICK = "--devices cpu --n_test 20 --n_val 16 --max_steps 2 --batch_size 4"


def test_an_interrupted_comparison_resumes_and_a_search_finds_the_rates_of_others(
    labelled, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("finetune.report.Log.draw", lambda log: None)  # pictures of each run, which take most of it
    monkeypatch.setattr(labels.Verdict, "draw", lambda verdict, path: None)
    out = tmp_path / "compare"
    args = f"--data {labelled} --checkpoint_dir {tiny}/base --out_dir {out} --devices cpu --n_test 30 --n_val 15"
    args += " --max_steps 4 --shots 2"
    say(compare, capsys, monkeypatch, f"{args} --methods zero-shot,lora --seeds 0,1")
    first = (out / "cells.jsonl").read_text()
    say(compare, capsys, monkeypatch, f"{args} --methods lora,few-shot,features --peers")
    say(compare, capsys, monkeypatch, f"{args} --methods head --seeds 0,1 --search")
    text, cells = (out / "cells.jsonl").read_text(), cells_of(out)
    assert text.startswith(first) and len(cells) == len(text.splitlines())  # no cell was computed twice
    losses = {cell["lr"]: cell["val_loss"] for cell in cells.values() if cell["method"] == "head" and not cell["seed"]}
    best, tried = min(losses, key=losses.get), sorted(losses)
    assert len(tried) >= 3 and tried[0] < best < tried[-1] and f"head, seed 1, lr {best:g}" in cells
    assert cells["head, seed 0, lr 0.003"]["n_trained"] == 400 * 64
    assert cells["peft-lora, seed 0, lr 0.003"]["n_trained"] == cells["lora, seed 0, lr 0.003"]["n_trained"]

    other = f"{args.replace(str(out), str(tmp_path / 'other'))} --methods head --rates {out}"
    say(compare, capsys, monkeypatch, other)
    assert [*cells_of(tmp_path / "other")] == [f"head, seed 0, lr {best:g}"]
    assert "has no cell of dora" in fail(compare, capsys, monkeypatch, other.replace("head", "dora"))
    assert "cells with another max_steps" in fail(compare, capsys, monkeypatch, f"{args} --methods lora --max_steps 5")
    assert {path.name for path in out.iterdir()} == {"cells.jsonl", "train.csv", "report.md", "compare.png"}


def test_all_methods_fit_their_scripts(labelled, tiny, tmp_path, capsys, monkeypatch):
    args = f"{QUICK} --data {labelled} --checkpoint_dir {tiny}/base --out_dir {tmp_path}/out --methods full,qlora"
    say(compare, capsys, monkeypatch, args)
    assert {cell["method"]: cell["stored_bytes"] > 0 for cell in cells_of(tmp_path / "out").values()} == dict(
        full=True, qlora=True
    )
    names = "data checkpoint_dir out_dir n_test n_val".split()
    options = compare.Options(**dict(zip(names, (str(labelled), tiny / "base", tmp_path / "out2", 20, 16))))
    comparison = compare.prepare(options)
    for method in compare.METHODS.values():
        started = run.start(compare.run_options(comparison, method, 0, method.lr))
        gpt = run.build(started, method.name, getattr(started.options, method.name, None))
        assert any(p.requires_grad for p in gpt.parameters()) and len(started.val_examples) == 16


def test_labels_of_several_tokens(tiny, tmp_path, capsys, monkeypatch):
    with open(tmp_path / "rows.csv", "w") as file:
        file.write("text,label\n" + "".join(f"{i} stone,{('seven green', 'quiet hill')[i % 2]}\n" for i in range(60)))
    args = f"{QUICK} --data {tmp_path}/rows.csv --checkpoint_dir {tiny}/base --out_dir {tmp_path}/out --shots 2"
    say(compare, capsys, monkeypatch, f"{args} --methods zero-shot,few-shot,features --seeds 3,3")
    assert [*cells_of(tmp_path / "out")] == [f"{name}, seed 3" for name in compare.UNTRAINED]


CELL = dict(method="lora", on="a GPU", lr=1e-3, n_trained=1000, n_tokens=600, peak_gib=2.0, stored_bytes=4000)


def test_a_line_has_mean_and_standard_deviation_and_the_speed_of_the_fastest_seed():
    cells = [dict(CELL, accuracy=accuracy, seconds=seconds) for accuracy, seconds in ((0.5, 3.0), (0.6, 2.0))]
    assert "| lora | 55.0 ± 7.1 | 1,000 | 0.001 | 2 | 300 | 2.0 | 0.00 |" in table([line_of(cells)])
    assert "| lora | 50.0 | 1,000 | 0.001 | 3 | 200 |  | 0.00 |" in table([line_of([dict(cells[0], on="CPU")])])
    untrained = dict(method="zero-shot", on="a GPU", lr=None, n_trained=0, accuracy=0.25, stored_bytes=0)
    assert "| zero-shot | 25.0 | 0 |  |  |  |  | 0.00 |" in table([line_of([untrained])])


def test_the_recommended_method_is_ours_and_the_smallest_within_the_noise():
    rows = [("peft-big", 0.95, 1), ("big", 0.94, 1000), ("small", 0.938, 10), ("tiny", 0.90, 1)]
    lines = [dict(method=method, accuracy=accuracy, n_trained=n, std=0.004) for method, accuracy, n in rows]
    text = recommendation(lines, n_test=10_000)
    assert text.startswith("Best: big, 94.0 %. small is within the noise of 0.4 points and trains 10 ")
    assert recommendation(lines[2:], n_test=10_000) == "Best: small, 93.8 %."


def test_the_picture_names_points_side_by_side(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: figures.append(figure))
    names = [*compare.METHODS, *(f"peft-{name}" for name in compare.PEERS)]
    cells = [dict(CELL, method=name, accuracy=0.9 + i % 4 / 200, seconds=50 + i) for i, name in enumerate(names)]
    draw([line_of([cell]) for cell in cells], tmp_path / "compare.png")
    assert len(figures[0].axes) == 3
    for axes in figures[0].axes:
        boxes = [label.get_window_extent() for label in axes.texts]
        assert [label.get_text() for label in axes.texts] == names
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_nothing_of_a_user_is_replaced(labelled, tiny, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine"
    (mine / "run").mkdir(parents=True)
    (mine / "train.csv").write_bytes(labelled.read_bytes())
    args = f"{QUICK} --data {mine}/train.csv --checkpoint_dir {tiny}/base --out_dir {mine} --methods zero-shot"
    assert "mine is not empty: name another folder, or remove it" in fail(compare, capsys, monkeypatch, args)
    assert (mine / "train.csv").read_bytes() == labelled.read_bytes() and (mine / "run").is_dir()


def test_cells_of_another_network_are_refused_and_a_line_that_was_cut_off_is_computed_again(
    labelled, tiny, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    args = f"{QUICK} --data {labelled} --out_dir {out} --methods zero-shot"
    say(compare, capsys, monkeypatch, f"{args} --checkpoint_dir {tiny}/base")
    whole = (out / "cells.jsonl").read_text()
    (out / "cells.jsonl").write_text(whole + whole[:50])
    assert "line 2 was cut off" in say(compare, capsys, monkeypatch, f"{args} --checkpoint_dir {tiny}/base")
    assert (out / "cells.jsonl").read_text() == whole
    base, other = load(tiny / "base"), tmp_path / "other/base"
    save_folder(other, base.config, {n: 2 * t for n, t in base.state_dict().items()}, tokenizer_files(tiny / "base"))
    assert "cells with another base" in fail(compare, capsys, monkeypatch, f"{args} --checkpoint_dir {other}")
    with open(labelled, "a", newline="") as file:
        csv.writer(file).writerow(["one more", "apple"])
    assert "another data" in fail(compare, capsys, monkeypatch, f"{args} --checkpoint_dir {tiny}/base")


@pytest.mark.parametrize(
    "args, message",
    [
        ("--n_val 0", "n_val is 0; it must be a whole number above 0"),
        ("--n_test -5", "n_test is -5"),
        ("--shots -2", "shots is -2"),
        ("--methods lore", "there is no method 'lore'; there are zero-shot"),
        ("--seeds a", "--seeds: invalid literal"),
        ("--n_test 500", "too few for --n_test and --n_val"),
    ],
)
def test_mistakes_end_in_one_line(args, message, labelled, tiny, tmp_path, capsys, monkeypatch):
    given = f"--devices cpu --data {labelled} --checkpoint_dir {tiny}/base --out_dir {tmp_path}/out"
    assert message in fail(compare, capsys, monkeypatch, f"{given} {args}")
    assert not (tmp_path / "out").exists()
