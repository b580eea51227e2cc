"""The contract that every method keeps. A new method is one row of METHODS."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import FAMILIES, ROOT, decoded
from safetensors import safe_open

from lit_model import GPT, Config, load
from lit_model.load import METHODS as NAMES
from lit_model.load import (
    empty_network,
    initialize,
    is_base,
    load_base,
    method_header,
    method_module,
    method_options,
    save_method,
)
from lit_model.merge import Loss
from lit_model.methods import lora, prefix, prompt
from lit_model.model import CausalSelfAttention, Linear
from lit_model.packing import Example, pack
from lit_model.weights.folder import Folder, save_folder

ALL = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"
LLAMA_ALL = f"{ALL},gate_proj"


class Row(NamedTuple):
    options: dict[str, Any]  # small ones
    counts: list[tuple[dict[str, Any], int]] = []  # options -> how many numbers of LLaMA-7B are trained
    merges: bool = True
    starts_as: str = "exactly the base"  # or nearly, or elsewhere
    unfreezes: str = "$^"  # regular expression of the base's tensors that it trains


METHODS = {  # a name in load.METHODS, and which of its kinds
    "adapter": Row(dict(prompt_length=3, start_layer=1), [({}, 1_229_760)], merges=False),
    "adapter-linear-gate": Row(dict(prompt_length=3, start_layer=0, gate="linear"), merges=False),
    "adapter_v2": Row(dict(prompt_length=3, start_layer=1), [({}, 4_279_744)], unfreezes="norm"),
    "bottleneck": Row(
        dict(size=5),
        [({}, 33_820_672), (dict(size=8), 4_456_960), (dict(size=256), 134_496_256)],
        merges=False,
    ),
    "bottleneck-mlp-norms": Row(
        dict(size=5, where="mlp", norms=True),
        [(dict(norms=True), 33_820_672 + 262_144)],
        merges=False,
        unfreezes="norm_[12]",
    ),
    "dora": Row(dict(r=3, targets=ALL), [({}, 4_456_448), (dict(r=16, targets=LLAMA_ALL), 41_336_832)]),
    "full": Row({}, [({}, 6_738_415_616)], unfreezes="."),
    "ia3": Row({}, [({}, 614_400)]),
    "lora": Row(
        dict(r=3),
        [
            ({}, 4_194_304),
            (dict(r=16), 8_388_608),
            (dict(targets=LLAMA_ALL), 19_988_480),
            (dict(r=16, targets=LLAMA_ALL), 39_976_960),
            (dict(r=64, targets=LLAMA_ALL), 159_907_840),
        ],
    ),
    "lora-all-rslora": Row(dict(r=2, rslora=True, targets=f"{ALL},lm_head")),
    "pissa": Row(dict(r=3, targets=ALL), [({}, 4_194_304)], starts_as="nearly the base"),
    "pissa-olora": Row(dict(r=3, init="olora", rslora=True), starts_as="nearly the base"),
    "prefix": Row(
        dict(length=5),
        [({}, 2_621_440), (dict(length=20), 5_242_880), (dict(length=50), 13_107_200)],
        merges=False,
        starts_as="something else",  # virtual positions take their share of attention
    ),
    "prefix-mlp": Row(
        dict(length=5, mlp=7), [(dict(mlp=512), 136_618_496)], merges=False, starts_as="something else"
    ),
    "prompt": Row(
        dict(length=4), [({}, 81_920), (dict(length=100), 409_600)], merges=False, starts_as="something else"
    ),
    "selective-head": Row(dict(what="head"), [(dict(what="head"), 131_072_000)], unfreezes="^lm_head"),
    "selective-last-block": Row(
        dict(what="last_blocks", n=1),
        [(dict(what="last_blocks", n=1), 333_459_456)],
        unfreezes=r"^blocks\.2\.|^norm_f|^lm_head",
    ),
    "selective-bitfit": Row(dict(what="bitfit"), [(dict(what="bitfit"), 1_359_872)], unfreezes=r"\.bias$"),
    "selective-norms": Row(dict(what="norms"), [(dict(what="norms"), 266_240)], unfreezes="norm"),
    "selective-regex": Row(dict(what="regex", regex=r"blocks\.1\.attn.*weight"), unfreezes=r"blocks\.1\.attn.*weight"),
}  # fmt: skip


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


def settings(name: str, options: dict[str, Any] | None = None) -> tuple[str, Any]:
    """(name in load.METHODS, its options) of a row, or of its method with other options."""
    kind = name.split("-")[0]
    return kind, method_options(kind, **METHODS[name].options if options is None else options)


def build(checkpoint: Path, name: str, options: dict[str, Any] | None = None, **base: Any) -> GPT:
    """The method's network as the scripts build it: on the meta device, then the base is loaded.

    base: dtype, device and quantize of `load_base`.
    """
    folder, (kind, options) = Folder(checkpoint), settings(name, options)
    gpt = empty_network(folder)
    with torch.device("meta"):
        method_module(kind).install(gpt, options)
    load_base(gpt, folder, **dict(dtype=torch.float32) | base)
    if kind == "pissa":
        method_module(kind).init_from_base(gpt, options)
    return gpt


def shake(gpt: GPT) -> GPT:
    """Sets what is trained, gates and B included, away from its initial value."""
    with torch.no_grad():
        for p in trained(gpt).values():
            p.add_(0.1 * torch.randn_like(p))
    return gpt


def trained(gpt: GPT) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in gpt.named_parameters() if p.requires_grad}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest."""
    difference, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= tolerance * largest, f"{difference:.1e} of {largest:.1e}"


