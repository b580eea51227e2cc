"""Several method folders over one base: each as if it were alone, call by call and example by example."""

import pytest
import torch
from test_methods import METHODS, build, shake

from lit_model import generate, load
from lit_model.methods import lora
from lit_model.load import fingerprint_of, save_method


@pytest.fixture
def folders(checkpoint, tmp_path):
    """Method files of all kinds that go side by side: LoRA of two ranks, an adapter, a prefix, a prompt, and more."""
    made = {}
    chosen = {name: METHODS[name] for name in ("lora", "adapter", "prefix", "prompt", "bottleneck", "ia3", "dora")}
    chosen["wide"] = (lora, dict(lora=lora.LoRA(r=6, targets="q_proj,lm_head")))
    for name, (module, options) in chosen.items():
        gpt = build(checkpoint, (module, options))
        shake(gpt, module)
        method, made[name] = module.__name__.split(".")[-1], tmp_path / f"{name}.safetensors"
        save_method(made[name], gpt, method, options.get(method), fingerprint_of(checkpoint))
    return made


def test_a_mixed_batch_equals_each_example_alone(checkpoint, folders):
    gpt = load(checkpoint, folders)
    methods = ["wide", "prompt", "lora", None, "prefix", "adapter", "lora", "dora", "bottleneck", "prompt", "ia3", None]
    idx = torch.randint(0, 97, (len(methods), 11))
    got = gpt(idx, method=methods)
    for i, name in enumerate(methods):
        alone = load(checkpoint, folders[name] if name else None)(idx[i : i + 1])[0]
        torch.testing.assert_close(got[i], alone, rtol=1e-4, atol=1e-5)
    assert (got[0] - load(checkpoint)(idx[:1])[0]).abs().max() > 1e-2


def test_methods_are_switched_without_loading(checkpoint, folders):
    gpt = load(checkpoint, folders)
    idx = torch.randint(0, 97, (2, 11))
    base = load(checkpoint)(idx)
    for name, folder in folders.items():
        alone = load(checkpoint, folder)
        torch.testing.assert_close(gpt(idx, method=name), alone(idx), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gpt(idx), base, rtol=0, atol=0)  # only that call
        gpt.switch(name)
        tokens = list(generate(gpt, idx[0].tolist(), 6, temperature=0))
        assert tokens == list(generate(alone, idx[0].tolist(), 6, temperature=0))
        gpt.switch(None)


def test_a_mixed_batch_leaves_the_method_of_other_calls_alone(checkpoint, folders):
    gpt = load(checkpoint, folders)
    idx = torch.randint(0, 97, (2, 11))
    gpt.switch("lora")
    expected = gpt(idx)
    gpt(idx, method=["prefix", "prompt"])
    assert torch.equal(gpt(idx), expected)
    with pytest.raises(ValueError, match="there is no method 'x' here"):
        gpt(idx, method=["dora", "x"])
    assert torch.equal(gpt(idx), expected)
    with pytest.raises(ValueError, match="cannot all be merged"):
        gpt.merge()


@pytest.mark.parametrize("name", ["a.b", "", "keys", 3])
def test_names_that_cannot_be_are_refused(name, checkpoint, folders):
    with pytest.raises(ValueError, match="cannot be the name of"):
        load(checkpoint, {name: folders["lora"]})


def test_what_does_not_go_side_by_side_is_refused(checkpoint, folders, tmp_path):
    gpt = build(checkpoint, METHODS["norms"])
    options = METHODS["norms"][1]["selective"]
    save_method(tmp_path / "norms.safetensors", gpt, "selective", options, fingerprint_of(checkpoint))
    with pytest.raises(ValueError, match="replaces .* tensors of the base, such as blocks.0.*norm"):
        load(checkpoint, {"norms": tmp_path / "norms.safetensors"})
    gpt = load(checkpoint, {"a": folders["lora"]})
    with pytest.raises(ValueError, match="there is no method 'b' here; there are a"):
        gpt(torch.zeros(1, 3, dtype=torch.long), method="b")
    with pytest.raises(ValueError, match="1 methods for 2 examples"):
        gpt(torch.zeros(2, 3, dtype=torch.long), method=["a"])
