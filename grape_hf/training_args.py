"""Every option of GrAPE, with its help text: the manual page.

An option that is not given stays None in the arguments. ``resolved`` fills it in once the model is known: with what the
method implies, else with the value of ``grape_preset`` (``presets.py``). A value that is not allowed, and options that
contradict each other, are refused when the arguments are made (``option_checks.py``).
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from transformers import TrainingArguments

from grape_hf.option_checks import Range, check_combinations, check_values
from grape_hf.presets import PRESETS, filled


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
            "where there are shortcuts too, the method is `grape`, and you give no option of another kind of "
            "feedback. `paper`: the settings of the GrAPE paper (ICLR 2026)."
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
        "Where the error is measured. `hidden`: at the output of the last block; B_l is n_l x n_L. `logits`: at that "
        "of the head; B_l is n_l x classes. `auto`: `hidden` for sequences, else where there are fewer numbers.",
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
        "How B_l, or a map, starts. `identity`: the Jacobian of the shortcut path alone, the identity matrix where its "
        "two sizes agree. `gaussian`: random numbers. `zero`: zeros. `auto`: `identity` where that fits, else "
        "`gaussian`; `zero` in an encoder below a decoder, and beside a shortcut path. Method `dfa`: `gaussian`.",
    )
    feedback_rule: Literal["lms", "cosine", "ema", "local"] | None = _option(
        "feedback_rule",
        "How B_l learns. From an estimate of the Jacobian: `lms`, from the part of the tangents that B_l did not "
        "predict, which has the least noise; `ema`, as a moving average of the estimates; `cosine`, by a gradient step "
        "on the cosine of each column with the estimate's (the paper). Without an estimate: `local`. Each block learns "
        "a map of its own from its own backward, and B_l is the product of the maps above. In place of `local`, a "
        "preset stands for `lms` where you give an option of the estimate: jvp_mode, jvp_scope, jvp_passes, "
        "jvp_fraction, perturbation_space, or calibration_refit.",
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
        "feedback_normalize", "Keep the columns of B_l, or of the maps, at unit length (`grape` and `fdfa`)."
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
        check_values(self, GrapeArgumentsMixin)
        if any(getattr(self, name) is None for name in PRESETS["recommended"]):
            resolved(self)  # whatever the model: `auto`'s presets differ in no option that could contradict another
        else:
            check_combinations(self)
        if (parent := getattr(super(), "__post_init__", None)) is not None:
            parent()

    @property
    def learns_by_maps(self) -> bool:
        """Whether each block learns a map of its own, without an estimate."""
        return self.method == "grape" and self.feedback_rule == "local"


@dataclass
class GrapeTrainingArguments(GrapeArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with GrAPE's options; see ``GrapeArgumentsMixin`` for those."""


def options_of(args: Any) -> GrapeArgumentsMixin:
    """Return GrAPE's options out of training arguments of any kind; the defaults where those have no such options."""
    if not isinstance(args, GrapeArgumentsMixin):
        return GrapeArgumentsMixin()
    return GrapeArgumentsMixin(**{option.name: getattr(args, option.name) for option in _FIELDS})


def resolved(options: GrapeArgumentsMixin, *blocks: bool) -> GrapeArgumentsMixin:
    """Return a copy of the options in which none is None but ``blocks``, and ``grape_preset`` is not ``auto``.

    Args:
        options: GrAPE's options; they stay as they are.
        blocks: what is known of the model's blocks: ``convolutional``, ``shortcuts`` and ``graphs`` of ``filled``.

    Raises:
        ValueError: if options contradict each other.
    """
    given = {option.name: getattr(options, option.name) for option in _FIELDS}
    return GrapeArgumentsMixin(**filled(given, *blocks))


_FIELDS = fields(GrapeArgumentsMixin)
