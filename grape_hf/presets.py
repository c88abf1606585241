"""What an option is where it is not given: the presets, what a method implies, and which preset suits a model."""

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "feedback_points": 0,
        "feedback_space": "auto",
        "feedback_sharing": "position",
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
# Feedback by matrices alone, learned from estimates or from backwards, is no better on convolutions than a lower half
# that is left at random. With one sweep it is, and best with few points (recipes/studies/LOG.md).
PRESETS["convnet"] = PRESETS["recommended"] | {
    "feedback_points": 3,
    "feedback_space": "hidden",
    "feedback_init": "zero",
    "feedback_sweeps": 1,
}
# Where blocks have shortcut connections the error takes them, and maps are of what the path leaves out.
PRESETS["resnet"] = PRESETS["recommended"] | {
    "feedback_space": "hidden",
    "feedback_path": "shortcut",
    "feedback_sweeps": 1,
}

# Whoever gives one of these options of an estimate, and no rule, gets a rule that makes one.
_OF_ESTIMATES = ("jvp_mode", "jvp_scope", "jvp_passes", "jvp_fraction", "perturbation_space", "calibration_refit")

# Methods without a star, a class each (``grape_hf/methods``).
BASELINES = ("fa", "forward_gradient", "pepita")
_BY_MATRIX = {"feedback_path": "matrix", "feedback_sweeps": 0}
_OF_LOGITS = _BY_MATRIX | {"feedback_points": 0, "feedback_space": "logits", "feedback_sharing": "auto"}
# What a method implies; it wins over the preset, and a value given wins over both.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "dfa": {"feedback_init": "gaussian", **_BY_MATRIX},
    "fdfa": {
        **_OF_LOGITS,
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
        **_OF_LOGITS,
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
# Whoever gives one of these another value than `resnet` has, or an option of an estimate, does not want `resnet`.
_OF_ITS_KIND = (
    "feedback_points",
    "feedback_space",
    "feedback_sharing",
    "feedback_init",
    "feedback_rule",
    "feedback_path",
)
# Methods whose B_l learn from estimates of the Jacobians.
ESTIMATING = ("grape", "fdfa")


def filled(
    given: Mapping[str, Any], convolutional: bool = False, shortcuts: bool = False, graphs: bool = True
) -> dict[str, Any]:
    """Return all options, with values for those that are None.

    Args:
        given: every option by its name.
        convolutional: whether the blocks of the model have convolutions.
        shortcuts: whether they have shortcut connections.
        graphs: whether a block's graph can be used before its backward, as paths and sweeps need it.
    """
    found, auto = dict(given), given["grape_preset"] == "auto"
    if auto:
        resnet = shortcuts and graphs and given["method"] == "grape" and not _goes_without_paths(given)
        found["grape_preset"] = ("resnet" if resnet else "convnet") if convolutional else "recommended"
    implied = PRESETS[found["grape_preset"]] | METHOD_OPTIONS.get(given["method"], {})
    if auto and not graphs:
        implied["feedback_sweeps"] = 0
    if given["method"] == "dfa" and (given["feedback_path"] or implied["feedback_path"]) == "shortcut":
        implied["feedback_init"] = "zero"  # of what is added to the path
    if implied["feedback_rule"] == "local":
        asked = {name: given[name] for name in _OF_ESTIMATES if given[name] not in (None, False)}
        if asked and asked != {"jvp_mode": "auto"}:
            implied["feedback_rule"] = "lms"
    if given["method"] == "grape" and found["grape_preset"] != "paper":  # a map learns at next to no cost
        implied["jvp_steps"] = 1 if (given["feedback_rule"] or implied["feedback_rule"]) == "local" else 4
    return found | {name: value for name, value in implied.items() if found[name] is None}


def _goes_without_paths(given: Mapping[str, Any]) -> bool:
    """Whether what is given speaks against the preset `resnet`, where the model has shortcut connections."""
    estimates = any(given[name] not in (None, False) for name in _OF_ESTIMATES)
    other = any(given[name] not in (None, PRESETS["resnet"][name]) for name in _OF_ITS_KIND)
    return estimates or other
