"""Train one recipe's settings with several methods, from the same weights, on the same batches, and compare.

    grape-hf compare demo.yaml
    grape-hf compare my.yaml --methods bp grape --seeds 0 1 2 --learning_rates grape=5e-3

Every method trains for what the file says (``max_steps`` or ``num_train_epochs``), once for each seed, in a process of
its own. The output folder gets a folder for each run, ``report.md`` with the table, ``curves.png`` and
``alignment.png``. Start again to go on with what is missing, or in several processes to share the runs. The rate is the
file's for every method unless given; GrAPE often wants a higher one, so tune each for a fair comparison (``tables.py``
does that for images).
"""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grape_hf
from grape_hf.recipes.cells import Cells, end_of_output, run_recipe
from grape_hf.recipes.parsing import read_options
from grape_hf.reports.card_texts import method_label
from grape_hf.reports.cards import write_card
from grape_hf.reports.figures import figures

PACKAGE = Path(grape_hf.__file__).parents[1]
METHODS = ("bp", "dfa", "grape")
# What can be compared beside the values of `method`.
VARIANTS = {"dfa_identity": {"method": "dfa", "feedback_init": "identity"}}
_TAIL = 20  # lines of a failed run's output that are kept
# The last of these stand in the table: what was logged, and what the column is called.
_LOGGED = {
    "grape/alignment/estimate/mean": "alignment, estimate",
    "grape/alignment/exact/mean": "alignment, exact",
    "grape/calibration/share": "share of BP steps",
}


@dataclass(frozen=True, eq=False)
class Run:
    """One run of the comparison.

    Attributes:
        method: its method, or a name of ``VARIANTS``.
        seed: of weights and batches.
        folder: where it leaves what a recipe leaves.
        options: all of the recipe's options.
    """

    method: str
    seed: int
    folder: Path
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """What the report calls the method: "DFA, fixed identity"."""
        return method_label({"method": self.method} | self.options)


def parse_rates(pairs: Sequence[str]) -> dict[str, float]:
    """Read ``method=rate`` pairs.

    Raises:
        ValueError: for anything else.
    """
    try:
        return {method: float(rate) for method, rate in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise ValueError(f"--learning_rates {' '.join(pairs)}: expected METHOD=RATE, e.g. grape=5e-3.") from None


def compare(
    config: Path,
    recipe: str,
    output: Path,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] | None = None,
    rates: Mapping[str, float] | None = None,
) -> Path:
    """Run what is missing, and write the report.

    Args:
        config: the recipe's file of options.
        recipe: its module, which the processes run.
        output: folder of the comparison.
        methods: values of ``method``, or names of ``VARIANTS``.
        seeds: default: the file's.
        rates: learning rate of each method whose rate is not the file's.

    Returns:
        The report.

    Raises:
        ValueError: if the folder holds runs with other options, or a rate is of a method that does not run.
        RuntimeError: if a run failed.
    """
    options = read_options(config)
    seeds, rates = list(seeds or [options.get("seed", 42)]), dict(rates or {})
    if unknown := rates.keys() - set(methods):
        raise ValueError(
            f"a learning rate for {', '.join(unknown)}, which does not run; methods: {', '.join(methods)}."
        )
    runs = [
        Run(
            method,
            seed,
            folder := output / (method if len(seeds) == 1 else f"{method}-seed{seed}"),
            options
            | VARIANTS.get(method, {"method": method})
            | {"seed": seed, "output_dir": str(folder)}
            | ({"learning_rate": rates[method]} if method in rates else {}),
        )
        for method in methods
        for seed in seeds
    ]
    cells = Cells(output / "cells", output / "locks")
    for run in runs:
        if (done := cells.read(run.folder.name)) and done["options"] != run.options:
            raise ValueError(
                f"{run.folder} was run with other options than {config} has now. Name another folder (--output), or "
                f"delete {output}."
            )
    for i, run in enumerate(runs, 1):
        with cells.claim(run.folder.name) as lock:
            if lock is not None:
                print(f"{time.strftime('%H:%M')} {i} of {len(runs)}: {run.folder.name} ...", flush=True)
                train(recipe, run, cells, lock)
    while not all(cells.settled(run.folder.name) for run in runs):  # somebody else has them
        time.sleep(2)
    if failed := [run for run in runs if cells.read(run.folder.name) is None]:
        last = cells.errors()[failed[0].folder.name]
        raise RuntimeError(f"{failed[0].folder.name} failed: {last} (all of it: {failed[0].folder / 'output.txt'})")
    return write_report(config, runs, {run.folder: cells.read(run.folder.name) or {} for run in runs}, output)


