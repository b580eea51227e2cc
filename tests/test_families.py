"""Every family against transformers: a folder as it was downloaded, in all its formats; merged, and opened there again;
config.json of both versions and back; parameter counts of the presets. Run with -s to see the differences."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import fail, randomize, save_tokenizer, say
from safetensors.torch import load_file, save_file
from test_convert import opened_by_transformers
from test_methods import build, save, shake
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune import full
from lit_model import GPT, Config, generate, load
from lit_model.families import PRESETS, read_config, write_config
from lit_model.load import method_header
from lit_model.merge import merge as merge_folder
from lit_model.rope import Rope
from lit_model.weights.folder import Folder, save_folder
from scripts import merge

transformers.logging.disable_progress_bar()
SIZES = dict(
    vocab_size=400, hidden_size=64, intermediate_size=112, num_hidden_layers=5, num_attention_heads=4,
    max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=None,
)  # fmt: skip
LLAMA_3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=500.0, factor=8.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.2,
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=900.0, factor=3.0)
LOCAL = dict(sliding_attention=dict(rope_type="default", rope_theta=500.0))
LONG = dict(
    rope_type="longrope", rope_theta=500.0, partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.3, 1.5, 1.6, 2.0],
    long_factor=[1.2, 1.9, 3.0, 5.0, 7.0, 9.0],
)  # fmt: skip
FAMILIES = {
    "llama": ("Llama", dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama-3.1": ("Llama", dict(num_key_value_heads=2, rope_parameters=LLAMA_3)),
    "llama-3.2": ("Llama", dict(num_key_value_heads=1, rope_parameters=LLAMA_3, tie_word_embeddings=True, head_dim=24)),
    "llama-biases": ("Llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "mistral-window-7": ("Mistral", dict(num_key_value_heads=2, sliding_window=7)),
    "mistral-no-window": ("Mistral", dict(num_key_value_heads=1, sliding_window=None, head_dim=24)),
    "qwen2.5": ("Qwen2", dict(num_key_value_heads=2)),
    "qwen2.5-tied": ("Qwen2", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=24)),
    "qwen3-tied": ("Qwen3", dict(num_key_value_heads=1, head_dim=40, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(num_key_value_heads=2)),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN, head_dim=24)),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0))),
    "llama-dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=3.0))),
    "qwen2-window-7": (
        "Qwen2", dict(num_key_value_heads=4, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    ),
    "seed_oss": ("SeedOss", dict(num_key_value_heads=2, head_dim=24)),
    "ministral3": (
        "Ministral3", dict(num_key_value_heads=2, head_dim=24, rope_parameters=YARN | dict(llama_4_scaling_beta=0.3)),
    ),
    "granite": (
        "Granite", dict(num_key_value_heads=2, embedding_multiplier=7.0, residual_multiplier=0.3,
                        attention_multiplier=0.11, logits_scaling=3.0),
    ),
    "olmo2": ("Olmo2", dict(num_key_value_heads=2)),
    "olmo3": (
        "Olmo3", dict(num_key_value_heads=2, sliding_window=7, rope_parameters=dict(full_attention=YARN, **LOCAL)),
    ),
    "gemma2": (
        "Gemma2", dict(num_key_value_heads=2, head_dim=24, sliding_window=7, query_pre_attn_scalar=20,
                       attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
    ),
    "gemma3": (
        "Gemma3Text", dict(num_key_value_heads=1, head_dim=24, sliding_window=7, query_pre_attn_scalar=60,
                           layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
                           rope_parameters=dict(full_attention=LINEAR, **LOCAL)),
    ),
    "phi3-window-7": ("Phi3", dict(num_key_value_heads=2, sliding_window=7)),
    "phi3-long": ("Phi3", dict(num_key_value_heads=2, original_max_position_embeddings=8, rope_parameters=LONG)),
    "phi3-short": ("Phi3", dict(num_key_value_heads=2, original_max_position_embeddings=256, rope_parameters=LONG)),
    "qwen3_moe": (
        "Qwen3Moe", dict(num_key_value_heads=2, head_dim=24, num_experts=6, num_experts_per_tok=2,
                         moe_intermediate_size=40, mlp_only_layers=[1], norm_topk_prob=True),
    ),
    "olmoe": ("Olmoe", dict(num_key_value_heads=2, num_experts=5, num_experts_per_tok=3)),
    "mixtral": ("Mixtral", dict(num_key_value_heads=2, num_local_experts=4)),
    "gpt2": ("GPT2", dict(n_inner=112)),
}  # fmt: skip
MERGED = (
    "llama", "llama-3.2", "mistral-window-7", "qwen2.5", "qwen2.5-tied", "qwen3", "smollm3", "gpt2", "olmo3", "gemma3",
    "phi3-long", "granite", "qwen3_moe", "mixtral",
)  # fmt: skip


@pytest.fixture(scope="module")
def downloads(tmp_path_factory, rows):
    """name -> (the transformers model, its folder as save_pretrained leaves it, with a tokenizer)"""
    made = {}

    def download(name: str):
        if name not in made:
            torch.manual_seed(0)
            folder, (kind, more) = tmp_path_factory.mktemp("hub") / name, FAMILIES[name]
            sizes = {n: v for n, v in SIZES.items() if kind != "GPT2" or n != "intermediate_size"}
            config = getattr(transformers, f"{kind}Config")(**sizes | more)
            hf = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), std=0.1).eval()
            hf.save_pretrained(folder)
            save_tokenizer(folder, rows)
            AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # Qwen's has ways of its own to cut words
            (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
            made[name] = hf, folder
        return made[name]

    return download


@pytest.fixture
def download(request, downloads, tmp_path):
    """(the transformers model, a folder of our own) of the family `request.param`"""
    hf, folder = downloads(getattr(request, "param", "llama"))
    shutil.copytree(folder, tmp_path / "hf")
    return hf, tmp_path / "hf"


def kept_as_it_was(stated: dict, source: dict) -> None:
    """A config.json, but for what follows from the rest of it."""
    source = {name: value for name, value in source.items() if value is not None}
    assert {name: value for name, value in stated.items() if name in source} == source
    assert {name for name in stated.keys() - source.keys() if stated[name] is not None} <= {"head_dim", "n_ctx"}


def same(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    d, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"\n{what}: largest difference {d:.1e}, logits up to {largest:.1f}: {d / largest:.1e}", end="")
    assert d <= 1e-5 * largest


# ------------------------------------------------------------------------------------------------------- as downloaded


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_decoding_equal_transformers(name, downloads):
    """50 tokens are longer than the window of 7 and than the original context of 32."""
    hf, folder = downloads(name)
    gpt, idx = load(folder), torch.randint(0, 400, (2, 50))
    with torch.no_grad():
        expected = hf(idx).logits
    same(f"{name} {shown(gpt.config)}", gpt(idx), expected)
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones(1, 12).long())
    expected = hf.generate(idx[:1, :12], max_new_tokens=40, **options)[0, 12:].tolist()
    assert list(generate(gpt, idx[0, :12].tolist(), 40, temperature=0)) == expected


def shown(config: Config) -> str:
    """What is special about it."""
    plain = vars(Config(n_embd=config.n_embd, n_head=config.n_head))
    names = "norm_place norm_plus_one qk_norm activation attn_softcap logit_softcap bias qkv_bias tie".split()
    special = {name: getattr(config, name) for name in names if getattr(config, name) != plain[name]}
    kinds = {type(rope.scaling).__name__ for rope in config.ropes if rope.scaling}
    windows = {layer.window for layer in config.layers} - {None}
    return f"{special} {kinds or ''} {windows or ''}"


FLAG_OF = dict(
    ropes="llama-3.1", window="mistral-window-7", qkv_bias="qwen2.5", qk_norm="qwen3", no_rope="smollm3",
    norm_plus_one="gemma3", experts="mixtral", attn_scale="granite", embedding_scale="gemma2", residual_scale="granite",
    attn_softcap="gemma2", logit_softcap="gemma2", logit_divisor="granite",
)  # fmt: skip
MODULES = dict(norm_plus_one="norm_1", qk_norm="attn.q_norm", experts="mlp")


@pytest.mark.parametrize("flag", FLAG_OF)
def test_each_flag_counts(flag, downloads):
    """Without it the logits are others: the test above would see that."""
    _, folder = downloads(FLAG_OF[flag])
    gpt, idx = load(folder), torch.randint(0, 400, (1, 50))
    before, c = gpt(idx), gpt.config
    if flag == "qkv_bias":
        for block in gpt.blocks:
            block.attn.k_proj.bias.zero_(), block.attn.q_proj.bias.zero_()
    elif flag in MODULES:
        for block in gpt.blocks:
            owner, _, name = MODULES[flag].rpartition(".")
            setattr(block.get_submodule(owner), name, torch.nn.Identity())
    elif flag in ("ropes", "window", "no_rope"):
        change = dict(ropes=dict(rope=Rope(500.0)), window=dict(window=None), no_rope=dict(rope=c.layers[0].rope))[flag]
        assert any(getattr(layer, name) != value for layer in c.layers for name, value in change.items())
        c.layers = tuple(replace(layer, **change) for layer in c.layers)
    else:
        gpt = GPT(replace(c, **{flag: None if "softcap" in flag else 1.0})).requires_grad_(False)
        gpt.load_state_dict(load(folder).state_dict())
    assert (gpt(idx) - before).abs().max() > 1e-3


def as_shards(hf, folder) -> None:
    (folder / "model.safetensors").unlink()
    hf.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def as_bin(hf, folder) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")


def as_bin_of_an_older_torch(hf, folder) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(hf.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_bin_shards(hf, folder) -> None:
    (folder / "model.safetensors").unlink()
    where = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(hf.state_dict())}
    for file in {*where.values()}:
        torch.save({name: t for name, t in hf.state_dict().items() if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=where)))


def without_prefix(hf, folder) -> None:
    """As the model without its output layer is stored, such as GPT-2 on the hub."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix(f"{hf.base_model_prefix}."): t for name, t in tensors.items()},
              folder / "model.safetensors", dict(format="pt"))  # fmt: skip


