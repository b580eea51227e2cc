"""The contract that every method keeps. A new method is one row of METHODS."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, LLAMA

from lit_model.methods import adapter, adapter_v2, bottleneck, full, ia3, lora, prefix, prompt, selective
from lit_model import generate, load, model
from lit_model.attention import KVCache
from lit_model.load import fingerprint_of, freeze, load_base, save_method
from lit_model.packing import Example, Segment, lay_out, pack
from scripts.merge import rounding_error

ALL = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"
METHODS = {
    "adapter": (adapter, dict(adapter=adapter.Adapter(prompt_length=3, start_layer=1))),
    "adapter-linear-gate": (adapter, dict(adapter=adapter.Adapter(prompt_length=3, start_layer=0, gate="linear"))),
    "lora": (lora, dict(lora=lora.LoRA(r=3))),
    "lora-all-rslora": (
        lora,
        dict(lora=lora.LoRA(r=2, rslora=True, targets=f"{ALL},lm_head")),
    ),
    "dora": (lora, dict(lora=lora.LoRA(r=3, dora=True, targets=ALL))),
    "full": (full, {}),
    "adapter_v2": (adapter_v2, dict(adapter_v2=adapter_v2.AdapterV2(prompt_length=3, start_layer=1))),
    "bottleneck": (bottleneck, dict(bottleneck=bottleneck.Bottleneck(size=5))),
    "bottleneck-mlp-norms": (bottleneck, dict(bottleneck=bottleneck.Bottleneck(size=5, where="mlp", norms=True))),
    "ia3": (ia3, {}),
    "prefix": (prefix, dict(prefix=prefix.Prefix(length=5))),
    "prefix-mlp": (prefix, dict(prefix=prefix.Prefix(length=5, mlp=7))),
    "prompt": (prompt, dict(prompt=prompt.Prompt(length=4))),
    "head": (selective, dict(selective=selective.Selective(what="head"))),
    "last-block": (selective, dict(selective=selective.Selective(what="last_blocks", n=1))),
    "bitfit": (selective, dict(selective=selective.Selective(what="bitfit"))),
    "norms": (selective, dict(selective=selective.Selective(what="norms"))),
    "regex": (selective, dict(selective=selective.Selective(what="regex", regex=r"blocks\.1\.attn.*weight"))),
}
LLAMA_7B = {  # name -> its options where they are not the default, number
    "adapter": ({}, 1_229_760),
    "adapter_v2": ({}, 4_279_744),
    "bottleneck": ({}, 33_820_672),
    "bottleneck-8": (dict(bottleneck=bottleneck.Bottleneck(size=8)), 4_456_960),
    "bottleneck-256": (dict(bottleneck=bottleneck.Bottleneck(size=256)), 134_496_256),
    "bottleneck-norms": (dict(bottleneck=bottleneck.Bottleneck(norms=True)), 33_820_672 + 262_144),
    "ia3": ({}, 614_400),
    "full": ({}, 6_738_415_616),
    "lora": ({}, 4_194_304),
    "lora-16": (dict(lora=lora.LoRA(r=16)), 8_388_608),
    "lora-8-all": (dict(lora=lora.LoRA(r=8, targets=f"{ALL},gate_proj")), 19_988_480),
    "lora-16-all": (dict(lora=lora.LoRA(r=16, targets=f"{ALL},gate_proj")), 39_976_960),
    "lora-64-all": (dict(lora=lora.LoRA(r=64, targets=f"{ALL},gate_proj")), 159_907_840),
    "dora": (dict(lora=lora.LoRA(r=16, dora=True, targets=f"{ALL},gate_proj")), 41_336_832),
    "prefix": ({}, 2_621_440),
    "prefix-20": (dict(prefix=prefix.Prefix(length=20)), 5_242_880),
    "prefix-50": (dict(prefix=prefix.Prefix(length=50)), 13_107_200),
    "prefix-mlp": (dict(prefix=prefix.Prefix(mlp=512)), 136_618_496),
    "prompt": ({}, 81_920),
    "prompt-100": (dict(prompt=prompt.Prompt(length=100)), 409_600),
    "head": (dict(selective=selective.Selective(what="head")), 131_072_000),
    "last-block": (dict(selective=selective.Selective(what="last_blocks", n=1)), 333_459_456),
    "bitfit": (dict(selective=selective.Selective(what="bitfit")), 1_359_872),
    "norms": (dict(selective=selective.Selective(what="norms")), 266_240),
}
STARTS_ELSEWHERE = ("prefix", "prefix-mlp", "prompt")  # not as the base model, and say so


@pytest.fixture(params=METHODS)
def method(request):
    """(module, fields of its Config)"""
    return METHODS[request.param]


def build(checkpoint, method) -> model.GPT:
    """The method's network as the scripts build it: on the meta device, base loaded, the rest frozen."""
    module, options = method
    with torch.device("meta"):
        gpt = module.GPT(module.Config.load(checkpoint, **options))
    load_base(gpt, checkpoint, torch.float32)
    freeze(gpt, module.trainable)
    return gpt


