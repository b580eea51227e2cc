"""Feature-based: the network stays as it is; a classifier of scikit-learn learns from what it makes of each text.

    python finetune/features.py --data reviews.csv

The features of a text are the last layer's vectors, normed, of its last token or on average; they are kept in
features.npz. Reports accuracy, macro F1 and the confusion matrix of the validation rows.
"""

import pickle
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from lit_model.cli import cli
from lit_model.data import labels
from lit_model.data.dataset import read_dataset
from lit_model.data.examples import ExampleOptions
from lit_model.data.tokenizer import Tokenizer
from lit_model.files import reading, refuse_used
from lit_model.load import NetworkOptions
from lit_model.model import GPT
from lit_model.packing import Example, pack
from lit_model.weights import demo


@dataclass
class Options(NetworkOptions):
    data: Path
    """.csv, .json or .jsonl file of rows with text and label"""
    out_dir: Path = Path("out/features")
    """folder for the features, the classifier and the confusion matrix"""
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    pool: Literal["last", "mean"] = "last"
    """the vector of the last token, or the mean over all"""
    classifier: str = "sklearn.linear_model.LogisticRegression"
    """any classifier with fit and predict, by its import path"""
    max_examples: int | None = None
    """train on this many rows only"""
    row_tokens: int = 4096
    """about this many tokens go through the network at a time"""
    seed: int = 0
    """seed of the validation split"""
    overwrite: bool = False
    """replace the features that out_dir holds"""


def main(options: Options) -> None:
    if not options.overwrite:
        refuse_used(options.out_dir)
    module, _, name = options.classifier.rpartition(".")
    with reading(Path(options.classifier)):
        classifier = getattr(import_module(module), name)(**dict(max_iter=2000) if "Logistic" in name else {})
    demo.fetch_if_demo(options.checkpoint_dir)
    tokenizer = Tokenizer(options.checkpoint_dir)
    more = dict(head="linear", seed=options.seed, limit=options.max_examples)
    data = read_dataset(options.data, tokenizer, options.examples, **more)
    classes = np.array(data.task.classes)
    gpt = options.load()
    parts, arrays = {"train": data.train, "val": data.val}, {}
    for part, examples in parts.items():
        arrays[f"{part}_features"] = features(gpt, examples, options.pool, options.row_tokens, part)
        arrays[f"{part}_labels"] = classes[[e.ids[-1] for e in examples]]
    options.out_dir.mkdir(parents=True, exist_ok=True)
    np.savez(options.out_dir / "features.npz", **arrays)
    classifier.fit(arrays["train_features"], arrays["train_labels"])
    (options.out_dir / "classifier.pickle").write_bytes(pickle.dumps(classifier))
    for part in parts:
        predicted = classifier.predict(arrays[f"{part}_features"]).tolist()
        verdict = labels.Verdict(arrays[f"{part}_labels"].tolist(), predicted, data.task.classes)
        print(f"{part}: {verdict}")
    verdict.draw(options.out_dir / "confusion.png")
    print(f"saved {options.out_dir}/: features.npz, classifier.pickle, confusion.png")


def read_classifier(folder: Path) -> Any:
    """The classifier that `main` has fitted. Unpickling runs what the file says: only of folders that you made."""
    return pickle.loads((folder / "classifier.pickle").read_bytes())


@torch.no_grad()
def features(gpt: GPT, examples: list[Example], pool: str, row_tokens: int, name: str) -> np.ndarray:
    """(examples, n_embd) in float32: the normed output of the last layer, at the last token or on average over all."""
    gpt.check_length(max(len(e.ids) for e in examples))
    gpt.config.check_tokens(max(e.ids.max() for e in examples))
    gpt.heads["features"] = torch.nn.Identity()
    vectors = []
    order = np.argsort([len(e.ids) for e in examples])  # one that `pack` keeps, which may put short ones first
    more = dict(share=False, short_context=gpt.config.short_context, windows=gpt.config.windows)
    rows = pack([examples[i] for i in order], row_tokens, **more)
    for idx, packed in tqdm(rows, desc=f"features of {name} rows", leave=False):
        if pool == "mean":
            packed = replace(packed, wanted=None, last=None)
        x = gpt(idx.to(gpt.device), replace(packed, targets=None).to(gpt.device)).float().cpu()
        lengths = [1 if pool == "last" else n for n, _ in packed.lengths]
        vectors += [part.mean(0) for part in x.split(lengths)]
    return torch.stack(vectors).numpy()[order.argsort()]


if __name__ == "__main__":
    cli(main, Options, __doc__)
