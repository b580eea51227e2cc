"""Make a checkpoint of random weights, and rows of random words in Alpaca's lengths, to try a run at full size without
any weights: how fast it is and how much memory it takes. docs/measure.md has the commands.

Its tokenizer is trained on the demo's rows, which are fetched if they are not there.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lit_model.weights import demo as hub
from lit_model import model
from lit_model.load import initialize, save_checkpoint
from lit_model.cli import cli
from lit_model.data.rows import read_rows
from lit_model.data.examples import render
from lit_model.files import refuse_used, write_text
from scripts.workload import lengths


@dataclass
class Options:
    """Options."""

    preset: str = "llama-7b"
    """shape of the network: a name in lit_model/presets.py"""
    out_dir: Path = Path("checkpoints/random")
    """folder for the checkpoint; the rows are in it too, as rows.json"""
    n_rows: int = 52_002
    """how many rows"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the weights"""


def main(options: Options) -> None:
    refuse_used(options.out_dir)
    if options.n_rows < 2:
        raise ValueError(f"n_rows is {options.n_rows}; it must be at least 2")
    config = model.Config.from_name(options.preset)
    hub.fetch_demo_data()
    texts = [text for row in read_rows(hub.DEMO_DATA) for text in row.values()]
    tokenizer = train_tokenizer(texts, min(config.vocab_size, 14_000))  # so Alpaca's preambles have LLaMA's 29 and 39
    rows = json.dumps(random_rows(tokenizer, options.n_rows))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tensors = {}
    with torch.device("meta"):
        gpt = model.GPT(config)
    parts = {name: part for name, part in gpt.named_children() if not (config.tie and name == "lm_head")}
    for name, part in parts.items():
        for child_name, child in part.named_children() if name == "blocks" else [("", part)]:
            initialize(child.to(getattr(torch, options.dtype)), device)
            prefix = ".".join(filter(None, (name, child_name)))
            tensors |= {f"{prefix}.{key}": t.cpu() for key, t in child.state_dict().items()}
    stated = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(stated).encode()}
    save_checkpoint(options.out_dir, config, tensors, files)
    write_text(options.out_dir / "rows.json", rows)
    print(f"made {options.out_dir}/: {options.preset} with random weights, and rows.json of {options.n_rows:,} rows")


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def random_rows(tokenizer: Tokenizer, n_rows: int) -> list[dict[str, str]]:
    """Rows that are `lengths()` long in tokens: Alpaca's preambles, two fifths of the rows with an input, a third of
    the other words in the prompt."""
    vocabulary = tokenizer.get_vocab()
    words = sorted(w for w in vocabulary if "Ġ" + w in vocabulary and w.isalpha() and w.isascii())  # "Ġ" is a space
    rng = np.random.default_rng(0)
    rows = []
    for length, with_input in zip(lengths(n_rows), rng.random(n_rows) < 0.4):
        frame = render("alpaca", "a", "a" if with_input else "")
        around = len(tokenizer.encode(frame).ids) - 1 - with_input + 2  # without the words "a", with <s> and </s>
        chosen = [words[i] for i in rng.integers(0, len(words), max(7, length - around))]
        n_prompt = len(chosen) * 3 // 10
        prompt, output = chosen[:n_prompt], chosen[n_prompt:]
        half = len(prompt) // 2 if with_input else len(prompt)
        row = {"instruction": " ".join(prompt[:half]), "input": " ".join(prompt[half:]), "output": " ".join(output)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    cli(main, Options, __doc__)
