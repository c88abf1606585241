r"""Image classifiers from scratch, one method beside the other: each at its best rate, several seeds, curves by epoch.

    python recipes/studies/image_model.py recipes/studies/image_model/paths.yaml --prepare   # the images, once
    python recipes/studies/image_model.py recipes/studies/image_model/paths.yaml             # the cells, on one core
    python recipes/studies/image_model.py recipes/studies/image_model/paths.yaml --report    # table and plot

A study is a YAML file as in ``language_model.py``, with ``data`` (a folder, the share of its training images that is
trained on, and how they are augmented) and ``model`` (``architecture``, one of timm's or ours, and what timm makes it
with). What is trained on, and which images are held out, is as in ``recipes/image_classification.py``; so are the
augmentation, which is made on the device, and a seed's first weights.

A cell is one training (``study.py``): every method at every rate with the first seed, then, at the rate that has the
highest accuracy on validation, all seeds and the whole test split. ``--workers N --seconds S --out DIR`` and
``--unpack`` are those of ``language_model.py``.
"""

import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import EvalPrediction, set_seed

from grape_hf import GrapeTrainer
from grape_hf.vision import image_classifier
from grape_hf.vision.data import EpochDraws, Images

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script sees its own folder alone
from grid import Cell
from image_pixels import StudyImages, prepare
from study import Study, Watch, main
from tables_report import write_report


class ImageStudy(Study):
    """A study of image classifiers from scratch."""

    figure: ClassVar[str] = "validation"

    def score(self, result: dict[str, Any]) -> float:
        """Return the accuracy on the validation split."""
        return score(result)

    def prepare(self) -> Path:
        """Decode and split the images."""
        return prepare(self.settings["data"])

    def load(self, device: torch.device) -> StudyImages:
        """Return the images."""
        return StudyImages(self.settings["data"], device)

    def make_trainer(self, cell: Cell, data: StudyImages, watch: Watch) -> GrapeTrainer:
        """Make the model and its Trainer, as the study says."""
        set_seed(cell.seed)
        model = image_classifier(labels=data.about["labels"], **self.settings["model"])
        train = data.images("train", cell.seed)
        on_cpu = data.device.type == "cpu"
        return self.trainer_of(cell.method)(
            model=model.to(memory_format=torch.channels_last),
            args=self.arguments(cell, {"per_device_eval_batch_size": 250 if on_cpu else 2500}, use_cpu=on_cpu),
            train_dataset=train,
            eval_dataset=data.images("validation"),
            data_collator=Images.collate,
            preprocess_logits_for_metrics=predicted_class,
            compute_metrics=accuracy,
            callbacks=[EpochDraws(train), watch],
        )

    def measure(self, trainer: GrapeTrainer, data: StudyImages, split: str) -> dict[str, float]:
        """Return accuracy and loss."""
        found = trainer.evaluate(data.images(split))
        return {split: found["eval_accuracy"], f"{split}_loss": found["eval_loss"]}

    def curve(self, history: list[dict[str, Any]]) -> list[list[float]]:
        """Return the accuracy by step."""
        return [[e["step"], e["eval_accuracy"]] for e in history if "eval_accuracy" in e]

    def report(self) -> None:
        """Write the table, in which a cell that diverged has an accuracy of 0, and the plot."""
        results = {
            name: {"loading_share": None} | cell | {"validation": cell["validation"] or 0.0}
            for name, cell in self.cells.all().items()
        }
        table = {"metric": "accuracy", "paper": {}, "learning_rates": []} | self.settings
        write_report(table, results, self.cells.errors(), self.folder)


def score(result: dict[str, Any]) -> float:
    """Return how good a cell is: its accuracy on validation; one that diverged is worse than all others."""
    return -math.inf if result["validation"] is None else result["validation"]


def predicted_class(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Pick the class of the largest logit, so that the logits need not be kept."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of images whose class was predicted, without the `evaluate` library."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


if __name__ == "__main__":
    main(ImageStudy, __doc__, Path(__file__).parent / "image_model" / "paths.yaml")