def save(path: Path, gpt: GPT, name: str, checkpoint: Path, options: dict[str, Any] | None = None) -> Path:
    save_method(path, gpt, *settings(name, options), Folder(checkpoint).identity)
    return path


# ------------------------------------------------------------------------------------------------- one after the other


def test_adds_keys_and_renames_none(checkpoint, method):
    base = load(checkpoint).state_dict()
    gpt = build(checkpoint, method)
    keys = gpt.state_dict()
    assert base.keys() <= keys.keys()
    assert all(keys[name].shape == t.shape for name, t in base.items())
    added = keys.keys() - base.keys()
    assert not any(is_base(name) for name in added)  # they say whose they are
    of_base = [name for name in base if re.search(METHODS[method].unfreezes, name)]
    expected = {*of_base, *added} - ({"lm_head.weight"} if gpt.config.tie else set())
    assert trained(gpt).keys() == expected  # what is added is trained by birth, and of the base what it un-freezes


def test_starts_as_the_base_model(checkpoint, method):
    idx = torch.randint(0, 97, (2, 9))
    got, expected, start = build(checkpoint, method)(idx), load(checkpoint)(idx), METHODS[method].starts_as
    if start == "something else":
        assert (got - expected).abs().max() > 1e-2
    else:
        atol = 1e-5 if start == "nearly the base" else 0
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name, options, expected", [(name, *c) for name, row in METHODS.items() for c in row.counts])
def test_counts_what_the_paper_counts(name, options, expected):
    kind, options = settings(name, options)
    with torch.device("meta"):
        gpt = GPT(Config.from_name("llama-7b")).requires_grad_(False)
        method_module(kind).install(gpt, options)
    n = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    print(f"\n{options or kind}: {n:,} of llama-7b are trained")
    assert n == expected