def shake(gpt, module) -> None:
    """Sets what is trained, gates and B included, away from its initial value."""
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if module.trainable(name, gpt.config):
                p.add_(0.1 * torch.randn_like(p))


def test_adds_keys_and_renames_none(checkpoint, method):
    module, options = method
    base = model.GPT(model.Config.load(checkpoint)).state_dict()
    keys = build(checkpoint, method).state_dict()
    assert base.keys() <= keys.keys()
    assert all(keys[name].shape == t.shape for name, t in base.items())
    config = module.Config.load(checkpoint, **options)
    assert all(module.trainable(name, config) for name in keys.keys() - base.keys())


def test_starts_as_the_base_model(checkpoint, method, request):
    if request.node.callspec.params["method"] in STARTS_ELSEWHERE:
        pytest.skip("virtual positions take their share of attention")
    idx = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(build(checkpoint, method)(idx), load(checkpoint)(idx), rtol=0, atol=0)


@pytest.mark.parametrize("name", LLAMA_7B)
def test_counts_what_the_paper_counts(name):
    module, _ = METHODS.get(name) or METHODS[name.split("-")[0]]
    options, expected = LLAMA_7B[name]
    with torch.device("meta"):
        gpt = module.GPT(module.Config.from_name("llama-7b", **options))
    n = sum(p.numel() for n, p in gpt.named_parameters() if module.trainable(n, gpt.config))
    print(f"\n{name}: {n:,} of llama-7b are trained")
    assert n == expected


def test_moves_every_trainable_and_nothing_else(checkpoint, method):
    """Also after evaluation passes, which must leave nothing behind that training would then use."""
    gpt = build(checkpoint, method)
    before = {name: t.clone() for name, t in gpt.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    example = Example(torch.randint(0, 97, (12,)).int().numpy(), first_target=1)
    ((idx, packed),) = pack([example], 100, gpt.n_virtual_tokens, gpt.n_virtual_keys)
    declared = [n for n, p in gpt.named_parameters() if p.requires_grad]
    assert declared and declared == [n for n, _ in gpt.named_parameters() if method[0].trainable(n, gpt.config)]
    moved = set()
    for _ in range(3):  # a zero gate or B hides its partner's gradient in the first step
        with torch.no_grad():
            gpt.eval()(idx[None])
        gpt.train()(idx, packed).backward()
        moved |= {name for name, p in gpt.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == set(declared)
    after = gpt.state_dict()
    tied = {"lm_head.weight"} if gpt.config.tie and "wte.weight" in declared else set()
    for name, t in before.items():
        if name in {*declared, *tied}:
            some_rows_only = name in ("wte.weight", "wpe.weight")  # of an embedding, those that occur in the text
            assert not torch.equal(after[name], t) if some_rows_only else not (after[name] == t).any(), name
        else:
            assert torch.equal(after[name], t), name


def test_trained_parameters_are_float32_and_move_under_a_bfloat16_base(checkpoint, method):
    module, options = method
    with torch.device("meta"):
        gpt = module.GPT(module.Config.load(checkpoint, **options))
    load_base(gpt, checkpoint, torch.bfloat16)
    freeze(gpt, module.trainable)
    assert {p.dtype for p in gpt.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in gpt.parameters() if not p.requires_grad} <= {torch.bfloat16}
    assert gpt(torch.randint(0, 97, (1, 5))).dtype == torch.bfloat16
    shake(gpt, module)
    params = [p for p in gpt.parameters() if p.requires_grad]
    before = [p.clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-5, weight_decay=0)
    gpt(torch.randint(0, 97, (1, 5))).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before))


