"""What compare.py says of its cells: a table, pictures of the trade-offs, and in plain words what to take."""

import csv
import math
import statistics
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def report(cells: dict[str, list[dict[str, Any]]], options: Any) -> None:
    """Writes table.md, table.csv and tradeoff.png, and prints the table and what to take.

    Args:
        cells: method -> one for each seed. options: those of compare.py.
    """
    lines = sorted((summed(name, of_method) for name, of_method in cells.items()), key=lambda line: -line["accuracy"])
    o, out = options, options.out_dir
    where = "; ".join(sorted({made["on"] for made in chain(*cells.values())}))
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    head = f"{o.data}, {o.max_steps} steps of {o.batch_size}, {o.n_test} test rows, {where}"
    said = f"{head}\n\n{markdown(lines)}\n\n{recommendation(lines, o)}\n"
    (out / "table.md").write_text(said)
    draw(lines, out / "tradeoff.png")
    print(f"\n{said}saved {out}/: table.md, table.csv, tradeoff.png, cells.jsonl")


def summed(name: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table. The accuracy is the mean over the seeds; the speed is that of the fastest one, since the
    others may have shared their machine."""
    accuracies = [c["accuracy"] for c in cells]

    def of_seeds(choose: Callable[[list[float]], float], key: str) -> float | None:
        return choose([c[key] for c in cells]) if cells[0].get(key) is not None else None

    return dict(
        method=name,
        accuracy=statistics.fmean(accuracies),
        std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        seeds=len(cells),
        lr=cells[0]["lr"],
        trained=cells[0]["trained"],
        share=cells[0]["trained"] / cells[0]["total"],
        seconds=of_seeds(min, "seconds"),
        tokens_per_second=of_seeds(max, "tokens_per_second"),
        peak_gib=of_seeds(max, "peak_gib"),
        stored_mb=cells[0]["stored_bytes"] / 1e6,
        decode=of_seeds(min, "decode"),
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


def recommendation(lines: list[dict[str, Any]], options: Any) -> str:
    """The best of ours that fits the limits, and what is as good within the noise for less."""
    fits = [
        r
        for r in lines
        if not r["method"].startswith("peft-")
        and (options.max_memory_gb is None or (r["peak_gib"] or 0) <= options.max_memory_gb)
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
    """Accuracy against what a method takes: trained parameters, memory, time. What trains nothing is not in it, and
    peft's methods are hollow."""
    panels = [("trained", "trained parameters"), ("peak_gib", "peak memory, GiB"), ("seconds", "training, s")]
    panels = [(key, title) for key, title in panels if any(r[key] for r in lines)]
    figure = Figure(figsize=(4.2 * len(panels) + 2, 5), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = sorted({r["method"].removeprefix("peft-") for r in lines})
    for axes, (key, title) in zip(grid, panels):
        for r in lines:
            if r[key] and r["trained"]:
                name = r["method"].removeprefix("peft-")
                i, face = names.index(name), {} if name == r["method"] else dict(markerfacecolor="none")
                look = dict(color=f"C{i % 10}", marker="osD"[i // 10 % 3], linestyle="", capsize=3, **face)
                axes.errorbar(r[key], 100 * r["accuracy"], yerr=100 * (r["std"] or 0), label=r["method"], **look)
        axes.set(xlabel=title, xscale="log")
        if key != "trained":
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("test accuracy, %")
    if shown := grid[0].get_legend_handles_labels()[0]:
        figure.legend(handles=shown, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
