"""Perplexity against a plain sum over tokens, and inside the Trainer against what it must not depend on; accuracy
against scikit-learn's."""

import math

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from torch.nn import functional as F
from transformers import (
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from grape_hf import metrics
from grape_hf.metrics import (
    Accuracy,
    Perplexity,
    accuracy_of_classes,
    perplexity_from_logits,
    predicted_class,
    token_nll,
)

CONTEXT = 8


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Token by token, the definition."""
    total, count = 0.0, 0
    for sample, targets in zip(logits.double(), labels, strict=True):
        for position in range(len(targets) - 1):
            if (target := targets[position + 1]) != -100:
                total -= float(sample[position].log_softmax(0)[target])
                count += 1
    return total, count


def test_parts_are_weighted_by_their_length():
    result = Perplexity().compute(nll=[2.0, 9.0], tokens=[1, 9], words=[1, 4.5])
    assert result["perplexity"] == pytest.approx(math.exp(11 / 10))
    assert result["word_perplexity"] == pytest.approx(math.exp(11 / 5.5))
    assert (result["tokens"], result["words"]) == (10, 5.5)


def test_parts_can_be_added_one_by_one():
    metric = Perplexity()
    for nll, tokens in ((2.0, 1), (9.0, 9)):
        metric.add(nll=nll, tokens=tokens, words=tokens)
    assert metric.compute()["perplexity"] == pytest.approx(math.exp(1.1))


def test_a_diverged_run_and_a_text_without_words():
    result = Perplexity().compute(nll=[1e6], tokens=[1], words=[0])
    assert result["perplexity"] == math.inf
    assert math.isnan(result["word_perplexity"])


def test_no_tokens():
    with pytest.raises(ValueError, match="at least one token"):
        Perplexity().compute(nll=[0.0], tokens=[0], words=[1])


def test_it_loads_by_its_path():
    loaded = evaluate.load(metrics.perplexity.__file__)
    inputs = {"nll": [3.0], "tokens": [2], "words": [1]}
    assert loaded.compute(**inputs) == Perplexity().compute(**inputs)


def test_token_nll_is_the_definition():
    logits, labels = torch.randn(3, CONTEXT, 11), torch.randint(11, (3, CONTEXT))
    labels[1, 4:] = -100
    result = token_nll((logits, None), labels)
    for i in range(3):
        nll, count = by_hand(logits[i : i + 1], labels[i : i + 1])
        assert result[i].tolist() == pytest.approx([nll, count], rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_with_the_trainer(smoothing: float, tmp_path):
    """A last batch of another size and label smoothing leave it as it is; without smoothing eval_loss agrees."""
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=31, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0)
    )
    tokens = np.random.default_rng(0).integers(31, size=(7, CONTEXT))
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in tokens.tolist()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            per_device_eval_batch_size=4,
            label_smoothing_factor=smoothing,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        eval_dataset=rows,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=token_nll,
        compute_metrics=perplexity_from_logits(words_per_token=0.5),
    )
    result = trainer.evaluate()
    with torch.no_grad():
        logits = model.eval()(torch.tensor(tokens)).logits
    nll, count = by_hand(logits, torch.tensor(tokens))
    assert count == result["eval_tokens"] == 7 * (CONTEXT - 1)
    assert result["eval_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result["eval_word_perplexity"] == pytest.approx(math.exp(nll / (0.5 * count)), rel=1e-5)
    reference = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.tensor(tokens)[:, 1:].flatten(), label_smoothing=smoothing
    )
    assert result["eval_loss"] == pytest.approx(reference.item(), rel=1e-5)
    assert (result["eval_loss"] == pytest.approx(nll / count)) == (smoothing == 0)


class TestAccuracy:
    def test_it_is_scikit_learns(self):
        predictions, references = np.random.default_rng(0).integers(4, size=(2, 101))
        result = Accuracy().compute(predictions=predictions, references=references)
        assert result == {"accuracy": pytest.approx(accuracy_score(references, predictions), abs=1e-12)}

    def test_from_logits(self):
        logits, labels = torch.randn(50, 7), torch.randint(7, (50,))
        for output in (logits, (logits, None)):
            predictions = predicted_class(output, labels).numpy()
            result = accuracy_of_classes(EvalPrediction(predictions, labels.numpy()))
            assert result["accuracy"] == accuracy_score(labels, [int(row.argmax()) for row in logits])

    def test_no_samples(self):
        with pytest.raises(ValueError, match="at least one sample"):
            Accuracy()._compute([], [])

    def test_it_loads_by_its_path(self):
        inputs = {"predictions": [1, 2], "references": [1, 1]}
        assert evaluate.load(metrics.accuracy.__file__).compute(**inputs) == Accuracy().compute(**inputs)