def test_survives_save_and_load_bit_for_bit(checkpoint, method, tmp_path):
    module, options = method
    gpt = build(checkpoint, method)
    shake(gpt, module)
    name = module.__name__.split(".")[-1]
    save_method(tmp_path / "lit_method.safetensors", gpt, name, options.get(name), fingerprint_of(checkpoint))
    loaded = load(checkpoint, tmp_path)
    if "virtual_keys.prefix.embedding" not in gpt.state_dict():  # of the MLP only the prefix that it makes is kept
        for (name, a), (_, b) in zip(gpt.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
    idx = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(loaded(idx), gpt.eval()(idx), rtol=0, atol=0)


def test_a_method_file_holds_only_what_is_trained(checkpoint, tmp_path):
    from safetensors import safe_open

    gpt = build(checkpoint, METHODS["lora"])
    save_method(tmp_path / "m.safetensors", gpt, "lora", lora.LoRA(r=3, alpha=32), fingerprint_of(checkpoint))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert all(lora.trainable(name) for name in file.keys())
        assert json.loads(file.metadata()["options"])["alpha"] == 32
    # rank and alpha come from the file: nobody types them again, and generation cannot use another alpha
    loaded = load(checkpoint, tmp_path / "m.safetensors")
    assert loaded.blocks[0].attn.q_proj.deltas["lora"].scale == 32 / 3


def test_cached_decoding_equals_one_pass(checkpoint, method):
    gpt = build(checkpoint, method)
    shake(gpt, method[0])
    c, idx = gpt.config, torch.randint(0, 97, (10,))
    n = gpt.n_virtual_tokens
    cache = KVCache(c.n_layer, n + 10, c.n_kv_head, c.head_size, torch.float32, "cpu")
    root = Segment(n) if n else None
    tail = Segment(6, root)
    packed = lay_out([root, tail] if root else [tail], gpt.n_virtual_keys, cached=0)
    with torch.no_grad():
        logits = [*gpt(idx[:6], replace(packed, has_virtual_tokens=n > 0), cache)[n:]]
        for t in range(6, 10):
            tail = Segment(1, tail)
            logits += gpt(idx[t : t + 1], lay_out([tail], gpt.n_virtual_keys, cached=n + t), cache)
        torch.testing.assert_close(torch.stack(logits), gpt(idx[None])[0], rtol=1e-5, atol=1e-5)


def test_merged_equals_unmerged(checkpoint, method):
    module, _ = method
    if module in (adapter, bottleneck, prefix, prompt):
        pytest.skip("does not merge")
    gpt = build(checkpoint, method)
    shake(gpt, module)
    idx = torch.randint(0, 97, (2, 9))
    expected = gpt(idx)
    gpt.merge()
    assert not any("deltas" in name and ".deltas.adapter." not in name for name in gpt.state_dict())
    torch.testing.assert_close(gpt(idx), expected, rtol=1e-4, atol=1e-5)


def test_merge_reports_what_bfloat16_loses(checkpoint):
    errors = []
    for size in (1e-1, 1e-3):
        gpt = build(checkpoint, METHODS["lora"])
        base = {name: t.clone() for name, t in gpt.state_dict().items()}
        for p in gpt.parameters():
            p.data = torch.randn_like(p) * size if p.requires_grad else p.data
        gpt.merge()
        exact = gpt.state_dict()
        errors += [
            rounding_error(exact, {k: t.to(dt) for k, t in exact.items()}, base)
            for dt in (torch.bfloat16, torch.float32)
        ]
    assert errors[1] == errors[3] == 0
    assert 0 < errors[0] < 0.5 < errors[2]


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(lora=lora.LoRA(targets="q_proj,qkv")), "no layer is called qkv; there are down_proj, gate_proj, k_proj"),
        (dict(lora=lora.LoRA(r=0)), "lora.r is 0"),
        (dict(lora=lora.LoRA(targets="")), "lora.targets is empty"),
        (dict(adapter=adapter.Adapter(start_layer=3)), "the model has layers 0 to 2"),
        (dict(adapter=adapter.Adapter(prompt_length=0)), "prompt_length is 0"),
        (dict(lora=lora.LoRA(targets="q_proj,blocks.[")), r"no layer is called blocks.\["),
        (dict(lora=lora.LoRA(lr_ratio=0)), "lora.lr_ratio is 0"),
        (dict(bottleneck=bottleneck.Bottleneck(size=0)), "bottleneck.size is 0"),
        (dict(prefix=prefix.Prefix(length=128)), "prefix.length is 128; .*the model's context of 128"),
        (dict(prompt=prompt.Prompt(length=0)), "the soft prompt's length is 0"),
        (dict(lora=lora.LoRA(targets="q_proj:4:0")), "lora.alpha is 0.0"),
        (dict(selective=selective.Selective(n=4)), "selective.n is 4; the model has 3 blocks"),
        (
            dict(selective=selective.Selective(what="regex", regex="qkv")),
            "finds no parameter; there are blocks.0.attn.k",
        ),
        (dict(selective=selective.Selective(what="regex", regex="(")), "is no regular expression"),
        (dict(selective=selective.Selective(what="regex")), "finds no parameter"),
    ],
)
def test_senseless_options_are_refused_in_one_line(options, says):
    module = next(module for module, _ in METHODS.values() if module.__name__.endswith(f".{next(iter(options))}"))
    with pytest.raises(ValueError, match=says):
        module.GPT(module.Config(**FAMILIES["llama"], **options))


