"""The same numbers as transformers and peft, over a folder as transformers saves it. Run with -s to see them."""

import functools
import re

import pytest
import torch
from conftest import randomize
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, logging

from lit_model import GPT, generate, load, model
from lit_model.load import empty_network, load_base, method_module, method_options, save_method
from lit_model.methods import pissa
from lit_model.weights.folder import Folder

logging.disable_progress_bar()
SIZES = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
LLAMA = dict(**SIZES, intermediate_size=112, max_position_embeddings=128, bos_token_id=0, eos_token_id=96)
HF = {
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, rope_theta=5e5)),
    "llama-mha-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama-one-kv-head": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=1, head_dim=24)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=96)
    ),
}


def make(name: str, tmp_path):
    """(the transformers model, its folder)"""
    hf = randomize(HF[name](), std=0.1).eval()
    hf.save_pretrained(tmp_path / "hf")
    return hf, tmp_path / "hf"


def difference(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    d = (ours - theirs).abs().max().item()
    print(f"{what}: max |difference| {d:.1e}, logits up to {theirs.abs().max():.1f}")
    return d


@pytest.mark.parametrize("name", HF)
def test_logits_equal_transformers(name, tmp_path):
    hf, checkpoint = make(name, tmp_path)
    idx = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        assert difference(name, load(checkpoint)(idx), hf(idx).logits) <= 1e-5


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_greedy_decoding_equals_transformers_token_by_token(name, tmp_path):
    hf, checkpoint = make(name, tmp_path)
    idx = torch.randint(0, 97, (1, 12))
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(idx))
    expected = hf.generate(idx, max_new_tokens=50, **options)[0, 12:]
    got = list(generate(load(checkpoint), idx[0].tolist(), max_new_tokens=50, temperature=0))
    assert got == expected.tolist()


def built(checkpoint, name: str, **options) -> GPT:
    """Ours with the base weights and a method, ready for the method's own to be set."""
    folder = Folder(checkpoint)
    gpt = empty_network(folder)
    with torch.device("meta"):
        method_module(name).install(gpt, method_options(name, **options))
    load_base(gpt, folder, torch.float32)
    return gpt.eval()


