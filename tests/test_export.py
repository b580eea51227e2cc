"""What is exported answers elsewhere as it does here: GGUF files in a real llama.cpp."""

import json
import math
from dataclasses import replace
from itertools import takewhile

import pytest
import torch
import torch.nn.functional as F
import transformers
import xllamacpp
from conftest import fail, randomize, say
from peft import PeftModel
from test_convert import OTHERS, SIZES, TEXTS, bpe_fields
from test_convert import write_gguf as write_by_hand
from test_parity import built
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import lora
from finetune.run import Train
from lit_model import GPT, Config, generate, load
from lit_model.data.examples import prompt_ids, render
from lit_model.data.tokenizer import Tokenizer
from lit_model.load import method_options, save_method
from lit_model.merge import Merged, merge
from lit_model.weights import demo
from lit_model.weights.folder import Folder, tokenizer_files
from lit_model.weights.gguf import convert_gguf
from lit_model.weights.to_gguf import write_gguf
from scripts import export

YARN = dict(rope_type="yarn", rope_theta=500.0, factor=8.0, original_max_position_embeddings=16)
NEWER = {  # as transformers says them, in what llama.cpp takes for granted as there
    "gemma2": ("Gemma2", dict(head_dim=32, sliding_window=7, query_pre_attn_scalar=32, attn_logit_softcapping=3.0)),
    "olmo3": ("Olmo3", dict(sliding_window=7, rope_parameters=dict(
        full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=500.0),
    ))),
    "granite": ("Granite", dict(
        embedding_multiplier=7.0, residual_multiplier=0.22, attention_multiplier=0.11, logits_scaling=3.0,
    )),
    "smollm3": ("SmolLM3", {}),
    "seed_oss": ("SeedOss", dict(head_dim=32)),
    "qwen3_moe": ("Qwen3Moe", dict(
        head_dim=32, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
    )),
    "olmoe": ("Olmoe", dict(num_key_value_heads=4, num_experts=5, num_experts_per_tok=3)),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
}  # fmt: skip
NAMES = [*OTHERS, *NEWER]
GELU = "gemma2", "gemma3", "gpt2"  # llama.cpp reads it from a table in half precision
EXACT = {name: name != "gpt2" for name in NAMES}  # of which llama.cpp's exact attention makes nan


def never_end(output: torch.Tensor) -> None:
    """A token that ends an answer is never the likeliest one: llama.cpp, told to ignore ends, chooses none."""
    output.data[[1, 7]] = 0


def folder_of(name: str, tiny, tmp_path):
    """A folder of another architecture, whose tokenizer has the rule that it usually has."""
    if name in NEWER:
        kind, more = NEWER[name]
        sizes = dict(
            vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=None,
        )  # fmt: skip
        hf = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes | more))
        never_end(randomize(hf, std=0.1).get_output_embeddings().weight)
        hf.save_pretrained(tmp_path / "hf")
        for file, content in tokenizer_files(tiny / "base").items():
            (tmp_path / "hf" / file).write_bytes(content)
        return tmp_path / "hf"
    shape, fields, rule = OTHERS[name]
    gpt = randomize(GPT(Config(**SIZES | shape | dict(vocab_size=400))), std=0.1).eval()
    never_end(gpt.lm_head.weight)
    arch = name.split("-")[0]
    write_by_hand(tmp_path / "m.gguf", gpt, bpe_fields(tiny) | {"ggml.pre": rule}, arch=arch, fields=fields)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "hf", torch.float32)
    return tmp_path / "hf"


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_file_is_read_as_what_it_was_written_from(name, tiny, tmp_path):
    folder = folder_of(name, tiny, tmp_path)
    write_gguf(tmp_path / "out.gguf", Merged(folder), "F32")
    convert_gguf(tmp_path / "out.gguf", tmp_path / "again", torch.float32)
    before, after = Folder(folder), Folder(tmp_path / "again")
    assert after.config == before.config
    for tensor in before.names:
        torch.testing.assert_close(after.tensor(tensor), before.tensor(tensor), rtol=0, atol=1e-6)
    ours, theirs = Tokenizer(folder), Tokenizer(tmp_path / "again")
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert (ours.bos_id, ours.stop_ids, ours.chat_template) == (theirs.bos_id, theirs.stop_ids, theirs.chat_template)


