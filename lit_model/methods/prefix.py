"""Prefix tuning (https://arxiv.org/abs/2101.00190): trained keys and values in front of every example, in each layer.

    attention over  K' = [P_K; K],  V' = [P_V; V]          P_K, P_V (P, nkv, hs) of this layer

The text's positions start after the prefix. It costs no tokens in the row, only keys that all of them see. Trained on
LLaMA-7B with P = 10: 10 * 2 * 32 * 4096 = 2,621,440 numbers.

No prefix leaves the base model as it is at the start: `zero` keys, too, take their share of every softmax.
The nearest to it is `tokens`: the keys and values that the base model has for a text (`init_from_base`), with their
positions' rotation in them, as if that text stood in front. `random` breaks the model first. `mlp` trains, in their
stead, an embedding and the paper's two-layer network, P = W_2 tanh(W_1 e), from random; only its output is saved
(`to_save`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Literal

import torch
from torch import Tensor, nn

from lit_model.decode import Decoder, Request
from lit_model.files import require_positive
from lit_model.model import GPT, Config
from lit_model.sampling import Sampling


@dataclass
class Prefix:
    """Prefix tuning."""

    length: int = 10
    """number of virtual positions P in front of every example"""
    init: Literal["tokens", "zero", "random"] = "tokens"
    """the keys and values of `text`, zeros, or normal numbers"""
    text: str = "Below is an instruction that describes a task. Write a response that appropriately completes it."
    """for init tokens: its first tokens, repeated if they are too few"""
    mlp: int = 0
    """width of the network that makes the prefix in training, such as 512; 0: train the prefix itself"""


class PrefixKeys(nn.Module):
    def __init__(self, config: Config, options: Prefix):
        super().__init__()
        self.length, self.random = options.length, options.init == "random"
        self.shape = config.n_layer, 2, config.n_kv_head, config.head_size
        if options.mlp:
            n_out = config.n_layer * 2 * config.n_kv_head * config.head_size
            self.embedding = nn.Parameter(torch.empty(options.length, config.n_embd))
            self.mlp = nn.Sequential(nn.Linear(config.n_embd, options.mlp), nn.Tanh(), nn.Linear(options.mlp, n_out))
        else:
            self.mlp = None
            self.kv = nn.Parameter(torch.empty(config.n_layer, 2, options.length, config.n_kv_head, config.head_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.mlp is not None:
            nn.init.normal_(self.embedding)
        elif self.random:
            nn.init.normal_(self.kv)
        else:
            nn.init.zeros_(self.kv)

    def forward(self) -> Tensor:  # (layers, 2, P, nkv, hs)
        if self.mlp is None:
            return self.kv
        return self.mlp(self.embedding).view(self.length, *self.shape).permute(1, 2, 0, 3, 4)


def install(gpt: GPT, options: Prefix) -> None:
    """Puts a prefix in front of every example. Raises ValueError if it is empty."""
    require_positive(options, "length")
    gpt.virtual_keys["prefix"] = PrefixKeys(gpt.config, options)


@torch.no_grad()
def init_from_base(gpt: GPT, ids: Sequence[int]) -> None:
    """Makes the prefix what the base model has for the tokens `ids`, repeated or cut to its length.

    Raises ValueError if there are none.
    """
    if not ids:
        raise ValueError("prefix.text is empty: give it a text, or --prefix.init zero")
    prefix = gpt.virtual_keys.pop("prefix")
    decoder = Decoder.of(gpt, [Request([*islice(cycle(ids), prefix.length)], 1, Sampling(0))])
    prefix.kv.copy_(decoder.kv[:, :, decoder.lines[0][: prefix.length]])
    gpt.virtual_keys["prefix"] = prefix


def to_save(gpt: GPT, tensors: dict[str, Tensor], options: Prefix) -> tuple[str, Prefix, dict[str, Tensor]]:
    """What a method file holds: the prefix itself, without the network that made it in training."""
    start = "virtual_keys.prefix."
    own = {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
    kv = torch.func.functional_call(gpt.virtual_keys["prefix"], own).detach().contiguous()
    return "prefix", replace(options, mlp=0), tensors | {f"{start}kv": kv}
