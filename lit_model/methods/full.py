"""Full finetuning: every parameter of the network is trained, in float32, whatever dtype the activations have.

AdamW at a learning rate of 1e-5 moves a bfloat16 weight of 0.02 by less than its last bit, so it would not move at all.
"""

from lit_model.model import GPT


def install(gpt: GPT, options: None = None) -> None:
    """Un-freezes everything."""
    gpt.requires_grad_(True)
