r"""Language models from scratch, one method beside the other: each at its best rate, several seeds, curves over steps.

    python recipes/studies/language_model.py recipes/studies/language_model.yaml --prepare   # the data, once
    python recipes/studies/language_model.py recipes/studies/language_model.yaml             # the cells, on one core
    python recipes/studies/language_model.py recipes/studies/language_model.yaml --report    # table and plots

A study is a YAML file: ``data`` (``token_blocks.py``), ``model`` (a configuration of transformers), ``arguments`` (of
the Trainer, over those below), ``steps``, ``seeds``, ``learning_rates`` and ``methods``, by name the options of each,
which may have ``learning_rates`` of their own and a ``trainer`` of ``study_trainers.py``. ``base`` names a file that it
is a variation of, whose ``methods`` it may choose from by a list of names; ``rates_from`` a study in which the rates
have been chosen. ``test: false`` leaves the test split alone, ``train_blocks`` takes the first blocks only.

A cell is one training: every method at every rate with the first seed; then, at the rate with the lowest loss on the
whole validation split, with all seeds, and the whole test split is read. The weights of the first seed are kept in
``outputs`` until then. Losses are in nats per token, those of the curve on the first ``eval_blocks`` blocks.

Each finished cell is a JSON file in the output folder, to be committed. Start again to go on with the missing ones.
Several files may be given: ``--workers N`` runs their cells in N processes, which share a GPU if there is one, rates
first; after ``--seconds`` all stop, and ``--out`` names a folder for all that is done, curves of unfinished cells too
(``bundle.py``); ``--unpack FILE.jsonl`` puts it where it belongs.
"""

import argparse
import math
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, set_seed

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.recipes.cells import Cells

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script sees its own folder alone
from bundle import run_workers, unpack
from curves import write_report
from grid import TOP, Cell, Grid, commit, fill
from study_trainers import TRAINERS
from token_blocks import TokenBlocks, load, prepare

SCRATCH = TOP / "outputs" / "studies"
_KNOWN = {"title", "base", "output_dir", "data", "model", "arguments", "steps", "eval_blocks", "train_blocks"}
_KNOWN |= {"learning_rates", "rates_from", "seeds", "methods", "labels", "test", "count_first_label"}
_NOT_ARGUMENTS = ("learning_rates", "trainer")  # of a method
_IGNORED = -100


class Study:
    """A study's file, and where its cells are.

    Args:
        path: the YAML file.
        only: the methods to be run; all by default.

    Raises:
        ValueError: a key or a method that is unknown; cells that were run with other settings.
    """

    def __init__(self, path: Path, only: list[str] | None = None) -> None:
        self.path, self.settings = path, read_study(path)
        if unknown := sorted(set(only or ()) - set(self.settings["methods"])):
            raise ValueError(f"{path} has no {', '.join(unknown)}, only {', '.join(self.settings['methods'])}.")
        self.scratch, self.folder = SCRATCH / path.stem, TOP / self.settings["output_dir"]
        source = self.settings.get("rates_from")
        self._source: Grid | None = Study(path.parent / source).grid if source else None
        self.cells = Cells(self.folder / "cells", self.scratch / "locks")
        self.partial = Cells(self.folder / "partial", self.scratch / "locks")
        methods, test = self.settings["methods"], self.settings.get("test", True)
        self.grid: Grid = Grid(self.cells, methods, self.rates, self.settings["seeds"], score, test, only)
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
        names = ("data", "model", "arguments", "steps", "eval_blocks", "train_blocks", "count_first_label")
        return {name: self.settings[name] for name in names if name in self.settings}


def score(result: dict[str, Any]) -> float:
    """Return how good a cell is: its validation loss, negated; one that diverged is worse than all others."""
    loss = result["validation_loss"]
    return -math.inf if loss is None else -loss


