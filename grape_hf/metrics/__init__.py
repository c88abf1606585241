"""Metrics of ours in the form of the ``evaluate`` library; each file also loads by its path, without the Hub."""

from grape_hf.metrics.accuracy import Accuracy, accuracy_of_classes, predicted_class
from grape_hf.metrics.perplexity import Perplexity, perplexity_from_logits, token_nll

__all__ = [
    "Accuracy",
    "Perplexity",
    "accuracy_of_classes",
    "perplexity_from_logits",
    "predicted_class",
    "token_nll",
]
