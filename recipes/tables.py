r"""Fill in a table of the paper: methods, each at the best of its rates, several seeds, beside the paper's figures.

    OMP_NUM_THREADS=1 python recipes/tables.py recipes/studies/images/resnet20.yaml      # start it once for each core
    python recipes/tables.py recipes/studies/images/resnet20.yaml --report               # tables from what is done

A cell is one run of a recipe, in a process of its own. Every method runs at each of its learning rates with the first
seed; the rate that is best on the validation split then runs with all seeds and is evaluated on the test split, which
no other cell reads. (Nothing is trained again on training and validation images together.) The model of the first seed
is not trained twice, if its folder is still there.

Each finished cell is a JSON file under ``output_dir``, to be committed. Start again to go on with the missing ones, or
start several processes: a cell is taken by one at a time, and set free if that one dies. A cell that fails leaves the
end of its output in ``<cell>.error.txt`` and the rest go on. Its options, and the whole output, are in
``outputs/tables``.

The YAML file: ``settings``, a recipe's file of options, and ``options`` over it, for all cells; ``methods``, by name,
the options of each (and ``learning_rates`` where they are not those of all); ``learning_rates``; ``seeds``; ``paper``,
its figures by method; ``title``; ``recipe`` (default: image_classification.py) and ``metric`` (default: accuracy). In a
plot over T a method named ``grape_T5`` belongs to ``grape``. The report is of the rates that are listed: one that is
best with the first seed and breaks down with the others may be taken off, and its cells stay.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from grid import TOP, Cell, Grid, commit, fill
from tables_report import learning_rates, write_report

from grape_hf.recipes.cells import Cells, end_of_output, run_recipe

SCRATCH = TOP / "outputs" / "tables"
_TAIL = 60  # lines of a failed cell's output that are kept with the results
_NOT_COMPARED = ("output_dir", "evaluate_test", "data_dir")  # where things are may differ between machines
_KNOWN = {
    "title",
    "recipe",
    "metric",
    "output_dir",
    "settings",
    "options",
    "methods",
    "labels",
    "learning_rates",
    "seeds",
    "paper",
}


def main() -> None:
    """Run the cells that are missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="the YAML file")
    parser.add_argument("--report", action="store_true", help="only write tables and plots")
    parser.add_argument("--methods", nargs="+", help="only run these methods")
    options = parser.parse_args()
    table = read_table(options.table)
    if unknown := [method for method in options.methods or [] if method not in table["methods"]]:
        parser.error(f"no method {', '.join(unknown)} in {options.table}; it has {', '.join(table['methods'])}")
    scratch = SCRATCH / options.table.stem
    cells = Cells(TOP / table["output_dir"] / "cells", scratch / "locks")
    grid = grid_of(table, cells, options.methods)
    grid.refuse_changed(lambda cell: all_options(table, cell), _NOT_COMPARED)
    if not options.report:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the recipe is ended as well
        fill([grid], lambda _, cell, lock: run(table, cell, cells, scratch, lock))
    write_report(table, cells.all(), cells.errors(), TOP / table["output_dir"])
    if not options.report and cells.errors():
        sys.exit(f"{len(cells.errors())} cells failed: {', '.join(cells.errors())}; see {cells.results}")


def read_table(path: Path) -> dict[str, Any]:
    """Read the YAML file.

    Raises:
        ValueError: a key that is unknown, or one that is missing.
    """
    table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown, missing = set(table) - _KNOWN, {"output_dir", "methods", "learning_rates", "seeds"} - set(table)
    if unknown or missing:
        raise ValueError(
            f"{path}: expected the keys {', '.join(sorted(_KNOWN))}; unknown: {', '.join(sorted(unknown)) or 'none'}, "
            f"missing: {', '.join(sorted(missing)) or 'none'}."
        )
    defaults = {"title": path.stem, "recipe": "recipes/image_classification.py", "metric": "accuracy", "paper": {}}
    defaults["labels"] = {}  # what a method is called in the report, where that is not its name in the file
    return defaults | table