def same(what: str, gpt: GPT, peft, checkpoint) -> None:
    """The logits of both in float64, which are not the base's."""
    idx = torch.randint(0, 97, (2, 20))
    gpt.double().dtype = torch.float64
    with torch.no_grad():
        ours, theirs = gpt(idx), peft.double()(idx).logits[:, -20:]
        # of LLaMA's norms and positions transformers computes some in float32 even so
        assert difference(what, ours, theirs) <= 1e-6 * theirs.abs().max()
        assert (ours - load(checkpoint)(idx)).abs().max() > 1e-2  # the method does something


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_lora_equals_peft(name, kind, tmp_path):
    hf, checkpoint = make(name, tmp_path)
    ours = {"q_proj": "q_proj", "v_proj": "v_proj", "down_proj": "down_proj"}
    theirs = ours if name != "gpt2" else {"down_proj": "mlp.c_proj"}  # peft cannot target GPT-2's q and v apart
    peft = get_peft_model(
        hf,
        LoraConfig(r=4, lora_alpha=16, target_modules=list(theirs.values()), use_rslora=kind == "rslora",
                   use_dora=kind == "dora", init_lora_weights=False, fan_in_fan_out=name == "gpt2"),
    ).eval()  # fmt: skip
    method = "dora" if kind == "dora" else "lora"
    gpt = built(checkpoint, method, r=4, alpha=16, targets=",".join(theirs), rslora=kind == "rslora")
    weights = {k: v for k, v in peft.state_dict().items() if "lora_" in k}
    names = {v: k for k, v in theirs.items()}
    with torch.no_grad():
        for i, block in enumerate(gpt.blocks):
            for key, t in weights.items():
                if f".{i}." in key:
                    target = next(names[n] for n in names if n in key)
                    linear = getattr(block.attn if target in ("q_proj", "v_proj") else block.mlp, target)
                    delta = linear.deltas[method]
                    if "magnitude" in key:
                        t.mul_(1 + 0.2 * torch.randn_like(t))
                        delta.magnitude.copy_(t.flatten() - linear.weight.norm(dim=-1))
                    else:
                        (delta.A if "lora_A" in key else delta.B).copy_(t)
    same(f"{name} {kind}", gpt, peft, checkpoint)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_equals_peft(init, tmp_path):
    """At the start it is the base model, A and B are peft's, and so is a step away from there, also in its file."""
    hf, checkpoint = make("llama-gqa", tmp_path)
    options = pissa.PiSSA(r=4, alpha=16, targets="q_proj,down_proj", init=init)
    gpt = built(checkpoint, "pissa", **vars(options))
    pissa.init_from_base(gpt, options)
    idx = torch.randint(0, 97, (2, 20))
    torch.testing.assert_close(gpt(idx), load(checkpoint)(idx), rtol=1e-5, atol=1e-5)
    peft = get_peft_model(
        hf, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    ).eval()
    with torch.no_grad():
        for i, block in enumerate(gpt.blocks):
            for part, linear in (("self_attn.q_proj", block.attn.q_proj), ("mlp.down_proj", block.mlp.down_proj)):
                delta, prefix = linear.deltas["pissa"], f"base_model.model.model.layers.{i}.{part}.lora_"
                A, B = (peft.get_parameter(f"{prefix}{letter}.default.weight") for letter in "AB")
                torch.testing.assert_close(delta.B @ delta.A, B @ A, rtol=1e-4, atol=1e-5)
                delta.A.copy_(A)  # the signs of singular vectors are free
                delta.B.copy_(B)
                delta.A0, delta.B0 = A.clone(), B.clone()
                for ours, theirs in ((delta.A, A), (delta.B, B)):
                    ours.add_(0.1 * torch.randn_like(ours))
                    theirs.copy_(ours)
    save_method(tmp_path / "m.safetensors", gpt, "pissa", options, Folder(checkpoint).identity)
    torch.testing.assert_close(load(checkpoint, tmp_path / "m.safetensors")(idx), gpt(idx), rtol=1e-5, atol=1e-5)
    same(init, gpt, peft, checkpoint)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_ia3_equals_peft(name, tmp_path):
    hf, checkpoint = make(name, tmp_path)
    targets = ["c_attn", "mlp.c_proj"] if name == "gpt2" else ["k_proj", "v_proj", "down_proj"]
    peft = get_peft_model(
        hf, IA3Config(target_modules=targets, feedforward_modules=targets[-1:], fan_in_fan_out=name == "gpt2")
    ).eval()
    gpt = built(checkpoint, "ia3")
    with torch.no_grad():
        for i, block in enumerate(gpt.blocks):
            layer = peft.base_model.model.transformer.h[i] if name == "gpt2" else peft.base_model.model.model.layers[i]
            scales = [1 + 0.3 * torch.randn(n) for n in (block.attn.k_proj.out_features,) * 2 + (gpt.config.n_hidden,)]
            if name == "gpt2":  # which scales q, k and v together
                theirs = [(layer.attn.c_attn, torch.cat((torch.ones(64), *scales[:2]))), (layer.mlp.c_proj, scales[2])]
                inside = block.mlp.down_proj
            else:
                theirs = zip((layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.down_proj), scales)
                inside = block.mlp.up_proj
            for module, t in theirs:
                module.ia3_l["default"].copy_(t.view_as(module.ia3_l["default"]))
            for linear, t in zip((block.attn.k_proj, block.attn.v_proj, inside), scales):
                linear.deltas["ia3"].scale.copy_(t)
    same(f"{name} (IA)^3", gpt, peft, checkpoint)


