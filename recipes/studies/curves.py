"""The report of ``language_model.py``: a table as Markdown and JSON, curves over steps, and the distance to ``bp``."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grid import Grid

Result = Mapping[str, Any]
_STYLES = ("-", "--", "-.", ":")
_FAR = 0.3  # nats above bp
_COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#999933",
    "#6699CC",
)


def write_report(settings: Mapping[str, Any], grid: Grid, results: Mapping[str, Result], folder: Path) -> None:
    """Write table.md, table.json and, if matplotlib is there, curves.png.

    Args:
        settings: the study's file.
        grid: its cells.
        results: of the cells by name, those whose time was up before the end (``partial``) among them.
        folder: where to.
    """
    shown = {method: found for method in settings["methods"] if (found := runs_of(grid, results, method))}
    if not shown:
        print("No cell is finished yet.")
        return
    bp = mean(losses_of(shown.get("bp", [])))
    rows = [row_of(grid, results, method, runs, bp) for method, runs in shown.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = markdown(settings, rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    try:
        plot(settings, shown, folder / "curves.png")
    except ImportError:
        print("No plots: matplotlib is missing. pip install '.[plot]' in a checkout of grape_hf")


def runs_of(grid: Grid, results: Mapping[str, Result], method: str) -> list[Result]:
    """Return a method's runs at the best of its rates, one a seed; those that are done before those that are not.

    Before all rates have run, the best is of those that have.
    """
    rates = {float(rate) for rate in grid.rates(method)}
    of_method = [r for r in results.values() if r["method"] == method and r["learning_rate"] in rates]
    first = [r for r in of_method if r["seed"] == grid.seeds[0]]
    done = [r for r in first if "partial" not in r]
    if not first:
        return []
    rate = max(done or first, key=lambda r: grid.score(dict(r)))["learning_rate"]
    by_seed: dict[int, Result] = {}
    for run in sorted((r for r in of_method if r["learning_rate"] == rate), key=_completeness):
        by_seed[run["seed"]] = run
    return [by_seed[seed] for seed in sorted(by_seed)]


def row_of(grid: Grid, results: Mapping[str, Result], method: str, runs: Sequence[Result], bp: float) -> dict[str, Any]:
    """Return a method's row of the table: losses in nats per token, distances in % of perplexity.

    Args:
        grid: the study's cells.
        results: of all cells by name.
        method: the method.
        runs: at its best rate.
        bp: the mean loss of backpropagation, NaN where it has not run.
    """
    done, losses = [run for run in runs if "partial" not in run], losses_of(runs)
    above = [] if math.isnan(bp) else [100 * math.expm1(loss - bp) for loss in losses]
    tests = [run["test_loss"] for run in done if "test_loss" in run]
    by_rate: dict[str, float | None] = {}
    for cell in grid.choices(method):
        if found := results.get(cell.name):
            by_rate[f"{cell.learning_rate:g}"] = math.nan if found.get("partial") else found["validation_loss"]
    seconds = [run["seconds_a_step"] for run in runs if "seconds_a_step" in run]
    return {
        "method": method,
        "learning_rate": runs[0]["learning_rate"],
        "seeds": len(done),
        "validation": mean(losses),
        "validation_range": [min(losses), max(losses)] if losses else None,
        "above_bp": 100 * math.expm1(mean(losses) - bp),
        "above_bp_range": [min(above), max(above)] if above else None,
        "perplexity": math.exp(mean(losses)) if losses and mean(losses) < math.inf else math.nan,
        "test": mean(tests),
        "test_perplexity": math.exp(mean(tests)) if tests else math.nan,
        "by_rate": by_rate,
        "alignment": last_alignment(runs[0]),
        "seconds_a_step": mean(seconds),
        "unfinished": len(runs) - len(done),
    }


def markdown(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as a table."""
    data = settings["data"]
    lines = [
        f"# {settings['title']}",
        "",
        f"Loss in nats per token (BPE {data['vocab_size']:,}) of the whole validation split after "
        f"{settings['steps']:,} steps: mean and range over the seeds at the best rate, which was chosen with seed "
        f"{settings['seeds'][0]} on that split. Above bp: of perplexity, against that of the mean loss of "
        "bp's seeds. Perplexity is that of the mean loss.",
        "",
        "| method | rate | seeds | validation | above bp, % | perplexity | test | test perplexity | by rate | "
        "exact alignment at the end | ms a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        by_rate = ", ".join(f"{rate}: {_number(loss, 3)}" for rate, loss in row["by_rate"].items())
        seeds = f"{row['seeds']}" + (f" (and {row['unfinished']} unfinished)" if row["unfinished"] else "")
        lines.append(
            f"| {settings.get('labels', {}).get(row['method'], row['method'])} | {row['learning_rate']:g} | {seeds} | "
            f"{_number(row['validation'], 3)}{_range(row['validation_range'], 3)} | "
            f"{_number(row['above_bp'], 1)}{_range(row['above_bp_range'], 1)} | {_number(row['perplexity'], 1)} | "
            f"{_number(row['test'], 3)} | {_number(row['test_perplexity'], 1)} | {by_rate} | {row['alignment']} | "
            f"{_number(1000 * row['seconds_a_step'], 1)} |"
        )
    return "\n".join(lines) + "\n"


def curve_of(run: Result, settings: Mapping[str, Any]) -> dict[int, float]:
    """Return the validation loss by step, in nats per token, on the blocks that curves are made on."""
    if "curve" in run:
        return {int(step): loss for step, loss in run["curve"]}
    context = settings["data"]["context"]  # of cells that were run before the curve had a place of its own
    scale = context / (context - 1) if settings.get("count_first_label") else 1.0
    return {e["step"]: scale * e["eval_loss"] for e in run["log_history"] if "eval_loss" in e}


def plot(settings: Mapping[str, Any], shown: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Draw the validation loss over steps, and how far it is above the mean of bp; seeds as a band.

    Where some method is far off, the second picture ends at 0.3 nats; where bp has not run there is none.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(11, 4.2 + 0.1 * (len(shown) + 1)), layout="constrained")  # with a row for two labels
    figure.suptitle(settings["title"])
    curves = {method: seeds_of([curve_of(run, settings) for run in runs]) for method, runs in shown.items()}
    bp = {step: statistics.fmean(values) for step, values in curves.get("bp", {}).items()}
    left, *above = figure.subplots(1, 2 if bp else 1, squeeze=False)[0]
    for i, (method, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _STYLES[i % len(_STYLES)]}
        runs = shown[method]
        name = settings.get("labels", {}).get(method, method)
        label = f"{name}, rate {runs[0]['learning_rate']:g}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
        _line(left, curve, style | {"label": label})
        common = {step: [value - bp[step] for value in values] for step, values in curve.items() if step in bp}
        if common:
            _line(above[0], common, style)
    left.set(xlabel="optimiser step", ylabel="validation loss (nats per token)", xscale="log")
    steps = sorted(step for curve in curves.values() for step in curve)
    left.set_xticks(
        [step for step in (100, 200, 500, 1000, 2000, 5000, 10_000) if steps and steps[0] <= step <= steps[-1]]
    )
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.xaxis.set_minor_formatter(NullFormatter())
    for right in above:
        right.set(xlabel="optimiser step", ylabel="above the mean of bp (nats per token)")
        if right.get_ylim()[1] > 2 * _FAR:
            right.set_ylim(top=_FAR)  # what is far off would hide how the others differ
    for axes in (left, *above):
        axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def seeds_of(curves: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """Return the values of all runs by step, at the steps that every run has; the longest alone if there are none."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        curves = [max(curves, key=len)]
        steps = sorted(curves[0])
    return {step: [curve[step] for curve in curves] for step in steps}


def last_alignment(run: Result) -> str:
    """Return the last exact alignment of each boundary that was logged."""
    logged = [entry for entry in run["log_history"] if "grape/alignment/exact/mean" in entry]
    if not logged:
        return "-"
    return " ".join(
        _number(value, 2) for name, value in logged[-1].items() if name.startswith("grape/alignment/exact/h_")
    )


def losses_of(runs: Sequence[Result]) -> list[float]:
    """Return the validation losses of the runs that came to their end; infinite where one diverged."""
    done = [run["validation_loss"] for run in runs if "partial" not in run]
    return [math.inf if loss is None else loss for loss in done]


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of none."""
    return statistics.fmean(values) if values else math.nan


def _line(axes: Any, curve: Mapping[int, Sequence[float]], style: Mapping[str, Any]) -> None:
    steps = list(curve)
    axes.plot(steps, [statistics.fmean(values) for values in curve.values()], linewidth=1.5, **style)
    low, high = ([end(values) for values in curve.values()] for end in (min, max))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _completeness(run: Result) -> tuple[bool, int, bool]:
    return "partial" not in run, run.get("steps", 0), "test_loss" in run


def _number(value: float | None, digits: int) -> str:
    if value is None or value == math.inf:
        return "diverged"
    return "-" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.0


def _range(ends: Sequence[float] | None, digits: int) -> str:
    if not ends or ends[0] == ends[1]:
        return ""
    return f" ({_number(ends[0], digits)} to {_number(ends[1], digits)})"