def read_study(path: Path) -> dict[str, Any]:
    """Read a study's file, over the one that it is a variation of.

    Raises:
        ValueError: a key that is unknown, or one that is missing.
    """
    study: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := set(study) - _KNOWN:
        raise ValueError(f"{path}: unknown: {', '.join(sorted(unknown))}; expected {', '.join(sorted(_KNOWN))}.")
    if "base" in study:
        base = read_study(path.parent / study.pop("base"))
        for name in ("data", "model", "arguments"):
            study[name] = base[name] | study.get(name, {})
        if isinstance(study.get("methods"), list):
            study["methods"] = {name: base["methods"][name] for name in study["methods"]}
        study = base | study
    if missing := {"output_dir", "data", "model", "steps", "seeds", "methods"} - set(study):
        raise ValueError(f"{path}: missing: {', '.join(sorted(missing))}.")
    return {"title": path.stem, "arguments": {}, "eval_blocks": 1024} | study


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


def collate(tokens: Tensor, count_first: bool) -> dict[str, Tensor]:
    """Make a batch of blocks, ``(batch, context)``; the labels are the inputs, which the model shifts.

    Args:
        tokens: the blocks.
        count_first: leave the first label as it is. Nothing predicts it, but the Trainer counts it where the model
            leaves the loss's scale to it, so that the loss is (context - 1) / context of that per token. The cells of
            November 2026 were trained so.
    """
    labels = tokens.clone()
    if not count_first:
        labels[:, 0] = _IGNORED
    return {"input_ids": tokens, "labels": labels}


