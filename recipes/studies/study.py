"""The machinery of a study: a YAML file of methods, cells that are trainings, many processes that share them.

What is trained, on which data, and what is reported is the business of a subclass of ``Study``: language models
(``language_model.py``), image classifiers (``image_model.py``). Their scripts say how a study is started.

A cell is one training: every method at every rate with the first seed; then, at the rate that is best on the whole
validation split, with all seeds, and the whole test split is read. The weights of the first seed are kept in
``outputs`` until then. Each finished cell is a JSON file in the output folder, to be committed.
"""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
import yaml
from bundle import run_workers, unpack
from grid import TOP, Cell, Grid, commit, fill
from study_trainers import TRAINERS
from transformers import TrainerCallback

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.recipes.cells import Cells

SCRATCH = TOP / "outputs" / "studies"
_NOT_ARGUMENTS = ("learning_rates", "trainer")  # of a method


class Watch(TrainerCallback):
    """End a training whose time is up, or whose loss is no number any more."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.late, self.diverged = deadline, False, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self.late = time.time() > self.deadline and state.global_step < state.max_steps
        control.should_training_stop = control.should_training_stop or self.late

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Look at the loss."""
        self.diverged = self.diverged or not math.isfinite(logs.get("loss", 0.0))
        control.should_training_stop = control.should_training_stop or self.diverged