def test_another_base_is_refused(checkpoint, tmp_path):
    gpt = build(checkpoint, METHODS["lora"])
    save_method(tmp_path / "lit_method.safetensors", gpt, "lora", lora.LoRA(r=3), "another fingerprint")
    with pytest.raises(ValueError, match="trained on another base"):
        load(checkpoint, tmp_path)


def test_dropout_acts_in_training_only(checkpoint):
    gpt = build(checkpoint, (lora, dict(lora=lora.LoRA(dropout=0.5))))
    shake(gpt, lora)
    idx = torch.randint(0, 97, (1, 9))
    assert not torch.equal(gpt.train()(idx), gpt(idx))
    assert torch.equal(gpt.eval()(idx), gpt(idx))


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_a_prefix_and_a_prompt_made_of_a_text_act_as_that_text(checkpoint, name):
    text, idx = [5, 17, 3], torch.randint(0, 97, (1, 9))
    module = METHODS[name][0]
    options = dict(prefix=prefix.Prefix(length=5)) if name == "prefix" else dict(prompt=prompt.Prompt(length=5))
    gpt = build(checkpoint, (module, options))
    module.start(gpt, text)
    repeated = torch.tensor([text + text[:2]])
    expected = load(checkpoint)(torch.cat((repeated, idx), dim=1))[:, 5:]
    torch.testing.assert_close(gpt(idx), expected, rtol=1e-5, atol=1e-5)


