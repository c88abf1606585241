"""Every option of GrAPE, with its help text: the manual page.

An option left at None takes the value that the method implies (``METHOD_OPTIONS``), else the one that ``grape_preset``
names; a value given wins over both. What two options say against each other, and a value that is not one of those
listed, is refused here, when the arguments are made.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from transformers import TrainingArguments

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "feedback_points": 0,
        "feedback_space": "auto",
        "feedback_sharing": "auto",
        "feedback_init": "auto",
        "feedback_rule": "lms",
        "feedback_lr": 0.02,
        "feedback_normalize": False,
        "jvp_mode": "auto",
        "jvp_passes": "joint",
        "jvp_fraction": 0.25,
        "jvp_steps": 4,
        "perturbation_space": "activation",
        "calibration_strategy": "no",
        "calibration_interval": 1.0,
        "calibration_refit": False,
    },
    "paper": {
        "feedback_points": 0,
        "feedback_space": "auto",
        "feedback_sharing": "auto",
        "feedback_init": "gaussian",
        "feedback_rule": "cosine",
        "feedback_lr": 0.1,
        "feedback_normalize": True,
        "jvp_mode": "dual",
        "jvp_passes": "joint",
        "jvp_fraction": 1.0,
        "jvp_steps": 1,
        "perturbation_space": "auto",
        "calibration_strategy": "epoch",
        "calibration_interval": 1.0,
        "calibration_refit": False,
    },
}
# One point in the middle, as more of them cost accuracy on ResNet-20; B_l from zero, with the Jacobian's own size, as
# columns of unit length are far too long for networks without norms (recipes/studies/LOG.md).
PRESETS["convnet"] = PRESETS["recommended"] | {
    "feedback_points": 1,
    "feedback_space": "logits",
    "feedback_init": "zero",
    "feedback_lr": 0.3,
    "jvp_fraction": 1.0,
}

# Methods without a star, a class each (``grape_hf/methods``).
BASELINES = ("fa", "forward_gradient", "pepita")
# What a method implies; it wins over the preset, and a value given wins over both.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "fdfa": {
        "feedback_space": "logits",
        "feedback_init": "zero",
        "feedback_rule": "ema",
        "feedback_lr": 1e-4,
        "feedback_normalize": False,
        "jvp_mode": "dual",
        "jvp_passes": "joint",
        "jvp_fraction": 1.0,
        "jvp_steps": 1,
        "perturbation_space": "activation",
        "calibration_strategy": "no",
    },
    "dkp": {
        "feedback_space": "logits",
        "feedback_init": "gaussian",
        "feedback_lr": 1.0,
        "feedback_normalize": False,
        "calibration_strategy": "no",
    },
    **{method: {"calibration_strategy": "no", "perturbation_space": "activation"} for method in BASELINES},
}
# Methods whose B_l learn from estimates of the Jacobians.
ESTIMATING = ("grape", "fdfa")


def _option(name: str, help_text: str) -> Any:
    """Make a field that takes its value from the preset, and whose help says which values those are."""
    values = ", ".join(f"{preset}: {options[name]}" for preset, options in PRESETS.items())
    return field(default=None, metadata={"help": f"{help_text} ({values})"})


@dataclass
class GrapeArgumentsMixin:
    """GrAPE's options, to be mixed into any ``TrainingArguments``: ``class MyArgs(GrapeArgumentsMixin, SFTConfig)``.

    After construction no option is None but ``blocks``. Raises ``ValueError`` for a value that is not one of those
    listed, a number out of range, or options that contradict each other.
    """

    method: Literal["grape", "dfa", "bp", "fdfa", "dkp", "fa", "forward_gradient", "pepita"] = field(
        default="grape",
        metadata={
            "help": "How blocks get their error: `grape`, direct feedback through learned matrices B_l; `dfa`, the "
            "same with B_l frozen at their start; `bp`, ordinary backpropagation, the stock Trainer bit for bit. "
            "Baselines (grape_hf/methods): "
            "`fdfa` (Bacho & Chu 2022), B_l from zero by a moving average of estimates, and `dkp` (direct "
            "Kolen-Pollack), B_l learned like a weight from h_l to the logits: both imply options below that are not "
            "given. `fa`: fixed random matrices in place of W^T, layer by layer; `forward_gradient`: directional "
            "derivatives times their directions, in perturbation_space; `pepita`: a second forward in place of a "
            "backward, for plain chains of layers."
        },
    )
    grape_preset: Literal["recommended", "convnet", "paper"] = field(
        default="recommended",
        metadata={
            "help": "Values for every option below that is not given: `recommended`, what worked best in our studies "
            "of Transformers; `paper`, the settings of the GrAPE paper (ICLR 2026); or `convnet`, what worked best "
            "on convolutional networks."
        },
    )
    blocks: str | None = field(
        default=None,
        metadata={
            "help": "The blocks that get direct feedback: names as in model.named_modules(), separated by commas; a "
            "list of modules stands for its items. Found automatically by default."
        },
    )
    feedback_points: int | None = _option(
        "feedback_points",
        "How many feedback points, evenly spaced; the blocks between two of them backpropagate among themselves. 0: "
        "one after every block but the last. In an encoder-decoder, so many in each, and one where the two meet.",
    )
    feedback_space: Literal["auto", "hidden", "logits"] | None = _option(
        "feedback_space",
        "Where the error is measured: `hidden`, the output of the last block (B_l is n_l x d_model; for language "
        "models), or `logits` (B_l is n_l x classes; for few classes). `auto`: the smaller.",
    )
    feedback_sharing: Literal["auto", "none", "position", "grid"] | None = _option(
        "feedback_sharing",
        "What shares one B_l: every `position` of a sequence or map; every position within a cell of a 4 x 4 `grid` "
        "over a map; or `none`, h_l is flattened. `auto`: positions of a sequence share, maps are flattened.",
    )
    feedback_size_limit: float = field(
        default=2.0,
        metadata={"help": "Refuse to train when all B_l together would take more than this, in GiB. Not in the paper."},
    )
    feedback_init: Literal["auto", "identity", "gaussian", "zero"] | None = _option(
        "feedback_init",
        "How B_l starts: `identity`, the Jacobian of the shortcut path alone, which is the identity matrix where h_l "
        "and y are of one size; `gaussian`, as in DFA; `zero`. `auto`: identity in hidden space where the sizes are "
        "one, else gaussian.",
    )
    feedback_rule: Literal["lms", "cosine", "ema"] | None = _option(
        "feedback_rule",
        "How B_l learns from the estimate J_hat_l: `cosine`, a gradient step on the columns' cosines (the paper); "
        "`ema`, a moving average; `lms`, a moving average of what B_l did not predict, with far less noise.",
    )
    feedback_lr: float | None = _option(
        "feedback_lr",
        "Learning rate eta_B of the feedback rule; for `cosine` it is per column, for method `dkp` a multiple of the "
        "weights' own rate (1 there).",
    )
    feedback_normalize: bool | None = _option(
        "feedback_normalize", "Bring the columns of B_l to unit length after each refinement."
    )
    jvp_mode: Literal["auto", "dual", "finite_difference"] | None = _option(
        "jvp_mode",
        "How tangents are computed: `dual` numbers (exact), or the `finite_difference` of two forwards. `auto`: "
        "finite differences where the blocks are convolutions (cheaper) or an operator has no forward-mode rule.",
    )
    jvp_passes: Literal["joint", "per_block"] | None = _option(
        "jvp_passes", "Perturb all boundaries in one `joint` pass, or one `per_block`: less noise, L-1 times the cost."
    )
    jvp_fraction: float | None = _option("jvp_fraction", "Share of the global batch that the estimate is made on.")
    jvp_steps: int | None = _option("jvp_steps", "Estimate and refine every so many optimiser steps.")
    perturbation_space: Literal["activation", "weight", "auto"] | None = _option(
        "perturbation_space",
        "What is perturbed: the boundary `activation`, or the `weight`s of the block in front of it, for the cosine "
        "rule only (the estimate is then a direction). `auto`: for each block whichever has fewer numbers. Method "
        "`forward_gradient`: `activation` (Ren et al. 2023) or all `weight`s at once (Baydin et al. 2022).",
    )
    calibration_strategy: Literal["no", "epoch", "steps", "adaptive"] | None = _option(
        "calibration_strategy",
        "When one optimiser step is ordinary backpropagation: `epoch`, at a random step in every calibration_interval "
        "epochs; `steps`, every calibration_interval steps; `adaptive`, when the smoothed alignment falls below "
        "calibration_threshold; or `no`.",
    )
    calibration_interval: float | None = _option(
        "calibration_interval",
        "Interval T of calibrations: in epochs (also a fraction) for `epoch`, in optimiser steps for `steps`.",
    )
    calibration_threshold: float = field(
        default=0.3,
        metadata={
            "help": "Cosine below which `adaptive` calibrates: the smoothed mean of that of B_l with J_hat_l, or with "
            "the exact delta where alignment_steps measures it. Not in the paper."
        },
    )
    calibration_cooldown: int = field(
        default=100,
        metadata={"help": "Least number of optimiser steps between two calibrations by `adaptive`. Not in the paper."},
    )
    calibration_refit: bool | None = _option(
        "calibration_refit", "Fit B_l to the exact deltas of each calibration step by ridge regression."
    )
    alignment_steps: int = field(
        default=0,
        metadata={
            "help": "Measure the exact alignment cos(B_l e, delta_l) every so many optimiser steps by a backward on "
            "the side (costs one step of ordinary backpropagation each time); 0: at calibration steps only."
        },
    )

    max_skipped_refinements: int = field(
        default=100,
        metadata={
            "help": "Stop with an error when so many refinements of B_l in a row were skipped for NaN or Inf in the "
            "error or the estimate (looked at when the loss is logged); 0: go on for ever. Not in the paper."
        },
    )
    fallback: Literal["no", "block", "bp"] = field(
        default="no",
        metadata={
            "help": "What to do where the alignment stays below fallback_threshold: nothing (`no`); give up the "
            "feedback of that `block`, which then gets its gradient from the block after it; or, by the mean "
            "alignment, go on with ordinary backpropagation (`bp`). For the rest of the run, with a warning. Not in "
            "the paper."
        },
    )
    fallback_threshold: float = field(
        default=0.0,
        metadata={
            "help": "The smoothed cosine for `fallback`, of what calibration_threshold looks at. At 0 the feedback "
            "points away from the gradient. Not in the paper."
        },
    )
    fallback_patience: int = field(
        default=10,
        metadata={
            "help": "How many measurements in a row the smoothed cosine has to be below fallback_threshold. Not in "
            "the paper."
        },
    )

    pipeline_stages: int = field(
        default=1,
        metadata={
            "help": "Divide the model's blocks among so many processes, its stages (K); K times R processes are R "
            "replicas. For methods `bp` and `dfa`. See docs/pipeline.md."
        },
    )
    pipeline_microbatches: int = field(
        default=4,
        metadata={
            "help": "Cut each batch into so many micro-batches (M), which run through the stages one behind the other. "
            "Where they do not divide the samples, the largest number below that does."
        },
    )
    pipeline_schedule: Literal["auto", "gpipe", "1f1b"] = field(
        default="auto",
        metadata={
            "help": "The order of forwards and backwards in ordinary backpropagation over stages: `gpipe`, all "
            "forwards first; `1f1b`, one forward, one backward, which keeps fewer activations. `auto`: 1f1b, and gpipe "
            "where there are fewer micro-batches than stages. Steps with direct feedback have an order of their own."
        },
    )
    pipeline_split: str | None = field(
        default=None,
        metadata={
            "help": "How many blocks each stage gets, as in `7,5`; evenly by default. `grape-hf inspect "
            "--pipeline_stages K` reckons which split is fastest."
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a dataclass of whatever this is mixed into: an undecorated class would take our options alone."""
        super().__init_subclass__(**kwargs)
        dataclass(kw_only=True)(cls)  # where the user decorates it as well, fields without a default may come last

    def __post_init__(self) -> None:
        """Fill in the preset, refuse what cannot work, and go on with the arguments mixed with."""
        self._check_choices()
        implied = PRESETS[self.grape_preset] | METHOD_OPTIONS.get(self.method, {})
        # Frozen at zero, it would be no feedback at all.
        if self.method == "dfa" and implied["feedback_init"] == "zero":
            implied["feedback_init"] = "gaussian"
        for name, value in implied.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_numbers()
        self._check_combinations()
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def _check_choices(self) -> None:
        hints = get_type_hints(GrapeArgumentsMixin)
        for option in dataclasses.fields(GrapeArgumentsMixin):
            allowed = [c for part in (hints[option.name], *get_args(hints[option.name])) for c in _choices(part)]
            value = getattr(self, option.name)
            if allowed and value not in allowed and not (value is None and option.default is None):
                raise ValueError(f"{option.name}={value!r}: expected one of {', '.join(map(repr, allowed))}.")

    def _check_numbers(self) -> None:
        ranges: dict[str, tuple[type, float, float]] = {
            "feedback_points": (int, 0, float("inf")),
            "feedback_lr": (float, 0, float("inf")),
            "feedback_size_limit": (float, 0, float("inf")),
            "jvp_fraction": (float, 1e-9, 1),
            "jvp_steps": (int, 1, float("inf")),
            "calibration_interval": (float, 1e-9, float("inf")),
            "calibration_threshold": (float, -1, 1),
            "calibration_cooldown": (int, 1, float("inf")),
            "alignment_steps": (int, 0, float("inf")),
            "max_skipped_refinements": (int, 0, float("inf")),
            "fallback_threshold": (float, -1, 1),
            "fallback_patience": (int, 1, float("inf")),
            "pipeline_stages": (int, 1, float("inf")),
            "pipeline_microbatches": (int, 1, float("inf")),
        }
        for name, (kind, low, high) in ranges.items():
            value = getattr(self, name)
            try:
                number = kind(value)  # YAML reads 1e-3 as a string
                valid = not isinstance(value, bool) and number == float(value) and low <= number <= high
                # No limit is a limit as well; of all else there has to be a number.
                valid = valid and (math.isfinite(number) or name == "feedback_size_limit")
            except (TypeError, ValueError, OverflowError):
                valid = False
            if not valid:
                lowest = {1e-9: "above 0"}.get(low, f"at least {low}")
                limit = f"{lowest} and finite" if high == float("inf") else f"{lowest} and at most {high}"
                raise ValueError(f"{name}={value!r}: expected {'a whole' if kind is int else 'a'} number, {limit}.")
            setattr(self, name, number)
        if not isinstance(self.blocks, str | None):
            raise ValueError(f"blocks={self.blocks!r}: expected names in one string, separated by commas, or None.")
        if not isinstance(self.pipeline_split, str | None):
            raise ValueError(f"pipeline_split={self.pipeline_split!r}: expected numbers in one string, as in '7,5'.")
        if self.pipeline_split is not None and self.pipeline_stages == 1:
            raise ValueError(
                f"pipeline_split={self.pipeline_split!r} says how many blocks each stage gets, and there is one: set "
                "pipeline_stages."
            )
        for name in ("feedback_normalize", "calibration_refit"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False.")

    def _check_combinations(self) -> None:
        if self.method == "bp":
            return
        if self.method in BASELINES:
            self._check_baseline()
            return
        if self.method == "fdfa" and self.feedback_rule != "ema":
            raise ValueError(
                f'method="fdfa" learns by feedback_rule="ema", got {self.feedback_rule!r}. For another rule use '
                'method="grape".'
            )
        if self.method in ESTIMATING and self.feedback_rule in ("lms", "ema") and (self.feedback_lr or 0.0) > 1:
            raise ValueError(
                f"feedback_lr={self.feedback_lr}: expected at most 1 for feedback_rule={self.feedback_rule!r}, a "
                "moving average, which a higher rate drives away from what it averages."
            )
        if self.method in ESTIMATING and self.perturbation_space != "activation" and self.feedback_rule != "cosine":
            raise ValueError(
                f"perturbation_space={self.perturbation_space!r} estimates a direction, not the Jacobian, which only "
                f'feedback_rule="cosine" can use; got feedback_rule={self.feedback_rule!r}. Use '
                'perturbation_space="activation".'
            )
        if self.calibration_strategy == "steps" and self.calibration_interval != int(self.calibration_interval or 0):
            raise ValueError(
                'calibration_strategy="steps" counts optimiser steps: expected a whole calibration_interval, got '
                f"{self.calibration_interval}."
            )
        watching = {"calibration_strategy": "adaptive", "fallback": self.fallback if self.fallback != "no" else None}
        for name, value in watching.items():
            if getattr(self, name) == value and self.method not in ESTIMATING and not self.alignment_steps:
                raise ValueError(
                    f'{name}="{value}" watches the alignment, and method="{self.method}" makes no estimate of it. Set '
                    f"alignment_steps to measure the exact one, or use another {name.removeprefix('calibration_')}."
                )
        if self.calibration_refit and self.calibration_strategy == "no":
            raise ValueError(
                "calibration_refit=True fits B_l at calibration steps, and there are none: set calibration_strategy."
            )

    def _check_baseline(self) -> None:
        found = self.calibration_strategy, self.calibration_refit, self.alignment_steps, self.fallback
        if found != ("no", False, 0, "no"):
            raise ValueError(
                f'method="{self.method}" has no feedback matrices to calibrate or measure: expected '
                'calibration_strategy="no", calibration_refit=False, alignment_steps=0 and fallback="no", got '
                f"{found[0]!r}, {found[1]}, {found[2]} and {found[3]!r}. Leave them out."
            )
        if self.method == "forward_gradient" and self.perturbation_space == "auto":
            raise ValueError(
                'method="forward_gradient" perturbs one space for all blocks: expected '
                "perturbation_space='activation' or 'weight', got 'auto'."
            )


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if getattr(hint, "__origin__", None) is Literal else ()


@dataclass
class GrapeTrainingArguments(GrapeArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with GrAPE's options; see ``GrapeArgumentsMixin`` for those."""


def options_of(args: Any) -> GrapeArgumentsMixin:
    """Return GrAPE's options out of training arguments of any kind; the defaults where they carry none."""
    names = [option.name for option in dataclasses.fields(GrapeArgumentsMixin)]
    return GrapeArgumentsMixin(**{name: getattr(args, name) for name in names if hasattr(args, name)})
