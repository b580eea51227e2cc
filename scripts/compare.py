"""Which method should I use? All of them on one data set under one budget, and a report that says what came out.

    python scripts/compare.py --out_dir out/quick                          on two cores of a CPU six to nine minutes
    python scripts/compare.py --methods all --max_steps 200 --search --out_dir out/search
    python scripts/compare.py --methods all --max_steps 300 --seeds 0,1,2 --data imdb --rates out/search

Rows of text and label are split into training, validation and test rows, each text once. A method is trained with
the label words as completion; its checkpoint of least validation loss is judged on the test rows, which no run has
seen.
Each finished cell (a method, a learning rate, a seed) is kept in cells.jsonl: what was cut off goes on from there.
With --search each method first looks for its learning rate, with the first seed on the validation rows. --peers trains
peft's methods, too, on the same rows in the same order, with a learning rate found in the same way. They begin as peft
begins them: prefixes and soft prompts at random.
"""

import csv
import gc
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from finetune import (
    adapter,
    adapter_v2,
    bottleneck,
    features,
    full,
    ia3,
    loop,
    lora,
    prefix,
    prompt,
    selective,
    setup,
)
from finetune.report import peak_memory
from lit_model.data import labels as classify
from lit_model import generate, load
from lit_model.weights import demo as hub
from lit_model.load import fingerprint_of
from lit_model.cli import cli
from lit_model.data.rows import PromptOptions, read_rows
from lit_model.files import write_text
from lit_model.model import GPT, Config
from lit_model.packing import Example
from lit_model.data.tokenizer import Tokenizer
from scripts.compare_report import report
from scripts.eval_data import demonstration_ids, demonstrations

ALL_LINEARS = "blocks.*"
RATES = [float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3)]  # what --search tries


@dataclass
class Method:
    script: ModuleType
    options: dict[str, Any]
    lr: float
    """of RATES; --search begins here"""


def _selective(**options: Any) -> dict[str, Any]:
    return dict(selective=selective.Selective(**options))


def _lora(**options: Any) -> dict[str, Any]:
    return dict(lora=lora.LoRA(**options))


METHODS = {
    "full": Method(full, {}, 1e-4),
    "last_blocks": Method(selective, _selective(what="last_blocks", n=2), 1e-3),
    "head": Method(selective, _selective(what="head"), 3e-3),
    "bitfit": Method(selective, _selective(what="bitfit"), 1e-3),
    "norms": Method(selective, _selective(what="norms"), 3e-3),
    "lora": Method(lora, {}, 3e-3),
    "lora-all": Method(lora, _lora(r=16, targets=ALL_LINEARS), 1e-3),
    "dora": Method(lora, _lora(dora=True), 3e-3),
    "qlora": Method(lora, _lora(r=16, targets=ALL_LINEARS) | dict(quantize="nf4"), 1e-3),
    "adapter": Method(adapter, {}, 1e-2),
    "adapter-linear": Method(adapter, dict(adapter=adapter.Adapter(gate="linear")), 1e-2),
    "adapter_v2": Method(adapter_v2, {}, 1e-3),
    "bottleneck": Method(bottleneck, {}, 1e-3),
    "ia3": Method(ia3, {}, 1e-2),
    "prefix": Method(prefix, {}, 1e-2),
    "prompt": Method(prompt, {}, 3e-2),
}
PEERS = {"lora": 3e-3, "dora": 1e-3, "adapter": 3e-2, "ia3": 1e-2, "prefix": 1e-2, "prompt": 1e-1}  # rates, as above
UNTRAINED = ("zero-shot", "few-shot", "features")
QUICK = "zero-shot,features,head,lora,adapter"


