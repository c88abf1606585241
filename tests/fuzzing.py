"""What the fuzz tests draw, and what they look at: models, samples in good and bad order, options, and one training.

A training is tried twice, by the stock Trainer and by ours (``attempt``), so that the stock Trainer is the oracle for
everything that has nothing to do with direct feedback: data that it cannot train on need not be trained on.
"""

import dataclasses
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from helpers import arguments, count_hooks
from hypothesis import strategies as st
from problems import (
    BLOCKS,
    DROPOUT,
    GPT2,
    MLP,
    NOISY,
    PADDED,
    PLAIN,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    PlainLanguageModel,
    Problem,
    padded_text,
)
from test_bad_input import BARE, NARROWING
from test_trainer import CHECKPOINTING
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PrinterCallback,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import grape_hf
from grape_hf import GrapeArgumentsMixin, GrapeTrainer, GrapeTrainingArguments

# --- models ----------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Convolutions with batch norm, the second with stride 2, and a pooled head of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, 4, 3, stride, 1), nn.BatchNorm2d(4), nn.ReLU())
            for n, stride in ((2, 1), (4, 2), (4, 1))
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.fc(x.mean((2, 3)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def image(generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(2, 6, 6, generator=generator)
    return {"x": x, "labels": x.sum().abs().long() % 3}


def bert(kind: type) -> nn.Module:
    sizes = dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2)
    return kind(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, num_labels=3, **sizes))


def masked(generator: torch.Generator) -> dict[str, Tensor]:
    """Some tokens are asked for, the others have no say in the loss."""
    sample = padded_text(generator)
    asked = torch.arange(POSITIONS) % 3 == 1
    return sample | {"labels": sample["labels"].masked_fill(~asked, -100)}


def classified(generator: torch.Generator) -> dict[str, Tensor]:
    sample = padded_text(generator)
    return sample | {"labels": sample["input_ids"][0] % 3}


def t5() -> nn.Module:
    sizes = dict(d_model=WIDTH, d_ff=WIDTH, d_kv=8, num_heads=2, num_layers=2, num_decoder_layers=2)
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


CONVNET = Problem("convnet", ConvNet, image)
MODELS = [
    *(GPT2, DROPOUT, PADDED, PLAIN, MLP, NOISY, BARE, NARROWING),
    Problem("bert-masked", lambda: bert(BertForMaskedLM), masked),
    Problem("bert-classifier", lambda: bert(BertForSequenceClassification), classified),
    CONVNET,
    Problem("t5", t5, padded_text),
    Problem("one-block", lambda: PlainLanguageModel(blocks=1), GPT2.draw),
]

# --- samples ---------------------------------------------------------------------------------------------------------

Samples = list[dict[str, Tensor]]


def some(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], every: int) -> Callable[[Samples], Samples]:
    """Change the first sample and each ``every``-th after it."""
    return lambda samples: [s | change(s) if i % every == 0 else s for i, s in enumerate(samples)]


def floats(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in sample.items() if value.is_floating_point()}


def padding(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"attention_mask": torch.zeros(POSITIONS, dtype=torch.long)} if "input_ids" in sample else {}


