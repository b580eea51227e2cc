"""How many operations training takes, and how many a GPU can do."""

import re
from collections.abc import Iterator

import torch

from lit_model.model import GPT, Linear

# TFLOP/s of matrix products in bf16 without sparsity, from the makers' data sheets, half of those in fp8; the first
# name that fits counts
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165,
}  # fmt: skip


def products(gpt: GPT, n_computed: float, n_targets: float) -> Iterator[tuple[Linear, float, bool, bool]]:
    """The matrix products that training on this many tokens takes, without attention scores: for each linear layer the
    number of tokens, whether it also takes one towards its input, and whether one for its weight's gradient.

    Blocks below the lowest one that is trained have no backward pass. Only the targets need the output layer and, in
    the last block, all but keys and values.
    """
    trains = [any(p.requires_grad for p in block.parameters()) for block in gpt.blocks]
    lowest = trains.index(True) if any(trains) else len(trains)  # none: only the output layer is trained
    if len(gpt.virtual_tokens) or len(gpt.virtual_keys):
        lowest = 0
    for i, block in enumerate(gpt.blocks):
        for linear in (m for m in block.modules() if isinstance(m, Linear)):
            in_last = i == len(gpt.blocks) - 1 and linear not in (block.attn.k_proj, block.attn.v_proj)
            is_trained = linear.weight is not None and linear.weight.requires_grad
            yield linear, n_targets if in_last else n_computed, i >= lowest, is_trained
    yield gpt.head, n_targets, True, gpt.head.weight.requires_grad


def n_flops(gpt: GPT, n_computed: float, n_targets: float) -> float:
    return sum(
        2 * (1 + backward + trained) * linear.in_features * linear.out_features * n
        for linear, n, backward, trained in products(gpt, n_computed, n_targets)
    )


def peak_tflops(gpt: GPT) -> int | None:
    """The GPU's, in the type that most products of `gpt` are in; None where it is not known."""
    name = torch.cuda.get_device_name()
    known = (tflops for model, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{model}\b", name))
    in_fp8 = any(type(m).__name__ == "FP8Linear" for m in gpt.modules())
    return next((tflops * (1 + in_fp8) for tflops in known), None)
