"""The options: from keywords, a YAML file, the command line; with their help, presets and refusals."""

import dataclasses
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from grape_hf import GrapeArgumentsMixin, GrapeTrainingArguments
from grape_hf.presets import PRESETS
from grape_hf.training_args import options_of, resolved

FIELDS = {f.name: f for f in dataclasses.fields(GrapeArgumentsMixin)}
HINTS = get_type_hints(GrapeArgumentsMixin)


def choices(name: str) -> tuple[str, ...]:
    """The values that the type of an option lists."""
    for part in (HINTS[name], *get_args(HINTS[name])):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


CHOICES = [(name, value) for name in FIELDS for value in choices(name)]
NUMBERS = {
    "feedback_points": (int, [-1, 1.5, float("inf")]),
    "feedback_lr": (float, [-0.1, float("inf"), float("nan")]),
    "feedback_size_limit": (float, [-1]),
    "jvp_fraction": (float, [0, 1.5]),
    "jvp_steps": (int, [0, 2.5]),
    "calibration_interval": (float, [0, -1, float("inf")]),
    "calibration_threshold": (float, [-1.5, 2]),
    "calibration_cooldown": (int, [0]),
    "alignment_steps": (int, [-1, 0.5]),
    "feedback_sweeps": (int, [-1, 0.5]),
    "max_skipped_refinements": (int, [-1, 0.5]),
    "fallback_threshold": (float, [-1.5, 2]),
    "fallback_patience": (int, [0]),
    "pipeline_stages": (int, [0]),
    "pipeline_microbatches": (int, [0]),
}


def from_keywords(folder: Path, **options: Any) -> GrapeTrainingArguments:
    return GrapeTrainingArguments(output_dir=str(folder), **options)


def from_yaml(folder: Path, **options: Any) -> GrapeTrainingArguments:
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder)} | options))
    (args,) = HfArgumentParser(GrapeTrainingArguments).parse_yaml_file(str(file))
    return args


def from_command_line(folder: Path, **options: Any) -> GrapeTrainingArguments:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    (args,) = HfArgumentParser(GrapeTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(folder), *words]
    )
    return args


ways = pytest.mark.parametrize("make", [from_keywords, from_yaml, from_command_line], ids=lambda way: way.__name__)

UNSET = ("blocks", "pipeline_split")  # None by default, whatever the preset


def compatible(name: str, value: Any) -> dict[str, Any]:
    """What some values want beside them."""
    beside = {
        "perturbation_space": {"feedback_rule": "cosine"},
        "feedback_path": {"feedback_rule": "local"},
    }
    more = beside.get(name, {})
    return {name: value} | more


@ways
@pytest.mark.parametrize(("name", "value"), CHOICES, ids=lambda part: str(part))
def test_every_value_listed_is_accepted(make, name, value, tmp_path):
    assert getattr(make(tmp_path, **compatible(name, value)), name) == value


@ways
@pytest.mark.parametrize("name", [name for name in FIELDS if choices(name)])
def test_other_values_are_refused(make, name, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        make(tmp_path, **{name: "nonsense"})
    message = str(caught.value) if caught.type is ValueError else capsys.readouterr().err
    assert name in message
    assert "nonsense" in message
    assert all(value in message for value in choices(name))


@ways
@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (_, values) in NUMBERS.items() for v in values])
def test_numbers_out_of_range_are_refused(make, name, value, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        make(tmp_path, **{name: value})
    message = str(caught.value) if caught.type is ValueError else capsys.readouterr().err
    assert name in message
    assert str(value) in message


def test_no_number_is_forgotten():
    kinds = (int, float)
    assert set(NUMBERS) == {n for n, hint in HINTS.items() if hint in kinds or set(get_args(hint)) & set(kinds)}


@ways
def test_numbers_keep_their_kind(make, tmp_path):
    """YAML reads 1e-3 as a string."""
    args = make(tmp_path, feedback_lr="1e-3", jvp_steps="2", jvp_fraction="5e-1", calibration_interval="1")
    assert (args.feedback_lr, args.jvp_steps, args.jvp_fraction, args.calibration_interval) == (0.001, 2, 0.5, 1.0)
    assert [type(v) for v in (args.feedback_lr, args.jvp_steps, args.calibration_interval)] == [float, int, float]


def test_a_yaml_file_as_one_would_write_it(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nmethod: grape\nfeedback_lr: 1e-3\nfeedback_normalize: true\n"
        "calibration_strategy: no\njvp_fraction: 0.25\n"
    )
    with pytest.raises(ValueError, match=r"calibration_strategy=False: expected one of .*'no'"):
        HfArgumentParser(GrapeTrainingArguments).parse_yaml_file(str(file))
    file.write_text(file.read_text().replace(": no", ': "no"'))
    (args,) = HfArgumentParser(GrapeTrainingArguments).parse_yaml_file(str(file))
    assert (args.feedback_lr, args.feedback_normalize, args.calibration_strategy) == (0.001, True, "no")


@pytest.mark.parametrize("name", ["feedback_normalize", "calibration_refit"])
def test_switches(name, tmp_path):
    on = {name: True} | ({"calibration_strategy": "epoch"} if name == "calibration_refit" else {})
    for make in (from_keywords, from_yaml, from_command_line):
        assert getattr(make(tmp_path, **on), name) is True
        assert getattr(make(tmp_path, **on | {name: False}), name) is False
    for value in ("yes please", 2):
        with pytest.raises(ValueError, match=f"{name}={value!r}: expected True or False"):
            from_keywords(tmp_path, **on | {name: value})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_in_what_is_not_given(preset, tmp_path):
    options = resolved(from_keywords(tmp_path, grape_preset=preset))
    assert {name: getattr(options, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert not [name for name in FIELDS if getattr(options, name) is None and name not in UNSET]
    given = resolved(from_keywords(tmp_path, grape_preset=preset, feedback_lr=0.5, calibration_interval=2.0))
    assert given.feedback_lr == 0.5
    assert given.calibration_interval == 2.0
    assert given.feedback_rule == PRESETS[preset]["feedback_rule"]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "local"),
        ({"jvp_steps": 2, "jvp_mode": "auto", "calibration_refit": False}, "local"),
        ({"jvp_fraction": 0.5}, "lms"),
        ({"jvp_mode": "dual"}, "lms"),
        ({"jvp_scope": "block"}, "lms"),
        ({"calibration_refit": True, "calibration_strategy": "steps"}, "lms"),
        ({"jvp_fraction": 0.5, "feedback_rule": "local"}, "local"),
        ({"grape_preset": "convnet"}, "local"),
        ({"grape_preset": "convnet", "jvp_passes": "joint"}, "lms"),
        ({"grape_preset": "paper", "jvp_fraction": 0.5}, "cosine"),
        ({"method": "fdfa", "jvp_fraction": 0.5}, "ema"),
    ],
)
def test_an_option_of_the_estimate_asks_for_one(options, rule):
    found = resolved(GrapeArgumentsMixin(**{"grape_preset": "recommended"} | options))
    assert found.feedback_rule == rule
    every = {"local": 1, "lms": 4, "cosine": 1, "ema": 1}  # the last two of the paper, and of method fdfa
    assert found.jvp_steps == options.get("jvp_steps", every[rule])


