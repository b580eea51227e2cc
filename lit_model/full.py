"""Full finetuning: every parameter of the network is trained, in float32, whatever dtype the activations have.

AdamW at a learning rate of 1e-5 moves a bfloat16 weight of 0.02 by less than its last bit, so it would not move at all.
"""

from lit_model import model
from lit_model.model import GPT, Config  # noqa: F401  a method's file exports these names; here they are the base's own


def install(gpt: model.GPT, options: None = None) -> None:
    """Adds nothing."""


def trainable(name: str, config: model.Config | None = None) -> bool:
    return True