def llama_cpp(path, loras=(), context: int = 128, exact: bool = True) -> xllamacpp.Server:
    """llama.cpp's own server, of one sequence at a time."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = context, 1, 0, False
    params.cpuparams.n_threads = 1
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0) for lora in loras]
    return xllamacpp.Server(params)


def greedy(server: xllamacpp.Server, ids: list[int], n: int, ends: bool = False) -> list[int]:
    options = dict(max_tokens=n, temperature=0, ignore_eos=not ends, cache_prompt=False, logprobs=1)
    answer = server.handle_completions(dict(prompt=ids, **options))
    return [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_decodes_what_we_do(name, tiny, tmp_path):
    folder = folder_of(name, tiny, tmp_path)
    write_gguf(tmp_path / "out.gguf", Merged(folder), "F32")
    server = llama_cpp(tmp_path / "out.gguf", exact=EXACT[name])
    ids = [3, 70, 15, 200, 9, 31, 77, 120, 44, 8, 91, 300]
    options = dict(max_tokens=1, temperature=0, cache_prompt=False, logprobs=8)
    for last in range(300, 310):  # until the likeliest token is a character
        answer = server.handle_completions(dict(prompt=[*ids, last], **options))["choices"][0]
        if answer["logprobs"] is not None:
            break
    (first,) = answer["logprobs"]["content"]
    log_p, top = load(folder)(torch.tensor([[*ids, last]]))[0, -1].log_softmax(-1).detach(), first["top_logprobs"]
    errors = [abs(token["logprob"] - log_p[token["id"]].item()) for token in top]
    print(f"{name}: log-probabilities of the likeliest {len(errors)} within {max(errors):.0e}")
    assert len(errors) == 8 and max(errors) <= (5e-3 if name in GELU else 2e-5)
    expected = list(generate(load(folder), ids, max_new_tokens=50, temperature=0))
    got, rest = greedy(server, ids, 50), iter(expected)
    assert len(got) >= 25 and all(i in rest for i in got)  # it says no ids of bytes that make no character


def tuned(folder, tmp_path, targets: str) -> GPT:
    """A network with a LoRA that is not at its start; its folder is tmp_path / "lora"."""
    gpt = built(folder, "lora", targets=targets)
    with torch.no_grad():
        for p in gpt.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    (tmp_path / "lora").mkdir()
    header = method_options("lora", targets=targets), Folder(folder).identity
    save_method(tmp_path / "lora/lit_method.safetensors", gpt, "lora", *header)
    return gpt


@pytest.mark.parametrize("name", ["llama-3.1", "qwen3", "gpt2", "phi3", "phi3-partial"])
def test_llama_cpp_decodes_with_a_lora_of_ours(name, tiny, tmp_path, capsys, monkeypatch):
    """Its file beside the base's, merged into one file, and read by peft: the same answer."""
    folder, ids = folder_of(name, tiny, tmp_path), [3, 70, 15, 200, 9, 31, 77, 120, 44, 8, 91, 300]
    gpt = tuned(folder, tmp_path, "q_proj,k_proj,o_proj,down_proj")
    expected = list(generate(gpt, ids, max_new_tokens=50, temperature=0))
    assert expected != list(generate(load(folder), ids, max_new_tokens=50, temperature=0))
    args = f"--checkpoint_dir {folder} --method_dir {tmp_path / 'lora'} --gguf_type F32 --out_dir {tmp_path}"
    assert "llama-server -m" in say(export, capsys, monkeypatch, f"--to gguf {args}/merged")
    assert "--lora" in say(export, capsys, monkeypatch, f"--to gguf-lora {args}/alone")
    say(export, capsys, monkeypatch, f"--to gguf --gguf_type F32 --checkpoint_dir {folder} --out_dir {tmp_path}/base")
    for server in (
        llama_cpp(tmp_path / "merged/hf-F32.gguf", exact=EXACT[name]),
        llama_cpp(tmp_path / "base/hf-F32.gguf", [tmp_path / "alone/lora.gguf"], exact=EXACT[name]),
    ):
        got, rest = greedy(server, ids, 50), iter(expected)
        assert len(got) >= 25 and all(i in rest for i in got)
    say(export, capsys, monkeypatch, f"--to peft {args}/peft")
    assert list(generate(load(folder, tmp_path / "peft"), ids, max_new_tokens=50, temperature=0)) == expected