def test_presets_agree_with_the_fields():
    assert PRESETS.keys() | {"auto"} == set(get_args(HINTS["grape_preset"]))
    assert PRESETS["paper"].keys() == PRESETS["recommended"].keys()
    assert PRESETS["paper"].keys() == {name for name, f in FIELDS.items() if f.default is None and name not in UNSET}


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        HfArgumentParser(GrapeTrainingArguments).parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, option in FIELDS.items():
        assert f"--{name}" in text
        help_text = option.metadata["help"]
        assert " ".join(help_text.split())[:60].replace("%%", "%") in text
        for value in choices(name):
            assert value in help_text, f"{name}: the help does not say what {value} is"
        if name in PRESETS["paper"]:
            for preset, options in PRESETS.items():
                assert f"{preset}: {options[name]}" in help_text


def test_the_command_line_gives_what_keywords_give(tmp_path):
    options = {
        "method": "dfa",
        "blocks": "transformer.h",
        "feedback_init": "zero",
        "feedback_lr": 0.5,
        "calibration_strategy": "epoch",
        "calibration_interval": 0.25,
        "calibration_refit": True,
    }
    made = [make(tmp_path, **options) for make in (from_keywords, from_yaml, from_command_line)]
    values = [{name: getattr(args, name) for name in FIELDS} for args in made]
    assert values[0] == values[1] == values[2]


def test_arguments_survive_their_own_dict_and_json(tmp_path):
    args = from_keywords(tmp_path, grape_preset="paper", feedback_space="hidden")
    again = GrapeTrainingArguments(**args.to_dict())
    assert {name: getattr(again, name) for name in FIELDS} == {name: getattr(args, name) for name in FIELDS}
    assert '"feedback_space": "hidden"' in args.to_json_string()


def test_they_are_training_arguments(tmp_path):
    assert issubclass(GrapeTrainingArguments, TrainingArguments)
    assert not set(FIELDS) & {f.name for f in dataclasses.fields(TrainingArguments)}
    with pytest.raises(TypeError, match="feedback_rate"):
        from_keywords(tmp_path, feedback_rate=0.1)


class Undecorated(GrapeArgumentsMixin, TrainingArguments):
    more: int = 3


@dataclasses.dataclass
class Decorated(GrapeArgumentsMixin, TrainingArguments):
    more: int = 3


@pytest.mark.parametrize("kind", [Undecorated, Decorated])
def test_a_class_that_mixes_the_options_in_takes_all_arguments(kind, tmp_path):
    args = kind(output_dir=str(tmp_path), method="dfa", learning_rate=0.5, more=4)
    assert (args.method, args.learning_rate, args.more) == ("dfa", 0.5, 4)
    assert kind(**args.to_dict()).to_dict() == args.to_dict()
    (parsed,) = HfArgumentParser(kind).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--more", "5"])
    assert (parsed.method, parsed.more) == ("grape", 5)