def test_moves_every_trainable_and_nothing_else(checkpoint, method):
    """Also after evaluation passes, which must leave nothing behind that training would then use."""
    gpt = build(checkpoint, method)
    before = {name: t.clone() for name, t in gpt.state_dict().items()}
    optimizer = torch.optim.AdamW(trained(gpt).values(), lr=1e-2, weight_decay=0)
    example = Example(torch.randint(0, 97, (12,)).int().numpy(), first_target=1)
    ((idx, packed),) = pack([example], 100, gpt.n_virtual_tokens, gpt.n_virtual_keys)
    moved = set()
    for _ in range(3):  # a zero gate or B hides its partner's gradient in the first step
        with torch.no_grad():
            gpt.eval()(idx[None])
        gpt.train()(idx, packed).backward()
        moved |= {name for name, p in gpt.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == trained(gpt).keys()
    after = gpt.state_dict()
    tied = {"lm_head.weight"} if gpt.config.tie and "wte.weight" in moved else set()
    for name, t in before.items():
        if name in moved | tied:
            some_rows_only = name in ("wte.weight", "wpe.weight")  # of an embedding, those that occur in the text
            kept = (after[name] == t).float().mean()  # of a matrix, a step or two may take a number back
            assert kept < 1 if some_rows_only else kept < 1e-3, name
        else:
            assert torch.equal(after[name], t), name


def test_blocks_recomputed_and_in_tiles_give_the_same_gradients(checkpoint, method, monkeypatch):
    monkeypatch.setattr("lit_model.recompute.TILE", 7)
    gpt, found = shake(build(checkpoint, method)).eval(), []
    example = Example(torch.randint(0, 97, (30,)).int().numpy(), first_target=5)
    ((idx, packed),) = pack([example], 100, gpt.n_virtual_tokens, gpt.n_virtual_keys)
    for gpt.recompute, is_tiled in ((0, False), (2, False), (2, True), (0, True)):
        for block in gpt.blocks:
            block.is_tiled = is_tiled
        loss = gpt(idx, packed)
        grads = torch.autograd.grad(loss, trained(gpt).values())
        found.append(torch.cat([loss.detach()[None], *(grad.flatten() for grad in grads)]))
    for other in found[1:]:
        close(other, found[0])


def test_trained_parameters_are_float32_and_move_under_a_bfloat16_base(checkpoint, method):
    gpt = build(checkpoint, method, dtype=torch.bfloat16)
    assert {p.dtype for p in gpt.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in gpt.parameters() if not p.requires_grad} <= {torch.bfloat16}
    assert gpt(torch.randint(0, 97, (1, 5))).dtype == torch.bfloat16
    params = list(trained(shake(gpt)).values())
    before = [p.clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-5, weight_decay=0)
    gpt(torch.randint(0, 97, (1, 5))).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before))


def test_survives_save_and_load_bit_for_bit(checkpoint, method, tmp_path):
    gpt = shake(build(checkpoint, method))
    save(tmp_path / "lit_method.safetensors", gpt, method, checkpoint)
    loaded = load(checkpoint, tmp_path)
    kept = gpt.state_dict()
    if method != "prefix-mlp" and not method.startswith("pissa"):  # whose files hold what a plain one would
        for (name, a), (_, b) in zip(kept.items(), loaded.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
    idx = torch.randint(0, 97, (2, 9))
    expected = gpt.eval()(idx)
    assert not loaded.training and not trained(loaded)
    torch.testing.assert_close(loaded(idx), expected, rtol=0, atol=0)
    assert (expected - load(checkpoint)(idx)).abs().max() > 1e-2


def test_cached_decoding_equals_one_pass(checkpoint, method, monkeypatch):
    gpt = shake(build(checkpoint, method)).eval().double()
    gpt.dtype, idx = torch.float64, torch.randint(0, 97, (10,))
    with torch.no_grad():
        expected = gpt(idx[None])[0, 5:]
    close(decoded(gpt, [idx], [6], monkeypatch)[0], expected, 1e-9)


def test_merged_equals_unmerged(checkpoint, method):
    """What does not merge stays, and acts as before."""
    gpt = shake(build(checkpoint, method))
    idx = torch.randint(0, 97, (2, 9))
    expected, before = gpt(idx), gpt.state_dict().keys()
    gpt.merge()
    after = gpt.state_dict().keys()
    if METHODS[method].merges:
        assert not any("deltas" in name and ".deltas.adapter." not in name for name in after)
    else:
        assert after == before
    close(gpt(idx), expected, 3e-5)


# ------------------------------------------------------------------------------------------------------------ the files


def test_every_method_is_a_row():
    assert {name.split("-")[0] for name in METHODS} == NAMES.keys()
    assert {name.split("-")[0] for name, row in METHODS.items() if row.counts} == NAMES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_options_a_module_and_install(name):
    """Each file defines one dataclass, its options, first in the file; full has none. And no network of its own."""
    module = method_module(name)
    classes = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.ClassDef)]
    decorators = {c.name: [ast.unparse(d).split("(")[0] for d in c.decorator_list] for c in classes}
    dataclasses = [c for c, names in decorators.items() if "dataclass" in names]
    assert dataclasses == ([NAMES[name]] if NAMES[name] else [])
    assert dataclasses == [c.name for c in classes][:1]
    for c in classes:
        assert not issubclass(getattr(module, c.name), (GPT, Config, Linear, CausalSelfAttention))
    assert callable(module.install)


def test_every_file_in_methods_is_a_method():
    files = {path.stem for path in (ROOT / "lit_model/methods").glob("*.py")}
    assert files - {"__init__", "mixed", "side_by_side", "tokens"} == NAMES.keys()


