"""Which values an option may have, and which options contradict each other: refused when the arguments are made."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from grape_hf.presets import BASELINES, ESTIMATING


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


def check_values(options: Any, kind: type) -> None:
    """Read numbers, and raise ValueError for a value that an option may not have.

    Args:
        options: GrAPE's options; numbers that are strings are replaced in them.
        kind: the class that declares the options.
    """
    hints = get_type_hints(kind, include_extras=True)
    for option in fields(kind):
        name, hint, value = option.name, hints[option.name], getattr(options, option.name)
        if value is None and option.default is None:
            continue
        allowed = [choice for part in (hint, *get_args(hint)) for choice in _choices(part)]
        if allowed and value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.")
        for limits in (part for part in get_args(hint) if isinstance(part, Range)):
            setattr(options, name, limits.read(name, value))
    if not isinstance(options.blocks, str | None):
        raise ValueError(f"blocks={options.blocks!r}: expected names in one string, separated by commas, or None.")
    if not isinstance(options.pipeline_split, str | None):
        raise ValueError(f"pipeline_split={options.pipeline_split!r}: expected numbers in one string, as in '7,5'.")
    if options.pipeline_split is not None and options.pipeline_stages == 1:
        raise ValueError(
            f"pipeline_split={options.pipeline_split!r} says how many blocks each stage gets, and there is one: set "
            "pipeline_stages."
        )
    for name in ("feedback_normalize", "calibration_refit"):
        if not isinstance(getattr(options, name), bool | None):
            raise ValueError(f"{name}={getattr(options, name)!r}: expected True or False.")


def check_combinations(options: Any) -> None:
    """Raise ValueError if options, none of which is None any more, contradict each other."""
    if options.method == "bp":
        return
    if options.method in BASELINES:
        _check_baseline(options)
        return
    if options.method == "fdfa" and options.feedback_rule != "ema":
        raise ValueError(
            f'method="fdfa" learns by feedback_rule="ema", got {options.feedback_rule!r}. For another rule use '
            'method="grape".'
        )
    if options.method in ESTIMATING and options.feedback_rule != "cosine" and (options.feedback_lr or 0.0) > 1:
        raise ValueError(
            f"feedback_lr={options.feedback_lr}: expected at most 1 for feedback_rule={options.feedback_rule!r}, "
            "which a higher rate drives away from what it learns."
        )
    if options.learns_by_maps and options.calibration_refit:
        raise ValueError(
            'calibration_refit=True fits B_l, which feedback_rule="local" makes of the maps of blocks. Set '
            "calibration_refit=False."
        )
    if options.feedback_path == "shortcut" and not (options.method == "dfa" or options.learns_by_maps):
        raise ValueError(
            f'feedback_path="shortcut" leaves the rest to matrices that learn from backwards, or to none: expected '
            f'feedback_rule="local" or method="dfa", got method={options.method!r}'
            + (f" and feedback_rule={options.feedback_rule!r}." if options.method == "grape" else ".")
        )
    if options.jvp_scope == "block" and (options.method != "grape" or options.feedback_rule not in ("lms", "ema")):
        raise ValueError(
            'jvp_scope="block" estimates the Jacobian of each block: expected method="grape" and '
            f'feedback_rule="lms" or "ema", got {options.method!r} and {options.feedback_rule!r}.'
        )
    if options.jvp_scope == "block" and (options.jvp_passes != "joint" or options.calibration_refit):
        raise ValueError(
            'jvp_scope="block" makes one pass for all blocks, and B_l is the product of their maps: expected '
            f'jvp_passes="joint" and calibration_refit=False, got {options.jvp_passes!r} and '
            f"{options.calibration_refit}."
        )
    if options.feedback_path == "shortcut" and options.calibration_refit:
        raise ValueError(
            'calibration_refit=True fits B_l to whole gradients, of which feedback_path="shortcut" leaves it a '
            "part. Set calibration_refit=False."
        )
    if options.feedback_sweeps and options.method not in ("dfa", "grape"):
        raise ValueError(
            f'feedback_sweeps={options.feedback_sweeps}: expected 0 with method={options.method!r}, or method="dfa" or '
            '"grape".'
        )
    if (
        options.method in ESTIMATING
        and options.perturbation_space != "activation"
        and options.feedback_rule != "cosine"
    ):
        raise ValueError(
            f"perturbation_space={options.perturbation_space!r} estimates a direction, not the Jacobian, which only "
            f'feedback_rule="cosine" can use; got feedback_rule={options.feedback_rule!r}. Use '
            'perturbation_space="activation".'
        )
    if options.calibration_strategy == "steps" and options.calibration_interval != int(
        options.calibration_interval or 0
    ):
        raise ValueError(
            'calibration_strategy="steps" counts optimiser steps: expected a whole calibration_interval, got '
            f"{options.calibration_interval}."
        )
    watching = {"calibration_strategy": "adaptive", "fallback": options.fallback if options.fallback != "no" else None}
    for name, value in watching.items():
        if getattr(options, name) == value and options.method not in ESTIMATING and not options.alignment_steps:
            raise ValueError(
                f'{name}="{value}" watches the alignment, and method="{options.method}" makes no estimate of it. Set '
                f"alignment_steps to measure the exact one, or use another {name.removeprefix('calibration_')}."
            )
    if options.calibration_refit and options.calibration_strategy == "no":
        raise ValueError(
            "calibration_refit=True fits B_l at calibration steps, and there are none: set calibration_strategy."
        )


def _check_baseline(options: Any) -> None:
    found = options.calibration_strategy, options.calibration_refit, options.alignment_steps, options.fallback
    if found != ("no", False, 0, "no"):
        raise ValueError(
            f'method="{options.method}" has no feedback matrices to calibrate or measure: expected '
            'calibration_strategy="no", calibration_refit=False, alignment_steps=0 and fallback="no", got '
            f"{found[0]!r}, {found[1]}, {found[2]} and {found[3]!r}. Leave them out."
        )
    if options.method == "forward_gradient" and options.perturbation_space == "auto":
        raise ValueError(
            'method="forward_gradient" perturbs one space for all blocks: expected '
            "perturbation_space='activation' or 'weight', got 'auto'."
        )


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if getattr(hint, "__origin__", None) is Literal else ()
