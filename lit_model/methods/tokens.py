"""New tokens beside any method: their rows of the embedding and of the output layer are trained, and no other row.

    x = rows[i] if i is a new token, else W[i]              rows (n, C)
    logits = [W h; rows h]                                  with rows of their own, unless the weights are tied

A row starts as the mean of the rows of the pieces that its text had before. The base's matrices stay as they are. Where
they have a row for an id, since the token exists or the vocabulary is padded, the new one takes its place. With tied
weights both layers share one delta. Equal to peft's trainable_token_indices, which copies all of W in every pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.model import GPT, Embedding, Linear

if TYPE_CHECKING:
    from lit_model.data.tokenizer import Tokenizer


@dataclass
class Tokens:
    """New tokens."""

    add: str = ""
    """tokens to add, such as '<tool>,</tool>': their rows of the embedding and of the output layer are trained beside
    the method; a token that exists is trained, too"""


class NewRows(nn.Module):
    def __init__(self, tokens: Mapping[str, int], n_embd: int):
        super().__init__()
        self.tokens = dict(sorted(tokens.items(), key=lambda token: token[1]))  # text -> id
        self.ids = torch.tensor([*self.tokens.values()], device="cpu")
        self.rows = nn.Parameter(torch.empty(len(tokens), n_embd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.rows, std=0.02)

    def forward(self, layer: Embedding | Linear, x: Tensor, y: Tensor) -> Tensor:
        """Embedding: ids x (T,) and y (T, C) -> (T, C). Output layer: x (M, C) and y (M, V) -> (M, vocab_size)."""
        self.ids = self.ids.to(x.device)  # copied in the first pass only: a GPU would wait for it
        rows = self.rows.to(y.dtype)
        if isinstance(layer, Linear):
            return self.put(y, F.linear(x, rows), -1)
        i = torch.searchsorted(self.ids, x).clamp(max=len(rows) - 1)
        return torch.where((self.ids[i] == x)[..., None], F.embedding(i, rows), y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = None if bias is None else self.put(bias, bias.new_zeros(len(self.ids)), 0)
        return self.put(weight, self.rows, 0), bias

    def put(self, old: Tensor, new: Tensor, dim: int) -> Tensor:
        """`old` with `new` at the ids of a dimension, which grows by those behind its end."""
        n = sum(i < old.shape[dim] for i in self.tokens.values())
        if n:
            old = old.index_copy(dim, self.ids[:n].to(old.device), new.narrow(dim, 0, n))
        return old if n == len(self.ids) else torch.cat((old, new.narrow(dim, n, len(self.ids) - n)), dim)


def add_tokens(tokenizer: "Tokenizer", options: Tokens) -> dict[str, int]:
    """Adds them to a tokenizer. Returns text -> id. Raises ValueError for an empty text, or one that is there twice."""
    texts = [text.strip() for text in options.add.split(",")] if options.add else []
    if "" in texts or len(set(texts)) < len(texts):
        raise ValueError(f"tokens.add is {options.add!r}; it must be different texts with commas between them")
    return dict(zip(texts, tokenizer.add(texts))) if texts else {}


def install(gpt: GPT, tokens: Mapping[str, int]) -> None:
    """Adds the rows of tokens, text -> id. Raises ValueError if the ids leave a gap behind the base's."""
    config, n = gpt.config, gpt.config.vocab_size
    beyond = sorted(i for i in tokens.values() if not 0 <= i < n)
    if beyond != list(range(n, n + len(beyond))):
        raise ValueError(f"tokens.add: the network has {n} tokens, and the tokenizer numbers new ones to {beyond[-1]}")
    gpt.config = replace(config, vocab_size=n + len(beyond))
    gpt.wte.deltas["tokens"] = delta = NewRows(tokens, config.n_embd)
    is_shared = config.tie or gpt.heads  # nobody reads an output layer that has another in its place
    gpt.lm_head.deltas["tokens"] = delta if is_shared else NewRows(tokens, config.n_embd)


@torch.no_grad()
def init_from_base(gpt: GPT, tokenizer: "Tokenizer") -> None:
    """Makes each row the mean of the rows of the pieces that its text has in `tokenizer`, the base's own."""
    for layer in (gpt.lm_head, gpt.wte):  # of a shared delta the embedding has the last word
        for row, text in zip(layer.deltas["tokens"].rows, layer.deltas["tokens"].tokens):
            row.copy_(layer.weight[tokenizer.encode(text) or slice(None)].float().mean(0))
