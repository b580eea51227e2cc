"""Answer a prompt with a network and, if you like, with what a finetuning run has trained on it.

    python generate/base.py --method_dir out/adapter --prompt "Name three fruits."

With --method_dir the method, its options and the prompt style are read from that folder. Without, the prompt is taken
as it is, unless --style names one.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model import hub, load
from lit_model.cli import cli
from lit_model.data import render
from lit_model.generate import generate, stream_text
from lit_model.tokenizer import Tokenizer


@dataclass
class Options:
    """Options."""

    prompt: str = "The capital of France is"
    """the instruction, or without a style the text to continue"""
    input: str = ""
    """the instruction's input, if it has one"""
    checkpoint_dir: Path = hub.DEMO_CHECKPOINT
    """folder of the base network; by default the demo's, fetched once"""
    method_dir: Path | None = None
    """out_dir of a finetuning run on that base"""
    style: Literal["auto", "none", "alpaca", "chatml"] = "auto"
    """text around the prompt; auto: that of the run in method_dir, or none"""
    max_new_tokens: int = 100
    """most tokens to make"""
    temperature: float = 0.8
    """0: the likeliest token each time; higher: more varied"""
    top_k: int | None = None
    """sample from the k likeliest tokens only"""
    top_p: float | None = None
    """sample from the smallest set of tokens that has this probability"""
    stop: list[str] = field(default_factory=list)
    """texts before which the answer ends, as a list: '["###"]'"""
    seed: int | None = None
    """the same seed gives the same answer"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU"""
    device: str = "auto"
    """auto: the GPU if there is one"""


def main(options: Options) -> None:
    if options.checkpoint_dir == hub.DEMO_CHECKPOINT:
        hub.fetch_demo_model()
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"cuda": "bfloat16"}.get(device, "float32") if options.dtype == "auto" else options.dtype
    tokenizer = Tokenizer(options.checkpoint_dir)
    gpt = load(options.checkpoint_dir, options.method_dir, device, getattr(torch, dtype))

    style = options.style
    if style == "auto":
        run = options.method_dir / "hparams.yaml" if options.method_dir else None
        style = yaml.safe_load(run.read_text())["prompt"]["style"] if run else "none"
    text = options.prompt if style == "none" else render(style, options.prompt, options.input)
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    if style == "none":
        print(text, end="", flush=True)

    began, n = time.perf_counter(), 0

    def counted():
        nonlocal n
        sampling = (options.temperature, options.top_k, options.top_p, [tokenizer.eos_id], options.seed)
        for token in generate(gpt, ids, options.max_new_tokens, *sampling):
            n += 1
            yield token

    for piece in stream_text(tokenizer, counted(), options.stop):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n{n} tokens in {seconds:.1f} s: {n / seconds:.1f} tokens/s ({device}, {dtype})", file=sys.stderr)


if __name__ == "__main__":
    cli(main, Options, __doc__)
