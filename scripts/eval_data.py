"""How well does a network tell the rows of a file apart, by its text and label columns?

    python scripts/eval_data.py --data test.csv --method_dir out/lora     what a finetuning run has learned
    python scripts/eval_data.py --data test.csv --shots 8 --shots_from train.csv      in-context learning, no training

The label that is likeliest as the words after a text is taken. Demonstrations stand before every text; their keys and
values are computed once.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from lit_model import classify, hub, load
from lit_model.checkpoint import method_header, task_in
from lit_model.cli import choose_device, choose_dtype, cli
from lit_model.data import PromptOptions, read_rows
from lit_model.quantize import Kind
from lit_model.tokenizer import Tokenizer


@dataclass
class Options:
    """Options."""

    data: Path
    """.csv, .json or .jsonl file of rows with text and label"""
    checkpoint_dir: Path = hub.DEMO_CHECKPOINT
    """folder of the base network; by default the demo's, fetched once"""
    method_dir: Path | None = None
    """out_dir of a finetuning run on that base; its labels and question are taken"""
    shots: int = 0
    """demonstrations, as many of each label as possible"""
    shots_from: Path | None = None
    """file of the demonstrations, with rows that are not in --data"""
    prompt: PromptOptions = field(default_factory=PromptOptions)
    max_examples: int | None = None
    """only the first so many rows"""
    row_tokens: int = 4096
    """tokens that go through the network at a time, about"""
    seed: int = 0
    """of the choice of demonstrations"""
    draw: Path | None = None
    """PNG file for the confusion matrix"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU"""
    quantize: Kind = "none"
    """keep the base weights in fewer bits, as in training"""
    device: str = "auto"
    """auto: the GPU if there is one; or cpu, cuda, cuda:1"""


def main(options: Options) -> None:
    if options.shots < 0:
        raise ValueError(f"--shots is {options.shots}; it must be at least 0")
    if (options.shots > 0) != (options.shots_from is not None):
        raise ValueError("--shots and --shots_from go together: how many demonstrations, and from which rows")
    hub.fetch_if_demo(options.checkpoint_dir)
    if options.max_examples is not None and options.max_examples < 1:
        raise ValueError(f"max_examples is {options.max_examples}; it must be at least 1")
    tokenizer = Tokenizer(options.checkpoint_dir)
    rows = labelled(options.data)
    task = task_in(method_header(options.method_dir)) if options.method_dir else None
    if options.method_dir and task is None:
        raise ValueError(f"{options.method_dir} was not trained on rows of text and label")
    if options.shots and task and task.head == "linear":
        raise ValueError(f"{options.method_dir} has a linear head, which learns nothing from --shots")
    shown = demonstrations(shots_from(options, rows), options.shots, options.seed) if options.shots else []
    task = task or classify.task_of(rows + shown, "labels", options.prompt.question)
    rows = rows[: options.max_examples]
    device = choose_device(options.device)
    examples = classify.examples(rows, tokenizer, options.prompt, task, bos=not shown)
    before = demonstration_ids(shown, tokenizer, options.prompt, task)
    dtype = choose_dtype(options.dtype, device)
    gpt = load(options.checkpoint_dir, options.method_dir, device, dtype, options.quantize)
    verdict = classify.judge(gpt, examples, task, classify.label_ids(task, tokenizer), options.row_tokens, before)
    print(f"{verdict}, {options.shots} demonstrations of {len(before)} tokens" if shown else verdict)
    if options.draw:
        verdict.draw(options.draw)


def shots_from(options: Options, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows to take demonstrations from: none that is judged."""
    asked = {row["text"] for row in rows}
    all_rows = labelled(options.shots_from)
    others = [row for row in all_rows if row["text"] not in asked]
    if len(others) < len(all_rows):
        print(f"{len(all_rows) - len(others)} rows of {options.shots_from} are judged, too: they are not shown")
    return others


def labelled(path: Path) -> list[dict[str, str]]:
    rows = read_rows(path)
    if "label" not in rows[0]:
        raise ValueError(f"{path} has no rows with text and label")
    return rows


def demonstrations(rows: list[dict[str, str]], n: int, seed: int) -> list[dict[str, str]]:
    """`n` rows in random order, of each label as many, give or take one. Raises ValueError if there are fewer."""
    if not 0 <= n <= len(rows):
        raise ValueError(f"--shots {n}: there are {len(rows)} rows to show")
    rng = np.random.default_rng(seed)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    seen: dict[str, int] = {}
    turn = []  # how many of its label came before each row: those of the same turn are one of each label
    for row in shuffled:
        turn.append(seen.get(row["label"], 0))
        seen[row["label"]] = turn[-1] + 1
    chosen = sorted(range(len(shuffled)), key=lambda i: turn[i])[:n]
    return [shuffled[i] for i in rng.permutation(chosen)]


def demonstration_ids(
    rows: list[dict[str, str]], tokenizer: Tokenizer, prompt: PromptOptions, task: classify.Task
) -> list[int]:
    """The demonstrations one after the other, an empty line behind each, as a text begins; of none: nothing."""
    (gap,) = tokenizer.encode_within(["\n\n"])
    ids = [*tokenizer.bos] if rows else []
    for e in classify.examples(rows, tokenizer, prompt, task, bos=False):
        ids += [*e.ids.tolist(), *gap]
    return ids


if __name__ == "__main__":
    cli(main, Options, __doc__)
