"""Every family against transformers, through the commands a user types: logits, decoding, both versions of config.json,
and the parameter counts of the presets. Run with -s to see the differences."""

import json

import pytest
import torch
import transformers
from conftest import randomize
from transformers import AutoModelForCausalLM

from lit_model import generate, load, model
from lit_model.weights.folder import convert_hf, hf_config
from lit_model.families import PRESETS

SIZES = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=5, num_attention_heads=4,
    max_position_embeddings=128, bos_token_id=0, eos_token_id=96, pad_token_id=None,
)  # fmt: skip
LLAMA_3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
FAMILIES = {
    "llama-3": ("Llama", dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama-3.1": ("Llama", dict(num_key_value_heads=2, rope_parameters=LLAMA_3)),
    "llama-3.2": ("Llama", dict(num_key_value_heads=1, rope_parameters=LLAMA_3, tie_word_embeddings=True, head_dim=24)),
    "mistral-window-7": ("Mistral", dict(num_key_value_heads=2, sliding_window=7)),
    "mistral-no-window": ("Mistral", dict(num_key_value_heads=1, sliding_window=None, head_dim=24)),
    "qwen2.5": ("Qwen2", dict(num_key_value_heads=2)),
    "qwen2.5-tied": ("Qwen2", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=24)),
    "qwen3-tied": ("Qwen3", dict(num_key_value_heads=1, head_dim=40, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(num_key_value_heads=2)),
}


def make(name: str, folder):
    """(the transformers model, its converted checkpoint folder)"""
    kind, more = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | more)
    hf = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), std=0.1).eval()
    hf.save_pretrained(folder / "hf")
    convert_hf(folder / "hf", folder / "lit")
    return hf, folder / "lit"


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_decoding_equal_transformers(name, tmp_path):
    """50 tokens are longer than the window of 7 and than the original context of 32."""
    hf, checkpoint = make(name, tmp_path)
    gpt, idx = load(checkpoint), torch.randint(0, 97, (2, 50))
    with torch.no_grad():
        expected = hf(idx).logits
    d = (gpt(idx) - expected).abs().max().item()
    flags = {k: v for k, v in vars(gpt.config).items() if k in FLAGS and v not in (None, False)}
    print(f"{name}: max |difference| {d:.1e}, logits up to {expected.abs().max():.1f}, {flags}")
    assert d <= 1e-5
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones(1, 12).long())
    expected = hf.generate(idx[:1, :12], max_new_tokens=40, **options)[0, 12:].tolist()
    assert list(generate(gpt, idx[0, :12].tolist(), 40, temperature=0)) == expected


FLAGS = ("rope_scaling", "window", "qkv_bias", "qk_norm", "no_rope_every", "tie")


@pytest.mark.parametrize("flag", ["rope_scaling", "window", "qkv_bias", "qk_norm", "no_rope_every"])
def test_each_flag_counts(flag, tmp_path):
    """Without it the logits are others: the test above would see that."""
    name = next(n for n in FAMILIES if n.startswith(FLAG_OF[flag]))
    _, checkpoint = make(name, tmp_path)
    gpt, idx = load(checkpoint), torch.randint(0, 97, (1, 50))
    before = gpt(idx)
    stated = json.loads((checkpoint / "lit_config.json").read_text())
    assert stated[flag]
    if flag in ("qkv_bias", "qk_norm"):  # there are tensors for it
        for block in gpt.blocks:
            if flag == "qkv_bias":
                block.attn.k_proj.bias.zero_(), block.attn.q_proj.bias.zero_()
            else:
                block.attn.q_norm = torch.nn.Identity()
    else:
        (checkpoint / "lit_config.json").write_text(json.dumps(stated | {flag: None}))
        gpt = load(checkpoint)
    assert (gpt(idx) - before).abs().max() > 1e-3


FLAG_OF = dict(rope_scaling="llama-3.1", window="mistral", qkv_bias="qwen2.5", qk_norm="qwen3", no_rope_every="smollm3")


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1", "mistral-window-7", "qwen3", "smollm3"])
def test_config_json_of_transformers_4_says_the_same(name, tmp_path):
    """There rope_theta stood by itself, the rest in rope_scaling."""
    _, checkpoint = make(name, tmp_path)
    path = tmp_path / "hf/config.json"
    stated = json.loads(path.read_text())
    rope = stated.pop("rope_parameters")
    stated |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=None if rope["rope_type"] == "default" else rope)
    path.write_text(json.dumps(stated))
    assert hf_config(path) == model.Config.load(checkpoint)
    if stated["rope_scaling"]:
        path.write_text(json.dumps(stated | {"rope_scaling": {**rope, "rope_type": "yarn"}}))
        with pytest.raises(ValueError, match="config.json: rope scaling of type 'yarn' is not supported"):
            hf_config(path)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("qwen2.5", dict(use_sliding_window=True), "use_sliding_window is True, which is not supported"),
        ("smollm3", dict(no_rope_layers=[1, 0, 0, 1, 1]), "not every n-th layer is without rope"),
        ("llama-3", dict(attention_bias=True), "attention_bias is True"),
        ("llama-3", dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        ("llama-3", dict(model_type="gemma"), "model_type is 'gemma'; known are gpt2, llama, mistral, qwen2, qwen3"),
        ("llama-3", dict(rms_norm_eps=None), "lacks rms_norm_eps"),
        (
            "llama-3",
            dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
            "its rope parameters are not one set",
        ),
        ("llama-3", dict(rope_parameters="linear"), "its rope parameters are not one set"),
        ("llama-3", dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
    ],
)
def test_what_is_not_known_is_named(name, change, says, tmp_path):
    make(name, tmp_path)
    path = tmp_path / "hf/config.json"
    stated = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))
    with pytest.raises(ValueError, match="config.json.*" + says.replace("(", r"\(")):
        hf_config(path)


COUNTS = {  # as their publishers state them
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-30b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384, "smollm3-3b": 3_075_098_624, "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        gpt = model.GPT(model.Config.from_name(name))
    assert sum(p.numel() for p in gpt.parameters()) == COUNTS[name]


def test_configs_written_before_there_were_these_flags_load(tmp_path):
    _, checkpoint = make("llama-3", tmp_path)
    stated = json.loads((checkpoint / "lit_config.json").read_text())
    new = ("rope_scaling", "no_rope_every", "window", "qkv_bias", "qk_norm", "bias", "head_bias")
    (checkpoint / "lit_config.json").write_text(json.dumps({k: v for k, v in stated.items() if k not in new}))
    assert model.Config.load(checkpoint) == hf_config(tmp_path / "hf/config.json")