def train(recipe: str, run: Run, cells: Cells, lock: int) -> None:
    """Run the recipe in a process of its own, and write down what came of it."""
    one_device = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ  # several in one process would mean nn.DataParallel
    if code := run_recipe(recipe, run.options, run.folder, lock, PACKAGE, environment=one_device):
        cells.fail(run.folder.name, "\n".join(end_of_output(run.folder, _TAIL)) or f"exit status {code}")
        return
    results = json.loads((run.folder / "all_results.json").read_text(encoding="utf-8"))
    state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
    logged = {name: value for entry in state["log_history"] for name, value in entry.items() if name in _LOGGED}
    result = {"options": run.options, "results": results, "logged": logged, "steps": state["global_step"]}
    cells.finish(run.folder.name, result)


def write_report(config: Path, runs: Sequence[Run], results: Mapping[Path, dict[str, Any]], output: Path) -> Path:
    """Write the table as Markdown, the pictures if matplotlib is there, and the models' cards."""
    methods = list(dict.fromkeys(run.label for run in runs))
    seeds = sorted({run.seed for run in runs})
    first = results[runs[0].folder]["results"]
    lines = [
        f"# {'; '.join(methods)} on the {first.get('dataset', 'same data')}",
        "",
        f"Settings of `{config.name}`, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: every method "
        f"starts from the same weights and sees the same batches, for {results[runs[0].folder]['steps']:,} steps. The "
        "learning rate is as listed; it was not tuned here. Mean over the seeds and, of several, the range. Alignment: "
        "the last mean cosine of the feedback with what it learns from, or of B_l e with the exact delta.",
        "",
        make_table(runs, results),
    ]
    try:
        from grape_hf.reports.plots import plot_alignments, plot_curves, read_history, values_to_draw
    except ImportError as error:
        lines += ["", f"No plots: {error}"]
    else:
        names = {run: run.label if len(seeds) == 1 else f"{run.label}, seed {run.seed}" for run in runs}
        histories = {names[run]: read_history(run.folder) for run in runs}
        if values := values_to_draw(histories):
            plot_curves(histories, output / "curves.png", values)
            lines += ["", "![Loss and figures over optimiser steps](curves.png)"]
        of_first = {names[run]: histories[names[run]] for run in runs if run.seed == runs[0].seed}
        if plot_alignments(of_first, output / "alignment.png"):
            lines += ["", "![Alignment of the feedback over optimiser steps](alignment.png)"]
    by_bp = {run.seed: run.folder for run in runs if run.method == "bp"}
    for run in runs:
        if run.method != "bp" and run.seed in by_bp:
            write_card(run.folder, bp_results=by_bp[run.seed])  # again, now that there is something to compare with
    report = output / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines[:5], ""]))
    print(f"Report: {report}")
    return report


def make_table(runs: Sequence[Run], results: Mapping[Path, dict[str, Any]]) -> str:
    """Write a row for each method: its figures, what it logged of its feedback at last, and the time of a step."""
    found = {method: [results[r.folder] for r in runs if r.method == method] for method in (r.method for r in runs)}
    labels = {run.method: run.label for run in runs}
    everything = [result for of_method in found.values() for result in of_method]
    counts = ("_samples", "_tokens", "_words")
    names = [
        n for n in figures(everything[0]["results"]) if n.startswith(("eval_", "test_")) and not n.endswith(counts)
    ]
    logged = [name for name in _LOGGED if any(name in result["logged"] for result in everything)]
    columns = ["method", "learning rate", *map(_spoken, names), *(_LOGGED[name] for name in logged), "seconds a step"]
    rows = []
    for method, of_method in found.items():
        rate = float(of_method[0]["options"].get("learning_rate", 5e-5))
        shown = [_mean([result["results"][name] for result in of_method]) for name in names]
        shown += [_mean([r["logged"][name] for r in of_method if name in r["logged"]]) for name in logged]
        seconds = _mean([1 / result["results"]["train_steps_per_second"] for result in of_method])
        rows.append([labels[method], f"{rate:g}", *shown, seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def _spoken(name: str) -> str:
    split, _, figure = name.partition("_")
    return {"eval": "validation", "test": "test"}[split] + " " + figure.replace("_", " ")


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, low, high = (f"{value:.4g}" for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"
