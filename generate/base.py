"""Answer a prompt with a network and, if you like, with what a finetuning run has trained on it.

    python generate/base.py --method_dir out/adapter --prompt "Name three fruits."
    python generate/base.py --method_dir out/adapter --prompts questions.jsonl --out answers.jsonl

With --method_dir the method, its options and the style are read from that folder. Without, the prompt is taken as it
is, unless --style names one. A row of --prompts has an instruction, perhaps with an input, or a prompt, or the messages
of a chat; --out gets the rows with their answers, in order. The same command again resumes.
"""

import json
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_model import GPT
from lit_model.cli import cli
from lit_model.data.examples import chat_ids, prompt_ids, render, validate_style
from lit_model.data.formats import files_behind, values_of
from lit_model.data.tokenizer import Tokenizer
from lit_model.files import read_yaml, reading, write_text
from lit_model.generate import generate_batch, stream_text
from lit_model.load import NetworkOptions, is_peft, load_tokenizer, method_dirs, method_file
from lit_model.sampling import Sampling


@dataclass
class Options(NetworkOptions):
    prompt: str = "The capital of France is"
    """instruction, or without a style the text to continue"""
    prompts: Path | None = None
    """file of prompts to answer instead, such as a .jsonl or .csv file, many at a time"""
    out: Path = Path("out/answers.jsonl")
    """.jsonl file for the rows of --prompts and their answers"""
    batch_size: int = 32
    """prompts of a file that are answered at a time"""
    input: str = ""
    """input of the instruction, if it has one"""
    system: str = ""
    """system prompt of a chat, as a run on chats was asked with"""
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
    min_p: float | None = None
    """sample from tokens with at least this share of the likeliest one's probability"""
    repetition_penalty: float = 1.0
    """above 1: tokens that are in the text already become less likely"""
    stop: str = ""
    """text before which the answer ends, or a list of them: '["###", "\\n\\n"]'; a special token is one, too"""
    seed: int | None = None
    """the same seed gives the same answer"""


def main(options: Options) -> None:
    gpt = options.load(options.method_dir)
    if gpt.heads:
        raise ValueError(f"{options.method_dir} classifies, by scripts/evaluate.py, and writes no text")
    tokenizer = load_tokenizer(options.checkpoint_dir, options.method_dir)
    style = options.style
    if style == "auto":
        style = style_of(method_dirs(options.method_dir)[0]) if options.method_dir else "none"
    validate_style(style, tokenizer)
    stops = stop_texts(options.stop)
    more = dict(min_p=options.min_p, repetition_penalty=options.repetition_penalty)
    way = Sampling(options.temperature, options.top_k, options.top_p, **more, seed=options.seed)
    stop_ids = tokenizer.stop_ids + tokenizer.special_ids(stops)
    if options.prompts is not None:
        answer_file(options, gpt, tokenizer, style, way, stops, stop_ids)
        return
    text = render(style, options.prompt, options.input, tokenizer, options.system)
    ids = prompt_ids(tokenizer, style, text)
    counter = count()  # zip takes a number for each token
    made = generate_batch(gpt, [ids], options.max_new_tokens, [way], stop_ids)
    tokens = (token for (_, token), _ in zip(made, counter))
    pieces = stream_text(tokenizer, tokens, stops, after=ids if style == "none" else ())
    began = time.perf_counter()
    print(text if style == "none" else "", next(pieces, ""), sep="", end="", flush=True)  # nothing before an error
    for piece in pieces:
        print(piece, end="", flush=True)
    seconds, n = time.perf_counter() - began, next(counter)
    speed = f"{n} tokens in {seconds:.1f} s: {n / seconds:.1f} tokens/s"
    print(f"\n{speed} ({gpt.device.type}, {gpt.dtype})".replace("torch.", ""), file=sys.stderr)


def answer_file(
    options: Options, gpt: GPT, tokenizer: Tokenizer, style: str, way: Sampling, stops: list[str], stop_ids: list[int]
) -> None:
    """Answers the rows of `options.prompts` that `options.out` does not hold yet. With a seed row i has seed + i, so
    that its answer depends on no other."""
    with reading(options.prompts):
        rows = [dict(value) for path in files_behind(options.prompts) for _, value in values_of(path)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with reading(options.out):
        text = options.out.read_text(encoding="utf-8") if options.out.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # without the line that a sudden end has cut off
        done = [json.loads(line) for line in whole.splitlines()]
        if [{**row, "answer": made.get("answer")} for row, made in zip(rows, done)] != done:
            raise ValueError("it holds answers to other prompts: name another --out, or remove it")
    if whole != text:
        write_text(options.out, whole)
    with open(options.out, "a", encoding="utf-8") as file, tqdm(total=len(rows), initial=len(done)) as bar:
        size = max(1, options.batch_size)
        for start in range(len(done), len(rows), size):
            batch = rows[start : start + size]
            with reading(options.prompts):
                prompts = [row_ids(row, tokenizer, style, options.system) for row in batch]
                found: list[list[int]] = [[] for _ in batch]
                numbers = range(start, start + len(batch))
                ways = [way if way.seed is None else way._replace(seed=way.seed + n) for n in numbers]
                for i, token in generate_batch(gpt, prompts, options.max_new_tokens, ways, stop_ids):
                    found[i].append(token)
            for row, tokens in zip(batch, found, strict=True):
                answer = "".join(stream_text(tokenizer, tokens, stops))
                file.write(json.dumps({**row, "answer": answer}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))
    print(f"{options.out}: {len(rows)} answers")


def row_ids(row: dict[str, Any], tokenizer: Tokenizer, style: str, system: str) -> list[int]:
    """The ids that the answer to a row starts from. Raises ValueError for a row without a prompt."""
    if "messages" in row:
        return chat_ids(tokenizer, style if style == "chatml" else "chat", row["messages"], row.get("tools"))
    text = next((row[key] for key in ("instruction", "prompt", "text") if isinstance(row.get(key), str)), None)
    if text is None:
        raise ValueError(f"a row needs instruction, prompt, text or messages; it is {row!r:.80}")
    return prompt_ids(tokenizer, style, render(style, text, row.get("input") or "", tokenizer, system))


def stop_texts(text: str) -> list[str]:
    """The texts of --stop, but for an empty one, which would end every answer before it begins."""
    try:
        listed = json.loads(text)
    except json.JSONDecodeError:
        listed = None
    texts = listed if isinstance(listed, list) and all(isinstance(stop, str) for stop in listed) else [text]
    return [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in texts if stop]


def style_of(method_dir: Path) -> str:
    """That of a finetuning run; chat for a PEFT folder, which names none."""
    path = method_file(method_dir).parent / "hparams.yaml"
    try:
        return "chat" if is_peft(method_dir) else str(read_yaml(path)["examples"]["style"])
    except (OSError, KeyError, TypeError):
        raise ValueError(
            f"{path} does not say which style the run had; generate/base.py takes a --style instead"
        ) from None


if __name__ == "__main__":
    cli(main, Options, __doc__)
