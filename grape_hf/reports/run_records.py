"""What is known of a training run: taken from its Trainer, or read from the folder that it left.

A model card is made of this (``cards.py``), so that the card of a run under way and the one made from its folder later
are the same. Nothing here asks the network, and a folder is read without making the model.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import ProcessorMixin, TrainerState, TrainingArguments
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modelcard import TASK_MAPPING, TrainingSummary

from grape_hf.presets import PRESETS
from grape_hf.reports.figures import best_step, figures, final_results, read_json
from grape_hf.reports.log_names import PREFIX, PRESET, log_names
from grape_hf.training_args import GrapeArgumentsMixin, options_of, resolved

# Arguments of TrainingSummary.from_trainer that create_model_card knows too.
_SUMMARISED = (
    "language",
    "license",
    "tags",
    "model_name",
    "finetuned_from",
    "tasks",
    "dataset_tags",
    "dataset",
    "dataset_args",
    "dataset_metadata",
)


class _Metadata(ModelCardData):
    """Metadata whose YAML keeps every character: PyYAML writes U+0085 as it is and reads it back as a space."""

    def to_yaml(self, line_break: Any = None, original_order: list[str] | None = None) -> str:
        text: str = super().to_yaml(line_break, original_order)
        if "\x85" not in text:
            return text
        return str(yaml.dump(self.to_dict(), sort_keys=False, line_break=line_break)).strip()  # all in escapes


class Card(ModelCard):
    """A model card of ours."""

    card_data_class = _Metadata


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        folder: where it left its files.
        args: the training arguments.
        options: GrAPE's options, those that were not given with their values for the model.
        summary: what the stock Trainer's card would say.
        card: the card that lies in the folder, or the stock one.
        history: the Trainer's log.
        steps: optimiser steps taken.
        results: figures of the last evaluation, by the names under which they were logged.
        measured_at: the step at which that was, None where unknown.
        architecture: class of the model.
        config: the model's configuration.
        preprocessor: which Auto class opens what the model reads with, if anything.
        trained_from: folder of the weights that it began with, where they were a folder's.
        latest: what has not been logged yet, under the names of the log.
        blocks: at whose outputs h_1 .. h_{L-1} are; empty where unknown.
        single_block: whether there was no feedback point at all.
        adapter: the configuration of the adapter that was trained, as peft saves it; empty where it was no adapter.
    """

    folder: Path
    args: TrainingArguments
    options: GrapeArgumentsMixin
    summary: TrainingSummary
    card: Card
    history: list[dict[str, Any]]
    steps: int
    results: dict[str, float]
    measured_at: int | None
    architecture: str
    config: Mapping[str, Any]
    preprocessor: str | None = None
    trained_from: str | None = None
    latest: dict[str, float] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    single_block: bool = False
    adapter: Mapping[str, Any] = field(default_factory=dict)


def record_of(trainer: Any, given: Mapping[str, Any]) -> RunRecord:
    """Take the record from a ``GrapeTrainer`` whose stock card has just been written.

    Args:
        trainer: the Trainer, on the main process.
        given: arguments of ``create_model_card``.
    """
    folder = Path(trainer.args.output_dir)
    card = Card.load(folder / "README.md")
    named = {name: value for name, value in given.items() if name in _SUMMARISED}
    named |= {"dataset": given.get("dataset") or given.get("dataset_name")}  # trl's name for it
    # The stock card has asked the Hub for the licence of the base model; any value keeps this from asking again.
    named |= {"license": card.data.get("license") or "unknown", "tags": None}
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "_orig_mod", model)
    adapter: dict[str, Any] = {}
    if hasattr(model, "get_base_model"):
        adapter, model = model.active_peft_config.to_dict(), model.get_base_model()
    start = str(getattr(model.config, "_name_or_path", ""))
    run = trainer._run
    history = trainer.state.log_history
    results, measured_at = final_results(history, best_step(trainer.state, trainer.args))
    saved = read_json(folder / "all_results.json")
    shared = results.keys() & saved.keys()
    if shared and all(saved[name] == results[name] for name in shared):  # else they are of another evaluation
        results |= figures(saved)
    return RunRecord(
        folder=folder,
        args=trainer.args,
        options=trainer.grape_options,
        summary=TrainingSummary.from_trainer(trainer, **named),
        card=card,
        history=history,
        steps=trainer.state.global_step,
        results=results,
        measured_at=measured_at,
        architecture=type(model).__name__,
        config=model.config.to_dict(),
        preprocessor=_preprocessor(trainer.processing_class),
        trained_from=start if os.path.isdir(start) else None,
        latest={name: float(value) for name, value in log_names(run.metrics).items()} if run is not None else {},
        blocks=run.block_names if run is not None else [],
        single_block=run is not None and run.single_block,
        adapter=adapter,
    )