@pytest.fixture
def filled_with_nan():
    """What torch.empty leaves."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_install_reads_no_value_and_initialises_what_it_adds(family, method, filled_with_nan):
    """On the meta device it makes no tensor elsewhere; once the base is there, it leaves what it leaves on a CPU."""
    kind, options = settings(method)
    networks = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            gpt = GPT(Config(**family)).requires_grad_(False)
            method_module(kind).install(gpt, options)
        assert {p.device.type for p in gpt.parameters()} == {device}
        networks.append(gpt)
    base = {name: t for name, t in networks[0].state_dict().items() if is_base(name)}
    networks[1].load_state_dict(base, strict=False, assign=True)
    networks[1].tie()
    initialize(networks[1], "cpu")
    on_cpu, on_meta = ([(name, p.shape, p.requires_grad) for name, p in gpt.named_parameters()] for gpt in networks)
    assert on_cpu == on_meta
    for ours, theirs in zip(*(gpt.parameters() for gpt in networks)):
        assert ours.isfinite().all() and theirs.isfinite().all()
        assert ours.std(correction=0).item() == pytest.approx(theirs.std(correction=0).item(), rel=0.5)


def test_only_what_is_used_is_imported(tmp_path):
    """No method and no converter by the library; by loading a LoRA, that method alone."""
    base, gpt = tmp_path / "base", GPT(Config(**FAMILIES["llama"]))
    save_folder(base, gpt.config, gpt.state_dict(), {})
    save(tmp_path / "m.safetensors", build(base, "lora"), "lora", base)
    show = "print(*sys.modules, flush=True)"
    code = f"import sys, lit_model; {show}; lit_model.load('base', 'm.safetensors'); {show}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    for line, methods in zip(done.stdout.splitlines(), (set(), {"lora"}), strict=True):
        modules = {*line.split()}
        assert "lit_model.model" in modules
        assert {m.removeprefix("lit_model.methods.") for m in modules if m.startswith("lit_model.methods.")} == methods
        assert not {"transformers", "gguf", "peft", "lit_model.weights.gguf"} & modules


def test_a_method_file_holds_only_what_is_trained(checkpoint, tmp_path):
    gpt = build(checkpoint, "lora", dict(r=3, alpha=32))
    path = save(tmp_path / "m.safetensors", gpt, "lora", checkpoint, dict(r=3, alpha=32))
    with safe_open(path, "pt") as file:
        assert {*file.keys()} == trained(gpt).keys()
    header = method_header(path)
    assert (header["method"], header["options"]["alpha"]) == ("lora", 32)
    # rank and alpha come from the file: nobody types them again, and generation cannot use another alpha
    assert load(checkpoint, path).blocks[0].attn.q_proj.deltas["lora"].scale == 32 / 3


@pytest.mark.parametrize("name", ["pissa", "pissa-olora"])
def test_pissa_is_saved_as_a_plain_lora_of_twice_the_rank(checkpoint, name, tmp_path):
    gpt = shake(build(checkpoint, name))
    path = save(tmp_path / "m.safetensors", gpt, name, checkpoint)
    header, options = method_header(path), settings(name)[1]
    stated = lora.LoRA(**header["options"])
    assert header["method"] == "lora" and stated.r == 2 * options.r and stated.targets == options.targets
    loaded = load(checkpoint, path)
    delta = loaded.blocks[0].attn.q_proj.deltas["lora"]
    assert type(delta) is lora.LoRADelta and delta.A.shape == (2 * options.r, 64)
    idx = torch.randint(0, 97, (2, 9))
    torch.testing.assert_close(loaded(idx), gpt.eval()(idx), rtol=1e-5, atol=1e-5)


def test_merge_reports_what_bfloat16_loses(checkpoint):
    errors = []
    for size in (1e-1, 1e-3):
        gpt = build(checkpoint, "lora")
        base = {name: t.clone() for name, t in gpt.state_dict().items()}
        for p in trained(gpt).values():
            p.data = torch.randn_like(p) * size
        gpt.merge()
        exact = gpt.state_dict()
        for dtype in (torch.bfloat16, torch.float32):
            loss = Loss()
            for name, t in exact.items():
                loss.add(t, t.to(dtype), base[name])
            errors.append(loss.share)
    assert errors[1] == errors[3] == 0
    assert 0 < errors[0] < 0.5 < errors[2]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("lora", dict(targets="q_proj,qkv"), "no layer is called qkv; there are down_proj, gate_proj, k_proj"),
        ("lora", dict(targets=""), "lora.targets: no layer is called nothing"),
        ("lora", dict(targets="q_proj:4"), "no layer is called q_proj:4"),  # one rank for all
        ("lora", dict(targets="q_proj,blocks.["), r"no layer is called blocks.\["),
        ("lora", dict(r=0), "lora.r is 0"),
        ("lora", dict(lr_ratio=0), "lora.lr_ratio is 0"),
        ("dora", dict(r=0), "dora.r is 0"),
        ("pissa", dict(alpha=0), "pissa.alpha is 0"),
        ("adapter", dict(start_layer=3), "the model has layers 0 to 2"),
        ("adapter", dict(prompt_length=0), "adapter.prompt_length is 0"),
        ("adapter_v2", dict(start_layer=-1), "the model has layers 0 to 2"),
        ("bottleneck", dict(size=0), "bottleneck.size is 0"),
        ("prefix", dict(length=0), "prefix.length is 0"),
        ("prompt", dict(length=0), "prompt.length is 0"),
        ("selective", dict(n=0), "selective.n is 0; it must be above 0"),
        ("selective", dict(what="regex", regex="qkv"), "finds no parameter; there are blocks.0.attn.k"),
        ("selective", dict(what="regex"), "finds no parameter"),
        ("selective", dict(what="regex", regex="("), r"selective.regex '\(' finds no parameter"),
    ],
)
def test_senseless_options_are_refused_in_one_line(name, options, says):
    with torch.device("meta"):
        gpt = GPT(Config(**FAMILIES["llama"]))
    with pytest.raises(ValueError, match=says):
        method_module(name).install(gpt, method_options(name, **options))


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_positions_that_fill_the_context_are_refused(name):
    with torch.device("meta"):
        gpt = GPT(Config(**FAMILIES["llama"]))
        method_module(name).install(gpt, method_options(name, length=128))
    with pytest.raises(ValueError, match="the model's context of 128 has room for 0"):
        gpt.check_length(1)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_a_rank_that_adds_nothing_is_refused(name):
    with torch.device("meta"):
        gpt = GPT(Config(**FAMILIES["llama"]))
        method_module(name).install(gpt, method_options(name, r=33))  # of v_proj, 32 x 64
    with pytest.raises(ValueError, match="lora.r is 33, but blocks.0.attn.v_proj is a matrix of rank 32 at most"):
        lora.validate_rank(gpt)


def test_another_base_is_refused(checkpoint, tmp_path):
    save_method(tmp_path / "lit_method.safetensors", build(checkpoint, "lora"), *settings("lora"), "another identity")
    with pytest.raises(ValueError, match="trained on another base"):
        load(checkpoint, tmp_path)


# ------------------------------------------------------------------------------------------------------------- together


def test_dropout_acts_in_training_only(checkpoint):
    gpt = shake(build(checkpoint, "lora", dict(dropout=0.5)))
    idx = torch.randint(0, 97, (1, 9))
    assert not torch.equal(gpt.train()(idx), gpt(idx))
    assert torch.equal(gpt.eval()(idx), gpt(idx))


@pytest.mark.parametrize("module", [prefix, prompt])
def test_a_prefix_and_a_prompt_made_of_a_text_act_as_that_text(checkpoint, module):
    text, idx = [5, 17, 3], torch.randint(0, 97, (1, 9))
    gpt = build(checkpoint, module.__name__.split(".")[-1], dict(length=5))
    module.init_from_base(gpt, text)
    repeated = torch.tensor([text + text[:2]])
    expected = load(checkpoint)(torch.cat((repeated, idx), dim=1))[:, 5:]
    torch.testing.assert_close(gpt(idx), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dora"])
def test_doras_row_of_zeros_stays_one(name):
    gpt, base = GPT(Config(**FAMILIES["llama"])), GPT(Config(**FAMILIES["llama"]))
    with torch.no_grad():
        gpt.blocks[0].attn.v_proj.weight[3] = 0
    base.load_state_dict(gpt.state_dict())
    method_module(name).install(gpt.requires_grad_(False), method_options(name, r=3))
    idx = torch.arange(9)[None]
    torch.testing.assert_close(gpt(idx), base(idx))
    gpt(idx).sum().backward()
    assert all(p.grad.isfinite().all() for p in trained(gpt).values())
    gpt.merge()
    torch.testing.assert_close(gpt(idx), base(idx))