@pytest.mark.parametrize("preset", [*PRESETS, "auto"])
def test_fixed_feedback_is_random_unless_told_otherwise(preset, tmp_path):
    def started(**options: Any) -> str | None:
        return resolved(from_keywords(tmp_path, grape_preset=preset, method="dfa", **options)).feedback_init

    assert started() == "gaussian"
    assert [started(feedback_init=init) for init in ("zero", "identity")] == ["zero", "identity"]


def test_auto_takes_the_settings_for_the_blocks_and_leaves_the_arguments_alone(tmp_path):
    args = from_keywords(tmp_path, feedback_lr=0.5)
    before = args.to_dict()
    assert args.grape_preset == "auto"
    for convolutional, preset in ((False, "recommended"), (True, "convnet")):
        options = resolved(args, convolutional)
        assert options.grape_preset == preset
        assert {name: getattr(options, name) for name in PRESETS[preset]} == PRESETS[preset] | {"feedback_lr": 0.5}
        assert options == resolved(options, not convolutional), "what is resolved stays as it is"
    assert args.to_dict() == before


def test_auto_takes_the_settings_for_shortcuts_where_nothing_says_otherwise(tmp_path):
    def preset(**options: Any) -> str:
        return resolved(from_keywords(tmp_path, **options), True, True).grape_preset

    options = resolved(from_keywords(tmp_path, alignment_steps=5), True, True)
    assert options.grape_preset == "resnet"
    assert {name: getattr(options, name) for name in PRESETS["resnet"]} == PRESETS["resnet"]
    assert options == resolved(options), "what is resolved stays as it is"
    # Another kind of feedback, or an option of an estimate, each by itself.
    for name, value in {
        "feedback_points": 2,
        "feedback_space": "logits",
        "feedback_sharing": "none",
        "feedback_init": "gaussian",
        "feedback_rule": "lms",
        "feedback_path": "matrix",
        "jvp_mode": "dual",
        "jvp_scope": "block",
        "jvp_passes": "per_block",
        "jvp_fraction": 0.5,
        "perturbation_space": "activation",
    }.items():
        others = {"feedback_rule": "lms"} if value == "block" else {}
        assert preset(**{name: value}, **others) == "convnet", name
    # Its own values, and what goes with it.
    for name in PRESETS["resnet"].keys() - {
        "jvp_fraction",
        "jvp_mode",
        "jvp_scope",
        "jvp_passes",
        "perturbation_space",
    }:
        assert preset(**{name: PRESETS["resnet"][name]}) == "resnet", name
    assert preset(feedback_sweeps=0) == preset(feedback_sweeps=2, feedback_lr=0.1, jvp_steps=2) == "resnet"
    assert preset(calibration_refit=True, calibration_strategy="epoch") == "convnet"
    assert preset(calibration_refit=False, calibration_strategy="epoch", feedback_normalize=True) == "resnet"
    for method in ("dfa", "fdfa", "dkp", "fa", "forward_gradient", "pepita"):
        assert preset(method=method) == "convnet"
        # Each of them is what it is elsewhere.
        given = resolved(from_keywords(tmp_path, method=method, grape_preset="resnet"))
        assert (given.feedback_path, given.feedback_sweeps) == ("matrix", 0)
    assert resolved(from_keywords(tmp_path), False, True).grape_preset == "recommended"


def test_what_auto_may_stand_for_contradicts_nothing_that_the_other_would_not():
    """So that arguments can be refused before the model is known."""
    values = [
        *CHOICES,
        *((name, value) for name in ("feedback_normalize", "calibration_refit") for value in (True, False)),
    ]
    differ = 0
    for i, (name, value) in enumerate(values):
        for other, second in values[i + 1 :]:
            if {name, other} & {"grape_preset"} or name == other:
                continue
            refused = []
            for convolutional in (False, True):
                options = {"grape_preset": "convnet" if convolutional else "recommended", name: value, other: second}
                try:
                    GrapeArgumentsMixin(**options)
                    refused.append(None)
                except ValueError as error:
                    refused.append(str(error))
            try:  # `resnet`, where what is given lets it be chosen
                resolved(GrapeArgumentsMixin(**{name: value, other: second}), True, True)
                refused.append(None)
            except ValueError as error:
                refused.append(str(error))
            assert refused[0] == refused[1] == refused[2], (name, value, other, second)
            differ += refused[0] is not None
    assert differ > 100, "pairs that contradict each other were among them"


def test_options_are_read_from_arguments_that_have_the_mixin_alone(tmp_path):
    @dataclasses.dataclass
    class Others(TrainingArguments):
        method: str = "pepita"
        blocks: int = 12
        jvp_steps: int = -1

    assert options_of(Others(output_dir=str(tmp_path))) == GrapeArgumentsMixin()
    assert options_of(SimpleNamespace(method="bp")) == GrapeArgumentsMixin()
    ours = Decorated(output_dir=str(tmp_path), method="dfa", jvp_steps=3)
    torch.save(ours, tmp_path / "training_args.bin")
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    for args in (ours, deepcopy(ours), loaded):
        assert options_of(args) == GrapeArgumentsMixin(method="dfa", jvp_steps=3)
