"""Every option of GrAPE, with its help text: the manual page.

An option that is not given stays None in the arguments. ``resolved`` fills it in once the model is known: with what the
method implies (``METHOD_OPTIONS``), else with the value of ``grape_preset``. A value that is not allowed, and options
that contradict each other, are refused when the arguments are made.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_type_hints

from transformers import TrainingArguments

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "feedback_points": 0,
        "feedback_space": "auto",
        "feedback_sharing": "auto",
        "feedback_init": "auto",
        "feedback_rule": "local",
        "feedback_path": "matrix",
        "feedback_sweeps": 0,
        "feedback_lr": 0.02,
        "feedback_normalize": False,
        "jvp_mode": "auto",
        "jvp_scope": "network",
        "jvp_passes": "joint",
        "jvp_fraction": 0.25,
        "jvp_steps": 1,
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
        "feedback_path": "matrix",
        "feedback_sweeps": 0,
        "feedback_lr": 0.1,
        "feedback_normalize": True,
        "jvp_mode": "dual",
        "jvp_scope": "network",
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
    "feedback_init": "zero",
    "feedback_rule": "lms",
    "feedback_lr": 0.3,
    "jvp_fraction": 1.0,
    "jvp_steps": 4,
}
# Where blocks have shortcut connections that is no better than no feedback at all. Down the shortcut path the lower
# blocks learn; one sweep, and maps of what the path leaves out, bring it near to backpropagation (LOG.md).
PRESETS["resnet"] = PRESETS["recommended"] | {
    "feedback_space": "hidden",
    "feedback_sharing": "position",
    "feedback_path": "shortcut",
    "feedback_sweeps": 1,
}

# Whoever gives one of these options of an estimate, and no rule, gets a rule that makes one.
_OF_ESTIMATES = ("jvp_mode", "jvp_scope", "jvp_passes", "jvp_fraction", "perturbation_space", "calibration_refit")

# Methods without a star, a class each (``grape_hf/methods``).
BASELINES = ("fa", "forward_gradient", "pepita")
_BY_MATRIX = {"feedback_path": "matrix", "feedback_sweeps": 0}
# What a method implies; it wins over the preset, and a value given wins over both.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "dfa": {"feedback_init": "gaussian", **_BY_MATRIX},
    "fdfa": {
        **_BY_MATRIX,
        "feedback_points": 0,
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
        **_BY_MATRIX,
        "feedback_points": 0,
        "feedback_space": "logits",
        "feedback_init": "gaussian",
        "feedback_lr": 1.0,
        "feedback_normalize": False,
        "calibration_strategy": "no",
    },
    **{
        method: _BY_MATRIX | {"feedback_points": 0, "calibration_strategy": "no", "perturbation_space": "activation"}
        for method in BASELINES
    },
}
# Whoever gives one of these chooses between the presets for convolutional networks.
_RESNETS_OWN = {*_OF_ESTIMATES, *(k for k, v in PRESETS["resnet"].items() if v != PRESETS["convnet"][k])}
# Methods whose B_l learn from estimates of the Jacobians.
ESTIMATING = ("grape", "fdfa")


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be, in the annotation of its field: argparse would not take it in the metadata.

    Attributes:
        kind: ``int`` or ``float``.
        low: the lowest that is allowed; with ``above`` the number must be higher.
        high: the highest.
        above: whether ``low`` itself is not allowed.
        infinite: whether infinity is allowed.
    """

    kind: type
    low: float
    high: float = math.inf
    above: bool = False
    infinite: bool = False

    def read(self, name: str, value: Any) -> Any:
        """Return a value as a number of this kind: YAML reads 1e-3 as a string.

        Raises:
            ValueError: for no number, or one out of range.
        """
        try:
            number = self.kind(value)
            valid = not isinstance(value, bool) and number == float(value) and self.low <= number <= self.high
            if valid and (number > self.low or not self.above) and (math.isfinite(number) or self.infinite):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        lowest = f"{'above' if self.above else 'at least'} {self.low}"
        limit = f"{lowest} and finite" if self.high == math.inf else f"{lowest} and at most {self.high}"
        raise ValueError(f"{name}={value!r}: expected {'a whole' if self.kind is int else 'a'} number, {limit}.")


