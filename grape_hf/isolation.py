"""Run a model on the side without leaving a trace: what an estimate or a measurement may not change.

Parameters are not touched by a forward; everything else that a forward can move is put back here: the training flags,
the buffers (batch norm's running statistics and counters), and the global random number generators.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

# Batch norms keep their batch statistics in an estimate: the Jacobian wanted is the one of the training step, and
# the running statistics lag far behind it early in training.
_BATCH_STATISTICS = nn.modules.batchnorm._BatchNorm


@contextmanager
def isolated(model: nn.Module, deterministic: bool = True) -> Iterator[None]:
    """Put back training flags, buffers and global random states of ``model`` and its process at the end.

    Args:
        model: the model that will run.
        deterministic: run in eval mode (no dropout), except batch norms, which go on using batch statistics.
    """
    training = [module for module in model.modules() if module.training]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers("", False)]
    with ExitStack() as stack:
        stack.enter_context(_random_states(model))
        if "torch._dynamo" in sys.modules:
            # Inductor drops tangents without a word (pytorch#187284, fixes #187311 and #189644 pending), and a
            # compiled block would be compiled once more for each mode.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, name, buffer in buffers:
                setattr(module, name, buffer.clone())
            if deterministic:
                for module in training:
                    module.training = isinstance(module, _BATCH_STATISTICS)
                stack.enter_context(_without_checkpointing(model))
            yield
        finally:
            for module, name, buffer in buffers:
                setattr(module, name, buffer)
            for module in training:
                module.training = True


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute products of float32 in float32: no TF32 (``tf32``, ``torch_compile``, convolutions on GPUs), no bf16.

    Two passes that differ by 1e-4 are the same to within TF32's resolution of 1e-3.
    """
    reduced = [(kind, kind.fp32_precision) for kind in _products(device_type)]
    reduced = [(kind, precision) for kind, precision in reduced if precision not in ("none", "ieee")]
    try:
        for kind, _ in reduced:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in reduced:
            kind.fp32_precision = "none"  # what holds for all products, where that is what it was
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision


def _products(device_type: str) -> list[Any]:
    """Torch's settings of the precision of products, one for each kind of them."""
    backends = torch.backends
    if device_type == "cuda":
        return [backends.cuda.matmul, *(getattr(backends.cudnn, kind) for kind in ("conv", "rnn"))]
    if device_type == "cpu":
        return [getattr(backends.mkldnn, kind) for kind in ("matmul", "conv", "rnn")]
    return []


def forget_compiled_code() -> None:
    """Have every compiled model compiled anew when it is next called: to be called where hooks are attached.

    torch.compile does not look whether hooks came or went, and shares its code among all models of a class. What it
    made of the model without hooks, in an evaluation or in an earlier training, would train on by backpropagation.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Have torch's checkpoint wrappers (FSDP's activation checkpointing) just run their module; they know no eval mode.

    In torch 2.11 a checkpoint has no forward-mode derivative, even where no gradients are wanted.
    """
    wrappers = [(module, module.checkpoint_fn) for module in model.modules() if isinstance(module, CheckpointWrapper)]
    for module, _ in wrappers:
        module.checkpoint_fn = partial(_run)
    try:
        yield
    finally:
        for module, checkpoint in wrappers:
            module.checkpoint_fn = checkpoint


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


@contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  the global one is meant
    device_type = next((d.type for d in devices), "cuda")
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices], device_type=device_type):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)  # noqa: NPY002