def read_record(folder: str | Path) -> RunRecord:
    """Read the record of a run from its folder, or from a checkpoint.

    Args:
        folder: holds ``trainer_state.json``, ``training_args.bin`` (a pickle: of folders you trust) and
            ``config.json``, or of an adapter ``adapter_config.json``; ``all_results.json`` and a ``README.md`` are
            read where they are.

    Raises:
        FileNotFoundError: if one of the first three is missing.
        ValueError: if the run was none of ``GrapeTrainer``.
    """
    folder = Path(folder)
    adapter = read_json(folder / "adapter_config.json")
    needed = ("trainer_state.json", "training_args.bin", *(() if adapter else ("config.json",)))
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder}: expected the folder of a finished run or a checkpoint, found no {', no '.join(missing)}. "
            "Trainer.save_state() and Trainer.save_model() write them."
        )
    args = torch.load(folder / "training_args.bin", map_location="cpu", weights_only=False)
    try:
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except ValueError as error:
        raise ValueError(f"{folder / 'trainer_state.json'} cannot be read, it may be cut off: {error}") from error
    history = state.log_history
    if not isinstance(args, GrapeArgumentsMixin) and not any("grape/calibration/steps" in entry for entry in history):
        raise ValueError(
            f"{folder}: expected a run of GrapeTrainer, found {type(args).__name__} without GrAPE's options and a log "
            "without its entries. Nothing says that it was trained by other than the stock Trainer."
        )
    # That of an adapter's base is known where the base is a folder.
    base = Path(adapter["base_model_name_or_path"] or folder) if adapter else folder
    config = read_json(base / "config.json")
    saved = read_json(folder / "all_results.json")
    readme = folder / "README.md"
    known = Card.load(readme) if readme.is_file() else None
    architecture = (config.get("architectures") or ["the model"])[0]
    summary = TrainingSummary.from_trainer(
        SimpleNamespace(
            args=args,
            state=state,
            model=SimpleNamespace(config=SimpleNamespace(_name_or_path="")),
            train_dataset=None,
            eval_dataset=None,
        ),
        **_named(saved, None if known is None else known.data, architecture),
    )
    summary.license = None if known is None else known.data.get("license")
    results, measured_at = final_results(state.log_history, best_step(state, args))
    chosen: Mapping[str, Any] = next((entry for entry in history if PRESET in entry), {})
    noted = {"grape_preset": chosen.get(PRESET)} | {name: chosen.get(PREFIX + name) for name in PRESETS["recommended"]}
    return RunRecord(
        folder=folder,
        args=args,
        options=resolved(replace(options_of(args), **{k: v for k, v in noted.items() if v is not None})),
        summary=summary,
        card=known or Card(summary.to_model_card()),
        history=history,
        steps=state.global_step,
        results=results | figures(saved),
        measured_at=measured_at,
        architecture=architecture,
        config=config,
        preprocessor=_saved_preprocessor(folder),
        adapter=adapter,
        # They are nowhere else without making the model.
        blocks=re.findall(r"^\| h_\d+ \| `([^`|]+)` \|", known.text, flags=re.MULTILINE) if known else [],
    )


def last_logged(record: RunRecord, prefix: str) -> tuple[int, dict[str, float]] | None:
    """Find the last values under a prefix: the step they were logged at, and the values by the rest of their names."""
    entries: Iterable[tuple[int, Mapping[str, Any]]] = [
        (record.steps, record.latest),
        *((entry["step"], entry) for entry in reversed(record.history)),
    ]
    for step, entry in entries:
        values = {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
        if values:
            return step, values
    return None


def task_of(architecture: str) -> str | None:
    """Return the Hub's name of what a model class of transformers is for, None where there is none."""
    for task, classes in TASK_MAPPING.items():
        names = [name for value in classes.values() for name in ([value] if isinstance(value, str) else value)]
        if architecture in names:
            return str(task)
    return None


def _named(saved: Mapping[str, Any], known: Any, architecture: str) -> dict[str, Any]:
    """Collect what nobody but the user can know, from the results of a recipe and from the card in the folder."""
    known = known or {}
    results = known.get("eval_results") or []
    data = results[0].dataset_name if results else None
    return {
        "language": known.get("language"),
        "license": "unknown",  # None would ask the Hub
        "tags": list(known.get("tags") or []),
        "model_name": known.get("model_name"),
        "finetuned_from": known.get("base_model"),
        "tasks": known.get("pipeline_tag") or (results[0].task_type if results else None) or task_of(architecture),
        "dataset_tags": known.get("datasets"),
        "dataset": saved.get("dataset") or (None if data == UNNAMED else data),
        "dataset_args": results[0].dataset_args if results else None,
    }


# What stands in metadata for the name of a data set that was not given.
UNNAMED = "not named"


def _preprocessor(processing_class: Any) -> str | None:
    if processing_class is None:
        return None
    if isinstance(processing_class, ProcessorMixin):
        return "AutoProcessor"
    if isinstance(processing_class, BaseImageProcessor):
        return "AutoImageProcessor"
    return "AutoFeatureExtractor" if isinstance(processing_class, FeatureExtractionMixin) else "AutoTokenizer"


def _saved_preprocessor(folder: Path) -> str | None:
    files = {
        "processor_config.json": "AutoProcessor",
        "preprocessor_config.json": "AutoImageProcessor",
        "tokenizer_config.json": "AutoTokenizer",
    }
    return next((kind for name, kind in files.items() if (folder / name).is_file()), None)
