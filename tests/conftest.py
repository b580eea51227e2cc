import csv
import json
import os
import random
import sys
from pathlib import Path

# before torch is imported: two threads beside a busy process take three times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lit_model import families, model
from lit_model.cli import cli
from lit_model.data.tokenizer import Tokenizer as OurTokenizer
from lit_model.decode import Decoder, Request
from lit_model.sampling import Sampler, Sampling
from lit_model.weights.folder import save_folder, tokenizer_files


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LLAMA = dict(arch="llama", vocab_size=97, block_size=128, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_hidden=112)
GPT2 = dict(arch="gpt2", vocab_size=97, block_size=128, n_layer=3, n_head=4, n_embd=64, tie=True)
NEWER_SAYS = dict(  # what came after LLaMA 2, all at once, in a config.json
    model_type="newer", vocab_size=97, max_position_embeddings=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, hidden_size=64, intermediate_size=112, head_dim=24, rms_norm_eps=1e-5,
    tie_word_embeddings=True, sliding_window=11, no_rope_layers=[1, 1, 0],
    layer_types=["sliding_attention", "full_attention", "full_attention"],
    rope_theta=900.0, rope_local_base_freq=500.0, partial_rotary_factor=0.5,
    rope_scaling=dict(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=4, attention_factor=1.2, beta_fast=0.9,
        beta_slow=0.1, llama_4_scaling_beta=0.3,
    ),
    mlp_only_layers=[1, 2], moe_intermediate_size=48, attn_scale=0.3, logit_divisor=1.5, embedding_scale=2.0,
    residual_scale=0.7, attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
)  # fmt: skip
families.FAMILIES["newer"] = families._llama_like(  # no network has all of it: a family of its own
    "NewerForCausalLM",
    {},
    dict(
        attention_bias=True, mlp_bias=False, attention_out_bias=False, sliding_window=None, layer_types=None,
        no_rope_layers=None, rope_local_base_freq=None, partial_rotary_factor=1.0, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True, mlp_only_layers=None,
        llama_4_scaling_beta=None,
    ),
    families._FOUR_NORMS,
    {name: name for name in ("attn_scale", "logit_divisor", "embedding_scale", "residual_scale")} | families._CAPS,
    qk_norm="all",
    **families._GEMMA,
)  # fmt: skip
NEWER = dict(arch="llama") | families.read_fields(NEWER_SAYS)[1]
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "newer": NEWER}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request) -> dict:
    """Config fields of a tiny model: LLaMA with grouped-query attention, GPT-2, and what Mistral, Qwen & co. added."""
    return FAMILIES[request.param]


def randomize(gpt: model.GPT, std: float = 0.2) -> model.GPT:
    """Gives every parameter, gates and biases too, a random value, so that a wrong one shows."""
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            scale = name.endswith("weight") and ("norm" in name or ".ln_" in name)
            p.normal_(1.0 if scale else 0.0, std)
    return gpt


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    """A folder with a random network of this family, which all tests of a file share."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(family["arch"]) / "base"
    base = randomize(model.GPT(model.Config(**family)), std=0.05)
    save_folder(folder, base.config, base.state_dict(), {}, NEWER_SAYS if family is NEWER else None)
    return folder


ROOT = Path(__file__).resolve().parents[1]
WORDS = "apple river stone seven green quiet makes finds under above".split()


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """60 different instruction rows, a third of them with an input."""
    rng = random.Random(0)
    text = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))  # noqa: E731
    return [
        {"instruction": f"{i} {text(3)}", "input": text(2) if i % 3 == 0 else "", "output": text(4).upper()}
        for i in range(60)
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, rows):
    """A folder with data.json and a checkpoint `base`: a random network with a trained byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "data.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    base = folder / "base"
    save_tokenizer(base, rows)
    gpt = model.GPT(model.Config(**{**LLAMA, "vocab_size": 400, "block_size": 512}))
    save_folder(base, gpt.config, gpt.state_dict(), tokenizer_files(base))
    return folder


@pytest.fixture
def chat_checkpoint(tiny, tmp_path):
    """A call makes a checkpoint folder with a chat template."""

    def make(template: str) -> OurTokenizer:
        folder = tmp_path / "model"
        tokenizer = OurTokenizer(tiny / "base")
        tokenizer.hf.add_special_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
        gpt = model.GPT(model.Config(**{**LLAMA, "vocab_size": 410, "block_size": 512}))
        stated = dict(bos_token="<bos>", eos_token="<|im_end|>", chat_template=template)
        files = tokenizer.files() | {"tokenizer_config.json": json.dumps(stated).encode()}
        save_folder(folder, gpt.config, gpt.state_dict(), files)
        return OurTokenizer(folder)

    return make


@pytest.fixture
def labelled(tmp_path):
    """Rows whose label is in the text."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "labelled.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(120):
            label = ("apple", "river", "stone")[i % 3]
            writer.writerow([f"{i}, {' '.join(rng.choice(WORDS[3:], 4))} {label}\n", label])
    return tmp_path / "labelled.csv"


def say(module, capsys, monkeypatch, args: str) -> str:
    """What a script prints."""
    monkeypatch.setattr(sys, "argv", ["script", *args.split()])
    cli(module.main, module.Options, module.__doc__)
    return capsys.readouterr().out


def fail(module, capsys, monkeypatch, args: str) -> str:
    """The one line that a script ends with, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["script", *args.split()])
    with pytest.raises(SystemExit) as stop:
        cli(module.main, module.Options, module.__doc__)
    last = capsys.readouterr().err.rsplit("\r", 1)[-1].strip()
    assert stop.value.code == 2 and last.splitlines()[-1].startswith("error: "), last
    return last.splitlines()[-1]


def save_tokenizer(folder, rows) -> None:
    """Trains a byte-level BPE tokenizer with <bos> and <eos> and writes it as Hugging Face does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(row.values()) for row in rows], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    stated["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def decoded(gpt: model.GPT, sequences: list[torch.Tensor], starts: list[int], monkeypatch) -> torch.Tensor:
    """Logits (B, steps + 1, V) of sequences behind their first `starts` tokens, and behind each that follows, decoded
    together through the cache; as far as the one that ends first."""
    got, front = [], gpt.n_virtual_tokens + gpt.n_virtual_keys

    def follow(self, logits: torch.Tensor, n: torch.Tensor, places: slice) -> torch.Tensor:
        got.append(logits)
        return torch.stack([s[min(i, len(s) - 1)] for s, i in zip(sequences, (n - front).tolist())])

    monkeypatch.setattr(Sampler, "__call__", follow)
    steps = min(len(s) - n for s, n in zip(sequences, starts))
    requests = [Request(s[:n].tolist(), steps + 1, Sampling(0)) for s, n in zip(sequences, starts)]
    list(Decoder.of(gpt, requests).tokens(steps))
    return torch.stack(got, dim=1)
