"""Accuracy: the share of samples whose class was predicted.

``evaluate.load("accuracy")`` asks the Hub; this one does not. It loads by its path too,
``evaluate.load("grape_hf/metrics/accuracy.py")``, so nothing of grape_hf is imported here.
"""

import datasets
import evaluate
import numpy as np
from torch import Tensor
from transformers import EvalPrediction

_INPUTS = """
Args:
    predictions: predicted classes.
    references: true classes.

Returns:
    accuracy: share of samples where both agree, between 0 and 1.
"""


class Accuracy(evaluate.Metric):
    """Accuracy of predicted classes: ``Accuracy().compute(predictions=[...], references=[...])``.

    Raises ``ValueError`` if there is no sample at all.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of samples whose class was predicted.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if len(references) < 1:
            raise ValueError("Accuracy needs at least one sample, got none.")
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def predicted_class(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Pick the class of the largest logit: for ``preprocess_logits_for_metrics``, so the logits need not be kept.

    Args:
        logits: ``(batch, classes)``, or a tuple that begins with them.
        labels: not used.

    Returns:
        ``(batch,)``.
    """
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy_of_classes(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the accuracy; the ``compute_metrics`` that goes with ``predicted_class``."""
    metric = Accuracy(keep_in_memory=True)
    return dict(metric.compute(predictions=prediction.predictions, references=prediction.label_ids))
