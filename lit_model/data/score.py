"""Log-probabilities of continuations: which of a few is likeliest after each of many prompts?

A row holds whole prompts, each followed by its continuations as children of one segment (packing.py): a prompt is
computed once, however many continuations it has, and what stands before all prompts once a row.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lit_model.data.labels import Task, Verdict, numbers
from lit_model.model import GPT
from lit_model.packing import Example, Segment, lay_out

Tokens = Sequence[int] | np.ndarray


@torch.no_grad()
def scores(
    gpt: GPT, prompts: Sequence[Tokens], labels: Sequence[Tokens], row_tokens: int, before: Tokens = ()
) -> Tensor:
    """log p(label | before, prompt) of each label after each prompt: (prompts, labels) in float32 on the CPU. It is a
    sum over the label's tokens, so that labels of like length compare best.

    Args:
        prompts: at least one. labels: with a linear head the number of each class.
        row_tokens: about this many tokens go through the network at a time, at least 1.
        before: tokens that stand before every prompt, such as demonstrations.
    Raises:
        ValueError: they are longer than the model's context, or the network lacks one of these tokens.
    """
    gpt.check_length(len(before) + max(map(len, prompts)) + max(map(len, labels)) - 1)
    gpt.config.check_tokens(max(int(np.max(ids)) for ids in (*prompts, *labels, before) if len(ids)))
    costs = np.array([len(prompt) for prompt in prompts]) + sum(len(label) - 1 for label in labels)
    row_of, parts = (costs.cumsum() - costs) // row_tokens, []
    for _, indices in groupby(range(len(prompts)), key=lambda i: row_of[i]):
        segments, ids, wanted, picks = _row([prompts[i] for i in indices], labels, before, gpt.n_virtual_tokens)
        packed = lay_out(segments, gpt.n_virtual_keys, wanted=wanted, windows=gpt.config.windows)
        idx = torch.from_numpy(np.concatenate(ids)).long().to(gpt.device)
        log_p = gpt(idx, packed.to(gpt.device)).log_softmax(-1, dtype=torch.float32).cpu()  # (M, V)
        at, n, k, token = torch.tensor(picks).T
        part = torch.zeros(int(n.max()) + 1, len(labels))
        parts.append(part.index_put((n, k), log_p[at, token], accumulate=True))
    return torch.cat(parts)


def _row(
    prompts: Sequence[Tokens], labels: Sequence[Tokens], before: Tokens, n_virtual_tokens: int
) -> tuple[list, list, list, list]:
    """(segments, ids of each, wanted tokens, picks) of prompts behind virtual tokens and `before`, each with all labels
    behind it.

    A pick is (index into wanted, prompt, label, the token of the label that is predicted there)."""
    end, ids, wanted, picks = n_virtual_tokens + len(before), [np.asarray(before, dtype=int)], [], []
    root = Segment(end) if end else None
    segments = [root] if root else []
    for n, prompt in enumerate(prompts):
        stem = Segment(len(prompt), root)
        segments.append(stem)
        ids.append(np.asarray(prompt))
        end += len(prompt)
        wanted.append(end - 1)  # the prompt's last token predicts the first one of each label
        first = len(wanted) - 1
        for k, label in enumerate(labels):
            picks.append((first, n, k, label[0]))
            if len(label) > 1:
                segments.append(Segment(len(label) - 1, stem))
                ids.append(np.asarray(label[:-1]))
                picks += [(len(wanted) + i, n, k, token) for i, token in enumerate(label[1:])]
                wanted += range(end, end + len(label) - 1)
                end += len(label) - 1
    return segments, ids, wanted, picks


def judge(
    gpt: GPT, examples: Sequence[Example], task: Task, labels: Sequence[Tokens], row_tokens: int, before: Tokens = ()
) -> Verdict:
    """Predicts the label of each example, and compares."""
    prompts = [e.ids[: e.first_target] for e in examples]
    best = scores(gpt, prompts, labels, row_tokens, before).argmax(-1).tolist()
    truth, predicted = ([task.classes[i] for i in which] for which in (numbers(examples, labels), best))
    return Verdict(truth, predicted, task.classes)
