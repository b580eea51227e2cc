"""Several method folders over one base: each as if it were alone, call by call and example by example."""

import pytest
import torch
from test_methods import build, close, save, shake

from lit_model import generate, load
from lit_model.decode import Decoder, Request
from lit_model.generate import generate_batch
from lit_model.sampling import Sampling

CHOSEN = {  # name -> row of test_methods.METHODS, and options instead of its own
    **{name: (name, None) for name in ("adapter", "bottleneck", "dora", "ia3", "lora", "prefix", "prompt")},
    "wide": ("lora", dict(r=6, targets="q_proj,lm_head", dropout=0.5)),
}


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """Method files of all kinds that go side by side: LoRA of two ranks, an adapter, a prefix, a prompt, and more."""
    folder = tmp_path_factory.mktemp("methods")
    torch.manual_seed(0)
    return {
        name: save(folder / f"{name}.safetensors", shake(build(checkpoint, row, options)), row, checkpoint, options)
        for name, (row, options) in CHOSEN.items()
    }


def test_a_mixed_batch_equals_each_example_alone(checkpoint, folders):
    gpt = load(checkpoint, folders)
    methods = ["wide", "prompt", "lora", None, "prefix", "adapter", "lora", "dora", "bottleneck", "prompt", "ia3", None]
    idx = torch.randint(0, 97, (len(methods), 11))
    got, base = gpt(idx, method=methods), load(checkpoint)(idx)
    for i, name in enumerate(methods):
        alone = load(checkpoint, folders[name] if name else None)(idx[i : i + 1])[0]
        close(got[i], alone)
        assert ((got[i] - base[i]).abs().max() > 1e-2) == (name is not None)


def test_a_mixed_batch_is_decoded_as_each_alone(checkpoint, folders):
    """Prompts of several lengths, some of which begin alike; the methods in other places than before and after."""
    gpt = load(checkpoint, folders)
    methods = ["wide", "prompt", "lora", None, "prefix", "adapter", "lora", "dora", "bottleneck", "prompt", "ia3", None]
    start = torch.randint(0, 97, (20,)).tolist()
    prompts = [start[: 20 - i] + torch.randint(0, 97, (3,)).tolist() for i in range(len(methods))]
    idx = torch.randint(0, 97, (2, 11))
    base, found = gpt(idx), [[] for _ in prompts]
    for i, token in generate_batch(gpt, prompts, 9, [Sampling(0)] * len(prompts), methods=methods):
        found[i].append(token)
    for ids, name, tokens in zip(prompts, methods, found):
        alone = load(checkpoint, folders[name] if name else None)
        assert tokens == list(generate(alone, ids, 9, temperature=0)), name
    assert torch.equal(gpt(idx), base) and len({tuple(tokens) for tokens in found}) > 6


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_sequences_come_and_go(checkpoint, folders, mixed, wide, monkeypatch):
    """Each as if it were alone, whatever came before it in its slots; in the end all slots are free again."""
    torch.manual_seed(0)
    gpt, names = load(checkpoint, folders if mixed else None), [None, *folders] if mixed else None
    methods = [names[i % len(names)] for i in range(8)] if mixed else None
    prompts = [torch.randint(0, 97, (n,)).tolist() for n in (9, 3, 30, 1, 17, 9, 26, 4)]
    n_new = [4, 9, 2, 12, 7, 1, 9, 11]
    ways = [Sampling(0.8, seed=i, repetition_penalty=1 + i % 3 * 2) for i in range(8)]
    alone = []
    for i, ids in enumerate(prompts):
        mine = None if methods is None else methods[i : i + 1]
        alone.append([token for _, token in generate_batch(gpt, [ids], n_new[i], ways[i : i + 1], methods=mine)])
    if wide:  # as on a GPU, which computes for places without a sequence, too
        monkeypatch.setattr(Decoder, "step", lambda self: self._step(len(self.n)))
    decoder = Decoder(gpt, 3, 100, 60, names)
    places, found, waiting = [], [[] for _ in prompts], [*range(8)]
    while places or waiting:
        fresh = waiting[: 3 - len(places)]
        if fresh:
            del waiting[: len(fresh)]
            decoder.admit([Request(prompts[i], n_new[i], ways[i], methods and methods[i]) for i in fresh])
            places += fresh
        for tokens in decoder.steps(1):
            for i, token in zip(places, tokens, strict=True):
                found[i].append(token)
        for place in reversed(range(len(places))):
            if len(found[places[place]]) == n_new[places[place]]:
                decoder.release(place)
                places[place] = places[-1]
                places.pop()
    assert found == alone
    assert (decoder.users > 0).sum() == len(decoder.front)


def test_methods_are_switched_without_loading(checkpoint, folders):
    gpt = load(checkpoint, folders)
    idx = torch.randint(0, 97, (2, 11))
    base = load(checkpoint)(idx)
    for name, folder in folders.items():
        alone = load(checkpoint, folder)
        assert torch.equal(gpt(idx, method=name), alone(idx)), name
        assert torch.equal(gpt(idx), base)  # only that call
        gpt.switch(name)
        tokens = list(generate(gpt, idx[0].tolist(), 6, temperature=0))
        assert tokens == list(generate(alone, idx[0].tolist(), 6, temperature=0))
        gpt.switch(None)
    assert torch.equal(gpt(idx), base)


def test_a_mixed_batch_leaves_the_method_of_other_calls_alone(checkpoint, folders):
    gpt = load(checkpoint, folders)
    idx = torch.randint(0, 97, (2, 11))
    gpt.switch("lora")
    expected = gpt(idx)
    gpt(idx, method=["prefix", "prompt"])
    assert torch.equal(gpt(idx), expected)
    with pytest.raises(KeyError, match="x"):
        gpt(idx, method=["dora", "x"])
    assert torch.equal(gpt(idx), expected)
    with pytest.raises(ValueError, match="cannot all be merged"):
        gpt.merge()


def test_a_switch_hangs_one_method_in_and_all_is_for_inference(checkpoint, folders):
    """Dropout too is over, and nothing waits for gradients."""
    gpt, alone = load(checkpoint, folders), load(checkpoint)
    assert gpt.state_dict().keys() == alone.state_dict().keys()
    for name in folders:
        gpt.switch(name)
        keys = gpt.state_dict().keys()
        assert keys == load(checkpoint, folders[name]).state_dict().keys()
        assert not any(p.requires_grad for p in gpt.parameters()) and not any(m.training for m in gpt.modules())


def test_what_does_not_go_side_by_side_is_refused(checkpoint, folders, tmp_path):
    norms = save(tmp_path / "norms.safetensors", build(checkpoint, "selective-norms"), "selective-norms", checkpoint)
    with pytest.raises(ValueError, match="replaces blocks.0.*norm.*; side by side go methods that only add"):
        load(checkpoint, {"norms": norms})
    gpt = load(checkpoint, {"a": folders["lora"]})
    with pytest.raises(KeyError, match="b"):
        gpt(torch.zeros(1, 3, dtype=torch.long), method="b")
    with pytest.raises(IndexError):
        gpt(torch.zeros(2, 3, dtype=torch.long), method=["a"])
