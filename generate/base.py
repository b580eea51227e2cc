"""Answer a prompt with a network and, if you like, with what a finetuning run has trained on it.

    python generate/base.py --method_dir out/adapter --prompt "Name three fruits."

With --method_dir the method, its options and the style are read from that folder. Without, the prompt is taken as it
is, unless --style names one.
"""

import json
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

from lit_model import load
from lit_model.cli import choose_device, choose_dtype, cli
from lit_model.data.examples import prompt_ids, render, validate_style
from lit_model.files import read_yaml, reading
from lit_model.generate import generate, stream_text
from lit_model.load import load_tokenizer, method_dirs, method_file
from lit_model.weights import demo


@dataclass
class Options:
    """Options."""

    prompt: str = "The capital of France is"
    """instruction, or without a style the text to continue"""
    input: str = ""
    """input of the instruction, if it has one"""
    system: str = ""
    """system prompt of a chat, as a run on chats was asked with"""
    checkpoint_dir: Path = demo.DEMO_CHECKPOINT
    """Hugging Face folder of the base network; default: the demo's, fetched once"""
    method_dir: Path | None = None
    """out_dir of a finetuning run on that base"""
    style: str = "auto"
    """text around the prompt: none, alpaca, chatml, chat (the checkpoint's template) or your own with {instruction} in
    it; auto: that of the run in method_dir, or none"""
    max_new_tokens: int = 100
    """maximum number of new tokens"""
    temperature: float = 0.8
    """0: the likeliest token each time; higher: more varied"""
    top_k: int | None = None
    """sample from the k likeliest tokens only"""
    top_p: float | None = None
    """sample from the smallest set of tokens that has this probability"""
    stop: str = ""
    """text before which the answer ends, or a list of them: '["###", "\\n\\n"]'; a special token is one, too"""
    seed: int | None = None
    """the same seed gives the same answer"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU"""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """form of the base weights, such as that of the run in method_dir"""
    device: str = "auto"
    """auto: the GPU if there is one"""


def main(options: Options) -> None:
    demo.fetch_if_demo(options.checkpoint_dir)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    gpt = load(options.checkpoint_dir, options.method_dir, device, dtype, options.quantize)
    if gpt.heads:
        raise ValueError(f"{options.method_dir} classifies, by scripts/evaluate.py, and writes no text")
    tokenizer = load_tokenizer(options.checkpoint_dir, options.method_dir)
    style = prompt_style(options)
    validate_style(style, tokenizer)
    stops = stop_texts(options.stop)
    if options.input and style == "none":
        raise ValueError("--input goes with a --style, such as alpaca")

    text = render(style, options.prompt, options.input, tokenizer, options.system)
    ids = prompt_ids(tokenizer, style, text)
    stop_ids = tokenizer.stop_ids + tokenizer.special_ids(stops)
    sampling = (options.temperature, options.top_k, options.top_p, stop_ids, options.seed)
    counter = count()  # zip takes a number for each token
    with reading(options.checkpoint_dir):
        gpt.config.check_tokens(max(ids, default=0))
    tokens = (token for token, _ in zip(generate(gpt, ids, options.max_new_tokens, *sampling), counter))
    pieces = stream_text(tokenizer, tokens, stops, after=ids if style == "none" else ())
    began = time.perf_counter()
    print(text if style == "none" else "", next(pieces, ""), sep="", end="", flush=True)  # nothing before an error
    for piece in pieces:
        print(piece, end="", flush=True)
    seconds, n = time.perf_counter() - began, next(counter)
    speed = f"{n} tokens in {seconds:.1f} s: {n / seconds:.1f} tokens/s"
    print(f"\n{speed} ({device.type}, {dtype})".replace("torch.", ""), file=sys.stderr)


def stop_texts(text: str) -> list[str]:
    """The texts of --stop, but for an empty one, which would end every answer before it begins."""
    try:
        listed = json.loads(text)
    except json.JSONDecodeError:
        listed = None
    texts = listed if isinstance(listed, list) and all(isinstance(stop, str) for stop in listed) else [text]
    return [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in texts if stop]


def prompt_style(options: Options) -> str:
    """The style that was asked for, or that of the run in method_dir, or none."""
    if options.style != "auto" or options.method_dir is None:
        return "none" if options.style == "auto" else options.style
    path = method_file(method_dirs(options.method_dir)[0]).parent / "hparams.yaml"
    try:
        return str(read_yaml(path)["examples"]["style"])
    except (OSError, KeyError, TypeError):
        raise ValueError(f"{path} does not say which style the run had; give --style") from None


if __name__ == "__main__":
    cli(main, Options, __doc__)
