"""Classification with a language model: which of a few labels does a text have?

    head labels   the label is the words that follow the text and a question, and that with the highest log-probability
                  wins; it is a sum over tokens, so that labels of like length compare best
    head linear   a layer of its own, trained beside the method, reads the last token (it begins at zero)

A linear head needs nothing new below it: an example is the text's tokens and then the number of its class, which the
last token has to predict, as it has to predict a word in any other example.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lit_model.attention import KVCache
from lit_model.data import PromptOptions
from lit_model.model import GPT, Linear
from lit_model.packing import Example, Segment, lay_out
from lit_model.tokenizer import Tokenizer


@dataclass
class Task:
    """What is to be told apart."""

    classes: list[str]
    head: Literal["labels", "linear"]
    question: str
    """stands between the text and the label"""


def task_of(rows: Sequence[dict[str, str]], head: str, question: str) -> Task:
    """Raises ValueError if there is only one class."""
    classes = sorted({row["label"] for row in rows})
    if len(classes) < 2:
        raise ValueError(f"all rows have the label {classes[0]!r}; there is nothing to tell apart")
    return Task(classes, head, question)


def install(gpt: GPT, n_classes: int) -> None:
    """Puts a linear head in the place of the output layer, with what a method has added to that."""
    gpt.lm_head.deltas.clear()
    gpt.heads["linear"] = LinearHead(gpt.config.n_embd, n_classes, bias=True)


class LinearHead(Linear):
    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)


def label_ids(task: Task, tokenizer: Tokenizer) -> list[list[int]]:
    """What stands for each class after a prompt. Raises ValueError if two begin alike to the end of one of them."""
    if task.head == "linear":
        return [[i] for i in range(len(task.classes))]
    ids = tokenizer.encode_within([f" {name}" for name in task.classes])
    for i, a in enumerate(ids):
        for j, b in enumerate(ids):
            if i != j and a == b[: len(a)]:
                raise ValueError(f"the label {task.classes[j]!r} begins with {task.classes[i]!r}: take --head linear")
    return ids


def examples(
    rows: Sequence[dict[str, str]], tokenizer: Tokenizer, options: PromptOptions, task: Task, bos: bool = True
) -> list[Example]:
    """Token examples of rows with text and label, in order. A text that is too long loses its end. With `bos` each
    begins with the token that texts of this family begin with.

    Raises ValueError for a label that is not in `task`.
    """
    begin = tokenizer.bos if bos else []
    (question,), labels = tokenizer.encode_within([f"\n{task.question}"]), label_ids(task, tokenizer)
    room = options.max_length - len(begin) - len(question) - max(map(len, labels))
    if room < 1:
        raise ValueError(f"prompt.max_length {options.max_length} leaves no room for a text beside the question")
    number = {name: i for i, name in enumerate(task.classes)}
    made, cut = [], 0
    for start in range(0, len(rows), 1024):
        batch = rows[start : start + 1024]
        for row, text in zip(batch, tokenizer.encode_batch([row["text"].strip() for row in batch]), strict=True):
            if row["label"] not in number:
                raise ValueError(f"the label {row['label']!r} was never seen; there are {', '.join(task.classes)}")
            cut += len(text) > room
            prompt = begin + text[:room] + question
            made.append(Example(np.array(prompt + labels[number[row["label"]]], dtype=np.int32), len(prompt)))
    if cut:
        print(f"{cut} of {len(rows)} texts cut to prompt.max_length {options.max_length}")
    return made


@torch.no_grad()
def scores(
    gpt: GPT,
    prompts: Sequence[np.ndarray],
    labels: Sequence[Sequence[int]],
    row_tokens: int,
    before: Sequence[int] = (),
) -> Tensor:
    """log p(label | before, prompt) of each label after each prompt, (prompts, labels) in float32 on the CPU.

    Args:
        labels: token ids; with a linear head the number of each class.
        before: tokens that stand before every prompt, such as demonstrations. They are computed once.
    Raises:
        ValueError: it is longer than the model's context, or there is no prompt.
    """
    if row_tokens < 1 or not len(prompts):
        raise ValueError(f"row_tokens is {row_tokens}, and there are {len(prompts)} texts; both must be at least 1")
    device = gpt.device
    gpt.check_length(len(before) + max(map(len, prompts)) + max(map(len, labels)) - 1)
    gpt.config.check_tokens(max(int(np.max(ids)) for ids in (*prompts, *labels, before) if len(ids)))
    costs = np.array([len(prompt) for prompt in prompts]) + sum(len(label) - 1 for label in labels)
    cache = gpt.new_cache(gpt.n_virtual_tokens + len(before) + row_tokens + int(costs.max()))
    root = _first(gpt, before, cache)
    used = gpt.n_virtual_tokens + len(before)
    found, row = [], (costs.cumsum() - costs) // row_tokens
    for _, group in groupby(range(len(prompts)), key=lambda i: row[i]):
        segments, ids, wanted, picks = [], [], [], []
        for n, prompt in enumerate(prompts[i] for i in group):
            own = Segment(len(prompt), root)
            end = sum(map(len, ids)) + len(prompt)  # the prompt's last token predicts the first one of each label
            segments, ids, wanted = [*segments, own], [*ids, prompt], [*wanted, end - 1]
            at = len(wanted) - 1
            for k, label in enumerate(labels):
                picks.append((at, n, k, label[0]))
                if len(label) > 1:
                    segments.append(Segment(len(label) - 1, own))
                    ids.append(np.asarray(label[:-1]))
                    picks += [(len(wanted) + i, n, k, token) for i, token in enumerate(label[1:])]
                    wanted += range(end, end + len(label) - 1)
                    end += len(label) - 1
        packed = replace(lay_out(segments, gpt.n_virtual_keys, cached=used), wanted=torch.tensor(wanted))
        idx = torch.from_numpy(np.concatenate(ids)).long().to(device)
        log_p = gpt(idx, packed.to(device), cache).log_softmax(-1, dtype=torch.float32).cpu()
        at, n, k, token = torch.tensor(picks).T
        found.append(torch.zeros(int(n.max()) + 1, len(labels)).index_put((n, k), log_p[at, token], accumulate=True))
    return torch.cat(found)


def _first(gpt: GPT, before: Sequence[int], cache: KVCache) -> Segment | None:
    """Computes what every prompt sees, a soft prompt and `before`, into the cache. None if there is neither."""
    segments = [Segment(gpt.n_virtual_tokens)] if gpt.n_virtual_tokens else []
    if before:
        segments.append(Segment(len(before), *segments))
    if not segments:
        return None
    packed = lay_out(segments, gpt.n_virtual_keys, cached=0)
    packed = replace(packed, has_virtual_tokens=gpt.n_virtual_tokens > 0, wanted=torch.tensor([len(packed.pos) - 1]))
    device = gpt.device
    gpt(torch.tensor(list(before), dtype=torch.long, device=device), packed.to(device), cache)
    return segments[-1]


@dataclass
class Verdict:
    """What came of it."""

    accuracy: float
    macro_f1: float
    truth: Sequence[str]
    predicted: Sequence[str]
    classes: Sequence[str]

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.4f}, macro F1 {self.macro_f1:.4f} on {len(self.truth)} rows"

    def draw(self, path: Path) -> None:
        """The confusion matrix: how many rows of each class were taken for which."""
        from matplotlib.figure import Figure
        from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

        counts, n = confusion_matrix(self.truth, self.predicted, labels=self.classes), len(self.classes)
        figure = Figure(figsize=(2 + 0.8 * n, 2 + 0.7 * n), layout="constrained")
        rotation = "vertical" if n > 4 else "horizontal"
        display = ConfusionMatrixDisplay(counts, display_labels=self.classes)
        display.plot(ax=figure.subplots(), colorbar=False, xticks_rotation=rotation)
        figure.savefig(path, dpi=120)


def verdict(truth: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> Verdict:
    from sklearn.metrics import accuracy_score, f1_score  # whose import takes a second

    macro_f1 = f1_score(truth, predicted, average="macro", zero_division=0)
    return Verdict(float(accuracy_score(truth, predicted)), float(macro_f1), truth, predicted, classes)


def judge(
    gpt: GPT,
    rows: Sequence[Example],
    task: Task,
    labels: Sequence[Sequence[int]],
    row_tokens: int,
    before: Sequence[int] = (),
) -> Verdict:
    """Predicts the label of each example, and compares."""
    prompts = [e.ids[: e.first_target] for e in rows]
    best = scores(gpt, prompts, labels, row_tokens, before).argmax(-1).tolist()
    truth, predicted = ([task.classes[i] for i in which] for which in (numbers(rows, labels), best))
    return verdict(truth, predicted, task.classes)


def numbers(rows: Sequence[Example], labels: Sequence[Sequence[int]]) -> list[int]:
    """The class of each example, by what stands after its prompt."""
    number = {tuple(label): i for i, label in enumerate(labels)}
    return [number[tuple(e.ids[e.first_target :].tolist())] for e in rows]