@pytest.mark.parametrize("name", ["llama-3.1", "qwen3", "phi3-partial", "olmo2"])
def test_mlx_lm_gives_our_logits(name, tiny, tmp_path, capsys, monkeypatch):
    """Of the base's folder with the LoRA beside it, and of the merged folder."""
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    folder, ids = folder_of(name, tiny, tmp_path), [3, 70, 15, 200, 9, 31, 77, 120, 44, 8, 91, 300]
    expected = tuned(folder, tmp_path, "q_proj,k_proj,o_proj" if "phi" in name else "q_proj,v_proj,down_proj")(
        torch.tensor([ids])
    )
    args = f"--checkpoint_dir {folder} --method_dir {tmp_path / 'lora'} --out_dir {tmp_path}"
    say(export, capsys, monkeypatch, f"--to mlx {args}/mlx")
    say(export, capsys, monkeypatch, f"--to hf {args}/merged")
    for model, adapter in ((folder, str(tmp_path / "mlx")), (tmp_path / "merged", None)):
        network, _ = mlx_lm.load(str(model), adapter_path=adapter)
        logits = torch.tensor(network(mx.array([ids])).tolist())
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_a_gguf_file_cannot_say_is_refused(tiny, tmp_path, capsys, monkeypatch):
    """A method that merges in part, and a shape that the file has no field for; nothing is left."""
    folder = folder_of("qwen3", tiny, tmp_path)
    gpt, base = randomize(built(folder, "adapter_v2", start_layer=1)), Folder(folder)
    options = method_options("adapter_v2", start_layer=1)
    save_method(tmp_path / "v2.safetensors", gpt, "adapter_v2", options, base.identity)
    args = f"--to gguf --checkpoint_dir {folder} --out_dir {tmp_path}/out"
    line = fail(export, capsys, monkeypatch, f"{args} --method_dir {tmp_path}/v2.safetensors")
    assert "adapter_v2 cannot be merged as a whole" in line
    merged = Merged(folder)
    merged.config = replace(base.config, attn_scale=0.1)
    with pytest.raises(ValueError, match="of qwen3 cannot say this network's shape"):
        write_gguf(tmp_path / "out/m.gguf", merged)
    assert not (tmp_path / "out").exists()