@dataclass
class Options:
    """Options."""

    data: str = "rotten_tomatoes"
    """rotten_tomatoes, imdb (both fetched once), or a file of rows with text and label"""
    checkpoint_dir: Path = hub.DEMO_CHECKPOINT
    """folder of the base network; by default the demo's, fetched once"""
    out_dir: Path = Path("out/compare")
    """folder for the report and the cells"""
    methods: str = QUICK
    """names, or all: zero-shot, few-shot, features, and those of METHODS in this file"""
    seeds: str = "0"
    """of the validation rows, the order of the others and what is random at the start; the test rows stay the same"""
    max_steps: int = 40
    """optimizer steps of each run"""
    max_time: float | None = None
    """end each run after so many minutes of training"""
    batch_size: int = 16
    """examples per optimizer step"""
    n_test: int = 300
    """rows to judge on"""
    n_val: int = 100
    """rows that choose the checkpoint, and with --search the learning rate"""
    shots: int = 8
    """demonstrations of few-shot"""
    search: bool = False
    """look for the learning rate of each method first"""
    rates: Path | None = None
    """out_dir of a --search, such as one on smaller data, whose learning rates are taken"""
    peers: bool = False
    """also peft's LoRA, DoRA, AdaptionPrompt, IA3, prefix and prompt tuning, where ours are asked for"""
    question: str = "Sentiment:"
    """what stands between a text and its label"""
    max_length: int = 384
    """longest example in tokens"""
    max_memory_gb: float | None = None
    """for the recommendation: memory that is there"""
    max_store_mb: float | None = None
    """for the recommendation: what a trained method may take on disk"""
    devices: Literal["auto", "cpu"] = "auto"
    """auto: the GPU if there is one"""


@dataclass
class Bench:
    """What all cells share."""

    options: Options
    settings: dict[str, Any]
    """what cells must have in common to be compared"""
    kept: dict[str, dict[str, Any]]
    """finished cells by their name"""
    tokenizer: Tokenizer
    prompt: PromptOptions
    task: classify.Task
    train: list[dict[str, str]]
    test_rows: list[dict[str, str]]
    test: list[Example]
    device: torch.device
    dtype: torch.dtype
    base_seconds: float = math.nan


def main(options: Options) -> None:
    known = (*UNTRAINED, *METHODS)
    names = list(known) if options.methods == "all" else [m.strip() for m in options.methods.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join(known)}")
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        raise ValueError(f"--seeds {options.seeds} is no list of numbers such as 0,1,2") from None
    if options.peers and not (find_spec("transformers") and find_spec("peft")):
        raise ValueError("--peers needs transformers and peft: pip install -r requirements-dev.txt")
    bench, cells = prepare(options), {}
    for name in names:
        lr = rate(bench, name, seeds[0]) if name in METHODS else None
        cells[name] = [cell(bench, name, seed, lr) for seed in (seeds if name != "zero-shot" else seeds[:1])]
        if options.peers and name in PEERS:
            lr = rate(bench, f"peft-{name}", seeds[0])
            cells[f"peft-{name}"] = [cell(bench, f"peft-{name}", seed, lr) for seed in seeds]
    report(cells, options)


def prepare(options: Options) -> Bench:
    """Splits the rows, the same way whatever is compared, and reads the cells that are there.

    Raises ValueError for options that make no sense, or an out_dir that holds anything else.
    """
    for name in ("max_steps", "batch_size", "n_test", "n_val", "shots"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at least 1")
    on_gpu = options.devices == "auto" and torch.cuda.is_available()
    if options.max_memory_gb is not None and not on_gpu:
        raise ValueError("max_memory_gb is about the memory of a GPU, and none is used here")
    hub.fetch_if_demo(options.checkpoint_dir)
    if options.peers and Config.load(options.checkpoint_dir).arch != "llama":
        raise ValueError("--peers needs a network of LLaMA's family")
    path = hub.fetch_reviews(options.data) if options.data in ("rotten_tomatoes", "imdb") else Path(options.data)
    rows = list({row["text"]: row for row in read_rows(path) if "label" in row}.values())
    if len(rows) < options.n_test + options.n_val + 2:
        raise ValueError(f"{path} has {len(rows)} different rows with text and label, too few for --n_test and --n_val")
    task = classify.task_of(rows, "labels", options.question)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    test, train = rows[: options.n_test], rows[options.n_test :]

    decisive = ("max_steps", "max_time", "batch_size", "n_test", "n_val", "shots", "question", "max_length")
    settings = {name: getattr(options, name) for name in decisive}
    settings |= {"data": hashlib.sha256(path.read_bytes()).hexdigest(), "base": fingerprint_of(options.checkpoint_dir)}
    kept = kept_cells(options.out_dir, settings)
    with open(options.out_dir / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((row["text"], row["label"]) for row in train)])
    tokenizer = Tokenizer(options.checkpoint_dir)
    shape = PromptOptions(max_length=options.max_length, question=options.question)
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = setup.training_dtype("auto", device)
    examples = classify.examples(test, tokenizer, shape, task)
    return Bench(options, settings, kept, tokenizer, shape, task, train, test, examples, device, dtype)


