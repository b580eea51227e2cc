"""PEFT's folders, saved by peft itself, answer here as they do there. Run with -s to see the differences."""

import json

import pytest
import torch
from conftest import randomize
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from test_parity import built, difference, make
from transformers import AutoModelForCausalLM

from lit_model import load
from lit_model.load import method_options, read_method, save_method
from lit_model.weights.folder import Folder
from lit_model.weights.peft import write_peft

GPT2 = dict(fan_in_fan_out=True)
Q_V_DOWN = dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
FUSED = Q_V_DOWN | GPT2 | dict(target_modules=["c_attn", "mlp.c_proj"])
IA3 = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
LM = dict(task_type="CAUSAL_LM")
ALPHAS = {"down_proj": 5, "model.layers.2.self_attn.v_proj": 3}
CASES = {
    "lora": ("llama-gqa", LoraConfig(**Q_V_DOWN, **LM)),
    "rslora": ("llama-gqa", LoraConfig(**Q_V_DOWN, use_rslora=True)),
    "dora": ("llama-gqa", LoraConfig(**Q_V_DOWN, use_dora=True)),
    "ranks and alphas": (
        "llama-gqa",
        LoraConfig(
            **Q_V_DOWN,
            rank_pattern={"layers.1.self_attn.q_proj": 7},
            alpha_pattern=ALPHAS,
        ),
    ),
    "head": ("llama-gqa", LoraConfig(**Q_V_DOWN, modules_to_save=["lm_head"])),
    "tokens": ("llama-gqa", LoraConfig(**Q_V_DOWN, trainable_token_indices=[5, 3])),
    "tokens, tied": ("llama-mha-tied", LoraConfig(**Q_V_DOWN, trainable_token_indices={"embed_tokens": [5, 3]})),
    "gpt2 lora": ("gpt2", LoraConfig(**FUSED)),
    "gpt2 dora": ("gpt2", LoraConfig(**FUSED, use_dora=True)),
    "ia3": ("llama-gqa", IA3Config(**IA3)),
    "gpt2 ia3": ("gpt2", IA3Config(target_modules=["mlp.c_proj"], feedforward_modules=["mlp.c_proj"], **GPT2)),
    "prefix": ("llama-gqa", PrefixTuningConfig(num_virtual_tokens=5, **LM)),
    "gpt2 prefix": ("gpt2", PrefixTuningConfig(num_virtual_tokens=5, **LM)),
    "prompt": ("llama-gqa", PromptTuningConfig(num_virtual_tokens=5, **LM)),
    "gpt2 prompt": ("gpt2", PromptTuningConfig(num_virtual_tokens=5, **LM)),
    "norms": (
        "llama-gqa",
        LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"], **LM),
    ),
    "adaption prompt": ("llama-gqa", AdaptionPromptConfig(adapter_len=5, adapter_layers=2, **LM)),
}


@pytest.fixture
def saved(tmp_path):
    """A call makes (checkpoint folder, PEFT folder, peft's network) of a case, every trained number changed."""

    def make_case(name: str):
        family, config = CASES[name]
        hf, checkpoint = make(family, tmp_path)
        (checkpoint / "tokenizer.json").write_text(words(97))
        (checkpoint / "tokenizer_config.json").write_text('{"eos_token": "96"}')
        peft = get_peft_model(hf, config).eval()
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
        peft.save_pretrained(tmp_path / "peft")
        return checkpoint, tmp_path / "peft", peft

    return make_case


def words(n: int) -> str:
    """A tokenizer of n words, which are numbers."""
    model = dict(type="WordLevel", vocab={str(i): i for i in range(n)}, unk_token="0")
    return json.dumps(dict(version="1.0", added_tokens=[], model=model))


def same(what: str, checkpoint, folder, peft) -> None:
    idx = torch.randint(0, 97, (2, 20))
    with torch.no_grad():
        expected = peft(idx).logits[:, -20:]
        assert difference(what, load(checkpoint, folder)(idx), expected) <= 1e-5 * max(1, expected.abs().max())
        assert (expected - load(checkpoint)(idx)).abs().max() > 1e-2  # the method does something


