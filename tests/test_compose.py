"""Methods of a list act together, merged as well as not; a run starts from what another one has trained."""

import pytest
import torch
from conftest import fail, say
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_methods import METHODS, build, save, shake
from transformers import AutoModelForCausalLM

from finetune import lora, prefix
from finetune.lora import Options
from finetune.run import Train
from lit_model import load
from lit_model.load import read_method
from lit_model.merge import compare, merge
from lit_model.methods.lora import LoRA
from lit_model.methods.prefix import Prefix
from lit_model.weights.folder import Folder
from scripts import export

IDX = torch.arange(3, 23).view(2, 10)


def saved(base, folder, name: str, seed: int):
    """A folder with what a method has trained, and its network."""
    torch.manual_seed(seed)
    folder.mkdir()
    gpt = shake(build(base, name))
    save(folder / "lit_method.safetensors", gpt, name, base)
    return folder, gpt


@pytest.mark.parametrize("second", [name for name in METHODS if name.split("-")[0] not in ("dora", "ia3", "full")])
def test_two_methods_add_up(second, checkpoint, tmp_path):
    """By hand: the deltas of one network hung into the slots of the other."""
    (a, first), (b, gpt) = (saved(checkpoint, tmp_path / f"{i}", n, i) for i, n in enumerate(("lora", second)))
    for path, m in first.named_modules():
        for delta in getattr(m, "deltas", {}).values():
            deltas = gpt.get_submodule(path).deltas
            others = [(f"{other}'", deltas.pop(other)) for other in list(deltas)]
            deltas["first"] = delta
            deltas.update(others)
    both, expected = load(checkpoint, [a, b]), gpt.eval()(IDX)
    torch.testing.assert_close(both(IDX), expected, rtol=1e-5, atol=1e-5)
    assert all((load(checkpoint, one)(IDX) - expected).abs().max() > 1e-3 for one in (a, b))
    torch.testing.assert_close(load(checkpoint, f"{a},{b}")(IDX), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("lora", "lora-all-rslora"), ("dora", "lora"), ("ia3", "lora", "selective-norms")])
def test_what_adds_up_merges(names, tiny, tmp_path, capsys):
    checkpoint = tiny / "base"
    folders = [saved(checkpoint, tmp_path / f"{i}", name, i)[0] for i, name in enumerate(names)]
    merge(checkpoint, folders, tmp_path / "merged")
    line = compare(checkpoint, folders, tmp_path / "merged")
    expected = load(checkpoint, folders)(IDX)
    torch.testing.assert_close(load(tmp_path / "merged")(IDX), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert "the same for 100.0 %" in line or pytest.fail(line)
    assert "% of what was trained" in capsys.readouterr().out


@pytest.mark.parametrize("names, undone", [
    (("selective-norms", "selective-norms"), "norm"), (("lora", "dora"), "deltas"), (("ia3", "dora"), "deltas"),
])  # fmt: skip
def test_what_would_undo_another_method_is_refused(names, undone, tiny, tmp_path):
    checkpoint = tiny / "base"
    folders = [saved(checkpoint, tmp_path / f"{i}", name, i)[0] for i, name in enumerate(names)]
    with pytest.raises(ValueError, match=f"{folders[1]} would undo .* to .*{undone}.*: name it first, or alone"):
        load(checkpoint, folders)


def test_the_sum_of_loras_is_one_for_peft(tiny, tmp_path, capsys, monkeypatch):
    checkpoint = tiny / "base"
    folders = [saved(checkpoint, tmp_path / f"{i}", n, i)[0] for i, n in enumerate(("lora", "lora-all-rslora"))]
    args = f"--checkpoint_dir {checkpoint} --to peft --out_dir {tmp_path}/peft --method_dir"
    say(export, capsys, monkeypatch, f"{args} {folders[0]},{folders[1]}")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "peft")
    expected = load(checkpoint, folders)(IDX)
    torch.testing.assert_close(peft(IDX).logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    other, _ = saved(checkpoint, tmp_path / "2", "prefix", 2)
    assert "prefix is more than a LoRA" in fail(export, capsys, monkeypatch, f"{args} {folders[0]},{other}")


# ---------------------------------------------------------------------------------------------------------- init_from


def run(script, tiny, out_dir, lr: float = 0.0, **more) -> dict[str, torch.Tensor]:
    """A run of one step. Returns what it has trained."""
    kind = Options if script is lora else prefix.Options
    train = Train(lr=lr, batch_size=8, sample="", max_steps=1, weight_decay=0.0)
    paths = dict(checkpoint_dir=tiny / "base", data=str(tiny / "data.json"), out_dir=out_dir)
    script.main(kind(**paths, train=train, devices="cpu", dtype="float32", **more))
    return load_file(out_dir / "lit_method.safetensors")


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_a_run_starts_from_another_one(name, tiny, tmp_path):
    """With its options; at a learning rate of 0 it ends there, at another one it does not."""
    script, own = (lora, dict(lora=LoRA(r=3, alpha=5))) if name == "lora" else (prefix, dict(prefix=Prefix(length=4)))
    before = run(script, tiny, tmp_path / "a", 1e-2, **own)
    for lr in (0.0, 1e-2):
        after = run(script, tiny, tmp_path / f"b{lr}", lr, init_from=tmp_path / "a")
        assert all(torch.equal(t, after[n]) == (lr == 0) for n, t in before.items()) and after.keys() == before.keys()
    header = read_method(tmp_path / "b0.0", Folder(tiny / "base"))[0]
    assert header["options"] == read_method(tmp_path / "a", Folder(tiny / "base"))[0]["options"]


def test_a_run_starts_from_a_folder_of_peft(tiny, tmp_path):
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny / "base"),
        LoraConfig(r=3, lora_alpha=7, target_modules=["k_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for p in peft.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.requires_grad else 0)
    peft.save_pretrained(tmp_path / "peft")
    run(lora, tiny, tmp_path / "out", init_from=tmp_path / "peft")
    expected = peft.eval()(IDX).logits
    torch.testing.assert_close(load(tiny / "base", tmp_path / "out")(IDX), expected, rtol=1e-4, atol=1e-5)


def test_another_method_or_base_is_refused(tiny, checkpoint, tmp_path):
    run(prefix, tiny, tmp_path / "a")
    with pytest.raises(ValueError, match="a: it holds prefix, which another script trains"):
        run(lora, tiny, tmp_path / "b", init_from=tmp_path / "a")
    other, _ = saved(checkpoint, tmp_path / "c", "lora", 0)
    with pytest.raises(ValueError, match="c: it holds lora on another base"):
        run(lora, tiny, tmp_path / "b", init_from=other)
    assert not (tmp_path / "b").exists()
