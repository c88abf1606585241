"""Which ways of training on several devices go with direct feedback; the others are refused before anything is trained.

DDP, FSDP2 and a model whose blocks lie on several devices (``device_map``) keep what the method needs: a rank sees
whole activations h_l and y of whole samples, and a forward runs the blocks' own modules. Each of the others splits one
of these, or puts another engine in the place of ``loss.backward()``, and could only go wrong in silence.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import is_sagemaker_mp_enabled

from grape_hf.core.in_place import ADVICE
from grape_hf.core.isolation import is_compiled

if TYPE_CHECKING:
    from transformers import Trainer

    from grape_hf.training_args import GrapeArgumentsMixin

_DDP = "one process for each GPU, as `accelerate launch your_script.py` starts them"
_DDP_OR_FSDP2 = "DDP (recipes/accelerate/ddp.yaml) or FSDP2 (recipes/accelerate/fsdp2.yaml)"


def refuse_parallelism(trainer: "Trainer", options: "GrapeArgumentsMixin") -> None:
    """Refuse what does not go with direct feedback, by the settings of a Trainer that has just been made.

    Raises:
        ValueError: with the setting's name and the way out.
    """
    for setting, reason, instead in _refused(trainer, options):
        raise ValueError(f"{setting} does not go with method={options.method!r}: {reason}. Use {instead}.")


def refuse_compiled_sums(trainer: "Trainer", in_place: bool) -> None:
    """Refuse to compile a model whose residuals are added up outside of blocks; see ``core/in_place.py``.

    Raises:
        ValueError: with the way out.
    """
    if in_place and (trainer.args.torch_compile or is_compiled(trainer.model)):
        raise ValueError(
            "torch.compile does not go with blocks whose residuals are added up outside of them: the graph is cut in "
            f"the sums themselves, which compiled code does not show. Do not compile the model. Or else: {ADVICE}"
        )


def _refused(trainer: "Trainer", options: "GrapeArgumentsMixin") -> Iterator[tuple[str, str, str]]:
    """For all that is refused: the setting, why, and what to use instead."""
    args, model, accelerator = trainer.args, trainer.model, trainer.accelerator
    if args.n_gpu > 1 or isinstance(model, nn.DataParallel):
        yield (
            f"nn.DataParallel ({args.n_gpu} GPUs in one process)",
            "the hooks cannot tell its replicas apart",
            f"{_DDP}, or show one GPU with CUDA_VISIBLE_DEVICES=0",
        )
    started = dist.get_world_size() if dist.is_initialized() else 1
    if started > accelerator.num_processes * options.pipeline_stages:
        yield (
            f"a launch of {started} processes",
            "accelerate found no GPUs to join them by, so that each would train on its own",
            "use_cpu=True (`--use_cpu True`) to train on CPUs",
        )
    if trainer.is_deepspeed_enabled:
        yield (
            "DeepSpeed (`deepspeed`)",
            "its engine runs the backward and its own hooks have no forward-mode derivative",
            _DDP_OR_FSDP2,
        )
    compiled = "torch_compile" if args.torch_compile else "torch.compile" if is_compiled(model) else ""
    if (options.feedback_sweeps or options.feedback_path == "shortcut") and compiled:
        yield (
            f"{compiled} with feedback_sweeps or feedback_path='shortcut'",
            "they look into the graph of each block, which compiled code does not show",
            f"feedback_sweeps=0 and feedback_path='matrix', or no {compiled}",
        )
    if trainer.is_fsdp_enabled:
        yield from _refused_of_fsdp(trainer, options)
    config = getattr(accelerator, "parallelism_config", None)
    for kind, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        if (size := getattr(config, f"{kind}_size", None) or 1) > 1:
            yield (
                f"{name} parallelism (parallelism_config, {kind}_size={size})",
                "a rank would see a part of each activation, or of each sample",
                _DDP_OR_FSDP2,
            )
    if any(isinstance(p, DTensor) for p in model.parameters()):
        yield (
            "a model that was sharded when it was loaded (`tp_plan`, `distributed_config`)",
            "tensor parallelism splits its activations",
            f"from_pretrained without these, and {_DDP_OR_FSDP2}",
        )
    if is_sagemaker_mp_enabled():
        yield "SageMaker's model parallelism", "it runs forward and backward by itself", _DDP_OR_FSDP2
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "FSDP", "DEEPSPEED") and not kind.startswith("MULTI_"):
        yield f"training by {kind} (accelerate's distributed_type)", "it has not been tried", _DDP_OR_FSDP2
    if getattr(model, "hf_device_map", None) and any(p.is_meta for p in model.parameters()):
        places = sorted({str(device) for device in model.hf_device_map.values()})
        yield (
            f"a model with weights offloaded by its device_map ({', '.join(places)})",
            "they are there during a forward only, and an optimiser cannot train them",
            "a device_map of devices with room for all weights, or FSDP2",
        )


def _refused_of_fsdp(trainer: "Trainer", options: "GrapeArgumentsMixin") -> Iterator[tuple[str, str, str]]:
    version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
    if version != 2:
        yield (
            f"FSDP{version} (fsdp_version={version})",
            "it flattens the weights of a block into one, and is deprecated",
            'FSDP2: fsdp_config={"version": 2}, or `fsdp_version: 2` in accelerate\'s configuration',
        )
    if options.feedback_sweeps or options.feedback_path == "shortcut":
        yield (
            "FSDP2 with feedback_sweeps or feedback_path='shortcut'",
            "a block's graph is used before its backward, when its weights are shards",
            "feedback_sweeps=0 and feedback_path='matrix', or DDP",
        )
    if options.perturbation_space == "weight":
        yield (
            "FSDP2 with perturbation_space='weight'",
            "a block runs a second time with other weights, which its shards cannot follow",
            "perturbation_space='activation'",
        )
    if options.jvp_mode == "finite_difference" and trainer.accelerator.mixed_precision != "no":
        yield (
            f"FSDP2 in {trainer.accelerator.mixed_precision} with jvp_mode='finite_difference'",
            "the weights themselves are in half precision during a forward, too coarse for a difference",
            "jvp_mode='dual', or no mixed precision",
        )
