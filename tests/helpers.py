"""What several tests do with a Trainer: make one on a problem, run it, look at what came out."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from problems import Problem
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.reports.log_names import PREFIX

# Estimates often enough to matter in a run of a few steps.
LEARNED = {"method": "grape", "jvp_steps": 1, "jvp_fraction": 1.0, "feedback_lr": 0.1}


def arguments(folder: Path, kind: type[TrainingArguments] = GrapeTrainingArguments, **options: Any) -> Any:
    """Arguments of a run of 10 steps on the CPU that tells nobody of it."""
    usual: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        grape_preset="recommended",  # a point after every block, in convolutional networks too
        dataloader_pin_memory=False,
    )
    if not issubclass(kind, GrapeTrainingArguments):
        ours = {f.name for f in dataclasses.fields(GrapeTrainingArguments)}
        ours -= {f.name for f in dataclasses.fields(kind)}
        usual, options = ({k: v for k, v in given.items() if k not in ours} for given in (usual, options))
    return kind(**(usual | options))


def make_trainer(
    problem: Problem,
    folder: Path,
    trainer: type[Trainer] = GrapeTrainer,
    *,
    dtype: torch.dtype = torch.float32,
    samples: int = 32,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """Make a Trainer on a problem. A stock Trainer gets the options that it knows.

    Args:
        problem: what to train.
        folder: for checkpoints.
        trainer: its class.
        dtype: of weights and inputs.
        samples: size of the training set.
        more: further arguments of the Trainer.
        **options: of the arguments.
    """
    kind = GrapeTrainingArguments if issubclass(trainer, GrapeTrainer) else TrainingArguments
    settings: dict[str, Any] = dict(
        args=arguments(folder, kind, **options), train_dataset=problem.samples(samples, dtype)
    )
    if "model_init" not in (more or {}):
        settings["model"] = problem.model(dtype)
    made = trainer(**(settings | (more or {})))
    made.remove_callback(PrinterCallback)
    return made


def train(*args: Any, resume: str | bool | None = None, **kwargs: Any) -> Any:
    """Make a Trainer as ``make_trainer`` does, and run it."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def fitted(
    build: Callable[[], nn.Module], rows: Any, folder: Path, trainer: type[Trainer] = GrapeTrainer, **options: Any
) -> dict[str, Tensor]:
    """All that a network of a test's own has after three steps of SGD; its first weights are the same each time."""
    kind = {} if issubclass(trainer, GrapeTrainer) else {"kind": TrainingArguments}
    usual: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd"}
    torch.manual_seed(0)
    model = build()
    trainer(model, arguments(folder, **(usual | kind | options)), train_dataset=rows).train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """All that the model learned, and B_l if it is a GrapeTrainer."""
    feedback = {f"B_{i}": b for i, b in enumerate(getattr(trainer, "feedback", []), 1)}
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()} | feedback


def logged(trainer: Trainer, name: str, at_all: bool = True) -> list[tuple[int, Any]]:
    """(step, value) of everything logged under a name. That there is nothing is an error, unless it may be so."""
    found = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
    assert found or not at_all, f"nothing is logged under {name}"
    return found


def log_of_grape(history: list[dict[str, Any]]) -> dict[tuple[int, str], Any]:
    """All that GrAPE logged, by step and name. That it logged nothing is an error."""
    found = {(entry["step"], name): entry[name] for entry in history for name in entry if name.startswith(PREFIX)}
    assert found, "nothing to compare"
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    """Compare by name; bit for bit unless a tolerance is given. That there is nothing to compare is an error."""
    assert expected, "nothing to compare"
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda text, name=name: f"{name}: {text}"
        )


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    """Names of what is not the same. That there is nothing to compare is an error."""
    assert a, "nothing to compare"
    return {name for name in a if not torch.equal(a[name], b[name])}


def count_hooks(model: nn.Module) -> int:
    """Hooks of any kind on any module of the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class OnEvent(TrainerCallback):
    """Call a function at one event of the training: ``OnEvent("step_end", look)``; it gets state and keywords."""

    def __init__(self, event: str, act: Callable[..., None]) -> None:
        setattr(self, f"on_{event}", lambda args, state, control, **kwargs: act(state, **kwargs))


def batches(samples: list[dict[str, Tensor]], order: Iterable[int], size: int) -> list[dict[str, Tensor]]:
    """Stack samples in the given order, ``size`` at a time."""
    order = list(order)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    return [{name: torch.stack([samples[i][name] for i in chunk]) for name in samples[0]} for chunk in chunks]