FORMATS = (as_shards, as_bin, as_bin_of_an_older_torch, as_bin_shards, without_prefix)


@pytest.mark.parametrize("download", ["llama", "qwen2.5-tied", "gpt2"], indirect=True)
@pytest.mark.parametrize("change", FORMATS)
def test_every_format_is_the_same_network(download, change):
    """Bit for bit, under one identity."""
    hf, folder = download
    one_file, idx = Folder(folder), torch.randint(0, 400, (2, 20))
    expected, identity = load(folder)(idx), one_file.identity
    change(hf, folder)
    other = Folder(folder)
    assert other.identity == identity and other.config == one_file.config
    assert all(torch.equal(other.tensor(name), one_file.tensor(name)) for name in one_file.names)
    assert torch.equal(load(folder)(idx), expected)


def test_what_lies_beside_the_weights_is_ignored(download):
    """Meta's own files, GGUF files, weights in a second format, and the index of a save before."""
    _, folder = download
    identity = Folder(folder).identity
    (folder / "original").mkdir()
    metas = "consolidated.00.pth consolidated.safetensors original/params.json original/consolidated.00.pth"
    for name in f"{metas} model.Q4_0.gguf pytorch_model.bin tf_model.h5 model.fp16.safetensors".split():
        (folder / name).write_bytes(b"none of our business")
    stale = dict(weight_map={"model.norm.weight": "model-00001-of-00002.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert Folder(folder).identity == identity
    assert load(folder)(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("download", ["qwen2.5-tied"], indirect=True)
def test_an_output_layer_stored_beside_the_embedding_is_taken_as_transformers_takes_it(download):
    hf, folder = download
    tensors, idx = load_file(folder / "model.safetensors"), torch.randint(0, 400, (2, 20))
    embedding = tensors["model.embed_tokens.weight"]
    for head, tied in ((embedding.clone(), True), (embedding + torch.randn_like(embedding), False)):
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", dict(format="pt"))
        gpt = load(folder)
        assert gpt.config.tie == tied
        with torch.no_grad():
            same("a stored output layer", gpt(idx), AutoModelForCausalLM.from_pretrained(folder).eval()(idx).logits)


def gemma_that_sees() -> transformers.PreTrainedModel:
    text = FAMILIES["gemma3"][1] | SIZES
    sees = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    config = transformers.Gemma3Config(text_config=text, vision_config=sees | dict(patch_size=8), mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def mistral_that_sees() -> transformers.PreTrainedModel:
    text = FAMILIES["ministral3"][1] | SIZES | dict(model_type="ministral3", tie_word_embeddings=False)
    sees = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=sees | dict(patch_size=8, head_dim=16, model_type="pixtral"),
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


@pytest.mark.parametrize("new_names", [False, True], ids=["language_model.model", "model.language_model"])
@pytest.mark.parametrize("build_whole", [gemma_that_sees, mistral_that_sees])
def test_of_a_network_that_also_sees_the_language_network_is_read(build_whole, new_names, tmp_path, capsys):
    torch.manual_seed(0)
    hf, idx = randomize(build_whole(), std=0.1).eval(), torch.randint(0, 400, (2, 30))
    hf.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith("language_model.model.") for name in tensors)
    if new_names:
        tensors = {f"model.{name}".replace("language_model.model", "language_model"): t for name, t in tensors.items()}
        tensors = {name.replace("model.language_model.lm_head", "lm_head"): t for name, t in tensors.items()}
    save_file(tensors, file, dict(format="pt"))
    capsys.readouterr()
    gpt = load(tmp_path / "hf")
    assert "hf: read without " in (err := capsys.readouterr().err) and "vision_tower" in err and "projector" in err
    with torch.no_grad():
        same(build_whole.__name__, gpt(idx), hf(idx).logits)
    save_folder(tmp_path / "text", gpt.config, gpt.state_dict(), {}, Folder(tmp_path / "hf").hf)
    same("its language network alone", load(tmp_path / "text")(idx), gpt(idx))
    opened_by_transformers(tmp_path / "text")


# ------------------------------------------------------------------------------------------------------------ identity


def test_another_base_of_the_same_shape_is_refused(downloads, download, tmp_path):
    """Also one of other numbers in one tensor, or in another dtype."""
    _, folder = download
    method = save(tmp_path / "m.safetensors", build(folder, "lora"), "lora", folder)
    load(folder, method)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    for changed in (
        {n: torch.randn_like(t) for n, t in tensors.items()},
        tensors | {name: tensors[name] + 1e-3},
        {n: t.half() for n, t in tensors.items()},
        tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2},
    ):
        save_file(changed, folder / "model.safetensors", dict(format="pt"))
        assert load(folder)
        with pytest.raises(ValueError, match=r"m.safetensors was trained on another base than .*hf"):
            load(folder, method)
    save_file(tensors, folder / "model.safetensors", dict(format="pt"))
    load(folder, method)


def test_the_identity_sees_first_and_last_numbers_and_every_64th_of_a_tensor(download):
    _, folder = download
    tensors, name = load_file(folder / "model.safetensors"), "model.embed_tokens.weight"
    identity, n = Folder(folder).identity, tensors[name].numel()
    starts = torch.randint(0, n - n // 60, (9,)).tolist()
    for first, last in [(0, 1), (n - 1, n), *((start, start + n // 60) for start in starts)]:
        changed = tensors[name].clone()
        changed.view(-1)[first:last] += 1
        save_file(tensors | {name: changed}, folder / "model.safetensors", dict(format="pt"))
        assert Folder(folder).identity != identity


# -------------------------------------------------------------------------------------------------------------- merged


NO_BIAS = ("mistral-window-7", "qwen3", "olmo3", "gemma3", "phi3-long", "qwen3_moe", "mixtral")
LEFT = {  # what stays in a method folder beside the merged network
    "lora-all": {},
    "ia3": {},
    "selective-bitfit": dict.fromkeys(NO_BIAS, "selective"),
    "adapter_v2": dict.fromkeys(MERGED, "adapter_v2"),  # v1's prompts, and a bias of the output layer
}
OPTIONS = {"lora-all": dict(r=3, targets="q_proj,v_proj,o_proj,up_proj,down_proj,lm_head")}


@pytest.mark.parametrize("method", LEFT)
@pytest.mark.parametrize("name", MERGED)
def test_merged_folders_are_opened_by_transformers(name, method, downloads, tmp_path, capsys, monkeypatch):
    _, folder = downloads(name)
    gpt = shake(build(folder, method, OPTIONS.get(method)))
    run, out, idx = tmp_path / "run", tmp_path / "out", torch.randint(0, 400, (2, 50))
    run.mkdir()
    save(run / "lit_method.safetensors", gpt, method, folder, OPTIONS.get(method))
    stdout = say(merge, capsys, monkeypatch, f"--checkpoint_dir {folder} --method_dir {run} --out_dir {out}")
    unmerged = load(folder, run)(idx)
    assert (unmerged - load(folder)(idx)).abs().max() > 1e-2

    left = [path for path in out.iterdir() if path.is_dir()]
    assert [path.name for path in left] == [method for key, method in LEFT[method].items() if key == name]
    assert ("the rest of it does not merge" in stdout) == bool(left)
    same(f"{name} {method}, merged", load(out, *left)(idx), unmerged)
    hf, _ = opened_by_transformers(out)  # whose logits and ids are ours
    with torch.no_grad():
        same("in transformers", load(out)(idx), hf(idx).logits)
    for file in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    stated, source = (json.loads((path / "config.json").read_text()) for path in (out, folder))
    if method in ("selective-bitfit", "adapter_v2") and name in ("llama", "llama-3.2", "smollm3"):
        assert stated["attention_bias"] is stated["mlp_bias"] is True and stated["model_type"] == source["model_type"]
    if method in ("lora-all", "ia3"):
        kept_as_it_was(stated, source | dict(tie_word_embeddings=source["tie_word_embeddings"] and method == "ia3"))


@pytest.mark.parametrize("download", ["qwen2.5"], indirect=True)
def test_biases_that_its_family_cannot_say_make_it_a_llama(download, tmp_path):
    _, folder = download
    file = save(tmp_path / "m.safetensors", shake(build(folder, "selective-bitfit")), "selective-bitfit", folder)
    merge_folder(folder, file, tmp_path / "out")
    stated = json.loads((tmp_path / "out/config.json").read_text())
    assert (stated["model_type"], stated["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert stated["attention_bias"] is stated["mlp_bias"] is True and stated["eos_token_id"] == 1


def test_full_finetuning_leaves_a_folder_for_transformers(tiny, tmp_path, capsys, monkeypatch):
    """Beside an ordinary method folder, which loads and merges."""
    flags = f"--checkpoint_dir {tiny}/base --data {tiny}/data.json --devices cpu --dtype float32 --train.max_steps 2"
    say(full, capsys, monkeypatch, f"{flags} --train.sample= --out_dir {tmp_path}/run")
    idx = torch.randint(0, 400, (1, 30))
    trained = load(tiny / "base", tmp_path / "run")(idx)
    assert (trained - load(tiny / "base")(idx)).abs().max() > 1e-3
    same("full finetuning", load(tmp_path / "run/hf")(idx), trained)
    opened_by_transformers(tmp_path / "run/hf")
    out = tmp_path / "out"
    say(merge, capsys, monkeypatch, f"--checkpoint_dir {tiny}/base --method_dir {tmp_path}/run --out_dir {out}")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "run/hf/model.safetensors").read_bytes()
    assert method_header(tmp_path / "run")["method"] == "full"
    say(full, capsys, monkeypatch, f"{flags} --train.sample= --out_dir {tmp_path}/slim --save_hf false")
    assert not (tmp_path / "slim/hf").exists()


def test_what_does_not_merge_is_refused(downloads, tmp_path, capsys, monkeypatch):
    _, folder = downloads("llama")
    for method in ("adapter", "prefix", "prompt", "bottleneck"):
        file = save(tmp_path / f"{method}.safetensors", build(folder, method), method, folder)
        flags = f"--checkpoint_dir {folder} --method_dir {file} --out_dir {tmp_path}/out"
        assert f"{method} cannot be merged" in fail(merge, capsys, monkeypatch, flags)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("download", ["llama", "llama-3.1", "mistral-window-7", "qwen3", "smollm3"], indirect=True)
def test_config_json_of_transformers_4_says_the_same(download):
    """There rope_theta stood by itself, the rest in rope_scaling."""
    _, folder = download
    expected, stated = Folder(folder).config, Folder(folder).hf
    rope = stated.pop("rope_parameters")
    stated |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=None if rope["rope_type"] == "default" else rope)
    stated["torch_dtype"] = stated.pop("dtype")
    assert read_config(stated)[1] == expected
    if stated["rope_scaling"]:
        with pytest.raises(ValueError, match="rope scaling of type 'mrope', .* not supported"):
            read_config(stated | {"rope_scaling": {**rope, "rope_type": "mrope"}})
    (folder / "config.json").write_text(json.dumps(stated))
    assert Folder(folder).config == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_and_read_as_itself(name):
    """By us, as transformers understands it, and over the config.json of a network of its kind."""
    config = Config.from_name(name)
    stated = write_config(config, PRESETS[name])
    assert read_config(json.loads(json.dumps(stated)))[1] == config
    theirs = AutoConfig.for_model(**stated)
    assert theirs.architectures == stated["architectures"]
    assert read_config(json.loads(theirs.to_json_string(use_diff=False)))[1] == config
    again = write_config(config, {**stated, "transformers_version": "4.40.0", "pad_token_id": 7})
    assert again == {**stated, "transformers_version": "4.40.0", "pad_token_id": 7}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_is_written_over_its_source_as_it_was(name, downloads):
    folder = Folder(downloads(name)[1])
    kept_as_it_was(write_config(folder.config, folder.hf), folder.hf)
    assert read_config(write_config(folder.config, folder.hf))[1] == folder.config


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("qwen2.5", dict(use_mrope=True), "use_mrope is True, which is not supported"),
        ("qwen2.5", dict(layer_types=["full_attention"] * 4 + ["linear_attention"]), "layer_types is "),
        ("qwen2.5", dict(layer_types=["full_attention"] * 4), "layer_types is "),
        ("qwen3_moe", dict(use_sliding_window=True), "use_sliding_window is True, which is not supported"),
        ("olmoe", dict(clip_qkv=8.0), "clip_qkv is 8.0, which is not supported"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True, which is not"),
        ("llama", dict(attention_sinks=True), "attention_sinks is True, which is not supported"),
        ("llama", dict(rope_parameters={"mrope_section": [1]}), r"mrope_section of its rope parameters is \[1\]"),
        ("qwen3", dict(attention_bias=True), "attention_bias is True, which is not supported"),
        ("llama", dict(attention_bias=True), "attention_bias is True and mlp_bias is not"),
        ("llama", dict(hidden_act="gelu"), "hidden_act is 'gelu', which is not supported"),
        ("llama", dict(model_type="gemma"), "model_type is 'gemma'; known are gemma2, gemma3_text, gpt2"),
        ("llama", dict(model_type=["llama"]), r"model_type is \['llama'\]; known are"),
        ("llama", dict(rms_norm_eps=None), "lacks rms_norm_eps"),
        ("llama", dict(num_attention_heads=3), "n_head 3, n_kv_head 2: .* n_head a multiple of n_kv_head"),
        ("llama", dict(vocab_size="many"), "vocab_size is 'many'"),
        ("llama", dict(quantization_config=dict(quant_method="gptq")), "quantization_config is .*gptq.*, which is not"),
        ("llama", dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "full_attention of its rope"),
        ("llama", dict(rope_parameters="linear"), "rope scaling is .linear."),
        ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), "of 0.5 of a head's numbers, is not supported"),
        ("gpt2", dict(activation_function="relu"), "activation_function is 'relu', which is not supported"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True, which is not"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(name, change, says, downloads, tmp_path):
    stated = Folder(downloads(name)[1]).hf | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))
    with pytest.raises(ValueError, match=f"config.json.*{says}"):
        Folder(tmp_path)


def test_quantized_weights_are_named(download):
    _, folder = download
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors.*model.norm.weight is .* of int8"):
        load(folder)


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
    "qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624, "mixtral-8x7b": 46_702_792_704,
    "ministral-3-3b": 3_429_006_336, "ministral-3-8b": 8_489_553_920, "ministral-3-14b": 13_506_073_600,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000, "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352, "yi-1.5-6b": 6_061_035_520, "yi-1.5-9b": 8_829_407_232,
    "yi-1.5-34b": 34_388_917_248, "falcon3-1b": 1_669_408_768, "falcon3-3b": 3_227_655_168,
    "falcon3-7b": 7_455_550_464, "falcon3-10b": 10_305_653_760, "seed-oss-36b": 36_151_104_512,
    "granite-3.3-2b": 2_533_539_840, "granite-3.3-8b": 8_170_864_640, "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344, "olmo-2-13b": 13_716_198_400, "olmo-2-32b": 32_234_279_936,
    "olmo-3-7b": 7_298_011_136, "olmo-3-32b": 32_233_522_176, "olmoe-1b-7b": 6_919_161_856,
    "phi-3-mini-4k": 3_821_079_552, "phi-3-medium-4k": 13_960_238_080, "phi-4": 14_659_507_200,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "gemma-3-4b": 3_880_263_168,  # without what sees
    "gemma-3-12b": 11_766_034_176, "gemma-3-27b": 27_009_346_304,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        gpt = GPT(Config.from_name(name))
    assert sum(p.numel() for p in gpt.parameters()) == COUNTS[name]