def perplexity(server: xllamacpp.Server, ids: list[int]) -> float:
    """Each token is asked for with a bias that makes it the answer; the log-probability is without the bias."""
    total = 0.0
    for i in range(1, len(ids)):
        options = dict(max_tokens=1, temperature=0, logprobs=1, logit_bias=[[ids[i], 1e4]], cache_prompt=True)
        answer = server.handle_completions(dict(prompt=ids[:i], **options))["choices"][0]
        (token,) = answer["logprobs"]["content"]
        assert token["id"] == ids[i]
        total -= token["logprob"]
    return math.exp(total / (len(ids) - 1))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(checkpoint folder, the out_dir of a LoRA on it)"""
    demo.fetch_if_demo(demo.DEMO_CHECKPOINT)
    out_dir = tmp_path_factory.mktemp("run") / "lora"
    train = Train(lr=2e-3, max_steps=4, max_examples=64, sample="")
    lora.main(lora.Options(out_dir=out_dir, train=train, dtype="float32", devices="cpu"))
    return demo.DEMO_CHECKPOINT, out_dir


@pytest.mark.slow
@pytest.mark.parametrize("kind, most", [("F32", 1e-3), ("Q8_0", 5e-3)])
def test_smollm2_has_our_perplexity_in_llama_cpp(kind, most, smollm2, tmp_path, capsys, monkeypatch):
    folder, out_dir = smollm2
    say(export, capsys, monkeypatch, f"--to gguf --gguf_type {kind} --method_dir {out_dir} --out_dir {tmp_path}")
    tokenizer, gpt = Tokenizer(folder), load(folder, out_dir)
    rows = [row["output"] for row in json.loads(demo.fetch_demo_data().read_text()) if row["output"].isascii()]
    ids = tokenizer.bos + tokenizer.encode("\n\n".join(rows[500:515]))
    expected = F.cross_entropy(gpt(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:])).exp().item()
    got = perplexity(llama_cpp(next(tmp_path.glob("*.gguf")), context=2048), ids)
    with capsys.disabled():
        print(f"\nSmolLM2 with a LoRA, {kind}, {len(ids)} tokens: perplexity {got:.4f}, ours {expected:.4f}")
    assert abs(got / expected - 1) <= most


@pytest.mark.slow
def test_smollm2_gives_one_answer_wherever_it_is_asked(smollm2, tmp_path, capsys, monkeypatch):
    """What a LoRA has trained: unmerged here, with peft, merged in transformers, in llama.cpp merged and beside."""
    folder, out_dir = smollm2
    args = f"--method_dir {out_dir} --out_dir {tmp_path}"
    for to, more in (("hf", ""), ("peft", ""), ("gguf", " --gguf_type F32"), ("gguf-lora", "")):
        say(export, capsys, monkeypatch, f"--to {to} {args}/{to}{more}")
    merge(folder, out_dir, tmp_path / "exact", torch.float32)
    say(export, capsys, monkeypatch, f"--to gguf --gguf_type F32 --out_dir {tmp_path}/base")
    tokenizer = Tokenizer(folder)
    n = dict(max_new_tokens=50, stop_ids=tokenizer.stop_ids)
    ids = prompt_ids(tokenizer, "alpaca", render("alpaca", "Give three tips for staying healthy."))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {
        "here, --method_dir": list(generate(load(folder, out_dir), ids, **n, temperature=0)),
        "here, merged, float32": list(generate(load(tmp_path / "exact"), ids, **n, temperature=0)),
        "transformers + peft": greedy_hf(PeftModel.from_pretrained(hf, tmp_path / "peft"), ids),
        "transformers, merged": greedy_hf(AutoModelForCausalLM.from_pretrained(tmp_path / "exact"), ids),
        "llama.cpp, merged": greedy(
            llama_cpp(next((tmp_path / "gguf").glob("*.gguf")), context=1024), ids, 50, ends=True
        ),
        "llama.cpp + LoRA": greedy(
            llama_cpp(next((tmp_path / "base").glob("*.gguf")), [tmp_path / "gguf-lora/lora.gguf"], 1024), ids, 50, True
        ),
    }
    with capsys.disabled():
        print(*(f"\n{name:22} {tokenizer.decode(answer)!r}" for name, answer in answers.items()))
    assert len({tuple(answer) for answer in answers.values()}) == 1 and len(answers.popitem()[1]) > 25


def greedy_hf(network, ids: list[int]) -> list[int]:
    network.generation_config.eos_token_id = None
    tokens = network.generate(torch.tensor([ids]), max_new_tokens=50, do_sample=False, pad_token_id=0)
    return list(takewhile(lambda token: token not in (0, 2), tokens[0, len(ids) :].tolist()))  # <|im_end|>


@pytest.mark.slow
def test_a_chat_with_smollm2_in_llama_cpp_is_the_chat_here(tmp_path, capsys, monkeypatch):
    demo.fetch_if_demo(demo.DEMO_CHECKPOINT)
    say(export, capsys, monkeypatch, f"--to gguf --gguf_type F32 --out_dir {tmp_path}")
    server = llama_cpp(next(tmp_path.glob("*.gguf")), context=1024)
    messages = [dict(role="user", content="Give three tips for staying healthy.")]
    answer = server.handle_chat_completions(dict(messages=messages, max_tokens=50, temperature=0, logprobs=True))
    got = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    tokenizer = AutoTokenizer.from_pretrained(demo.DEMO_CHECKPOINT)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert got == list(generate(load(demo.DEMO_CHECKPOINT), ids, max_new_tokens=50, temperature=0))
