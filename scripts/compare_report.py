"""What compare.py writes about its cells: a table, a picture, and a sentence that says which method to take."""

import math
import statistics
from itertools import chain, product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

COLUMNS = {  # of a line, beside the method and its accuracy: heading and format
    "n_trained": ("trained parameters", ",d"),
    "lr": ("learning rate", "g"),
    "seconds": ("training, s", ".0f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "peak_gib": ("peak memory, GiB", ".1f"),
    "stored_mb": ("on disk, MB", ".2f"),
}
SIDES = [(1, 0, "left"), (-1, 0, "right"), (0, 1, "center"), (0, -1, "center"), (0.7, 0.7, "left"), (0.7, -0.7, "left")]
PANELS = ("n_trained", "peak_gib", "seconds")


def report(cells: dict[str, list[dict[str, Any]]], options: Any) -> None:
    """Writes report.md and compare.png, and prints the report. cells: method -> one cell for each seed."""
    lines = sorted((line_of(of_seeds) for of_seeds in cells.values()), key=lambda line: -line["accuracy"])
    machines = "; ".join(sorted({one["on"] for one in chain(*cells.values())}))
    budget = f"{options.data}, {options.max_steps} steps of {options.batch_size}, {options.n_test} test rows"
    text = f"{budget}, {machines}\n\n{table(lines)}\n\n{recommendation(lines, options.n_test)}\n"
    (options.out_dir / "report.md").write_text(f"{text}\n![accuracy and costs](compare.png)\n", encoding="utf-8")
    draw(lines, options.out_dir / "compare.png")
    print(f"\n{text}saved {options.out_dir}/: report.md, compare.png, cells.jsonl")


def line_of(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table, from the cells of all seeds: their mean accuracy, and the speed of the fastest one, since
    the others may have shared their machine."""
    accuracies, fastest = [one["accuracy"] for one in cells], min(cells, key=lambda one: one.get("seconds", 0))
    return fastest | dict(
        peak_gib=None if fastest["on"].startswith("CPU") else fastest.get("peak_gib"),  # there it is that of all cells
        accuracy=statistics.fmean(accuracies),
        std=statistics.stdev(accuracies) if len(cells) > 1 else None,
        tokens_per_second=fastest["n_tokens"] / fastest["seconds"] if "n_tokens" in fastest else None,
        stored_mb=fastest["stored_bytes"] / 1e6,
    )


def table(lines: list[dict[str, Any]]) -> str:
    """In Markdown, accuracies as mean ± standard deviation."""
    headings = ["method", "test accuracy, %", *(heading for heading, _ in COLUMNS.values())]
    rows = [headings, ["---"] * len(headings)]
    for line in lines:
        spread = f" ± {100 * line['std']:.1f}" if line["std"] is not None else ""
        values = ["" if line.get(key) is None else format(line[key], form) for key, (_, form) in COLUMNS.items()]
        rows.append([line["method"], f"{100 * line['accuracy']:.1f}{spread}", *values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def recommendation(lines: list[dict[str, Any]], n_test: int) -> str:
    """Our best method, the first of `lines`, and a smaller one that is as good within the noise."""
    ours = [line for line in lines if not line["method"].startswith("peft-")]
    best = ours[0]
    noise = max(best["std"] or 0, math.sqrt(best["accuracy"] * (1 - best["accuracy"]) / n_test))  # of seeds, of rows
    equals = [line for line in ours if line["accuracy"] >= best["accuracy"] - noise]
    smallest = min(equals, key=lambda line: line["n_trained"])
    text = f"Best: {best['method']}, {100 * best['accuracy']:.1f} %."
    numbers = f"{smallest['n_trained']:,} parameters instead of {best['n_trained']:,}"
    other = f"{smallest['method']} is within the noise of {100 * noise:.1f} points and trains {numbers}."
    return text if smallest is best else f"{text} {other}"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against trained parameters, memory and time, of all that trains a network. peft's methods are hollow."""
    lines = [line for line in lines if line["lr"]]
    keys = [key for key in PANELS if all(line[key] for line in lines)]
    figure = Figure(figsize=(6 * len(keys), 6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys):
        for line in lines:
            look = dict(color="C1", markerfacecolor="none") if line["method"].startswith("peft-") else dict(color="C0")
            axes.errorbar(line[key], 100 * line["accuracy"], yerr=100 * (line["std"] or 0), fmt="o", **look)
        axes.set(xlabel=COLUMNS[key][0], xscale="log" if key == "n_trained" else "linear", xmargin=0.15, ymargin=0.1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    figure.draw_without_rendering()  # gives the axes their places
    for axes, key in zip(panels, keys):
        name_points(axes, [(line["method"], line[key], 100 * line["accuracy"]) for line in lines])
    figure.savefig(path)


def name_points(axes: Axes, points: list[tuple[str, float, float]]) -> None:
    """Writes the name beside each point (name, x, y), as near as it covers no point, no other name and no frame."""
    taken = [Bbox.from_extents(*(at - 4), *(at + 4)) for at in axes.transData.transform([p[1:] for p in points])]
    for name, *point in points:
        label = axes.annotate(name, point, xytext=(0, 0), textcoords="offset points", va="center", fontsize=8)
        for distance, (x, y, align) in product(range(8, 80, 6), SIDES):
            label.xyann = x * distance, y * distance
            label.set_ha(align)
            box = label.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
