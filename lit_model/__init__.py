"""A minimal GPT and LLaMA in PyTorch, with every method of parameter-efficient finetuning written where it acts."""

from lit_model.generate import generate
from lit_model.load import load
from lit_model.model import GPT, Config

__all__ = ["GPT", "Config", "generate", "load"]
