"""What does not go with pipeline stages is refused when the Trainer is made, by the name of its setting."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from grape_hf.core.isolation import is_compiled
from grape_hf.core.parts import find_encoder
from grape_hf.training_args import GrapeArgumentsMixin

if TYPE_CHECKING:
    from transformers import Trainer

METHODS = ("bp", "dfa", "grape")
Refusal = tuple[str, str, str]  # the setting, why, what to use instead


def refuse(found: Iterator[Refusal]) -> None:
    """Raise ValueError for the first refusal, if there is one."""
    for setting, reason, instead in found:
        raise ValueError(f"{setting} does not go with pipeline_stages: {reason}. Use {instead}.")


def refused_options(options: GrapeArgumentsMixin, blocks: int) -> Iterator[Refusal]:
    """Yield what GrAPE's options refuse.

    Args:
        options: GrAPE's.
        blocks: how many the model has.
    """
    method, stages = options.method, options.pipeline_stages
    if method not in METHODS:
        yield f"method={method!r}", "it has no star of its own over stages", f"one of {', '.join(METHODS)}"
    if method == "bp":
        return
    if method == "grape" and options.feedback_rule != "local":
        yield (
            f"feedback_rule={options.feedback_rule!r}",
            "it learns from tangents, which would have to travel through all stages",
            'feedback_rule="local", whose maps learn inside a stage, method="dfa", or method="bp"',
        )
    if options.feedback_sweeps:
        yield f"feedback_sweeps={options.feedback_sweeps}", "each sweep is one more exchange between all stages", "0"
    if options.feedback_path == "shortcut":
        yield 'feedback_path="shortcut"', "the path leads from stage to stage, and the error goes to all", '"matrix"'
    if options.feedback_points not in (0, stages - 1):
        yield (
            f"feedback_points={options.feedback_points}",
            "the end of each stage is a feedback point",
            f"0, one after every block, or {stages - 1}, the ends of the stages alone",
        )
    if options.feedback_space == "logits":
        yield (
            'feedback_space="logits"',
            "the error takes the way of the gradient, whose buffers have the size of h_l",
            '"hidden" or "auto"',
        )
    if options.feedback_sharing not in ("auto", "position"):
        yield f"feedback_sharing={options.feedback_sharing!r}", "B_l is for a position", '"auto" or "position"'
    if options.feedback_init == "zero" and method == "dfa":
        yield 'feedback_init="zero"', "with B_l frozen at zero a stage would learn nothing", '"identity"'
    settings = {
        'calibration_strategy="adaptive"': options.calibration_strategy == "adaptive",
        "calibration_refit": bool(options.calibration_refit),
        "fallback": options.fallback != "no",
    }
    for setting, is_set in settings.items():
        if is_set:
            yield setting, "it is not carried over to stages", "it without pipeline_stages"
    assert blocks >= stages


def refused_arguments(trainer: "Trainer") -> Iterator[Refusal]:
    """Yield what training arguments refuse, before any process is joined to another."""
    args, config = trainer.args, trainer.args.accelerator_config
    checks: list[tuple[str, object, str, str]] = [
        (
            "fsdp",
            args.fsdp or _launched_with("FSDP"),
            "a stage holds its blocks whole",
            "replicas of the pipeline, or FSDP2 without stages",
        ),
        (
            "deepspeed",
            args.deepspeed or _launched_with("DEEPSPEED"),
            "its engine runs the backward",
            "accelerate's configuration without it",
        ),
        ("torch_compile", args.torch_compile, "each stage runs a part of the forward", "it without stages"),
        ("fp16", args.fp16, "every stage would have to skip the same steps", "bf16"),
        (
            "fp16_full_eval / bf16_full_eval",
            getattr(args, "fp16_full_eval", False) or getattr(args, "bf16_full_eval", False),
            "activations travel in the type that they have in training",
            "bf16=True for both",
        ),
        ("auto_find_batch_size", args.auto_find_batch_size, "one stage alone runs out of memory", "a smaller batch"),
        ("use_liger_kernel", args.use_liger_kernel, "it has not been tried", "it without stages"),
        ("neftune_noise_alpha", args.neftune_noise_alpha, "it has not been tried", "it without stages"),
        (
            "parallelism_config",
            args.parallelism_config,
            "accelerate has no dimension for stages",
            "pipeline_stages alone",
        ),
        (
            "enable_jit_checkpoint",
            getattr(args, "enable_jit_checkpoint", False),
            "the processes get their signals at different steps",
            "save_steps",
        ),
        ("eval_use_gather_object", args.eval_use_gather_object, "it has not been tried", "tensors as predictions"),
        (
            f"optim={getattr(args.optim, 'value', args.optim)!r}",
            "lomo" in str(getattr(args.optim, "value", args.optim)),
            "it updates inside the backward",
            'optim="adamw_torch"',
        ),
        (
            "accelerator_config={'dispatch_batches': True}",
            config.dispatch_batches,
            "the first stage of each replica reads its own batches",
            "its default",
        ),
        (
            "accelerator_config={'split_batches': True}",
            config.split_batches,
            "it has not been tried",
            "per_device_train_batch_size for the batch of one replica",
        ),
        (
            "predict_with_generate",
            getattr(args, "predict_with_generate", False),
            "generation would run through the stages token by token",
            "the saved model in one process",
        ),
    ]
    for setting, is_set, reason, instead in checks:
        if is_set:
            yield setting, reason, instead
    if args.n_gpu > 1:
        yield f"nn.DataParallel ({args.n_gpu} GPUs in one process)", "a stage is a process", "accelerate launch"


def _launched_with(kind: str) -> bool:
    """Whether accelerate's configuration asks for it, which ``accelerate launch`` hands on in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def refused_model(model: nn.Module) -> Iterator[Refusal]:
    """Yield what a model refuses."""
    kind = type(model).__name__
    if find_encoder(model) is not None:
        yield (
            f"an encoder-decoder ({kind})",
            "the encoder's output goes to every block of the decoder",
            "it without stages",
        )
    if hasattr(model, "peft_config"):
        yield f"adapters ({kind})", "peft would save those of one stage alone", "it without stages"
    if is_compiled(model):
        yield f"a compiled model ({kind})", "each stage runs a part of the forward", "it uncompiled"
    if getattr(model, "is_quantized", False):
        yield f"a quantised model ({kind})", "it has not been tried", "it unquantised"
    if getattr(model, "hf_device_map", None):
        yield "device_map", "each stage is a process with one device", "from_pretrained without it"
    if any(p.is_meta for p in model.parameters()):
        yield f"{kind} on the meta device", "its weights have no numbers", "a model on the CPU"