@pytest.mark.parametrize("name", CASES)
def test_a_peft_folder_is_a_method(name, saved):
    same(name, *saved(name))


@pytest.mark.parametrize("prefix", ["", "base_model.model._orig_mod.model.", "_orig_mod.base_model.model.model."])
def test_names_with_other_prefixes_are_read(prefix, saved):
    checkpoint, folder, peft = saved("lora")
    file = folder / "adapter_model.safetensors"
    tensors = {name.replace("base_model.model.model.", prefix): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    same(prefix, checkpoint, folder, peft)


def test_what_is_not_understood_is_refused_by_its_name(saved):
    checkpoint, folder, _ = saved("lora")
    file, name = folder / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"
    save_file(load_file(file) | {name: torch.ones(2)}, file)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.lora_C.weight, which no method here"):
        load(checkpoint, folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"VERA"'))
    with pytest.raises(ValueError, match="adapter_config.json: its peft_type is 'VERA'; known are LORA"):
        load(checkpoint, folder)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if name != "adaption prompt"])
def test_a_method_is_a_peft_folder(name, exact, saved, tmp_path):
    """What was read is written, and peft answers with it as ours does."""
    checkpoint, folder, peft = saved(name)
    base = Folder(checkpoint)
    methods = [read_method(folder, base)]
    if "dora" in name and not exact:
        with pytest.raises(ValueError, match="a DoRA is read by peft alone"):
            write_peft(tmp_path / "out", methods, base, exact)
        return
    write_peft(tmp_path / "out", methods, base, exact)
    hf = AutoModelForCausalLM.from_pretrained(checkpoint)
    same(name, checkpoint, folder, PeftModel.from_pretrained(hf, tmp_path / "out").eval())
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()).get("lora_alpha", 1) > 0
    same(name, checkpoint, tmp_path / "out", peft)


OURS = {
    "q and v of gpt2": ("gpt2", "lora", dict(targets="q_proj,v_proj,o_proj")),
    "dora on k of gpt2": ("gpt2", "dora", dict(targets="k_proj")),
    "ia3 of gpt2": ("gpt2", "ia3", {}),
    "some layers": ("llama-gqa", "lora", dict(targets="blocks.[02].mlp.*,lm_head")),
    "norms": ("gpt2", "selective", dict(what="norms")),
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_trained_here_is_a_peft_folder(name, tmp_path):
    family, method, options = OURS[name]
    hf, checkpoint = make(family, tmp_path)
    gpt, base = built(checkpoint, method, **options), Folder(checkpoint)
    with torch.no_grad():
        for p in gpt.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    ours = tmp_path / "lit_method.safetensors"
    save_method(ours, gpt, method, method_options(method, **options), base.identity)
    write_peft(tmp_path / "out", [read_method(ours, base)], base, exact=True)
    same(name, checkpoint, ours, PeftModel.from_pretrained(hf, tmp_path / "out").eval())


@pytest.mark.parametrize(
    "method, options, reason",
    [
        ("adapter", {}, "peft cannot say adapter; merge it with --to hf, or serve it with --method_dir"),
        ("bottleneck", {}, "peft cannot say bottleneck; merge it with --to hf, or serve it with --method_dir"),
        ("selective", dict(what="head"), "peft cannot say a trained lm_head.weight"),
    ],
)
def test_what_peft_cannot_say_is_refused(method, options, reason, tmp_path):
    _, checkpoint = make("llama-gqa", tmp_path)
    gpt, base = randomize(built(checkpoint, method, **options)), Folder(checkpoint)
    save_method(tmp_path / "m.safetensors", gpt, method, method_options(method, **options), base.identity)
    with pytest.raises(ValueError, match=reason):
        write_peft(tmp_path / "out", [read_method(tmp_path / "m.safetensors", base)], base)
    assert not (tmp_path / "out").exists()
