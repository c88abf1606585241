"""What the processes run: a training over stages, with everything that a test compares with one process afterwards."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import problems
import torch
from helpers import make_trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
)

from grape_hf import GrapeTrainer

LAYERS, LONG = 4, 40


def decoder(kind: str, **options: Any) -> Any:
    return lambda: problems.transformer(kind, num_hidden_layers=LAYERS, **options)


def gpt2(tied: bool = True, dropout: float = 0.0, **options: Any) -> Any:
    drops = dict(embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    return decoder("gpt2", tie_word_embeddings=tied, **drops, **options)


def frozen(blocks: int) -> Any:
    """A decoder that is trained from some block on."""

    def build() -> torch.nn.Module:
        model = gpt2(tied=False)()
        inner = model.transformer
        for module in (inner.wte, inner.wpe, *inner.h[:blocks]):
            module.requires_grad_(False)
        return model

    return build


def bert(kind: Any = AutoModelForMaskedLM) -> torch.nn.Module:
    config = AutoConfig.for_model(
        "bert",
        hidden_size=problems.WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        vocab_size=problems.VOCABULARY,
        max_position_embeddings=problems.POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return kind.from_config(config)


def vit() -> torch.nn.Module:
    config = AutoConfig.for_model(
        "vit",
        hidden_size=problems.WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AutoModelForImageClassification.from_config(config)


def long_text(generator: torch.Generator) -> dict[str, Tensor]:
    """So long that maps look at one position in two."""
    ids = torch.cat([problems.text(generator)["input_ids"] for _ in range(LONG // problems.POSITIONS)])
    return {"input_ids": ids, "labels": ids.clone()}


def masked_text(generator: torch.Generator) -> dict[str, Tensor]:
    """Some tokens of each sample have a label, of different number."""
    sample = problems.text(generator)
    chosen = torch.rand(problems.POSITIONS, generator=generator) < 0.4
    chosen[0] = True
    return sample | {"labels": sample["labels"].masked_fill(~chosen, -100)}


def padded_sentence(generator: torch.Generator) -> dict[str, Tensor]:
    """One label a sample, which is padded to the same length."""
    sample = problems.text(generator)
    length = int(torch.randint(2, problems.POSITIONS, (), generator=generator))
    mask = (torch.arange(problems.POSITIONS) < length).long()
    return {"input_ids": sample["input_ids"], "attention_mask": mask, "labels": torch.tensor(length % 2)}


def image(generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(5, (), generator=generator)}


PROBLEMS = {
    problem.id: problem
    for problem in (
        problems.Problem("gpt2-tied", gpt2(), problems.text),
        problems.Problem("gpt2-untied", gpt2(tied=False), problems.padded_text),
        problems.Problem("gpt2-long", gpt2(max_position_embeddings=LONG), long_text),
        problems.Problem("gpt2-frozen", frozen(2), problems.text),
        problems.Problem("gpt2-partly-frozen", frozen(1), problems.text),
        problems.Problem("gpt2-dropout", gpt2(dropout=0.1), problems.text),
        problems.Problem("llama-tied", decoder("llama", tie_word_embeddings=True), problems.padded_text),
        problems.Problem("llama-untied", decoder("llama"), problems.text),
        problems.Problem("bert", bert, masked_text),
        problems.Problem("bert-classifier", lambda: bert(AutoModelForSequenceClassification), padded_sentence),
        problems.Problem("vit", vit, image),
    )
}


@dataclass
class Trained:
    """One process's view of a training.

    Attributes:
        weights: all parameters of the whole model, as the saved folder has them.
        log: the log's history.
        predictions: of some samples after the training, with their labels and then without.
        parameters: how many numbers this process holds: in parameters, gradients and the optimiser's state.
        files: in the saved folder.
        batches: how many it still holds of those that it handed up.
    """

    weights: dict[str, Tensor]
    log: list[dict[str, Any]]
    predictions: np.ndarray
    parameters: tuple[int, int, int]
    files: list[str] = field(default_factory=list)
    batches: int = 0


class Stream(torch.utils.data.IterableDataset):
    """A data set without a length."""

    def __init__(self, samples: list[dict[str, Tensor]]) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples)


def smoothed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of a user's own: a sum over the number of items."""
    logits = outputs["logits"][:, :-1]
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.2
    )
    return total / (num_items_in_batch if num_items_in_batch is not None else labels[:, 1:].ne(-100).sum())


class MeanLoss(GrapeTrainer):
    """A subclass with a loss of its own, a mean over what it is given."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def train(
    problem: str,
    folder: Path,
    trainer: type[Trainer] = GrapeTrainer,
    *,
    dtype: torch.dtype = torch.float64,
    resume: str | None = None,
    stream: bool = False,
    trainings: int = 1,
    by_init: bool = False,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Train a problem, evaluating half-way and at the end, and save the model."""
    usual: dict[str, Any] = dict(
        max_steps=4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=6,
        eval_strategy="steps",
        eval_steps=2,
        max_grad_norm=0.5,
        weight_decay=0.1,
        warmup_steps=2,
        ddp_timeout=30,
    )
    more = dict(more or {})
    samples = PROBLEMS[problem].samples(52, dtype)
    more |= {"eval_dataset": samples[40:]}
    more |= {"train_dataset": Stream(samples[:36])} if stream else {"train_dataset": samples[:36]}
    if by_init:
        more |= {"model_init": lambda: PROBLEMS[problem].model(dtype)}
    made = make_trainer(PROBLEMS[problem], folder, trainer, dtype=dtype, more=more, **(usual | options))
    for _ in range(trainings):
        made.train(resume_from_checkpoint=resume)
    unlabelled = [{name: value for name, value in sample.items() if name != "labels"} for sample in samples[43:]]
    predictions = np.concatenate([made.predict(data).predictions for data in (samples[43:], unlabelled)])
    made.save_model(str(folder / "final"))
    held = list(made.model.parameters())
    state = [value for values in made.optimizer.state_dict()["state"].values() for value in values.values()]
    numbers = (
        sum(p.numel() for p in held),
        sum(p.numel() for p in held if p.requires_grad),
        sum(value.numel() for value in state if isinstance(value, Tensor) and value.ndim),
    )
    weights = load_file(folder / "final" / "model.safetensors") if made.args.process_index == 0 else {}
    files = sorted(file.name for file in (folder / "final").iterdir())
    pipeline = getattr(made, "_pipeline", None)  # a stock Trainer has none
    batches = 0 if pipeline is None else len(pipeline.places.on_their_way)
    return Trained(weights, made.state.log_history, np.asarray(predictions), numbers, files, batches)


def run_many(runs: dict[str, tuple[str, Path, dict[str, Any]]]) -> dict[str, Trained]:
    """Train one after the other in these processes."""
    return {name: train(problem, folder, **options) for name, (problem, folder, options) in runs.items()}
