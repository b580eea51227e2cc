"""Classification with a language model: which of a few labels does a text have?

    head labels   the label is the words that follow the text, and that with the highest log-probability wins (score.py)
    head linear   a layer of its own, trained beside the method, reads the last token; it starts at zero

A linear head needs nothing new below it: an example is the text's tokens and then the number of its class, which the
last token has to predict, as it has to predict a word in any other example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lit_model.data.examples import CUT, ExampleOptions
from lit_model.data.rows import Notes, Row, place
from lit_model.data.tokenizer import Tokenizer
from lit_model.model import GPT, Linear
from lit_model.packing import Example

STYLE = "{text}\nLabel:"


@dataclass
class Task:
    """What is to be classified, and how it is asked."""

    classes: list[str]
    head: Literal["labels", "linear"]
    style: str = STYLE
    """the text around a text; the label follows"""


def task_of(rows: Sequence[dict[str, str]], head: str, style: str = STYLE) -> Task:
    """The task of rows with text and label. style: taken if there is {text} in it.

    Raises ValueError if there are not two classes, or one has no name.
    """
    classes = sorted({row["label"] for row in rows})
    if len(classes) < 2 or not classes[0]:
        what = f"all rows have the label {classes[0]!r}" if len(classes) < 2 else "the label of a row is empty"
        raise ValueError(f"{what}; there is nothing to classify")
    return Task(classes, head, style if "{text}" in style else STYLE)


def install(gpt: GPT, n_classes: int) -> None:
    """Puts a linear head in the place of the output layer, which is no longer trained, nor what hangs on it."""
    gpt.lm_head.deltas.clear()
    for p in gpt.lm_head.parameters():
        if p is not gpt.wte.weight:  # a tied one is the embedding, too
            p.requires_grad_(False)
    gpt.heads["linear"] = LinearHead(gpt.config.n_embd, n_classes, bias=True)


class LinearHead(Linear):
    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)


def label_ids(task: Task, tokenizer: Tokenizer) -> list[list[int]]:
    """What stands for each class after a prompt: its token ids; with a linear head its number.

    Raises ValueError if one class is the beginning of another.
    """
    if task.head == "linear":
        return [[i] for i in range(len(task.classes))]
    prompt = task.style.replace("\\n", "\n").replace("{text}", "text")
    ids = [tokenizer.encode_after(prompt, f" {name}") for name in task.classes]
    for short, a in zip(task.classes, ids):
        for long, b in zip(task.classes, ids):
            if long != short and a == b[: len(a)]:
                raise ValueError(f"the label {long!r} begins with {short!r}: take --head linear")
    return ids


def examples(
    rows: Sequence[Row], tokenizer: Tokenizer, options: ExampleOptions, task: Task, bos: bool = True
) -> list[Example]:
    """Token examples of rows with text and label, in order. A text that is too long loses its end. With `bos` each
    begins with the token that texts of this family begin with.

    Raises ValueError for a label that is not in `task`, or if `options.max_length` leaves no room for a text.
    """
    before, _, after = task.style.replace("\\n", "\n").partition("{text}")
    first, labels = tokenizer.bos if bos else [], label_ids(task, tokenizer)
    number = {name: i for i, name in enumerate(task.classes)}
    notes, examples = Notes(), []
    texts = [before + row["text"].strip() for row in rows]
    encoded = tokenizer.encode_with_places(text + after for text in texts)
    for row, text, (ids, places) in zip(rows, texts, encoded, strict=True):
        if row["label"] not in number:
            raise ValueError(f"the label {row['label']!r} was never seen; there are {', '.join(task.classes)}")
        n = int((places < len(text)).sum())
        room = options.max_length - len(first) - (len(ids) - n) - max(map(len, labels))
        if room <= (places < len(before)).sum():
            what = f"examples.max_length {options.max_length} leaves no room for a text beside {task.style!r}"
            raise ValueError(what)
        if n > room:
            notes.add(CUT, place(row))
        prompt = [*first, *ids[: min(n, room)], *ids[n:]]
        examples.append(Example(np.array(prompt + labels[number[row["label"]]], dtype=np.int32), len(prompt)))
    notes.say(len(rows), "rows")
    return examples


def numbers(examples: Sequence[Example], labels: Sequence[Sequence[int]]) -> list[int]:
    """The class of each example, by what stands after its prompt."""
    number = {tuple(label): i for i, label in enumerate(labels)}
    return [number[tuple(e.ids[e.first_target :].tolist())] for e in examples]


@dataclass
class Verdict:
    """How predicted labels compare with the true ones."""

    truth: Sequence[str]
    predicted: Sequence[str]
    classes: Sequence[str]

    def __post_init__(self):
        from sklearn.metrics import accuracy_score, f1_score  # whose import takes a second

        self.accuracy = float(accuracy_score(self.truth, self.predicted))
        self.macro_f1 = float(f1_score(self.truth, self.predicted, average="macro", zero_division=0))

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, macro F1 {self.macro_f1:.4f} on {len(self.truth)} rows"

    def draw(self, path: Path) -> None:
        """The confusion matrix: how many rows of each class were taken for which."""
        from matplotlib.figure import Figure
        from sklearn.metrics import ConfusionMatrixDisplay

        n = len(self.classes)
        figure = Figure(figsize=(2 + 0.8 * n, 2 + 0.7 * n), layout="constrained")
        shape = dict(colorbar=False, xticks_rotation="vertical" if n > 4 else "horizontal", ax=figure.subplots())
        ConfusionMatrixDisplay.from_predictions(self.truth, self.predicted, labels=self.classes, **shape)
        figure.savefig(path, dpi=120)
