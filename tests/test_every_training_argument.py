"""Of every field of ``TrainingArguments`` it is known what it does under GrAPE: tested, refused, or of no bearing.

A field may be tested for some of its values and refused for others. What is named as a test must be there; what is
named as refused is tried here; and a field that nobody has looked at, as a new version of transformers brings, fails.
"""

import ast
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import make_trainer
from problems import GPT2
from test_trainer import CHECKPOINTING
from test_training_features import SETTINGS
from transformers import TrainingArguments

FIELDS = [field.name for field in dataclasses.fields(TrainingArguments)]
# transformers has added and taken away these within the versions that we support, 5.17 to 5.23.
NOT_IN_ALL = {"activation_checkpointing", "activation_checkpointing_kwargs"}

_FEATURES = "test_training_features.py::"
# Fields by the test that runs with them. Those of SETTINGS, which one test runs through, are not repeated.
TESTED: dict[str, tuple[str, ...]] = {
    _FEATURES + "test_every_optimizer_works_or_fails_as_with_the_stock_trainer": ("optim", "optim_target_modules"),
    _FEATURES + "test_arguments_for_an_optimizer": ("optim_args",),
    _FEATURES + "test_every_schedule": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    _FEATURES + "test_batches_of_like_lengths": (
        "train_sampling_strategy",
        "length_column_name",
        "remove_unused_columns",
    ),
    _FEATURES + "test_auto_find_batch_size_is_a_fresh_run_with_smaller_batches": ("auto_find_batch_size",),
    _FEATURES + "test_a_compiled_model_trains_as_it_does_uncompiled": ("torch_compile", "torch_compile_backend"),
    _FEATURES + "test_inductor": ("torch_compile", "torch_compile_mode"),
    _FEATURES + "test_estimates_do_not_suffer_from_less_precise_products": ("tf32",),
    _FEATURES + "test_the_best_model_comes_with_its_feedback": ("load_best_model_at_end", "save_only_model"),
    _FEATURES + "test_every_trial_of_a_search_is_a_run_of_its_own": ("learning_rate", "output_dir"),
    _FEATURES + "test_full_determinism": ("full_determinism",),
    _FEATURES + "test_memory_metrics": ("skip_memory_metrics",),
    _FEATURES + "test_a_cache_of_keys_and_values": ("use_cache",),
    _FEATURES + "test_ways_to_resume": ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
    _FEATURES + "test_liger": ("use_liger_kernel", "liger_kernel_config"),
    "test_trainer.py::test_four_micro_batches_of_4_are_a_batch_of_16": (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
    ),
    "test_trainer.py::test_bp_is_the_stock_trainer": ("bf16",),
    "test_trainer.py::test_max_grad_norm_bounds_the_step": ("max_grad_norm",),
    "test_trainer.py::test_loss_and_exact_gradients_are_the_stock_trainers": (
        "label_smoothing_factor",
        "neftune_noise_alpha",
    ),
    "test_trainer.py::test_activation_checkpointing_equals_none": (CHECKPOINTING,),
    "test_resume.py::test_15_steps_and_5_more_are_20": ("save_strategy", "save_steps", "seed"),
    "engine/test_checkpoints.py::test_leftovers_are_not_counted_as_checkpoints": ("save_total_limit",),
    "engine/test_checkpoints.py::test_sigterm_in_the_middle_of_a_step": ("enable_jit_checkpoint",),
    "engine/test_checkpoints.py::test_what_is_pushed_to_the_hub_is_complete": ("push_to_hub",),
    "distributed/test_ddp.py::test_2_ranks_of_4_are_1_rank_of_8": ("ddp_find_unused_parameters", "ddp_static_graph"),
    "distributed/test_ddp.py::test_a_sample_has_the_place_that_it_has_on_one_rank": ("accelerator_config",),
    "distributed/test_ddp.py::test_settings_of_ddp": (
        "average_tokens_across_devices",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_backend",
        "ddp_timeout",
    ),
    "distributed/test_fsdp2.py::test_2_ranks_of_4_are_1_rank_of_8": ("fsdp", "fsdp_config"),
    "distributed/test_parallelism.py::test_several_processes": ("parallelism_config", "use_cpu"),
    "distributed/test_parallelism.py::test_settings_that_cannot_be_made_here": ("deepspeed", "fsdp"),
}

