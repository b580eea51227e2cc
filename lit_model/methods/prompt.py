"""Prompt tuning (https://arxiv.org/abs/2104.08691): trained vectors in front of every example, in the place of words.

    x = [P; embedding(tokens)]          P (length, C)

They are tokens like any other from there on: the text's positions come after them, and they fill the context. In a
packed row they are computed once, as a segment that all examples share.

Trained: on LLaMA-7B with 20 of them 20 * 4096 = 81,920 numbers. It does not start as the base model; it starts with the
vectors of words (`init_from_base`): some of the vocabulary, or those of a text. From random numbers it learns much
worse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from lit_model.files import require_positive
from lit_model.model import GPT


@dataclass
class Prompt:
    """Prompt tuning."""

    length: int = 20
    """number of trained vectors in front of every example"""
    text: str = ""
    """initial text, repeated or cut to `length`; empty: random tokens of the vocabulary"""


class PromptTokens(nn.Module):
    def __init__(self, n_embd: int, options: Prompt):
        super().__init__()
        self.length = options.length
        self.embedding = nn.Parameter(torch.empty(options.length, n_embd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding, std=0.02)

    def forward(self) -> Tensor:  # (P, C)
        return self.embedding


def install(gpt: GPT, options: Prompt) -> None:
    """Puts a soft prompt in front of every example. Raises ValueError if it is empty."""
    require_positive(options, "length")
    gpt.virtual_tokens["prompt"] = PromptTokens(gpt.config.n_embd, options)


@torch.no_grad()
def init_from_base(gpt: GPT, ids: Sequence[int]) -> None:
    """Makes the prompt the vectors of the tokens `ids`, repeated or cut to its length; without ids, of any tokens."""
    prompt = gpt.virtual_tokens["prompt"]
    if not ids:
        ids = torch.randint(gpt.config.vocab_size, (prompt.length,)).tolist()
    chosen = torch.tensor(list(islice(cycle(ids), prompt.length)), device=gpt.device)
    prompt.embedding.copy_(gpt.embed_tokens(chosen))
