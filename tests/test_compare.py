"""compare.py: peft's share of it is the same network, trained by the same rule; it goes on where it ended."""

import csv
import json

import pytest
import torch
from conftest import fail, say

from finetune import ia3 as finetune_ia3
from finetune import setup
from lit_model.data import labels as classify
from lit_model.methods import ia3
from lit_model import load
from lit_model.load import save_checkpoint
from lit_model.weights.folder import tokenizer_files
from lit_model.data.rows import PromptOptions
from scripts import compare, peers
from scripts.compare_report import recommendation


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
    other = f"{args.replace(str(out), str(tmp_path / 'other'))} --methods head --rates {out}"
    assert f"==== head, seed 0, lr {best:g}\n" in say(compare, capsys, monkeypatch, other)
    assert "has no cell of dora" in fail(compare, capsys, monkeypatch, other.replace("head", "dora"))
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ("lora", "peft-lora", "few-shot", "head")) and "Best: " in table
    assert (out / "tradeoff.png").stat().st_size > 5000 and not (out / "run").exists()
    lines = list(csv.DictReader(open(out / "table.csv")))
    assert [float(r["accuracy"]) for r in lines] == sorted((float(r["accuracy"]) for r in lines), reverse=True)
    head = next(r for r in lines if r["method"] == "head")
    assert head["seeds"] == "2" and int(head["trained"]) == 400 * 64

    said = say(compare, capsys, monkeypatch, f"{args} --methods lora,head --max_store_mb 0.05")
    assert "Best within 0.05 MB on disk: lora" in said  # the head is larger
    assert "cells with another max_steps" in fail(compare, capsys, monkeypatch, f"{args} --methods lora --max_steps 5")


QUICK = "--devices cpu --n_test 20 --n_val 16 --max_steps 2 --batch_size 4"


def test_labels_of_several_tokens(tiny, tmp_path, capsys, monkeypatch):
    with open(tmp_path / "rows.csv", "w") as file:
        file.write("text,label\n" + "".join(f"{i} stone,{('seven green', 'quiet hill')[i % 2]}\n" for i in range(60)))
    args = f"{QUICK} --data {tmp_path}/rows.csv --checkpoint_dir {tiny}/base --out_dir {tmp_path}/out --shots 2"
    said = say(compare, capsys, monkeypatch, f"{args} --methods zero-shot,few-shot,features --seeds 3,3")
    assert all(f"| {name} |" in said for name in ("zero-shot", "few-shot", "features")) and "+-" not in said


def test_what_to_take_is_ours_fits_and_is_the_smallest_within_the_noise():
    line = dict(std=0.004, peak_gib=3.0, stored_mb=2.0)
    lines = [
        dict(line, method="peft-big", accuracy=0.95, trained=1),
        dict(line, method="big", accuracy=0.94, trained=1000, stored_mb=20.0),
        dict(line, method="small", accuracy=0.938, trained=10),
        dict(line, method="tiny", accuracy=0.90, trained=1),
    ]
    said = recommendation(lines, compare.Options(n_test=10_000))
    assert said.startswith("Best: big, 94.0 %. small is within the noise of 0.4 points and trains 10 ")
    said = recommendation(lines, compare.Options(n_test=10_000, max_store_mb=10))
    assert said == "Best within 10 MB on disk: small, 93.8 %."
    assert recommendation(lines, compare.Options(max_store_mb=1)) == "Nothing that was tried stays within 1 MB on disk."


def test_nothing_of_a_user_is_replaced(labelled, tiny, tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine"
    (mine / "run").mkdir(parents=True)
    (mine / "train.csv").write_bytes(labelled.read_bytes())
    args = f"{QUICK} --data {mine}/train.csv --checkpoint_dir {tiny}/base --out_dir {mine} --methods zero-shot"
    assert "mine holds other things: name another --out_dir" in fail(compare, capsys, monkeypatch, args)
    assert (mine / "train.csv").read_bytes() == labelled.read_bytes() and (mine / "run").is_dir()


def test_cells_of_another_network_are_not_taken_and_a_line_that_was_cut_off_is_made_again(
    labelled, tiny, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    args = f"{QUICK} --data {labelled} --out_dir {out} --methods zero-shot"
    say(compare, capsys, monkeypatch, f"{args} --checkpoint_dir {tiny}/base")
    whole = (out / "cells.jsonl").read_text()
    (out / "cells.jsonl").write_text(whole + whole[:50])
    said = say(compare, capsys, monkeypatch, f"{args} --checkpoint_dir {tiny}/base")
    assert "line 2 was cut off" in said and (out / "cells.jsonl").read_text() == whole
    base = load(tiny / "base")
    save_checkpoint(
        tmp_path / "other/base", base.config, {n: 2 * t for n, t in base.state_dict().items()},
        tokenizer_files(tiny / "base"),
    )  # fmt: skip
    assert "cells with another base" in fail(
        compare, capsys, monkeypatch, f"{args} --checkpoint_dir {tmp_path}/other/base"
    )
    with open(labelled, "a") as file:
        file.write("one more,apple\n")
    assert "another data" in fail(compare, capsys, monkeypatch, f"{args} --checkpoint_dir {tiny}/base")


@pytest.mark.parametrize(
    "args, says",
    [
        ("--n_val 0", "n_val is 0; it must be at least 1"),
        ("--n_test -5", "n_test is -5"),
        ("--shots -2", "shots is -2"),
        ("--max_memory_gb 4", "max_memory_gb is about the memory of a GPU"),
        ("--methods lore", "there is no method 'lore'; there are zero-shot"),
        ("--seeds a", "--seeds a is no list of numbers"),
        ("--n_test 500", "too few for --n_test and --n_val"),
    ],
)
def test_mistakes_end_in_one_line(args, says, labelled, tiny, tmp_path, capsys, monkeypatch):
    given = f"--devices cpu --data {labelled} --checkpoint_dir {tiny}/base --out_dir {tmp_path}/out"
    assert says in fail(compare, capsys, monkeypatch, f"{given} {args}")
    assert not (tmp_path / "out").exists()