def ignored(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return {} if sample["labels"].is_floating_point() else {"labels": torch.full_like(sample["labels"], -100)}


def out_of_range(name: str, value: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda s: {name: s[name] * 0 + value} if name in s and not s[name].is_floating_point() else {}


def shortened(length: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda s: {n: t[:length] for n, t in s.items() if t.ndim} if "input_ids" in s else {}


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "padding only": padding,
    "no target": ignored,
    "padding only and no target": lambda s: padding(s) | ignored(s),
    "NaN": lambda s: {name: t * float("nan") for name, t in floats(s).items()},
    "Inf": lambda s: {name: t * float("inf") for name, t in floats(s).items()},
    "large": lambda s: {name: t * 1e30 for name, t in floats(s).items()},
    "zeros": lambda s: {name: t * 0 for name, t in s.items() if name != "attention_mask"},
    "label out of range": out_of_range("labels", 99),
    "negative label": out_of_range("labels", -1),
    "another length": shortened(5),
    "token out of range": out_of_range("input_ids", 99),
}
# Changes that make sense for all samples only: those of a batch have one shape and dtype.
CHANGES_OF_ALL = {
    "one token": shortened(1),
    "two tokens": shortened(2),
    "no token": shortened(0),
    "float16": lambda s: {name: t.half() for name, t in floats(s).items()},
    "float64": lambda s: {name: t.double() for name, t in floats(s).items()},
}


@st.composite
def changed_samples(draw: Any) -> tuple[str, int, Callable[[Samples], Samples]]:
    """Draw a change of the samples, with its name and the number of samples that there are to be."""
    number = draw(st.sampled_from([0, 1, 2, 3, 8, 13]))
    name = draw(st.sampled_from([*CHANGES, *CHANGES_OF_ALL]))
    if name in CHANGES_OF_ALL:
        return name, number, some(CHANGES_OF_ALL[name], 1)
    every = draw(st.sampled_from([1, 2, 4]))
    return f"{name}, every {every}", number, some(CHANGES[name], every)


# --- options ---------------------------------------------------------------------------------------------------------

HINTS = get_type_hints(GrapeArgumentsMixin)
# Without those of stages, which want several processes (tests/pipeline).
OPTIONS = [o.name for o in dataclasses.fields(GrapeArgumentsMixin) if not o.name.startswith("pipeline_")]
PROPER: dict[str, list[Any]] = {
    "feedback_points": [0, 1, 2, 100],
    "feedback_lr": [0, 0.02, "1e-3", 0.5, 1, 10],
    "feedback_size_limit": [0, 1e-5, 2.0, float("inf")],
    "jvp_fraction": [1e-9, 0.25, 1],
    "jvp_steps": [1, 2, 10**6],
    "calibration_interval": [1e-3, 0.5, 1, 2, 1e6],
    "calibration_threshold": [-1, 0.3, 1],
    "calibration_cooldown": [1, 2, 100],
    "alignment_steps": [0, 1, 3],
    "feedback_sweeps": [0, 1, 2, 10],
    "max_skipped_refinements": [0, 1, 100],
    "fallback_threshold": [-1, 0, 1],
    "fallback_patience": [1, 2, 10],
    "feedback_normalize": [True, False],
    "calibration_refit": [True, False],
    "blocks": ["", ",", "blocks", "blocks.0,blocks.1", "transformer.h", "no.such.block"],
}
SILLY: list[Any] = [
    *(None, True, -1, 0, 1.5, 2, -1e-9, 1e300, 10**400, float("nan"), float("inf"), -float("inf")),
    *("", "no", "auto", "1e-3", "inf", "nan", "identity", "Grape", "1_0", [], [1], {}, (), b"bp", object, 1j),
]
# Options of the Trainer that change what a step is.
TRAINING: dict[str, list[Any]] = {
    "gradient_accumulation_steps": [1, 2, 3],
    "bf16": [True, False],
    CHECKPOINTING: [True, False],
    "max_grad_norm": [0.0, 1e-9, 1.0],
    "per_device_train_batch_size": [1, 2, 4, 64],
    "max_steps": [1, 2, 4],
    "optim": ["adamw_torch", "sgd", "adafactor"],
    "weight_decay": [0.0, 0.1],
    "label_smoothing_factor": [0.0, 0.1],
    "dataloader_drop_last": [True, False],
    "average_tokens_across_devices": [True, False],
    "logging_steps": [1, 2, 500],
    "train_sampling_strategy": ["random", "sequential"],
    "seed": [0, 2**31],
    "torch_empty_cache_steps": [1],
    "lr_scheduler_type": ["linear", "constant_with_warmup"],
}


def choices(option: str) -> list[Any]:
    """The values that an option's Literal lists, or those above."""
    if option in PROPER:
        return PROPER[option]
    literal = next(t for t in (HINTS[option], *get_args(HINTS[option])) if get_origin(t) is Literal)
    return list(get_args(literal))


def drawn(values: dict[str, list[Any]], least: int = 0, most: int = 5) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the options, each with one of its values."""
    names = st.lists(st.sampled_from(sorted(values)), min_size=least, max_size=most, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({n: st.sampled_from(values[n]) for n in chosen}))


proper_options = drawn({name: choices(name) for name in OPTIONS}, most=8)
training_options = drawn(TRAINING)
any_options = drawn({name: choices(name) + SILLY for name in OPTIONS}, least=1, most=4)

# --- one training ----------------------------------------------------------------------------------------------------


def condition(model: nn.Module) -> dict[str, Any]:
    """All of a model that is no number: hooks, flags, attributes."""
    return {
        "hooks": count_hooks(model),
        "training": [m.training for m in model.modules()],
        "gradients wanted": [p.requires_grad for p in model.parameters()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
    }


@dataclass
class Attempt:
    """What became of a training: where it ended, by what error if any, and the model before and after."""

    stage: Literal["arguments", "trainer", "train", "end"] = "arguments"
    error: Exception | None = None
    trainer: Any = None
    before: Any = None
    after: Any = None
    files: list[str] = dataclasses.field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.trainer.state.global_step if self.trainer is not None else 0

    @property
    def finite(self) -> bool:
        """Whether all weights, buffers and logged losses are."""
        losses = [
            entry[name]
            for entry in self.trainer.state.log_history
            for name in ("loss", "grad_norm", "train_loss")
            if name in entry
        ]
        tensors = [t for t in self.trainer.model.state_dict().values() if t.is_floating_point()]
        return all(torch.isfinite(t).all() for t in tensors) and bool(torch.isfinite(torch.tensor(losses)).all())

    @property
    def ours(self) -> bool:
        """Whether grape_hf itself raised the error: not the model, torch or the stock Trainer, nor for what we did."""
        innermost = traceback.extract_tb(self.error.__traceback__)[-1]
        return Path(grape_hf.__file__).parent in Path(innermost.filename).parents and "raise " in (innermost.line or "")

    def __str__(self) -> str:
        if self.error is None:
            return f"trained {self.steps} steps"
        shown = "".join(traceback.format_exception(self.error)[-6:])
        return f"stopped at {self.stage}, step {self.steps}: {shown}"


def attempt(
    problem: Problem,
    samples: Samples,
    folder: Path,
    kind: type[Trainer] = GrapeTrainer,
    evaluating: bool = False,
    **options: Any,
) -> Attempt:
    """Make a Trainer and run it, whatever comes.

    Args:
        problem: the model.
        samples: to train it on.
        folder: for checkpoints.
        kind: of Trainer; a stock one is given the options that it knows.
        evaluating: hand over the model in eval mode, as ``from_pretrained`` does.
        **options: of the arguments.
    """
    made, model = Attempt(), problem.model().train(not evaluating)
    made.before = condition(model), {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(0)
    try:
        args = arguments(folder, GrapeTrainingArguments if kind is GrapeTrainer else TrainingArguments, **options)
        made.stage = "trainer"
        made.trainer = kind(model=model, args=args, train_dataset=samples)
        made.trainer.remove_callback(PrinterCallback)
        made.stage = "train"
        made.trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
        made.stage = "end"
    except Exception as error:
        made.error = error
    made.after = condition(model), model.state_dict()
    made.files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return made
