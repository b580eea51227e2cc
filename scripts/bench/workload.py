"""What to measure with: random weights; random tokens in the lengths of Alpaca's 52,002 rows, or the demo's rows."""

import numpy as np
import torch
from torch import Tensor

from lit_model.data.examples import ExampleOptions, tokenize
from lit_model.data.rows import read_rows
from lit_model.data.tokenizer import Tokenizer
from lit_model.model import Config
from lit_model.packing import Example
from lit_model.weights.demo import fetch_demo_data, fetch_demo_model
from lit_model.weights.folder import network_shapes


class RandomFolder:
    """In the place of a checkpoint folder: random weights of this shape, made when they are asked for."""

    path = "random weights"

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device):
        self.config, self.dtype, self.device = config, dtype, device
        self.names = network_shapes(config)  # name -> shape

    def tensor(self, name: str) -> Tensor:
        t = torch.empty(self.names[name], dtype=self.dtype, device=self.device)
        if t.ndim > 1:
            return t.normal_(std=0.02)
        return t.fill_(name.endswith("weight"))  # a norm's are ones, biases zero


def lengths(n: int = 52_002) -> np.ndarray:
    """Lengths in tokens like those of Alpaca's examples: lognormal with a mean of 130, from 40 to 512."""
    sigma = 0.62
    drawn = np.random.default_rng(0).lognormal(np.log(130.0) - sigma**2 / 2, sigma, n)
    return np.clip(np.rint(drawn), 40, 512).astype(int)


def alpaca_lengths(vocab_size: int) -> list[Example]:
    """52,002 examples of random tokens, after Alpaca's preambles: 29 tokens, or 39 in two fifths of the examples."""
    rng = np.random.default_rng(3)
    preambles = [rng.integers(5, vocab_size, n).astype(np.int32) for n in (29, 39)]
    examples = []
    for n in lengths():
        preamble = preambles[int(rng.random() < 0.4)]
        n_own = max(int(n) - len(preamble), 8)
        ids = np.concatenate((preamble, rng.integers(5, vocab_size, n_own).astype(np.int32)))
        examples.append(Example(ids, len(preamble) + int(0.3 * n_own)))
    return examples


def of_length(n: int, vocab_size: int) -> list[Example]:
    """64 examples of n random tokens, half of them targets."""
    rng = np.random.default_rng(3)
    return [Example(rng.integers(5, vocab_size, n + 1).astype(np.int32), n // 2) for _ in range(64)]


def demo_examples() -> list[Example]:
    tokenizer = Tokenizer(fetch_demo_model())
    return tokenize(read_rows(fetch_demo_data()), tokenizer, ExampleOptions())
