"""Answer a prompt with a network and, if you like, with what a finetuning run has trained on it.

    python generate/base.py --method_dir out/adapter --prompt "Name three fruits."

With --method_dir the method, its options and the prompt style are read from that folder. Without, the prompt is taken
as it is, unless --style names one.
"""

import json
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_model import hub, load
from lit_model.checkpoint import method_file, method_header, task_in
from lit_model.cli import choose_device, choose_dtype, cli
from lit_model.examples import check_style, render
from lit_model.files import read_yaml
from lit_model.generate import generate, stream_text
from lit_model.model import Config
from lit_model.quantize import Kind
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
    style: str = "auto"
    """text around the prompt: none, alpaca, chatml, chat (the checkpoint's template) or your own with {instruction} in
    it; auto: that of the run in method_dir, or none"""
    max_new_tokens: int = 100
    """most tokens to make"""
    temperature: float = 0.8
    """0: the likeliest token each time; higher: more varied"""
    top_k: int | None = None
    """sample from the k likeliest tokens only"""
    top_p: float | None = None
    """sample from the smallest set of tokens that has this probability"""
    stop: str | None = None
    """a text before which the answer ends, or a list of some: '["###", "Q:"]'"""
    seed: int | None = None
    """the same seed gives the same answer"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU"""
    quantize: Kind = "none"
    """keep the base weights in fewer bits, such as those that the run in method_dir was trained over"""
    device: str = "auto"
    """auto: the GPU if there is one"""


def main(options: Options) -> None:
    hub.fetch_if_demo(options.checkpoint_dir)
    Config.load(options.checkpoint_dir)  # says what is wrong with the folder before anything else is done
    if options.method_dir is not None:
        if (task := task_in(method_header(options.method_dir))) and task.head == "linear":
            raise ValueError(f"{options.method_dir} tells classes apart, by scripts/eval_data.py, and writes no text")
    tokenizer = Tokenizer(options.checkpoint_dir)
    style = prompt_style(options)
    check_style(style, tokenizer)
    stops = stops_in(options.stop)
    if "" in stops:
        raise ValueError("an empty --stop would end every answer before it begins")
    if options.input and style == "none":
        raise ValueError("--input goes with a --style, such as alpaca")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    gpt = load(options.checkpoint_dir, options.method_dir, device, dtype, options.quantize)

    text = options.prompt if style == "none" else render(style, options.prompt, options.input, tokenizer)
    ids = tokenizer.bos + tokenizer.encode(text)
    sampling = (options.temperature, options.top_k, options.top_p, tokenizer.stop_ids, options.seed)
    made = count()  # zip takes a number for each token
    tokens = (token for token, _ in zip(generate(gpt, ids, options.max_new_tokens, *sampling), made))
    print(text if style == "none" else "", end="", flush=True)
    began = time.perf_counter()
    try:
        for piece in stream_text(tokenizer, tokens, stops, after=ids if style == "none" else ()):
            print(piece, end="", flush=True)
    except ValueError as e:
        raise ValueError(f"{options.checkpoint_dir}: {e}") from None
    seconds = time.perf_counter() - began
    n = next(made)
    speed = f"{n} tokens in {seconds:.1f} s: {n / seconds:.1f} tokens/s"
    print(f"\n{speed} ({device.type}, {dtype})".replace("torch.", ""), file=sys.stderr)


def stops_in(text: str | None) -> list[str]:
    """The texts of --stop."""
    try:
        listed = json.loads(text or "[]")
    except json.JSONDecodeError:
        listed = None
    return listed if isinstance(listed, list) and all(isinstance(stop, str) for stop in listed) else [text]


def prompt_style(options: Options) -> str:
    """The style asked for, or that of the run in method_dir, or none."""
    if options.style != "auto" or options.method_dir is None:
        return "none" if options.style == "auto" else options.style
    path = method_file(options.method_dir).parent / "hparams.yaml"
    try:
        style = read_yaml(path)["prompt"]["style"]
    except (OSError, KeyError, TypeError):
        style = None
    if not isinstance(style, str):
        raise ValueError(f"{path} does not say which prompt style the run had; give --style")
    return style


if __name__ == "__main__":
    cli(main, Options, __doc__)