def _option(name: str, help_text: str) -> Any:
    """Make a field that takes its value from the preset, and whose help says which values those are."""
    values = ", ".join(f"{preset}: {options[name]}" for preset, options in PRESETS.items())
    return field(default=None, metadata={"help": f"{help_text} ({values})"})


@dataclass
class GrapeArgumentsMixin:
    """GrAPE's options, to be mixed into any ``TrainingArguments``: ``class MyArgs(GrapeArgumentsMixin, SFTConfig)``.

    An option that is not given is None until ``resolved``. Raises ``ValueError`` for a value that is not one of those
    listed, a number out of range, or options that contradict each other; what the method and the preset give counts.
    """

    method: Literal["grape", "dfa", "bp", "fdfa", "dkp", "fa", "forward_gradient", "pepita"] = field(
        default="grape",
        metadata={
            "help": "How blocks get their error. `grape`: direct feedback through matrices B_l that are learned. "
            "`dfa`: the same with B_l fixed, as random matrices, or as feedback_init says. `bp`: ordinary "
            "backpropagation, the stock Trainer bit for bit. The others are there to compare with; each gives some of "
            "the options below another default. `fdfa` (Bacho & Chu 2022): B_l starts at zero and averages "
            "estimates. `dkp` (direct Kolen-Pollack): B_l learns as a weight from h_l to the logits would. `fa`: fixed "
            "random matrices in place of the transposed weights, layer by layer. `forward_gradient`: random "
            "directions times the derivative of the loss along them. `pepita`: a second forward in place of a "
            "backward, for plain chains of layers."
        },
    )
    grape_preset: Literal["auto", "recommended", "convnet", "resnet", "paper"] = field(
        default="auto",
        metadata={
            "help": "The values of all options below that are not given. `recommended`: what worked best in our "
            "studies of Transformers. `convnet` and `resnet`: of convolutional networks without and with shortcut "
            "connections. `auto`: `recommended` where the blocks have no convolutions; else `convnet`, or `resnet` "
            "where there are shortcuts too, the method is `grape`, and you give none of the options in which these two "
            "differ. `paper`: the settings of the GrAPE paper (ICLR 2026)."
        },
    )
    blocks: str | None = field(
        default=None,
        metadata={
            "help": "The blocks that get direct feedback. Names as in model.named_modules(), separated by commas; the "
            "name of a list of modules stands for all of them. Found in the model by default."
        },
    )
    feedback_points: Annotated[int | None, Range(int, 0)] = _option(
        "feedback_points",
        "How many feedback points there are, evenly spaced. Between two of them blocks backpropagate among "
        "themselves. 0: one after every block but the last. In an encoder-decoder: so many in each of the two, and "
        "one more where they meet.",
    )
    feedback_space: Literal["auto", "hidden", "logits"] | None = _option(
        "feedback_space",
        "Where the error is measured. `hidden`: at the output of the last block; B_l is n_l x n_L. `logits`: at the "
        "output of the head; B_l is n_l x classes. `auto`: where there are fewer numbers.",
    )
    feedback_sharing: Literal["auto", "none", "position", "grid"] | None = _option(
        "feedback_sharing",
        "Which positions of a sequence or an image share one B_l. `position`: all of them. `grid`: those within one "
        "cell of a 4 x 4 grid over the image. `none`: no two; B_l acts on h_l as one long vector. `auto`: all of a "
        "sequence, none of an image.",
    )
    feedback_size_limit: Annotated[float, Range(float, 0, infinite=True)] = field(
        default=2.0,
        metadata={"help": "Refuse to train where all B_l together would take more GiB than this. Not in the paper."},
    )
    feedback_init: Literal["auto", "identity", "gaussian", "zero"] | None = _option(
        "feedback_init",
        "How B_l starts. `identity`: the Jacobian of the shortcut path alone, which is the identity matrix where h_l "
        "and y are of one size. `gaussian`: random numbers. `zero`: zeros. `auto`: `identity` where the error is "
        "measured in hidden space and the sizes are one, else `gaussian`. Method `dfa` starts with `gaussian`.",
    )
    feedback_rule: Literal["lms", "cosine", "ema", "local"] | None = _option(
        "feedback_rule",
        "How B_l learns. From an estimate of the Jacobian: `lms`, from the part of the tangents that B_l did not "
        "predict, which has the least noise; `ema`, as a moving average of the estimates; `cosine`, by a gradient step "
        "on the cosine of each column with the estimate's (the paper). Without an estimate: `local`. Each block learns "
        "a map of its own from its own backward, and B_l is the product of the maps above. In place of `local`, a "
        "preset stands for `lms` where you give an option of the estimate: jvp_mode, jvp_scope, jvp_passes, "
        "jvp_fraction, perturbation_space, or calibration_refit. With feedback_path `shortcut` it stands for `local`.",
    )
    feedback_path: Literal["matrix", "shortcut"] | None = _option(
        "feedback_path",
        "Which way the error takes to a block. `matrix`: B_l. `shortcut`: the shortcut connections of the blocks "
        "above, at the very samples of the batch. In most Transformers that is the identity. In ResNets it is masks of "
        "ReLUs and transposed 1 x 1 convolutions. The matrices then stand for the rest. With feedback_rule `local` "
        "they learn it; with method `dfa` there is no rest, unless feedback_init says otherwise.",
    )
    feedback_sweeps: Annotated[int | None, Range(int, 0)] = _option(
        "feedback_sweeps",
        "How often the errors of all blocks are corrected at once before they are used. Each block sends its error "
        "back through itself, and that of the block below goes half way to what came out, or all the way where "
        "that is exact. As many sweeps as feedback points are ordinary backpropagation, but for losses on inner "
        "layers. Each takes one backward without weight gradients. Not in the paper.",
    )
    feedback_lr: Annotated[float | None, Range(float, 0)] = _option(
        "feedback_lr",
        "Learning rate of B_l. With `cosine` it holds for each column. With method `dkp` it is a multiple of the "
        "weights' own rate, 1 by default.",
    )
    feedback_normalize: bool | None = _option(
        "feedback_normalize", "Bring the columns of B_l to unit length whenever B_l has learned."
    )
    jvp_mode: Literal["auto", "dual", "finite_difference"] | None = _option(
        "jvp_mode",
        "How an estimate differentiates. `dual`: exactly, by dual numbers. `finite_difference`: by the difference of "
        "two forwards. `auto`: `finite_difference` where the blocks have convolutions, on which it is cheaper, and "
        "where an operator knows no dual numbers; else `dual`.",
    )
    jvp_scope: Literal["network", "block"] | None = _option(
        "jvp_scope",
        "What an estimate is of. `network`: of the Jacobian from each feedback point to the output. `block`: of each "
        "block's own Jacobian, in one pass in which no tangent goes on to the next block; B_l is the product of the "
        "maps above.",
    )
    jvp_passes: Literal["joint", "per_block"] | None = _option(
        "jvp_passes",
        "How many passes an estimate takes. `joint`: one for all feedback points. `per_block`: one for each, which "
        "has less noise.",
    )
    jvp_fraction: Annotated[float | None, Range(float, 0, 1, above=True)] = _option(
        "jvp_fraction", "Share of the global batch that an estimate is made on."
    )
    jvp_steps: Annotated[int | None, Range(int, 1)] = _option(
        "jvp_steps",
        "B_l learns every so many optimiser steps: from an estimate, or with the rule `local` from backwards. In the "
        "presets but `paper` 1 with the rule `local`, and 4 with others.",
    )
    perturbation_space: Literal["activation", "weight", "auto"] | None = _option(
        "perturbation_space",
        "What an estimate perturbs. `activation`: h_l. `weight`: the weights of the block that makes h_l, for the rule "
        "`cosine` only. `auto`: whichever has fewer numbers, for each block. With method `forward_gradient`: "
        "`activation` (Ren et al. 2023), or all weights at once by `weight` (Baydin et al. 2022).",
    )
    calibration_strategy: Literal["no", "epoch", "steps", "adaptive"] | None = _option(
        "calibration_strategy",
        "When an optimiser step is one of ordinary backpropagation. `no`: never. `epoch`: at one random step in every "
        "calibration_interval epochs. `steps`: every calibration_interval steps. `adaptive`: when the smoothed "
        "alignment falls below calibration_threshold.",
    )
    calibration_interval: Annotated[float | None, Range(float, 0, above=True)] = _option(
        "calibration_interval",
        "From one calibration step to the next: epochs, also a fraction of one, with `epoch`; optimiser steps with "
        "`steps`.",
    )
    calibration_threshold: Annotated[float, Range(float, -1, 1)] = field(
        default=0.3,
        metadata={
            "help": "Alignment below which `adaptive` calibrates. It is the mean cosine of B_l with the estimate, or "
            "of B_l e with the exact gradient where alignment_steps measures that; smoothed over time. Not in the "
            "paper."
        },
    )
    calibration_cooldown: Annotated[int, Range(int, 1)] = field(
        default=100,
        metadata={"help": "Least number of optimiser steps between two calibrations by `adaptive`. Not in the paper."},
    )
    calibration_refit: bool | None = _option(
        "calibration_refit", "Fit B_l to the exact gradients of each calibration step, by ridge regression."
    )
    alignment_steps: Annotated[int, Range(int, 0)] = field(
        default=0,
        metadata={
            "help": "Number of optimiser steps from one measurement of the exact alignment to the next. Each takes one "
            "more forward and backward. 0: it is measured at calibration steps only."
        },
    )
    max_skipped_refinements: Annotated[int, Range(int, 0)] = field(
        default=100,
        metadata={
            "help": "Stop with an error when B_l could not learn so many times in a row, as the error or the estimate "
            "was NaN or infinite. This is looked at whenever the loss is logged. 0: never stop. Not in the paper."
        },
    )
    fallback: Literal["no", "block", "bp"] = field(
        default="no",
        metadata={
            "help": "What to do when the alignment stays below fallback_threshold. `no`: nothing. `block`: that block "
            "gets its gradient from the block after it. `bp`: when the mean of all blocks is that low, the whole "
            "model goes on by ordinary backpropagation. Either holds for the rest of the run, and a warning says so. "
            "Not in the paper."
        },
    )
    fallback_threshold: Annotated[float, Range(float, -1, 1)] = field(
        default=0.0,
        metadata={
            "help": "Alignment that is too low for `fallback`; the cosine that calibration_threshold looks at, "
            "smoothed. At 0 the feedback is at a right angle to the gradient, below 0 it points away from it. Not in "
            "the paper."
        },
    )
    fallback_patience: Annotated[int, Range(int, 1)] = field(
        default=10,
        metadata={
            "help": "Number of measurements in a row that have to be below fallback_threshold. Not in the paper."
        },
    )

    pipeline_stages: Annotated[int, Range(int, 1)] = field(
        default=1,
        metadata={
            "help": "Divide the model's blocks among so many processes, its stages (K); K times R processes are R "
            "replicas. For methods `bp`, `dfa` and `grape`. See docs/pipeline.md."
        },
    )
    pipeline_microbatches: Annotated[int, Range(int, 1)] = field(
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
        """Make a dataclass of whatever this is mixed into: an undecorated class would take our options alone.

        Raises TypeError where ``TrainingArguments`` would be found first.
        """
        super().__init_subclass__(**kwargs)
        if TrainingArguments in cls.__mro__[: cls.__mro__.index(GrapeArgumentsMixin)]:
            raise TypeError(
                f"nobody would check the options of class {cls.__name__}: expected GrapeArgumentsMixin before "
                f"TrainingArguments, as in class {cls.__name__}(GrapeArgumentsMixin, ...)."
            )
        dataclass(kw_only=True)(cls)  # where the user decorates it as well, fields without a default may come last

    def __post_init__(self) -> None:
        """Refuse what cannot work, and go on with the arguments mixed with."""
        self._check_values()
        if any(getattr(self, name) is None for name in PRESETS["recommended"]):
            resolved(
                self
            )  # what contradicts itself does so whatever the model: `auto`'s presets differ in no such option
        else:
            self._check_combinations()
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def _check_values(self) -> None:
        hints = get_type_hints(GrapeArgumentsMixin, include_extras=True)
        for option in dataclasses.fields(GrapeArgumentsMixin):
            name, hint, value = option.name, hints[option.name], getattr(self, option.name)
            if value is None and option.default is None:
                continue
            allowed = [choice for part in (hint, *get_args(hint)) for choice in _choices(part)]
            if allowed and value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.")
            for limits in (part for part in get_args(hint) if isinstance(part, Range)):
                setattr(self, name, limits.read(name, value))
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
            if not isinstance(getattr(self, name), bool | None):
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
        if self.method in ESTIMATING and self.feedback_rule != "cosine" and (self.feedback_lr or 0.0) > 1:
            raise ValueError(
                f"feedback_lr={self.feedback_lr}: expected at most 1 for feedback_rule={self.feedback_rule!r}, "
                "which a higher rate drives away from what it learns."
            )
        if self.learns_by_maps and self.calibration_refit:
            raise ValueError(
                'calibration_refit=True fits B_l, which feedback_rule="local" makes of the maps of blocks. Set '
                "calibration_refit=False."
            )
        if self.feedback_path == "shortcut" and not (self.method == "dfa" or self.learns_by_maps):
            raise ValueError(
                f'feedback_path="shortcut" leaves the rest to matrices that learn from backwards, or to none: expected '
                f'feedback_rule="local" or method="dfa", got method={self.method!r}'
                + (f" and feedback_rule={self.feedback_rule!r}." if self.method == "grape" else ".")
            )
        if self.jvp_scope == "block" and (self.method != "grape" or self.feedback_rule not in ("lms", "ema")):
            raise ValueError(
                'jvp_scope="block" estimates the Jacobian of each block: expected method="grape" and '
                f'feedback_rule="lms" or "ema", got {self.method!r} and {self.feedback_rule!r}.'
            )
        if self.jvp_scope == "block" and (self.jvp_passes != "joint" or self.calibration_refit):
            raise ValueError(
                'jvp_scope="block" makes one pass for all blocks, and B_l is the product of their maps: expected '
                f'jvp_passes="joint" and calibration_refit=False, got {self.jvp_passes!r} and {self.calibration_refit}.'
            )
        if self.feedback_path == "shortcut" and self.calibration_refit:
            raise ValueError(
                'calibration_refit=True fits B_l to whole gradients, of which feedback_path="shortcut" leaves it a '
                "part. Set calibration_refit=False."
            )
        if self.feedback_sweeps and self.method not in ("dfa", "grape"):
            raise ValueError(
                f'feedback_sweeps={self.feedback_sweeps}: expected 0 with method={self.method!r}, or method="dfa" or '
                '"grape".'
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

    @property
    def learns_by_maps(self) -> bool:
        """Whether each block learns a map of its own, without an estimate."""
        return self.method == "grape" and self.feedback_rule == "local"

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
    """Return GrAPE's options out of training arguments of any kind; the defaults where those have no such options."""
    if not isinstance(args, GrapeArgumentsMixin):
        return GrapeArgumentsMixin()
    return GrapeArgumentsMixin(**{option.name: getattr(args, option.name) for option in _FIELDS})


def resolved(options: GrapeArgumentsMixin, convolutional: bool = False, shortcuts: bool = False) -> GrapeArgumentsMixin:
    """Return a copy of the options in which none is None but ``blocks``, and ``grape_preset`` is not ``auto``.

    Args:
        options: GrAPE's options; they stay as they are.
        convolutional: whether the blocks of the model have convolutions.
        shortcuts: whether they have shortcut connections that may be used.

    Raises:
        ValueError: if options contradict each other.
    """
    given = {option.name: getattr(options, option.name) for option in _FIELDS}
    if options.grape_preset == "auto":
        own = any(given[name] is not None and given[name] is not False for name in _RESNETS_OWN)
        resnet = shortcuts and options.method == "grape" and not own
        given["grape_preset"] = ("resnet" if resnet else "convnet") if convolutional else "recommended"
    implied = PRESETS[given["grape_preset"]] | METHOD_OPTIONS.get(options.method, {})
    if options.method == "dfa" and (options.feedback_path or implied["feedback_path"]) == "shortcut":
        implied["feedback_init"] = "zero"  # of what is added to the path
    if implied["feedback_rule"] in ("local", "lms"):
        asked = {name: given[name] for name in _OF_ESTIMATES if given[name] not in (None, False)}
        if asked and asked != {"jvp_mode": "auto"}:
            implied["feedback_rule"] = "lms"
        elif options.method == "grape" and options.feedback_path == "shortcut":
            implied["feedback_rule"] = "local"
    if options.method == "grape" and given["grape_preset"] != "paper":  # a map learns at next to no cost
        implied["jvp_steps"] = 1 if (options.feedback_rule or implied["feedback_rule"]) == "local" else 4
    missing = {name: value for name, value in implied.items() if given[name] is None}
    return GrapeArgumentsMixin(**given | missing)


_FIELDS = dataclasses.fields(GrapeArgumentsMixin)