@pytest.mark.parametrize("name, mlp", [("llama-gqa", 0), ("gpt2", 0), ("llama-mha-tied", 7), ("gpt2", 7)])
def test_prefix_equals_peft(name, mlp, tmp_path):
    hf, checkpoint = make(name, tmp_path)
    peft = get_peft_model(
        hf,
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=mlp > 0,
                           encoder_hidden_size=mlp or None),
    ).eval()  # fmt: skip
    gpt = built(checkpoint, "prefix", length=5, mlp=mlp)
    encoder, ours, c = peft.prompt_encoder["default"], gpt.virtual_keys["prefix"], gpt.config
    with torch.no_grad():
        if mlp:
            ours.embedding.copy_(encoder.embedding.weight)
            ours.mlp.load_state_dict(encoder.transform.state_dict())
        else:
            kv = encoder.embedding.weight.view(5, c.n_layer, 2, c.n_kv_head, c.head_size)
            ours.kv.copy_(kv.permute(1, 2, 0, 3, 4))
    same(f"{name} prefix, mlp {mlp}", gpt, peft, checkpoint)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_prompt_equals_peft(name, tmp_path):
    hf, checkpoint = make(name, tmp_path)
    peft = get_peft_model(hf, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    gpt = built(checkpoint, "prompt", length=5)
    with torch.no_grad():
        gpt.virtual_tokens["prompt"].embedding.copy_(peft.prompt_encoder["default"].embedding.weight)
    same(f"{name} prompt", gpt, peft, checkpoint)


def test_norms_equal_peft(tmp_path):
    hf, checkpoint = make("llama-gqa", tmp_path)
    norms = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2", "norm": "norm_f"}
    peft = get_peft_model(hf, LNTuningConfig(task_type="CAUSAL_LM", target_modules=list(norms))).eval()
    gpt = built(checkpoint, "selective", what="norms")
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
                layer, norm = re.search(r"(?:layers\.(\d+)\.)?(\w*norm)\.", name).groups()
                ours = gpt.norm_f if layer is None else getattr(gpt.blocks[int(layer)], norms[norm])
                ours.weight.copy_(p)
    same("norms", gpt, peft, checkpoint)


def naive_linear(gpt, change) -> None:
    """Replaces what every linear layer of the blocks computes by change(name, linear, x), from weights alone."""
    for name, m in gpt.named_modules():
        if isinstance(m, model.Linear):
            m.forward = functools.partial(lambda name, m, x: change(name, m, x), name, m)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_bottleneck_adapter_v2_and_bitfit_are_their_equations(name, tmp_path):
    _, checkpoint = make(name, tmp_path)
    idx = torch.randint(0, 97, (2, 20))

    def plain(m, x):
        return x @ m.weight.T + (0 if m.bias is None else m.bias)

    def with_bottleneck(name, m, x):
        y = plain(m, x)
        if not name.endswith(("o_proj", "down_proj")):
            return y
        d = m.deltas["bottleneck"]
        h = y @ d.down.T + d.down_bias
        return y + 0.5 * h * (1 + torch.erf(h / 2**0.5)) @ d.up.T + d.up_bias

    def with_scale_and_bias(name, m, x):
        d = m.deltas["adapter_v2"]
        return d.scale * plain(m, x) + d.bias

    def with_bias(name, m, x):
        return plain(m, x) + (m.deltas["bitfit"].bias if "bitfit" in m.deltas else 0)

    for method, options, equation in (
        ("bottleneck", dict(size=7), with_bottleneck),
        ("adapter_v2", dict(prompt_length=3, start_layer=1), with_scale_and_bias),
        ("selective", dict(what="bitfit"), with_bias),
    ):
        gpt = built(checkpoint, method, **options)
        gpt.double().dtype = torch.float64
        with torch.no_grad():
            for p in gpt.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
            got = gpt(idx)
            naive_linear(gpt, equation)
            assert difference(f"{name} {method}, written out", got, gpt(idx)) <= 1e-12
            assert (got - load(checkpoint)(idx)).abs().max() > 1e-2


def test_adapter_equals_peft_with_one_gate_a_layer(tmp_path):
    hf, checkpoint = make("llama-gqa", tmp_path)
    peft = get_peft_model(hf, AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")).eval()
    gpt = built(checkpoint, "adapter", prompt_length=5, start_layer=1, gate="linear")
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "adaption_gate" in name:
                p.fill_(0.37)
            if "adaption_prompt" in name:
                layer = int(name.split("layers.")[1].split(".")[0])
                gpt.blocks[layer].attn.deltas["adapter"].prompt.copy_(p[0])
                gpt.blocks[layer].attn.deltas["adapter"].gate.fill_(0.37)
    same("LLaMA-Adapter", gpt, peft, checkpoint)


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(tmp_path):
    hf, checkpoint = make("llama-gqa", tmp_path)
    idx = torch.randint(0, 97, (1, 40))
    with torch.no_grad():
        exact = hf(idx).logits
        ours = (load(checkpoint, dtype=torch.bfloat16)(idx).float() - exact).norm() / exact.norm()
        theirs = (hf.bfloat16()(idx).logits.float() - exact).norm() / exact.norm()
    assert ours < 1.5 * theirs
