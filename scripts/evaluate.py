"""How well does a network classify the rows of a file, by their text and label?

    python scripts/evaluate.py --data test.csv --method_dir out/lora     what a finetuning run has learned
    python scripts/evaluate.py --data test.csv --shots 8 --shots_from train.csv     in-context learning, no training

The label that is likeliest as the words after a text is taken. Demonstrations stand before every text; they are
computed once a row.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lit_model.cli import cli
from lit_model.data import labels
from lit_model.data.examples import ExampleOptions
from lit_model.data.rows import read_rows
from lit_model.data.score import judge
from lit_model.data.tokenizer import Tokenizer
from lit_model.load import NetworkOptions, load_tokenizer, method_dirs, method_header
from lit_model.weights import demo


@dataclass
class Options(NetworkOptions):
    data: Path
    """.csv, .json or .jsonl file of rows with text and label"""
    method_dir: Path | None = None
    """out_dir of a finetuning run on that base; its labels and style are taken"""
    shots: int = 0
    """number of demonstrations, as many of each label as of another"""
    shots_from: Path | None = None
    """file of the demonstrations, with rows that are not in --data"""
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    max_examples: int | None = None
    """judge only this many rows, the first"""
    row_tokens: int = 4096
    """about this many tokens go through the network at a time"""
    seed: int = 0
    """seed of the choice of demonstrations"""
    draw: Path | None = None
    """PNG file for the confusion matrix"""


def main(options: Options) -> None:
    if options.shots < 0 or (options.shots > 0) != (options.shots_from is not None):
        raise ValueError("--shots and --shots_from go together: how many demonstrations, and from which rows")
    demo.fetch_if_demo(options.checkpoint_dir)
    tokenizer = load_tokenizer(options.checkpoint_dir, options.method_dir)
    rows = labelled(options.data, options.examples.strict)
    task = next((task for d in method_dirs(options.method_dir) if (task := method_header(d)["task"])), None)
    if options.method_dir and task is None:
        raise ValueError(f"{options.method_dir} was not trained on rows of text and label")
    if options.shots and task and task.head == "linear":
        raise ValueError(f"{options.method_dir} has a linear head, which learns nothing from --shots")
    shown = demonstrations(shots_from(options, rows), options.shots, options.seed) if options.shots else []
    task = task or labels.task_of(rows + shown, "labels", options.examples.style)
    rows = rows[: options.max_examples]
    examples = labels.examples(rows, tokenizer, options.examples, task, bos=not shown)
    before = demonstration_ids(shown, tokenizer, options.examples, task)
    gpt = options.load(options.method_dir)
    verdict = judge(gpt, examples, task, labels.label_ids(task, tokenizer), options.row_tokens, before)
    print(f"{verdict}, {options.shots} demonstrations of {len(before)} tokens" if shown else verdict)
    if options.draw:
        verdict.draw(options.draw)


def shots_from(options: Options, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows to take demonstrations from: none that is judged."""
    judged = {row["text"] for row in rows}
    all_rows = labelled(options.shots_from, options.examples.strict)
    others = [row for row in all_rows if row["text"] not in judged]
    if len(others) < len(all_rows):
        print(f"{len(all_rows) - len(others)} rows of {options.shots_from} are judged, too: they are not shown")
    return others


def labelled(path: Path, strict: bool) -> list[dict[str, str]]:
    rows = read_rows(path, strict=strict)
    if not all("label" in row for row in rows):
        raise ValueError(f"{path} has rows without text and label")
    return rows


def demonstrations(rows: list[dict[str, str]], n: int, seed: int) -> list[dict[str, str]]:
    """`n` rows in random order, each label as often as another, give or take one. Raises ValueError for too few."""
    if n > len(rows):
        raise ValueError(f"--shots {n}: there are {len(rows)} rows to show")
    rng = np.random.default_rng(seed)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    seen: dict[str, int] = {}
    rounds = []  # how many of its label came before each row: a round has one of each label
    for row in shuffled:
        rounds.append(seen.get(row["label"], 0))
        seen[row["label"]] = rounds[-1] + 1
    chosen = sorted(range(len(shuffled)), key=lambda i: rounds[i])[:n]
    return [shuffled[i] for i in rng.permutation(chosen)]


def demonstration_ids(
    rows: list[dict[str, str]], tokenizer: Tokenizer, options: ExampleOptions, task: labels.Task
) -> list[int]:
    """The demonstrations one after the other, an empty line behind each, as a text begins; without any nothing."""
    gap = tokenizer.encode_after("a", "\n\n")
    ids = [*tokenizer.bos] if rows else []
    for e in labels.examples(rows, tokenizer, options, task, bos=False):
        ids += [*e.ids.tolist(), *gap]
    return ids


if __name__ == "__main__":
    cli(main, Options, __doc__)
