"""Make a checkpoint of random weights, and rows of random words in Alpaca's lengths, to try a run at full size without
any weights: how fast it is and how much memory it takes. docs/measure.md has the commands.

The words are made of syllables, and each is one token of a byte-level tokenizer trained on them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lit_model.cli import cli
from lit_model.data.examples import render
from lit_model.families import PRESETS
from lit_model.files import refuse_used, write_text
from lit_model.load import choose_device
from lit_model.model import Config
from lit_model.weights.folder import save_folder
from scripts.bench.workload import RandomFolder, lengths

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES]
PAIRS = "appropri|ately comple|tes pa|ired Inst|ruction ##|#".split()  # so preambles have LLaMA's 29 and 39 tokens


@dataclass
class Options:
    preset: str = "llama-7b"
    """shape of the network: a name in lit_model/presets.json"""
    out_dir: Path = Path("checkpoints/random")
    """folder for the checkpoint; the rows are in it too, as rows.json"""
    n_rows: int = 52_002
    """number of rows"""


def main(options: Options) -> None:
    refuse_used(options.out_dir)
    config, hf = Config.from_name(options.preset), PRESETS[options.preset]
    tokenizer = train_tokenizer(config.vocab_size)
    stated = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(stated).encode()}
    folder = RandomFolder(config, torch.bfloat16, choose_device("auto"))  # a GPU draws them in a moment
    save_folder(options.out_dir, config, ((name, folder.tensor(name)) for name in folder.names), files, hf)
    write_text(options.out_dir / "rows.json", json.dumps(random_rows(tokenizer, options.n_rows)))
    print(f"made {options.out_dir}/: {options.preset} with random weights, and rows.json of {options.n_rows:,} rows")


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Knows WORDS, alone and after a space, and those of Alpaca's preambles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **special)
    frames = " ".join(render("alpaca", "a", text) for text in ("", "a"))
    for pair in PAIRS:
        frames = frames.replace(pair.replace("|", ""), pair.replace("|", "1"))  # a digit is a token of its own
    tokenizer.train_from_iterator([frames] * 1000 + [f"{word} {word}" for word in WORDS], trainer)
    return tokenizer


def random_rows(tokenizer: Tokenizer, n_rows: int) -> list[dict[str, str]]:
    """Rows that are `lengths()` long in tokens: Alpaca's preambles, two fifths of the rows with an input, a third of
    the other words in the prompt."""
    frames = [render("alpaca", "a", text) for text in ("", "a")]
    n_around = [len(tokenizer.encode(frame).ids) - 1 - i + 2 for i, frame in enumerate(frames)]  # "a" goes, <s>, </s>
    rng = np.random.default_rng(0)
    rows = []
    for length, has_input in zip(lengths(n_rows), rng.random(n_rows) < 0.4):
        words = [WORDS[i] for i in rng.integers(0, len(WORDS), max(7, length - n_around[int(has_input)]))]
        n_prompt = len(words) * 3 // 10
        n_instruction = n_prompt // 2 if has_input else n_prompt
        parts = words[:n_instruction], words[n_instruction:n_prompt], words[n_prompt:]
        rows.append(dict(zip(("instruction", "input", "output"), map(" ".join, parts))))
    return rows


if __name__ == "__main__":
    cli(main, Options, __doc__)
