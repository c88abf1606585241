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
whole validation split, with all seeds, and the whole test split is read (``study.py``). Losses are in nats per token,
those of the curve on the first ``eval_blocks`` blocks.

Each finished cell is a JSON file in the output folder, to be committed. Start again to go on with the missing ones.
Several files may be given: ``--workers N`` runs their cells in N processes, which share a GPU if there is one, rates
first; after ``--seconds`` all stop, and ``--out`` names a folder for all that is done, curves of unfinished cells too
(``bundle.py``); ``--unpack FILE.jsonl`` puts it where it belongs.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from grape_hf import GrapeTrainer

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script sees its own folder alone
from curves import write_report
from grid import Cell
from study import Study, Watch, main
from token_blocks import TokenBlocks, load, prepare

_IGNORED = -100


class LanguageStudy(Study):
    """A study of language models from scratch, on blocks of tokens."""

    known: ClassVar[set[str]] = Study.known | {"eval_blocks", "train_blocks", "count_first_label"}
    shared: ClassVar[tuple[str, ...]] = (*Study.shared, "eval_blocks", "train_blocks", "count_first_label")
    figure: ClassVar[str] = "validation_loss"
    defaults: ClassVar[dict[str, Any]] = Study.defaults | {"eval_blocks": 1024}

    def score(self, result: dict[str, Any]) -> float:
        """Return the validation loss, negated."""
        return score(result)

    def prepare(self) -> Path:
        """Tokenise and pack the text."""
        return prepare(self.settings["data"])

    def load(self, device: torch.device) -> dict[str, TokenBlocks]:
        """Return the blocks of each split."""
        return load(self.settings["data"], device)

    def make_trainer(self, cell: Cell, data: dict[str, TokenBlocks], watch: Watch) -> GrapeTrainer:
        """Make the model and its Trainer, as the study says."""
        settings = self.settings
        set_seed(cell.seed)
        shape: dict[str, Any] = {
            "vocab_size": settings["data"]["vocab_size"],
            "n_positions": settings["data"]["context"],
        }
        on_cpu = data["train"].tokens.device.type == "cpu"
        if on_cpu:
            # Under bf16 on a CPU the fused kernel's backward is several times slower than plain matrix products.
            shape["attn_implementation"] = "eager"
        config = AutoConfig.for_model(
            **(shape | {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False} | settings["model"])
        )
        defaults = {"per_device_eval_batch_size": 64, "warmup_steps": settings["steps"] // 20}
        return self.trainer_of(cell.method)(
            model=AutoModelForCausalLM.from_config(config),
            args=self.arguments(cell, defaults, use_cpu=on_cpu, prediction_loss_only=True),
            data_collator=partial(collate, count_first=settings.get("count_first_label", False)),
            train_dataset=TokenBlocks(data["train"].tokens[: settings.get("train_blocks")]),
            eval_dataset=TokenBlocks(data["validation"].tokens[: settings["eval_blocks"]]),
            callbacks=[watch],
        )

    def measure(self, trainer: GrapeTrainer, data: dict[str, TokenBlocks], split: str) -> dict[str, float]:
        """Return the loss, and of the validation split the perplexity."""
        loss = self.loss_of(trainer.evaluate(data[split])["eval_loss"])
        return {f"{split}_loss": loss} | ({"perplexity": math.exp(loss)} if split == "validation" else {})

    def curve(self, history: list[dict[str, Any]]) -> list[list[float]]:
        """Return the loss by step."""
        return [[e["step"], self.loss_of(e["eval_loss"])] for e in history if "eval_loss" in e]

    def report(self) -> None:
        """Write the table, and curves of unfinished cells too."""
        write_report(self.settings, self.grid, self.partial.all() | self.cells.all(), self.folder)

    def loss_of(self, loss: float) -> float:
        """Return the loss per predicted token in nats, of what ``evaluate`` says (``collate``)."""
        context = self.settings["data"]["context"]
        return loss * context / (context - 1) if self.settings.get("count_first_label") else loss


def score(result: dict[str, Any]) -> float:
    """Return how good a cell is: its validation loss, negated; one that diverged is worse than all others."""
    loss = result["validation_loss"]
    return -math.inf if loss is None else -loss


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


if __name__ == "__main__":
    main(LanguageStudy, __doc__, Path(__file__).with_suffix(".yaml"))