def grid_of(table: dict[str, Any], cells: Cells, methods: list[str] | None = None) -> Grid:
    """Make the grid of a table's cells, of which those of ``methods`` (default: all) are to be run."""

    def score(result: dict[str, Any]) -> float:
        return result["validation"]

    return Grid(
        cells, table["methods"], lambda method: learning_rates(table, method), table["seeds"], score, only=methods
    )


def run(table: dict[str, Any], cell: Cell, cells: Cells, scratch: Path, lock: int) -> None:
    """Run one cell's recipe in a process of its own and write the cell's file, or how it failed."""
    folder = scratch / cell.name
    chosen = Cell(cell.method, cell.learning_rate, cell.seed)
    trained = cells.read(chosen.name) if cell.final else None  # the same run, without the test
    options = all_options(table, cell) | {"output_dir": str(folder)}
    reopen = trained is not None and (scratch / chosen.name / "config.json").exists()
    if reopen:
        options |= {"evaluate_only": True, "model_name_or_path": str(scratch / chosen.name)}
    print(f"{time.strftime('%H:%M')} {cell.name} ...", flush=True)
    code = run_recipe(TOP / table["recipe"], options, folder, lock, package=TOP, cwd=TOP)
    try:
        if code:
            raise RuntimeError(f"exit status {code}")
        result = collect(table, cell, folder, trained if reopen else None)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        tail = end_of_output(folder, _TAIL)
        cells.fail(cell.name, "\n".join([f"{type(error).__name__}: {error}, {folder / 'output.txt'}:", *tail]))
        print(f"{time.strftime('%H:%M')} {cell.name} FAILED: {tail[-1] if tail else error}", flush=True)
    else:
        cells.finish(cell.name, result)
        figures = ", ".join(f"{split} {result[split]:.4f}" for split in ("validation", "test") if split in result)
        print(f"{time.strftime('%H:%M')} {cell.name}: {figures}, {result['seconds']:.0f} s", flush=True)


def all_options(table: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Put together the options of a cell: the recipe's file, what all cells have, what the method has."""
    options: dict[str, Any] = {}
    if "settings" in table:
        options |= yaml.safe_load((TOP / table["settings"]).read_text(encoding="utf-8"))
    options |= (table.get("options") or {}) | (table["methods"][cell.method] or {})
    options.pop("learning_rates", None)
    options |= {"learning_rate": cell.learning_rate, "seed": cell.seed, "disable_tqdm": True}
    return options | ({"evaluate_test": True} if cell.final else {})


def collect(table: dict[str, Any], cell: Cell, folder: Path, trained: dict[str, Any] | None) -> dict[str, Any]:
    """Put together a cell's result from what the recipe left in its folder."""
    metrics = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    metric = table["metric"]
    test = {"test": metrics[f"test_{metric}"]} if cell.final else {}
    if trained is not None:
        if abs(metrics[f"eval_{metric}"] - trained["validation"]) > 2e-3:  # a model evaluated on another machine
            raise ValueError(
                f"the saved model has a validation {metric} of {metrics[f'eval_{metric}']}, its cell says "
                f"{trained['validation']}: it is another model. Delete its folder, and it will be trained again"
            )
        return trained | test
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "dataset": metrics.get("dataset"),
        "model": metrics.get("model"),
        "options": {name: value for name, value in all_options(table, cell).items() if name != "output_dir"},
        "validation": metrics[f"eval_{metric}"],
        **test,
        "seconds": round(metrics["train_runtime"], 1),
        "loading_share": metrics.get("train_loading_share"),
        "commit": COMMIT,
        "finished": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "log_history": history,
    }


# Of the code as it was when this process began, whatever is committed while it runs.
COMMIT = commit()

if __name__ == "__main__":
    main()
