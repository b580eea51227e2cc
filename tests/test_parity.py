"""The same numbers as transformers and peft, through the commands a user types: save a Hugging Face folder, convert it,
load it. Run with -s to see the differences."""

import pytest
import torch
from conftest import randomize
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_model import adapter, generate, load, lora
from lit_model.checkpoint import load_base
from lit_model.convert import convert_hf

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
    """(the transformers model, its converted checkpoint folder)"""
    hf = randomize(HF[name](), std=0.1).eval()
    hf.save_pretrained(tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "lit")
    return hf, tmp_path / "lit"


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


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_lora_equals_peft(name, rslora, tmp_path):
    hf, checkpoint = make(name, tmp_path)
    ours = {"q_proj": "q_proj", "v_proj": "v_proj", "down_proj": "down_proj"}
    theirs = ours if name != "gpt2" else {"down_proj": "mlp.c_proj"}  # peft cannot target GPT-2's q and v apart
    peft = get_peft_model(
        hf,
        LoraConfig(r=4, lora_alpha=16, target_modules=list(theirs.values()), use_rslora=rslora, init_lora_weights=False,
                   fan_in_fan_out=name == "gpt2"),
    ).eval()  # fmt: skip
    options = lora.LoRA(r=4, alpha=16, targets=",".join(theirs), rslora=rslora)
    gpt = lora.GPT(lora.Config.load(checkpoint, lora=options)).eval()
    load_base(gpt, checkpoint, torch.float32)
    weights = {k: v for k, v in peft.state_dict().items() if "lora_" in k}
    names = {v: k for k, v in theirs.items()}
    with torch.no_grad():
        for i, block in enumerate(gpt.blocks):
            for key, t in weights.items():
                if f".{i}." in key:
                    target = next(names[n] for n in names if n in key)
                    delta = getattr(block.attn if target in ("q_proj", "v_proj") else block.mlp, target).deltas["lora"]
                    (delta.A if "lora_A" in key else delta.B).copy_(t)
        idx = torch.randint(0, 97, (2, 20))
        assert difference(f"{name} LoRA rslora={rslora}", gpt(idx), peft(idx).logits) <= 1e-5
        assert (gpt(idx) - load(checkpoint)(idx)).abs().max() > 1e-2  # the correction does something


def test_adapter_equals_peft_with_one_gate_a_layer(tmp_path):
    hf, checkpoint = make("llama-gqa", tmp_path)
    peft = get_peft_model(hf, AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM")).eval()
    options = adapter.Adapter(prompt_length=5, start_layer=1, gate="linear")
    gpt = adapter.GPT(adapter.Config.load(checkpoint, adapter=options)).eval()
    load_base(gpt, checkpoint, torch.float32)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "adaption_gate" in name:
                p.fill_(0.37)
            if "adaption_prompt" in name:
                layer = int(name.split("layers.")[1].split(".")[0])
                gpt.blocks[layer].attn.deltas["adapter"].prompt.copy_(p[0])
                gpt.blocks[layer].attn.deltas["adapter"].gate.fill_(0.37)
        idx = torch.randint(0, 97, (2, 20))
        assert difference("LLaMA-Adapter", gpt(idx), peft(idx).logits) <= 1e-5
        assert (gpt(idx) - load(checkpoint)(idx)).abs().max() > 1e-2


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(tmp_path):
    hf, checkpoint = make("llama-gqa", tmp_path)
    idx = torch.randint(0, 97, (1, 40))
    with torch.no_grad():
        exact = hf(idx).logits
        ours = (load(checkpoint, dtype=torch.bfloat16)(idx).float() - exact).norm() / exact.norm()
        theirs = (hf.bfloat16()(idx).logits.float() - exact).norm() / exact.norm()
    assert ours < 1.5 * theirs
