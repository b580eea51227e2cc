"""Which method should I use? All of them on one data set under one budget, and a report that says what came out.

    python scripts/compare.py --out_dir out/compare                       the quick setting, on a CPU about 10 minutes
    python scripts/compare.py --methods all --seeds 0,1,2 --max_steps 400 --out_dir out/compare-all

Rows of text and label are split into training, validation and test rows, each text once. A method is trained with
the label words as completion; its checkpoint of least validation loss is judged on the test rows, which no run has
seen.
Each finished cell (a method, a learning rate, a seed) is kept in cells.jsonl: what was cut off goes on from there.
With --search each method first tries its learning rates, with the first seed on the validation rows.
"""

import csv
import gc
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a bare clone

from finetune import adapter, adapter_v2, bottleneck, features, full, ia3, loop, lora, prefix, prompt, selective
from lit_model import classify, generate, hub, load
from lit_model.cli import cli
from lit_model.data import PromptOptions, read_rows
from lit_model.tokenizer import Tokenizer
from scripts.eval_data import demonstration_ids, demonstrations

ALL_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass
class Method:
    script: ModuleType
    options: dict[str, Any]
    lrs: tuple[float, ...]
    """learning rates that --search tries; the middle one is taken without it"""


def _selective(**options: Any) -> dict[str, Any]:
    return dict(selective=selective.Selective(**options))


def _lora(**options: Any) -> dict[str, Any]:
    return dict(lora=lora.LoRA(**options))


METHODS = {
    "full": Method(full, {}, (1e-5, 3e-5, 1e-4)),
    "last_blocks": Method(selective, _selective(what="last_blocks", n=2), (3e-5, 1e-4, 3e-4)),
    "head": Method(selective, _selective(what="head"), (3e-4, 1e-3, 3e-3)),
    "bitfit": Method(selective, _selective(what="bitfit"), (1e-3, 3e-3, 1e-2)),
    "norms": Method(selective, _selective(what="norms"), (1e-3, 3e-3, 1e-2)),
    "lora": Method(lora, {}, (5e-4, 2e-3, 5e-3)),
    "lora-all": Method(lora, _lora(r=16, targets=ALL_LINEARS), (2e-4, 1e-3, 3e-3)),
    "dora": Method(lora, _lora(dora=True), (5e-4, 2e-3, 5e-3)),
    "qlora": Method(lora, _lora(r=16, targets=ALL_LINEARS) | dict(quantize="nf4"), (2e-4, 1e-3, 3e-3)),
    "adapter": Method(adapter, {}, (1e-2, 3e-2, 1e-1)),
    "adapter_v2": Method(adapter_v2, {}, (3e-3, 1e-2, 3e-2)),
    "bottleneck": Method(bottleneck, {}, (1e-3, 3e-3, 1e-2)),
    "ia3": Method(ia3, {}, (1e-2, 3e-2, 1e-1)),
    "prefix": Method(prefix, {}, (3e-3, 1e-2, 3e-2)),
    "prompt": Method(prompt, {}, (1e-2, 3e-2, 1e-1)),
}
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
    """of the order of the rows and of what is random at the start; the splits stay the same"""
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
    """try the learning rates of each method first"""
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
    tokenizer: Tokenizer
    prompt: PromptOptions
    task: classify.Task
    train: list[dict[str, str]]
    test: list[Any]
    device: torch.device
    dtype: torch.dtype
    base_seconds: float = math.nan
    kept: dict[str, dict] = field(default_factory=dict)


def main(options: Options) -> None:
    names = [*UNTRAINED, *METHODS] if options.methods == "all" else [m.strip() for m in options.methods.split(",")]
    if unknown := [name for name in names if name not in (*UNTRAINED, *METHODS)]:
        raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join((*UNTRAINED, *METHODS))}")
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {options.seeds} is no list of numbers such as 0,1,2") from None
    bench = prepare(options)
    for name in names:
        lr = search(bench, name, seeds[0]) if options.search and name in METHODS else None
        for seed in seeds if name in METHODS or name == "few-shot" else seeds[:1]:
            cell(bench, name, seed, lr)
    report(bench, names)


