"""A pytest plugin that runs tests of the ``transformers`` Trainer with grape_hf's in its place.

``transformers_tests.py`` loads it (``-p swap_trainer``) and says by environment variables what it shall do:

- ``SWAP_TRAINER_MODE``: ``stock`` swaps nothing; ``bp`` makes every ``Trainer`` that a test takes from ``transformers``
  a ``GrapeTrainer`` with ``method="bp"``, and ``recommended`` one with its defaults. Classes that a test derives from
  ``Trainer`` or ``TrainingArguments`` derive from ours then.
- ``SWAP_TRAINER_OUTCOMES``: a file that gets a JSON line for each test.
- ``SWAP_TRAINER_SECONDS``: the time limit of a test.

In each mode every call of ``train()`` is noted: how many steps it took, how many of them with direct feedback, and a
digest of the weights and logged figures that it ended with, so that runs can be compared bit for bit. Tests that ask
for an accelerator run on the CPU instead. Each begins with one seed, and so does each search of optuna. A
``LlamaConfig`` that says no ``intermediate_size`` gets 64 rather than 11,008, with which a test takes a minute.
"""

import ast
import functools
import hashlib
import importlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import transformers
import transformers.testing_utils
import transformers.trainer
import transformers.trainer_seq2seq
import transformers.training_args
import transformers.training_args_seq2seq
from transformers import LlamaConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, set_seed

from grape_hf import GrapeArgumentsMixin, GrapeMixin, GrapeTrainer

MODE = os.environ["SWAP_TRAINER_MODE"]
OUTCOMES = Path(os.environ["SWAP_TRAINER_OUTCOMES"])
SECONDS = int(os.environ["SWAP_TRAINER_SECONDS"])
METHOD = "bp" if MODE == "bp" else "grape"
LOGGED = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "train_loss")

runs: list[dict[str, Any]] = []  # of the test under way


@dataclass
class SwappedArguments(GrapeArgumentsMixin, TrainingArguments):
    """Found by name when a test unpickles its arguments."""

    method: Literal["bp", "grape"] = METHOD  # type: ignore[assignment]


@dataclass
class SwappedSeq2SeqArguments(GrapeArgumentsMixin, Seq2SeqTrainingArguments):
    """The same for ``Seq2SeqTrainer``."""

    method: Literal["bp", "grape"] = METHOD  # type: ignore[assignment]


class SwappedSeq2SeqTrainer(GrapeMixin, Seq2SeqTrainer):
    """The stock ``Seq2SeqTrainer`` with GrAPE."""


def swap() -> None:
    """Put our classes in the places where tests look for the stock ones."""
    swapped = {
        "Trainer": (GrapeTrainer, transformers.trainer),
        "TrainingArguments": (SwappedArguments, transformers.training_args),
        "Seq2SeqTrainer": (SwappedSeq2SeqTrainer, transformers.trainer_seq2seq),
        "Seq2SeqTrainingArguments": (SwappedSeq2SeqArguments, transformers.training_args_seq2seq),
    }
    for name, (ours, module) in swapped.items():
        for place in (transformers, module):
            setattr(place, name, ours)
    transformers.trainer.TrainingArguments = SwappedArguments  # what a Trainer makes where it is given none


def record() -> None:
    """Note every training: in the stock class, which all modes run through."""
    train, training_step = Trainer.train, Trainer.training_step

    @functools.wraps(train)
    def recorded_train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        mine: dict[str, Any] = {"ours": isinstance(self, GrapeMixin), "steps": 0, "feedback_steps": 0, "digest": None}
        runs.append(mine)
        try:
            return train(self, *args, **kwargs)
        finally:
            mine["digest"] = digest(self)

    @functools.wraps(training_step)
    def recorded_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if runs:
            runs[-1]["steps"] += 1
        loss = training_step(self, *args, **kwargs)
        if runs:
            runs[-1]["feedback_steps"] += bool(getattr(self, "feedback", None))  # there since the first step
        return loss

    Trainer.train, Trainer.training_step = recorded_train, recorded_step


def give_default(cls: Any, **defaults: Any) -> None:
    """Change what a class takes where its maker says nothing."""
    init = cls.__init__

    @functools.wraps(init)
    def changed_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **defaults | kwargs)

    cls.__init__ = changed_init


def digest(trainer: Trainer) -> str:
    """A hash of the weights and of the figures logged, to the last bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        total.update(name.encode())
        if not tensor.is_meta:
            total.update(tensor.detach().cpu().float().numpy().tobytes())
    for entry in trainer.state.log_history:
        total.update(repr([(name, entry[name]) for name in LOGGED if name in entry]).encode())
    return total.hexdigest()[:16]


def stand_in(file: Path) -> None:
    """Give ``transformers`` the names that a test module imports and this version no longer has."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    setattr(module, name, None)  # a test that uses it fails, in every mode


def pytest_configure(config: pytest.Config) -> None:
    """Change ``transformers`` before a test module is imported."""
    for argument in config.args:
        for file in Path(argument.split("::")[0]).parent.glob("*.py"):
            stand_in(file)  # they import each other
    transformers.testing_utils.require_torch_accelerator = lambda test: test
    record()
    give_default(LlamaConfig, intermediate_size=64)
    with suppress(ImportError):
        give_default(importlib.import_module("optuna").samplers.TPESampler, seed=0)
    if MODE != "stock":
        swap()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Begin with a seed, and end a test that takes too long."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"took longer than {SECONDS} seconds")

    runs.clear()
    set_seed(0)
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down how the test ended: its call, or what kept it from being called."""
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(crash.message if crash else "")
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "reason": reason[:200],
        "runs": [*runs] if report.when == "call" else [],
    }
    with OUTCOMES.open("a") as file:
        file.write(json.dumps(line) + "\n")