class Study:
    """A study's file, and where its cells are; what is trained is for a subclass to say.

    Args:
        path: the YAML file.
        only: the methods to be run; all by default.

    Attributes:
        known: the keys of the file.
        shared: those of them that decide what a cell's training is, whatever its method; a cell's file has them.
        figure: the name, in a cell's result, of what is measured on the validation split; None where it diverged.
        defaults: what the file need not say.

    Raises:
        ValueError: a key or a method that is unknown; cells that were run with other settings.
    """

    known: ClassVar[set[str]] = {
        *("title", "base", "output_dir", "data", "model", "arguments", "steps", "labels"),
        *("learning_rates", "rates_from", "seeds", "methods", "test"),
    }
    shared: ClassVar[tuple[str, ...]] = ("data", "model", "arguments", "steps")
    figure: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {"arguments": {}, "labels": {}}

    def __init__(self, path: Path, only: list[str] | None = None) -> None:
        self.path, self.settings = path, {"title": path.stem} | self.defaults | read_study(path, self.known)
        if unknown := sorted(set(only or ()) - set(self.settings["methods"])):
            raise ValueError(f"{path} has no {', '.join(unknown)}, only {', '.join(self.settings['methods'])}.")
        self.scratch, self.folder = SCRATCH / path.stem, TOP / self.settings["output_dir"]
        source = self.settings.get("rates_from")
        self._source: Grid | None = type(self)(path.parent / source).grid if source else None
        self.cells = Cells(self.folder / "cells", self.scratch / "locks")
        self.partial = Cells(self.folder / "partial", self.scratch / "locks")
        methods, test = self.settings["methods"], self.settings.get("test", True)
        self.grid: Grid = Grid(self.cells, methods, self.rates, self.settings["seeds"], self.score, test, only)
        self.grid.refuse_changed(lambda cell: self.options(cell.method), ("learning_rates",))
        for name, result in self.cells.all().items():
            if result.get("settings", self.common()) != self.common():
                raise ValueError(
                    f"{self.cells.results / name}.json was run with {result['settings']}, and {path} now says "
                    f"{self.common()}. Name another output_dir, or delete the cells."
                )

    def rates(self, method: str) -> list[float]:
        """Return a method's learning rates: its own, those of all, or the one that another study has chosen."""
        own = (self.settings["methods"][method] or {}).get("learning_rates")
        if own is None and self._source is not None:
            best = self._source.best(method)
            return [] if best is None else [best.learning_rate]
        return [float(rate) for rate in own or self.settings["learning_rates"]]

    def options(self, method: str) -> dict[str, Any]:
        """Return what a method's cells have that others have not, its rates aside."""
        given = self.settings["methods"][method] or {}
        return {name: value for name, value in given.items() if name != "learning_rates"}

    def common(self) -> dict[str, Any]:
        """Return what all cells have, for their files."""
        return {name: self.settings[name] for name in self.shared if name in self.settings}

    def arguments(self, cell: Cell, defaults: Mapping[str, Any], **fixed: Any) -> GrapeTrainingArguments:
        """Return the arguments of a cell's training.

        Args:
            cell: the cell.
            defaults: what holds where the study says nothing, over the defaults of all studies.
            fixed: what holds whatever the study says.
        """
        steps = self.settings["steps"]
        usual = {
            "logging_steps": max(1, steps // 40),
            "eval_steps": max(1, steps // 8),
            "alignment_steps": max(1, steps // 8),
        }
        always: dict[str, Any] = {
            "output_dir": str(self.scratch / "trainer"),
            "max_steps": steps,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "eval_strategy": "steps",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,  # the data are where they are used
            "logging_nan_inf_filter": False,  # it would wait for the device in every step
        }
        options = self.options(cell.method)
        given = {name: value for name, value in options.items() if name not in _NOT_ARGUMENTS}
        return GrapeTrainingArguments(**(usual | dict(defaults) | self.settings["arguments"] | given | always | fixed))

    def trainer_of(self, method: str) -> Any:
        """Return what makes the method's Trainer: ``GrapeTrainer``, or one of ``study_trainers.py``."""
        for name, value in self.options(method).get("trainer", {}).items():
            return partial(TRAINERS[name], value)
        return GrapeTrainer

    def score(self, result: dict[str, Any]) -> float:
        """Return how good a cell is on the validation split; one that diverged is worse than all others."""
        raise NotImplementedError

    def prepare(self) -> Path:
        """Write the data's files, if that has not been done; return their folder."""
        raise NotImplementedError

    def load(self, device: torch.device) -> Any:
        """Return the data, on the device that cells are run on."""
        raise NotImplementedError

    def make_trainer(self, cell: Cell, data: Any, watch: Watch) -> GrapeTrainer:
        """Make the model and its Trainer; ``watch`` is one of its callbacks."""
        raise NotImplementedError

    def measure(self, trainer: GrapeTrainer, data: Any, split: str) -> dict[str, float]:
        """Return what a cell's result says of a whole split, ``validation`` or ``test``."""
        raise NotImplementedError

    def curve(self, history: list[dict[str, Any]]) -> list[list[float]]:
        """Return the validation figure by step, out of what was logged."""
        raise NotImplementedError

    def report(self) -> None:
        """Write table and plots of what is done."""
        raise NotImplementedError


def read_study(path: Path, known: set[str]) -> dict[str, Any]:
    """Read a study's file, over the one that it is a variation of.

    Raises:
        ValueError: a key that is unknown, or one that is missing.
    """
    study: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := set(study) - known:
        raise ValueError(f"{path}: unknown: {', '.join(sorted(unknown))}; expected {', '.join(sorted(known))}.")
    if "base" in study:
        base = read_study(path.parent / study.pop("base"), known)
        for name in ("data", "model", "arguments"):
            study[name] = base.get(name, {}) | study.get(name, {})
        if isinstance(study.get("methods"), list):
            study["methods"] = {name: base["methods"][name] for name in study["methods"]}
        study = base | study
    if missing := {"output_dir", "data", "model", "steps", "seeds", "methods"} - set(study):
        raise ValueError(f"{path}: missing: {', '.join(sorted(missing))}.")
    return study


def train(study: Study, cell: Cell, data: Any, deadline: float) -> dict[str, Any]:
    """Train one cell, or open what its rate's choice has trained, and return its result."""
    chosen = Cell(cell.method, cell.learning_rate, cell.seed)
    watch, trained = Watch(deadline), study.cells.read(chosen.name) if cell.final else None
    trainer = study.make_trainer(cell, data, watch)
    weights = study.scratch / f"{chosen.name}.pt"
    if trained is not None and weights.exists():
        trainer.model.load_state_dict(torch.load(weights, map_location=trainer.args.device))
        found = trained[study.figure]
        if found is None or abs(study.measure(trainer, data, "validation")[study.figure] - found) > 2e-3:
            raise ValueError(f"{weights} is not the model of {chosen.name}, or that diverged. Delete the file.")
        return trained | study.measure(trainer, data, "test")
    started = time.time()
    trainer.train()
    seconds, history, steps = time.time() - started, list(trainer.state.log_history), trainer.state.global_step
    result: dict[str, Any] = {
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "options": study.options(cell.method),
        "settings": study.common(),
        study.figure: None,
        "steps": steps,
        "seconds": round(seconds),
        "seconds_a_step": round(seconds / max(1, steps), 5),
        "commit": COMMIT,
        "finished": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curve": study.curve(history),
        "log_history": history,
    }
    if watch.late or watch.diverged:
        return result | {"partial" if watch.late else "diverged": True}
    study.partial.finish(cell.name, result | {"partial": True})  # should time be up before the whole split is read
    result |= study.measure(trainer, data, "validation")
    if cell.final:
        result |= study.measure(trainer, data, "test")
    elif study.grid.test:
        torch.save(trainer.model.state_dict(), weights)
    return result


def run(study: Study, cell: Cell, data: Any, deadline: float = math.inf) -> None:
    """Run one cell and write its file, or how it failed."""
    try:
        result = train(study, cell, data, deadline)
    except Exception as error:
        study.cells.fail(cell.name, traceback.format_exc())
        print(f"{time.strftime('%H:%M')} {study.path.stem}/{cell.name} FAILED: {error}", flush=True)
        return
    (study.partial if result.get("partial") else study.cells).finish(cell.name, result)
    if not result.get("partial"):
        study.partial.forget(cell.name)
    value = result[study.figure]
    found = f"no result after {result['steps']} steps" if value is None else f"{study.figure} {value:.4f}"
    print(f"{time.strftime('%H:%M')} {study.path.stem}/{cell.name}: {found}, {result['seconds']} s", flush=True)


def main(kind: type[Study], about: str | None, default: Path) -> None:
    """Run the cells that are missing, then write the reports: the command line of every kind of study.

    Args:
        kind: of the studies.
        about: what the help says.
        default: the study that is meant where none is named.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", type=Path, default=[default], help="YAML files, the first first")
    parser.add_argument("--prepare", action="store_true", help="only make the data's files")
    parser.add_argument("--report", action="store_true", help="only write tables and plots")
    parser.add_argument("--unpack", nargs="+", type=Path, default=[], help="what --out has left elsewhere")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--workers", type=int, default=1, help="processes that run cells at the same time; 0: be one")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after that time")
    parser.add_argument("--out", type=Path, help="a folder for all that is done, in few files")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    studies = [kind(path, options.methods) for path in options.studies]
    folders = {str(study.path): study.folder for study in studies}
    for file in options.unpack:
        unpack(file, folders)
    if options.prepare:
        for study in studies:
            print(study.prepare())
        return
    many = options.workers > 1 or (options.workers == 1 and options.out is not None)
    if many and not options.report and not options.unpack:
        run_workers(options.workers, deadline, folders, options.out)
    elif not options.report and not options.unpack:
        torch.set_num_threads(1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: dict[str, Any] = {}
        by_grid = {id(study.grid): study for study in studies}

        def run_cell(grid: Grid, cell: Cell, lock: int) -> None:
            study = by_grid[id(grid)]
            data = str(study.settings["data"])
            loaded[data] = loaded.get(data) or study.load(device)
            run(study, cell, loaded[data], deadline)

        fill([study.grid for study in studies], run_cell, by_stage=options.workers == 0, deadline=deadline)
        if options.workers == 0:  # who started it reports
            return
    failed = [name for study in studies for name in study.cells.errors()]
    for study in studies:
        study.report()
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")


# Of the code that this process has loaded, whatever is committed while it runs.
COMMIT = commit()