def make_trainer(study: Study, cell: Cell, blocks: dict[str, TokenBlocks], watch: Watch) -> GrapeTrainer:
    """Make the model and its Trainer, as the study says."""
    settings, options = study.settings, study.options(cell.method)
    set_seed(cell.seed)
    shape: dict[str, Any] = {"vocab_size": settings["data"]["vocab_size"], "n_positions": settings["data"]["context"]}
    on_cpu = blocks["train"].tokens.device.type == "cpu"
    if on_cpu:
        # Under bf16 on a CPU the fused kernel's backward is several times slower than plain matrix products.
        shape["attn_implementation"] = "eager"
    config = AutoConfig.for_model(
        **(shape | {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False} | settings["model"])
    )
    steps = settings["steps"]
    defaults: dict[str, Any] = {
        "per_device_eval_batch_size": 64,
        "warmup_steps": steps // 20,
        "logging_steps": max(1, steps // 40),
        "eval_steps": max(1, steps // 8),
        "alignment_steps": max(1, steps // 8),
    }
    fixed: dict[str, Any] = {
        "output_dir": str(study.scratch / "trainer"),
        "max_steps": steps,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "use_cpu": on_cpu,
        "eval_strategy": "steps",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": False,  # the blocks are where they are used
        "logging_nan_inf_filter": False,  # it would wait for the device in every step
    }
    given = {name: value for name, value in options.items() if name not in _NOT_ARGUMENTS}
    arguments = GrapeTrainingArguments(**(defaults | settings["arguments"] | given | fixed))
    kind: Any = GrapeTrainer
    for name, value in options.get("trainer", {}).items():
        kind = partial(TRAINERS[name], value)
    return kind(
        model=AutoModelForCausalLM.from_config(config),
        args=arguments,
        data_collator=partial(collate, count_first=settings.get("count_first_label", False)),
        train_dataset=TokenBlocks(blocks["train"].tokens[: settings.get("train_blocks")]),
        eval_dataset=TokenBlocks(blocks["validation"].tokens[: settings["eval_blocks"]]),
        callbacks=[watch],
    )


def loss_of(study: Study, loss: float) -> float:
    """Return the loss per predicted token in nats, of what ``evaluate`` says (``collate``)."""
    context = study.settings["data"]["context"]
    return loss * context / (context - 1) if study.settings.get("count_first_label") else loss


def train(study: Study, cell: Cell, blocks: dict[str, TokenBlocks], deadline: float) -> dict[str, Any]:
    """Train one cell, or open what its rate's choice has trained, and return its result."""
    chosen = Cell(cell.method, cell.learning_rate, cell.seed)
    watch, trained = Watch(deadline), study.cells.read(chosen.name) if cell.final else None
    trainer = make_trainer(study, cell, blocks, watch)
    weights = study.scratch / f"{chosen.name}.pt"

    def evaluated(split: str) -> float:
        return loss_of(study, trainer.evaluate(blocks[split])["eval_loss"])

    if trained is not None and weights.exists():
        trainer.model.load_state_dict(torch.load(weights, map_location=trainer.args.device))
        if (found := trained["validation_loss"]) is None or abs(evaluated("validation") - found) > 2e-3:
            raise ValueError(f"{weights} is not the model of {chosen.name}, or that diverged. Delete the file.")
        return trained | {"test_loss": evaluated("test")}
    started = time.time()
    trainer.train()
    seconds, history, steps = time.time() - started, list(trainer.state.log_history), trainer.state.global_step
    result: dict[str, Any] = {
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "options": study.options(cell.method),
        "settings": study.common(),
        "validation_loss": None,
        "steps": steps,
        "seconds": round(seconds),
        "seconds_a_step": round(seconds / max(1, steps), 5),
        "commit": COMMIT,
        "finished": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "curve": [[e["step"], loss_of(study, e["eval_loss"])] for e in history if "eval_loss" in e],
        "log_history": history,
    }
    if watch.late or watch.diverged:
        return result | {"partial" if watch.late else "diverged": True}
    study.partial.finish(cell.name, result | {"partial": True})  # should time be up before the whole split is read
    result["validation_loss"] = evaluated("validation")
    result["perplexity"] = math.exp(result["validation_loss"])
    if cell.final:
        result["test_loss"] = evaluated("test")
    elif study.grid.test:
        torch.save(trainer.model.state_dict(), weights)
    return result


def run(study: Study, cell: Cell, blocks: dict[str, TokenBlocks], deadline: float = math.inf) -> None:
    """Run one cell and write its file, or how it failed."""
    try:
        result = train(study, cell, blocks, deadline)
    except Exception as error:
        study.cells.fail(cell.name, traceback.format_exc())
        print(f"{time.strftime('%H:%M')} {study.path.stem}/{cell.name} FAILED: {error}", flush=True)
        return
    (study.partial if result.get("partial") else study.cells).finish(cell.name, result)
    if not result.get("partial"):
        study.partial.forget(cell.name)
    loss = result["validation_loss"]
    found = f"no loss after {result['steps']} steps" if loss is None else f"{loss:.4f} nats, {math.exp(loss):.2f}"
    print(f"{time.strftime('%H:%M')} {study.path.stem}/{cell.name}: {found}, {result['seconds']} s", flush=True)


def main() -> None:
    """Run the cells that are missing, then write the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [Path(__file__).with_suffix(".yaml")]
    parser.add_argument("studies", nargs="*", type=Path, default=default, help="YAML files, the first first")
    parser.add_argument("--prepare", action="store_true", help="only tokenise the data")
    parser.add_argument("--report", action="store_true", help="only write tables and plots")
    parser.add_argument("--unpack", nargs="+", type=Path, default=[], help="what --out has left elsewhere")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--workers", type=int, default=1, help="processes that run cells at the same time; 0: be one")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after that time")
    parser.add_argument("--out", type=Path, help="a folder for all that is done, in few files")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    studies = [Study(path, options.methods) for path in options.studies]
    folders = {str(study.path): study.folder for study in studies}
    for file in options.unpack:
        unpack(file, folders)
    if options.prepare:
        for study in studies:
            print(prepare(study.settings["data"]))
        return
    many = options.workers > 1 or (options.workers == 1 and options.out is not None)
    if many and not options.report and not options.unpack:
        run_workers(options.workers, deadline, folders, options.out)
    elif not options.report and not options.unpack:
        torch.set_num_threads(1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded: dict[str, dict[str, TokenBlocks]] = {}
        by_grid = {id(study.grid): study for study in studies}

        def run_cell(grid: Grid, cell: Cell, lock: int) -> None:
            study = by_grid[id(grid)]
            data = str(study.settings["data"])
            loaded[data] = loaded.get(data) or load(study.settings["data"], device)
            run(study, cell, loaded[data], deadline)

        fill([study.grid for study in studies], run_cell, by_stage=options.workers == 0, deadline=deadline)
        if options.workers == 0:  # who started it reports
            return
    failed = [name for study in studies for name in study.cells.errors()]
    for study in studies:
        write_report(study.settings, study.grid, study.partial.all() | study.cells.all(), study.folder)
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")


# Of the code that this process has loaded, whatever is committed while it runs.
COMMIT = commit()

if __name__ == "__main__":
    main()