def prepare(options: Options) -> Bench:
    """Splits the rows, the same way whatever is compared, and reads the cells that are there."""
    if options.checkpoint_dir.absolute() == hub.DEMO_CHECKPOINT:
        hub.fetch_demo_model()
    path = hub.fetch_reviews(options.data) if options.data in ("rotten_tomatoes", "imdb") else Path(options.data)
    rows = list({row["text"]: row for row in read_rows(path) if "label" in row}.values())
    if len(rows) < options.n_test + options.n_val + 2:
        raise ValueError(f"{path} has {len(rows)} different rows with text and label, too few for --n_test and --n_val")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    test, train = rows[: options.n_test], rows[options.n_test :]
    options.out_dir.mkdir(parents=True, exist_ok=True)
    with open(options.out_dir / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((row["text"], row["label"]) for row in train)])
    tokenizer = Tokenizer(options.checkpoint_dir)
    shape = PromptOptions(max_length=options.max_length, question=options.question)
    task = classify.task_of(rows, "labels", options.question)
    device = torch.device("cuda" if options.devices == "auto" and torch.cuda.is_available() else "cpu")
    dtype = loop.training_dtype("auto", device)
    examples = classify.examples(test, tokenizer, shape, task)
    bench = Bench(options, tokenizer, shape, task, train, examples, device, dtype)
    settings = {"steps": options.max_steps, "minutes": options.max_time, "batch": options.batch_size,
                "data": options.data, "n_test": options.n_test, "n_val": options.n_val}  # fmt: skip
    if (path := options.out_dir / "cells.jsonl").is_file():
        for line in path.read_text().splitlines():
            made = json.loads(line)
            if made["settings"] != settings:
                raise ValueError(f"{path} has cells of other settings, {made['settings']}: name another --out_dir")
            bench.kept[made["cell"]] = made
    bench.kept["settings"] = settings
    return bench


def search(bench: Bench, name: str, seed: int) -> float:
    """The learning rate with which the method gets the least validation loss."""
    tried = {lr: cell(bench, name, seed, lr)["val_loss"] for lr in METHODS[name].lrs}
    return min(tried, key=tried.get)


