"""The report of ``tables.py``: a table as Markdown and CSV beside the paper's figures, and plots."""

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]


def write_report(table: dict[str, Any], results: Results, errors: dict[str, str], folder: Path) -> None:
    """Write table.md, table.csv, epochs.png and calibration.png (if matplotlib is there) from the finished cells."""
    rows = [row for method in table["methods"] if (row := summarise(table, method, list(results.values())))]
    if not rows:
        print("No cell is finished yet.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(table, rows, errors)
    (folder / "table.md").write_text(text, encoding="utf-8")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        columns = [name for name in rows[0] if name not in ("histories", "by_rate", "label")]
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(text)
    try:
        plot(table, rows, folder)
    except ImportError:
        print("No plots: matplotlib is missing. pip install '.[plot]' in a checkout of grape_hf")


def summarise(table: dict[str, Any], method: str, results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return a method's row: the best of its rates by the validation split, first seed; there, figures in %."""
    rates = learning_rates(table, method)
    of_method = [r for r in results if r["method"] == method and r["learning_rate"] in rates]
    first = [r for r in of_method if r["seed"] == table["seeds"][0] and "test" not in r]
    if not first:
        return None
    best = max(first, key=lambda result: result["validation"])
    final = [r for r in of_method if "test" in r and r["learning_rate"] == best["learning_rate"]]
    runs = final or [best]
    validation, test = ([100 * r[split] for r in runs if split in r] for split in ("validation", "test"))
    paper = table["paper"].get(method)
    return {
        "method": method,
        "label": table["labels"].get(method, method),
        "T": calibration(best["options"]),
        "learning_rate": best["learning_rate"],
        "seeds": len(final),
        "validation": statistics.fmean(validation),
        "test": statistics.fmean(test) if test else math.nan,
        "test_std": statistics.stdev(test) if len(test) > 1 else math.nan,
        "test_min": min(test, default=math.nan),
        "test_max": max(test, default=math.nan),
        "paper": math.nan if paper is None else paper,
        "minutes": statistics.fmean(r["seconds"] for r in runs) / 60,
        "loading_share": statistics.fmean(r["loading_share"] or 0.0 for r in runs),
        "by_rate": {r["learning_rate"]: 100 * r["validation"] for r in sorted(first, key=lambda r: r["learning_rate"])},
        "histories": [r["log_history"] for r in runs],
    }


def learning_rates(table: dict[str, Any], method: str) -> list[float]:
    """Return the rates that the file lists for a method: its own, or those of all."""
    return [float(rate) for rate in (table["methods"][method] or {}).get("learning_rates", table["learning_rates"])]


def calibration(options: dict[str, Any]) -> str:
    """Return T of a cell's options: a number of epochs, or in other words; empty without calibration."""
    # What the presets say, written out: importing them would cost this script transformers and torch.
    preset = "epoch" if options.get("grape_preset") == "paper" else "no"
    strategy, interval = options.get("calibration_strategy", preset), options.get("calibration_interval", 1)
    if options.get("method", "grape") == "bp" or strategy in (None, "no", False):
        return ""
    return f"{interval:g}" if strategy == "epoch" else f"{interval:g} steps" if strategy == "steps" else str(strategy)


def markdown(table: dict[str, Any], rows: list[dict[str, Any]], errors: dict[str, str]) -> str:
    """Write the rows as a table."""
    lines = [
        f"# {table['title']}",
        "",
        f"{table['metric'].capitalize()} in %. Test: mean and standard deviation over the seeds, at the rate that was "
        f"best on the validation split with seed {table['seeds'][0]}. Paper: GrAPE (ICLR 2026).",
        "",
        "| method | T | rate | seeds | test | range | paper | validation | validation by rate | minutes a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = "" if math.isnan(row["test_std"]) else f" ± {row['test_std']:.2f}"
        ends = "-" if row["seeds"] < 2 else f"{row['test_min']:.2f} to {row['test_max']:.2f}"
        by_rate = ", ".join(f"{rate:g}: {value:.1f}" for rate, value in row["by_rate"].items())
        lines.append(
            f"| {row['label']} | {row['T'] or '-'} | {row['learning_rate']:g} | {row['seeds']} | "
            f"{_number(row['test'])}{spread} | {ends} | {_number(row['paper'])} | {row['validation']:.2f} | "
            f"{by_rate} | {row['minutes']:.1f} |"
        )
    if errors:
        lines += ["", "Failed, and left out above:", "", *(f"- {name}: {line}" for name, line in errors.items())]
    return "\n".join(lines) + "\n"


def plot(table: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw the metric over epochs, a line a method with its seeds as a band; and over T, where there are several."""
    from matplotlib.figure import Figure

    metric, styles = table["metric"], ("-", "--", "-.", ":")
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        curves: dict[float, list[float]] = defaultdict(list)
        for history in row["histories"]:
            for epoch, value in {e["epoch"]: e[f"eval_{metric}"] for e in history if f"eval_{metric}" in e}.items():
                curves[epoch].append(100 * value)
        epochs, values = list(curves), list(curves.values())
        label = f"{row['label']}, rate {row['learning_rate']:g}"
        axes.plot(epochs, [statistics.fmean(v) for v in values], styles[i % 4], color=f"C{i}", label=label)
        axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.2)
    axes.set(xlabel="epoch", ylabel=f"validation {metric} (%)", title=table["title"])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")  # of up to ten lines
    figure.savefig(folder / "epochs.png", dpi=150)

    families: dict[str, dict[float, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        if row["T"].replace(".", "", 1).isdigit() and not math.isnan(row["test"]):
            families[row["method"].split("_T")[0]][float(row["T"])] = (row["test"], row["test_std"])
    if not families:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (family, points) in enumerate(families.items()):
        intervals = sorted(points)
        errors = [0.0 if math.isnan(points[t][1]) else points[t][1] for t in intervals]
        heights = [points[t][0] for t in intervals]
        axes.errorbar(intervals, heights, errors, fmt="o-", capsize=4, color=f"C{i}", label=f"{family}, calibrated")
    for i, name in enumerate([*families, "bp"]):
        for row in rows:
            if row["method"] == name and not row["T"] and not math.isnan(row["test"]):
                colour, label = ("black", name) if name == "bp" else (f"C{i}", f"{name}, never calibrated")
                axes.axhline(row["test"], linestyle="--", color=colour, label=label)
    axes.set(xlabel="T: epochs between calibrations", ylabel=f"test {metric} (%)", title=table["title"], xscale="log")
    every = sorted({t for points in families.values() for t in points})
    axes.set_xticks(every, [f"{t:g}" for t in every])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0.9)  # lines lie across the whole of the axes
    figure.savefig(folder / "calibration.png", dpi=150)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
