"""Perplexity per token and per whitespace word, from summed negative log-likelihoods.

The sums come from the logits of each evaluation batch, not from ``eval_loss``: that one is a mean over batches, holds
label smoothing where it is on, and counts samples twice that several processes were given to even out their batches.
Loads as ``evaluate.load("grape_hf/metrics/perplexity.py")`` too, so nothing of grape_hf is imported here.
"""

import math
from collections.abc import Callable

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

_CITATION = """@article{jelinek1977perplexity,
title={Perplexity---a measure of the difficulty of speech recognition tasks},
author={Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.}, year={1977},
journal={The Journal of the Acoustical Society of America}, volume={62}}"""

_INPUTS = """
Args:
    nll: summed negative log-likelihoods in nats, one number for each part of the text.
    tokens: number of tokens each of them sums over.
    words: number of whitespace words that those tokens are; may be a fraction, where a part ends within a word.

Returns:
    perplexity: exp(sum nll / sum tokens).
    word_perplexity: exp(sum nll / sum words); NaN without words.
    tokens, words: the totals.
"""


class Perplexity(evaluate.Metric):
    """Perplexity per token and per whitespace word of parts of a text, each weighted by its length.

    ``Perplexity().compute(nll=[...], tokens=[...], words=[...])``; what goes in and comes out stands in
    ``inputs_description``. Raises ``ValueError`` if there is no token at all.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity per token, and per whitespace word (comparable between tokenizers).",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "nll": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "words": datasets.Value("float64"),
                }
            ),
        )

    def _compute(self, nll: list[float], tokens: list[int], words: list[float]) -> dict[str, float]:
        total, token_count, word_count = math.fsum(nll), sum(tokens), math.fsum(words)
        if token_count < 1:
            raise ValueError("Perplexity needs at least one token that was predicted, got none.")
        return {
            "perplexity": _exp(total / token_count),
            "word_perplexity": _exp(total / word_count) if word_count else math.nan,
            "tokens": token_count,
            "words": word_count,
        }


def token_nll(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Sum the negative log-likelihoods of each sample's next tokens: for ``preprocess_logits_for_metrics``.

    Args:
        logits: ``(batch, context, vocabulary)``, or a tuple that begins with them; position s predicts token s + 1.
        labels: ``(batch, context)``; -100 is not counted.

    Returns:
        ``(batch, 2)`` in float32: nll in nats, and number of tokens, of each sample. So the Trainer need not keep the
        logits of the whole validation set.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    ).view(len(labels), -1)
    counted = (labels[:, 1:] != -100).sum(dim=1)
    return torch.stack([losses.sum(dim=1), counted.float()], dim=1)


def perplexity_from_logits(words_per_token: float) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make the ``compute_metrics`` that goes with ``token_nll``.

    The first token of each block is never predicted and a last, incomplete block is dropped, so the words that were
    scored are reckoned from the scored tokens.

    Args:
        words_per_token: whitespace words over tokens of the validation text, from ``grape_hf.text.count_text``.

    Returns:
        A function from an ``EvalPrediction`` to the results of ``Perplexity``.
    """
    metric = Perplexity(keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        nll, tokens = prediction.predictions.astype("float64").T
        result = metric.compute(nll=nll, tokens=tokens.astype("int64"), words=tokens * words_per_token)
        return {name: float(value) for name, value in result.items()}

    return compute


def _exp(x: float) -> float:
    """Exponential that is infinite where it is too large to be written, as for a diverged run."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