def cell(bench: Bench, name: str, seed: int, lr: float | None) -> dict[str, Any]:
    """One run, or what is kept of it."""
    if name in METHODS and lr is None:
        lr = METHODS[name].lrs[1]
    key = f"{name}, seed {seed}" + (f", lr {lr:g}" if lr else "")
    if key not in bench.kept:
        print(f"\n==== {key}", flush=True)
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        made = trained(bench, name, seed, lr) if name in METHODS else untrained(bench, name, seed)
        made = dict(cell=key, method=name, seed=seed, lr=lr, settings=bench.kept["settings"], **made)
        bench.kept[key] = made
        with open(bench.options.out_dir / "cells.jsonl", "a") as file:
            file.write(json.dumps(made) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    return bench.kept[key]


def trained(bench: Bench, name: str, seed: int, lr: float) -> dict[str, Any]:
    options, method = bench.options, METHODS[name]
    folder = options.out_dir / "run"
    train = loop.Train(
        lr=lr, batch_size=options.batch_size, epochs=10**6, max_steps=options.max_steps, max_time=options.max_time,
        eval_interval=max(1, options.max_steps // 4), seed=seed, sample="",
    )  # fmt: skip
    summary = method.script.main(
        method.script.Options(
            checkpoint_dir=options.checkpoint_dir, data=options.out_dir / "train.csv", out_dir=folder, train=train,
            prompt=replace(bench.prompt, val_fraction=options.n_val / len(bench.train)), devices=options.devices,
            overwrite=True, **method.options,
        )
    )  # fmt: skip
    gpt = load(options.checkpoint_dir, folder, bench.device, bench.dtype, method.options.get("quantize", "none"))
    found = dict(
        accuracy=judged(bench, gpt).accuracy,
        val_loss=summary.val_loss,
        trained=summary.n_trained,
        total=summary.n_total,
        seconds=summary.seconds,
        tokens_per_second=summary.n_tokens / summary.seconds,
        peak_gib=summary.peak_gib if bench.device.type == "cuda" else None,
        stored_bytes=(folder / "lit_method.safetensors").stat().st_size,
        decode=decode_seconds(bench, gpt) / base_decode(bench),
    )
    shutil.rmtree(folder)
    return found


def untrained(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    options = bench.options
    start = time.perf_counter()
    if name == "features":
        folder = options.out_dir / "run"
        n = min(len(bench.train), options.max_steps * options.batch_size)  # as many rows as the others see
        features.main(
            features.Options(
                data=options.out_dir / "train.csv", checkpoint_dir=options.checkpoint_dir, out_dir=folder,
                max_examples=n,
                prompt=replace(bench.prompt, val_fraction=options.n_val / len(bench.train)), device=options.devices,
            )
        )  # fmt: skip
        kept, classifier = np.load(folder / "features.npz"), features.read_classifier(folder)
        gpt = load(options.checkpoint_dir, None, bench.device, bench.dtype)
        seen = features.features(gpt, bench.test, "last", 4096, "test")
        labels = classify.label_ids(bench.task, bench.tokenizer)
        truth = [bench.task.classes[i] for i in classify.numbers(bench.test, labels)]
        verdict = classify.verdict(truth, classifier.predict(seen).tolist())
        size, count = (folder / "classifier.pickle").stat().st_size, kept["train_features"].shape[1] + 1
        shutil.rmtree(folder)
    else:
        gpt = load(options.checkpoint_dir, None, bench.device, bench.dtype)
        before = []
        if name == "few-shot":
            shown = demonstrations(bench.train, options.shots, seed)
            before = demonstration_ids(shown, bench.tokenizer, bench.prompt, bench.task)
        verdict, size, count = judged(bench, gpt, before), 0, 0
    total = sum(p.numel() for p in gpt.parameters())
    seconds = time.perf_counter() - start
    return dict(accuracy=verdict.accuracy, trained=count, total=total, seconds=seconds, stored_bytes=size)


def judged(bench: Bench, gpt: Any, before: tuple | list = ()) -> classify.Verdict:
    labels = classify.label_ids(bench.task, bench.tokenizer)
    return classify.judge(gpt, bench.test, bench.task, labels, 4096, before)


def decode_seconds(bench: Bench, gpt: Any) -> float:
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


# ---------------------------------------------------------------------------------------------------------- the report


def report(bench: Bench, names: list[str]) -> None:
    """table.md, table.csv, tradeoff.png and, in words, what to take."""
    lines = [line for name in names if (line := summed(bench, name))]
    lines.sort(key=lambda line: -line["accuracy"])
    out = bench.options.out_dir
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    table = markdown(lines)
    advice = recommendation(lines, bench.options)
    where = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    o = bench.options
    head = f"{o.data}, {o.max_steps} steps of {o.batch_size}, {o.n_test} test rows, {where}, torch {torch.__version__}"
    (out / "table.md").write_text(f"{head}\n\n{table}\n\n{advice}\n")
    draw(lines, out / "tradeoff.png")
    print(f"\n{head}\n\n{table}\n\n{advice}\nsaved {out}/: table.md, table.csv, tradeoff.png, cells.jsonl")


def summed(bench: Bench, name: str) -> dict[str, Any] | None:
    """One line of the table: the cells of a method with the learning rate that was chosen, over the seeds."""
    cells = [c for key, c in bench.kept.items() if key != "settings" and c["method"] == name]
    if not cells:
        return None
    rates = {c["lr"] for c in cells}
    if len(rates) > 1:  # searched: the one that all seeds have, else the best one on the validation rows
        most = max(sum(c["lr"] == lr for c in cells) for lr in rates)
        rates = [lr for lr in rates if sum(c["lr"] == lr for c in cells) == most]
        best = min(rates, key=lambda lr: min(c["val_loss"] for c in cells if c["lr"] == lr))
        cells = [c for c in cells if c["lr"] == best]
    accuracies = [c["accuracy"] for c in cells]
    mean = lambda key: statistics.fmean(c[key] for c in cells) if cells[0].get(key) is not None else None  # noqa: E731
    return dict(
        method=name,
        accuracy=statistics.fmean(accuracies),
        std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        seeds=len(cells),
        lr=cells[0]["lr"],
        trained=cells[0]["trained"],
        share=cells[0]["trained"] / cells[0]["total"],
        seconds=mean("seconds"),
        tokens_per_second=mean("tokens_per_second"),
        peak_gib=mean("peak_gib"),
        stored_mb=cells[0]["stored_bytes"] / 1e6,
        decode=mean("decode"),
    )


def markdown(lines: list[dict[str, Any]]) -> str:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        "| method | test accuracy | trained | share | rate | training | tokens/s | peak memory | on disk | decoding |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|---|---|")
    for r in lines:
        spread = f" +- {100 * r['std']:.1f}" if r["std"] is not None else ""
        rows.append(
            f"| {r['method']} | {100 * r['accuracy']:.1f}{spread} % | {r['trained']:,} | {100 * r['share']:.3g} % "
            f"| {show(r['lr'], 'g')} | {r['seconds']:.0f} s | {show(r['tokens_per_second'], ',.0f')} "
            f"| {show(r['peak_gib'], '.1f')}{' GiB' if r['peak_gib'] else ''} | {r['stored_mb']:.2f} MB "
            f"| {show(r['decode'], '.2f')}{' x' if r['decode'] else ''} |"
        )
    return "\n".join(rows)


def recommendation(lines: list[dict[str, Any]], options: Options) -> str:
    """The best that fits the limits, and what is as good within the noise for less."""
    fits = [
        r
        for r in lines
        if (options.max_memory_gb is None or (r["peak_gib"] or 0) <= options.max_memory_gb)
        and (options.max_store_mb is None or r["stored_mb"] <= options.max_store_mb)
    ]
    limits = [f"{options.max_memory_gb:g} GiB of memory"] if options.max_memory_gb else []
    limits += [f"{options.max_store_mb:g} MB on disk"] if options.max_store_mb else []
    within = f" within {' and '.join(limits)}" if limits else ""
    if not fits:
        return f"Nothing that was tried stays{within}."
    best = fits[0]
    error = math.sqrt(best["accuracy"] * (1 - best["accuracy"]) / options.n_test)  # of the test rows' choice
    noise = max(best["std"] or 0, error)
    said = f"Best{within}: {best['method']}, {100 * best['accuracy']:.1f} %."
    smaller = min((r for r in fits if r["accuracy"] >= best["accuracy"] - noise), key=lambda r: r["trained"])
    if smaller is not best:
        said += (
            f" {smaller['method']} is within the noise of {100 * noise:.1f} points and trains {smaller['trained']:,} "
            f"parameters instead of {best['trained']:,}."
        )
    return said


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against what a method takes: trained parameters, memory, time."""
    panels = [("trained", "trained parameters"), ("peak_gib", "peak memory, GiB"), ("seconds", "training, s")]
    panels = [(key, title) for key, title in panels if any(r[key] for r in lines)]
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    for axes, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels):
        for i, r in enumerate(lines):
            if r[key]:
                at, spread = (r[key], 100 * r["accuracy"]), 100 * (r["std"] or 0)
                axes.errorbar(*at, yerr=spread, fmt="o", capsize=3, color=f"C{i % 10}")
                axes.annotate(r["method"], at, xytext=(5, 4), textcoords="offset points", size=8)
        axes.margins(x=0.15)
        axes.set(xlabel=title, xscale="log")
        axes.grid(alpha=0.3)
    np.atleast_1d(figure.axes)[0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli(main, Options, __doc__)