_REENTRANT = {"use_reentrant": True}
# Fields by settings that are refused when the Trainer is made, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gradient_checkpointing_kwargs": (
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": _REENTRANT},
        'Say {"use_reentrant": False}',
    ),
    "activation_checkpointing_kwargs": (
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": _REENTRANT},
        'Say {"use_reentrant": False}',
    ),
    "gradient_checkpointing": ({"method": "fa", CHECKPOINTING: True}, "does not go with activation checkpointing"),
    "activation_checkpointing": ({"method": "fa", CHECKPOINTING: True}, "does not go with activation checkpointing"),
    "torch_compile": ({"method": "fa", "torch_compile": True}, "does not go with torch_compile"),
    "fp16": ({"method": "dkp", "fp16": True}, "method='dkp' needs the error as it is"),
    "bf16": ({"method": "pepita", "bf16": True}, "does not go with bf16"),
}

# Fields that neither what is computed nor our own code depends on.
NO_BEARING: dict[str, tuple[str, ...]] = {
    "said to people, not to the training": (
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "disable_tqdm",
        "run_name",
        "project",
    ),
    "where logs go: they get what `log` was given, numbers under names": (
        "report_to",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ),
    "how a folder is uploaded, which is that of the stock Trainer": (
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
    "for scripts: the Trainer does not read it": (
        "do_train",
        "do_eval",
        "do_predict",
        "resume_from_checkpoint",
        "local_rank",
    ),
}


@cache
def functions_in(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def known(field: str) -> list[str]:
    """What is known of a field, in words."""
    found = [f"tested by {test}" for test, fields in TESTED.items() if field in fields]
    found += [f"tested as the setting {name!r}" for name, setting in SETTINGS.items() if field in setting]
    found += [f"refused: {REFUSED[field]}"] if field in REFUSED else []
    return found + [f"no bearing: {reason}" for reason, fields in NO_BEARING.items() if field in fields]


@pytest.mark.parametrize("field", FIELDS)
def test_it_is_known_what_a_field_does(field):
    assert known(field), (
        f"TrainingArguments has a field {field!r} that nobody has looked at. See what it does in the Trainer, and "
        "whether GrapeTrainer keeps it; then give it a setting in tests/test_training_features.py (SETTINGS), or a "
        "test that TESTED names, or refuse it in grape_hf/engine/refusals.py and name it in REFUSED, or say in "
        "NO_BEARING why it does not matter."
    )
    reasons = [reason for reason in known(field) if reason.startswith("no bearing")]
    assert not reasons or len(known(field)) == 1, f"{field!r} is said to have no bearing, and to have some"


@pytest.mark.parametrize("test", TESTED)
def test_what_is_named_is_there(test):
    file, name = test.split("::")
    path = Path(__file__).parent / file
    assert name in functions_in(path)
    fields = set(FIELDS) & set(TESTED[test])
    assert fields
    # In the test's file, or in what it imports for it: the name as such.
    text = path.read_text() + Path(__file__).with_name("helpers.py").read_text()
    unnamed = {f for f in fields if f not in text and not (f.startswith("fsdp") and "fsdp" in text)}
    assert not unnamed


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_refused_is_refused_when_the_trainer_is_made(field, tmp_path):
    options, says = REFUSED[field]
    with pytest.raises(ValueError, match=".") as refusal:
        make_trainer(GPT2, tmp_path, **options)
    assert says in str(refusal.value)
    make_trainer(GPT2, tmp_path, **options | {"method": "bp"})


def test_no_field_is_named_that_there_is_not():
    """One that transformers has taken away must go, or be of those that not all versions have."""
    named = {f for fields in (*TESTED.values(), *NO_BEARING.values()) for f in fields} | REFUSED.keys()
    assert named - set(FIELDS) <= NOT_IN_ALL
    settings = {field for setting in SETTINGS.values() for field in setting}
    assert settings <= set(FIELDS)