def kept_cells(out_dir: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> what is kept of a cell in out_dir/cells.jsonl, which is made if it is not there.

    Raises ValueError if out_dir holds other things, or cells with other settings.
    """
    path = out_dir / "cells.jsonl"
    if not path.is_file():
        if out_dir.is_dir() and any(out_dir.iterdir()):
            raise ValueError(f"{out_dir} holds other things: name another --out_dir")
        out_dir.mkdir(parents=True, exist_ok=True)
        path.touch()
    cells = read_cells(out_dir)
    for made in cells:
        if other := [name for name in settings if made["settings"].get(name) != settings[name]]:
            raise ValueError(f"{path} has cells with another {', '.join(other)}: name another --out_dir")
    write_text(path, "".join(json.dumps(made) + "\n" for made in cells))
    return {made["cell"]: made for made in cells}


def read_cells(out_dir: Path) -> list[dict[str, Any]]:
    """Raises ValueError if there are none to read."""
    path, cells = out_dir / "cells.jsonl", []
    if not path.is_file():
        raise ValueError(f"{path} is not there: name the --out_dir of a comparison")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            cells.append(json.loads(line))
        except ValueError:
            print(f"{path}, line {number} was cut off: its cell is made again")
    return cells


def rate(bench: Bench, name: str, seed: int) -> float:
    """That of METHODS or PEERS; searched, the one of RATES from there on with the least validation loss."""
    if folder := bench.options.rates:
        cells = [made for made in read_cells(folder) if made["method"] == name]
        if not cells:
            raise ValueError(f"{folder}/cells.jsonl has no cell of {name}: search its learning rate there first")
        return min(cells, key=lambda made: made["val_loss"])["lr"]
    at = RATES.index(METHODS[name].lr if name in METHODS else PEERS[name.removeprefix("peft-")])
    if not bench.options.search:
        return RATES[at]
    losses = {}
    for step in (1, -1):  # up as long as it gets better, then down
        while (best := min(losses, key=losses.get, default=at)) + step in range(len(RATES)):
            for i in {best, best + step} - losses.keys():
                try:
                    losses[i] = cell(bench, name, seed, RATES[i])["val_loss"]
                except loop.Diverged:
                    losses[i] = math.inf
            if min(losses, key=losses.get) == best:
                break
    return RATES[best]


def cell(bench: Bench, name: str, seed: int, lr: float | None) -> dict[str, Any]:
    """One run, or what is kept of it."""
    key = f"{name}, seed {seed}" + (f", lr {lr:g}" if lr else "")
    if key not in bench.kept:
        print(f"\n==== {key}", flush=True)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if name in UNTRAINED:
            made = untrained(bench, name, seed)
        else:
            make = trained_by_peft if name.startswith("peft-") else trained
            made = make(bench, name.removeprefix("peft-"), seed, lr)
        where = f"CPU, {torch.get_num_threads()} threads"
        if bench.device.type == "cuda":
            where = torch.cuda.get_device_name()
        on = f"{where}, torch {torch.__version__}"
        made = dict(cell=key, method=name, seed=seed, lr=lr, on=on, settings=bench.settings, **made)
        bench.kept[key] = made
        with open(bench.options.out_dir / "cells.jsonl", "a") as file:
            file.write(json.dumps(made) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    return bench.kept[key]


def settings_of(bench: Bench, name: str, seed: int, lr: float) -> setup.Options:
    """What to tell the script of a method."""
    options, method = bench.options, METHODS[name]
    train = setup.Train(
        lr=lr, batch_size=options.batch_size, epochs=10**6, max_steps=options.max_steps, max_time=options.max_time,
        max_examples=options.max_steps * options.batch_size, eval_interval=max(1, options.max_steps // 4), seed=seed,
        sample="",
    )  # fmt: skip
    return method.script.Options(
        checkpoint_dir=options.checkpoint_dir, data=options.out_dir / "train.csv", out_dir=options.out_dir / "run",
        train=train, prompt=replace(bench.prompt, val_fraction=options.n_val / len(bench.train)),
        devices=options.devices, overwrite=True, **method.options,
    )  # fmt: skip


def trained(bench: Bench, name: str, seed: int, lr: float) -> dict[str, Any]:
    options = settings_of(bench, name, seed, lr)
    summary = METHODS[name].script.main(options)
    gpt = load(options.checkpoint_dir, options.out_dir, bench.device, bench.dtype, options.quantize)
    found = dict(
        accuracy=judged(bench, gpt, bench.test).accuracy,
        val_loss=summary.val_loss,
        trained=summary.n_trained,
        total=summary.n_total,
        seconds=summary.seconds,
        tokens_per_second=summary.n_tokens / summary.seconds,
        peak_gib=summary.peak_gib if bench.device.type == "cuda" else None,
        stored_bytes=(options.out_dir / "lit_method.safetensors").stat().st_size,
        decode=decode_seconds(bench, gpt) / base_decode(bench),
    )
    shutil.rmtree(options.out_dir)
    return found


def trained_by_peft(bench: Bench, name: str, seed: int, lr: float) -> dict[str, Any]:
    from scripts import peers  # only this needs transformers and peft

    options, method = settings_of(bench, name, seed, lr), METHODS[name]
    ours = import_module(f"lit_model.{method.script.__name__.split('.')[-1]}")
    config = ours.Config.load(options.checkpoint_dir, **method.options)
    run = setup.start(options)
    network = peers.base(config, run.dtype, run.device)
    peers.copy_weights(network, options.checkpoint_dir)
    network = peers.attach(network, name, config)
    val_loss, seconds, n_tokens = peers.fit(network, run)
    labels = classify.label_ids(bench.task, bench.tokenizer)
    n_trained, n_total = network.get_nb_trainable_parameters()
    return dict(
        accuracy=peers.judge(network, bench.test, bench.task, labels, run).accuracy,
        val_loss=val_loss,
        trained=n_trained,
        total=n_total,
        seconds=seconds,
        tokens_per_second=n_tokens / seconds,
        peak_gib=peak_memory(bench.device) if bench.device.type == "cuda" else None,
        stored_bytes=4 * n_trained,
    )


def untrained(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    options = bench.options
    start = time.perf_counter()
    if name == "features":
        folder = options.out_dir / "run"
        n = min(len(bench.train), options.max_steps * options.batch_size)  # as many rows as the others see
        features.main(
            features.Options(
                data=options.out_dir / "train.csv", checkpoint_dir=options.checkpoint_dir, out_dir=folder,
                max_examples=n, seed=seed, overwrite=True, dtype=str(bench.dtype).removeprefix("torch."),
                prompt=replace(bench.prompt, val_fraction=options.n_val / len(bench.train)), device=options.devices,
            )
        )  # fmt: skip
        kept, classifier = np.load(folder / "features.npz"), features.read_classifier(folder)
        gpt = load(options.checkpoint_dir, None, bench.device, bench.dtype)
        asked = [replace(e, ids=e.ids[: e.first_target + 1]) for e in bench.test]  # a label may be several tokens
        seen = features.features(gpt, asked, "last", 4096, "test")
        labels = classify.label_ids(bench.task, bench.tokenizer)
        truth = [bench.task.classes[i] for i in classify.numbers(bench.test, labels)]
        verdict = classify.verdict(truth, classifier.predict(seen).tolist(), bench.task.classes)
        size, count = (folder / "classifier.pickle").stat().st_size, kept["train_features"].shape[1] + 1
        shutil.rmtree(folder)
    else:
        gpt = load(options.checkpoint_dir, None, bench.device, bench.dtype)
        before, asked = [], bench.test
        if name == "few-shot":
            shown = demonstrations(bench.train, options.shots, seed)
            before = demonstration_ids(shown, bench.tokenizer, bench.prompt, bench.task)
            asked = classify.examples(bench.test_rows, bench.tokenizer, bench.prompt, bench.task, bos=False)
        verdict, size, count = judged(bench, gpt, asked, before), 0, 0
    total = sum(p.numel() for p in gpt.parameters())
    seconds = time.perf_counter() - start
    return dict(accuracy=verdict.accuracy, trained=count, total=total, seconds=seconds, stored_bytes=size)


def judged(bench: Bench, gpt: GPT, asked: list[Example], before: Sequence[int] = ()) -> classify.Verdict:
    labels = classify.label_ids(bench.task, bench.tokenizer)
    return classify.judge(gpt, asked, bench.task, labels, 4096, before)


def decode_seconds(bench: Bench, gpt: GPT) -> float:
    """Of 24 tokens after a text of the test rows, the fastest of three."""
    ids, times = bench.test[0].ids.tolist(), []
    for _ in range(3):
        start = time.perf_counter()
        list(generate(gpt, ids, 24, temperature=0))
        times.append(time.perf_counter() - start)
    return min(times)


def base_decode(bench: Bench) -> float:
    if math.isnan(bench.base_seconds):
        bench.base_seconds = decode_seconds(bench, load(bench.options.checkpoint_dir, None, bench.device, bench.dtype))
    return bench.base_seconds


if __name__ == "__main__":
    cli(main, Options, __doc__)