def test_several_methods_work_together(checkpoint, tmp_path):
    """Trained apart, loaded together: each is there with its own tensors, and decoding goes through all of them."""
    chosen = {"lora": METHODS["dora"], "prefix": METHODS["prefix"], "bottleneck": METHODS["bottleneck"]}
    together = model.GPT(model.Config.load(checkpoint))
    for name, (module, options) in chosen.items():
        gpt = build(checkpoint, (module, options))
        shake(gpt, module)
        save_method(tmp_path / f"{name}.safetensors", gpt, name, options[name], fingerprint_of(checkpoint))
        module.install(together, options[name])
        together.load_state_dict({n: p for n, p in gpt.named_parameters() if p.requires_grad}, strict=False)
    together.load_state_dict(load(checkpoint).state_dict(), strict=False)
    together.tie()
    loaded = load(checkpoint, [tmp_path / f"{name}.safetensors" for name in chosen])
    idx = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(loaded(idx), together(idx), rtol=0, atol=0)
    for name in chosen:
        assert (loaded(idx) - load(checkpoint, tmp_path / f"{name}.safetensors")(idx)).abs().max() > 1e-2
    tokens = list(generate(loaded, idx[0].tolist(), 5, temperature=0))
    assert tokens[0] == loaded(idx[:1])[0, -1].argmax() and len(tokens) == 5
    with pytest.raises(ValueError, match="are a lora, and a network has room for one"):
        load(checkpoint, [tmp_path / "lora.safetensors"] * 2)


TOGETHER = ("lora-all-rslora", "dora", "adapter_v2", "adapter", "ia3", "bitfit", "norms", "bottleneck")


@pytest.mark.parametrize("second", TOGETHER)
@pytest.mark.parametrize("first", TOGETHER)
def test_two_methods_act_both_or_are_refused(checkpoint, first, second, tmp_path):
    """In whatever order they are named; what merges gives the same merged."""
    for name in {first, second}:
        module, options = METHODS[name]
        gpt = build(checkpoint, METHODS[name])
        shake(gpt, module)
        method = module.__name__.split(".")[-1]
        save_method(tmp_path / f"{name}.safetensors", gpt, method, options.get(method), fingerprint_of(checkpoint))
    idx = torch.randint(0, 97, (2, 9))
    try:
        gpt = load(checkpoint, [tmp_path / f"{first}.safetensors", tmp_path / f"{second}.safetensors"])
    except ValueError as e:
        assert re.search("has room for one|both hold|name its folder first", str(e))
        return
    both = gpt(idx)
    for name in (first, second):
        assert (both - load(checkpoint, tmp_path / f"{name}.safetensors")(idx)).abs().max() > 1e-3
    gpt.merge()
    torch.testing.assert_close(gpt(idx), both, rtol=1e-4, atol=2e-4)  # float32; without the refusals 0.1 and more


def test_layers_ranks_and_alphas_by_name_and_by_regular_expression(checkpoint):
    targets = r"v_proj, blocks\.[12]\.mlp\.(up|down)_proj:4, blocks.0.attn.q_proj:2:3.5e-2"
    gpt = build(checkpoint, (lora, dict(lora=lora.LoRA(targets=targets))))
    found = {
        name: (len(m.deltas["lora"].A), m.deltas["lora"].scale)
        for name, m in gpt.named_modules()
        if isinstance(m, model.Linear) and "lora" in m.deltas
    }
    expected = {f"blocks.{i}.attn.v_proj": (8, 2.0) for i in range(3)}
    expected |= {f"blocks.{i}.mlp.{part}_proj": (4, 4.0) for i in (1, 2) for part in ("up", "down")}
    assert found == expected | {"blocks.0.attn.q_proj": (2, 0.0175)}


def test_doras_row_of_zeros_stays_one():
    gpt = lora.GPT(lora.Config(**LLAMA, lora=lora.LoRA(r=3, dora=True)))
    base = model.GPT(model.Config(**LLAMA))
    with torch.no_grad():
        gpt.blocks[0].attn.v_proj.weight[3] = 0
    base.load_state_dict({n: t for n, t in gpt.state_dict().items() if ".deltas." not in n})
    idx = torch.arange(9)[None]
    torch.testing.assert_close(gpt(idx), base(idx))
    gpt(idx).sum().backward()
    assert all(p.grad.isfinite().all() for p in gpt.parameters() if p.grad is not None)
    gpt.merge()
    torch.testing.assert_close(gpt(idx), base(idx))
