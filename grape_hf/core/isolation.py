"""Run a model on the side without leaving a trace: what an estimate or a measurement may not change.

What a forward can move is put back here: the buffers (batch norm's running statistics and counters), plain attributes
of modules and their training flags (``snapshot.py``), parameters that it changes, and the random number generators.
"""

import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from grape_hf.core import nested
from grape_hf.core.snapshot import Snapshot

# Batch norms keep their batch statistics in an estimate: the Jacobian wanted is the one of the training step, and
# the running statistics lag far behind it early in training.
_BATCH_STATISTICS = nn.modules.batchnorm._BatchNorm


class Trace:
    """What a run on the side left behind.

    Attributes:
        changed: names of the parameters that it changed and that were put back.
    """

    def __init__(self) -> None:
        self.changed: list[str] = []


@contextmanager
def isolated(
    model: nn.Module, deterministic: bool = True, saved: Collection[str] | Literal["all"] = ()
) -> Iterator[Trace]:
    """Put back all that a forward may change of ``model`` and its process at the end.

    Args:
        model: the model that will run.
        deterministic: run in eval mode (no dropout), except batch norms, which go on using batch statistics.
        saved: names of the parameters that a forward changes (a momentum encoder's), which are copied and put back;
            "all" copies all of them, and finds out which those are.

    Raises:
        RuntimeError: if the forward changed a parameter that was not copied.
    """
    training = [module for module in model.modules() if module.training]
    trace, watch = Trace(), _Parameters(model, saved)
    state = Snapshot(model)
    with ExitStack() as stack:
        stack.enter_context(same_randomness(model))
        stack.enter_context(_weights_of_its_own())
        if "torch._dynamo" in sys.modules:
            # Inductor drops tangents without a word (pytorch#187284, fixes #187311 and #189644 pending), and a
            # compiled block would be compiled once more for each mode.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in model.modules():
                for name, buffer in module.named_buffers("", False):
                    setattr(module, name, buffer.clone())
            if deterministic:
                for module in training:
                    module.training = isinstance(module, _BATCH_STATISTICS)
                stack.enter_context(_without_checkpointing(model))
            yield trace
        finally:
            stack.close()
            state.restore()
            trace.changed = watch.restore()
        watch.check(trace.changed)


class _Parameters:
    """The parameters of a model, before a forward that may change some of them."""

    def __init__(self, model: nn.Module, saved: Collection[str] | Literal["all"]) -> None:
        named = {n: p for n, p in model.named_parameters() if not (p.is_meta or is_lazy(p) or isinstance(p, DTensor))}
        self.before = {name: (p, p._version, p.data_ptr()) for name, p in named.items()}
        self.first = saved == "all"
        wanted = named if saved == "all" else saved
        # Of a whole model a GPU may have no room for a second one.
        copy = (lambda p: p.detach().to("cpu", copy=True)) if self.first else (lambda p: p.detach().clone())
        self.copies = {name: copy(named[name]) for name in wanted if name in named}

    def restore(self) -> list[str]:
        """Put back those that were copied, and name those that had changed."""
        changed = []
        for name, copy in self.copies.items():
            p, *before = self.before[name]
            moved = (
                [p._version, p.data_ptr()] != before or not torch.equal(p.detach().cpu(), copy) if self.first else True
            )
            if moved:
                p.data.copy_(copy)
                changed.append(name)
        return changed

    def check(self, restored: Collection[str]) -> None:
        """Raise RuntimeError if others have changed, as far as torch notes it."""
        found = [
            name
            for name, (p, version, place) in self.before.items()
            if name not in restored and (p._version, p.data_ptr()) != (version, place)
        ]
        if found:
            raise RuntimeError(
                f"a forward changed the parameter(s) {', '.join(found[:5])}, which none did at first: one that GrAPE "
                "makes on the side has changed them once more, and they cannot be put back. Change them in every "
                'forward, or in none (in a callback, say), or use method="dfa", which makes no estimates.'
            )


@contextmanager
def _weights_of_its_own() -> Iterator[None]:
    """Have ``torch.nn.utils.parametrize.cached()`` keep none of this forward's weights, nor give it any."""
    before = parametrize._cache  # torch has no public name for it
    parametrize._cache = {}
    try:
        yield
    finally:
        parametrize._cache = before


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


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile has been called on the model, or on a module in it."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


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


def random_states(model: nn.Module) -> Callable[[], None]:
    """Return what sets the random generators (torch's on the CPU and the model's devices, python's, numpy's) back."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    states = [(torch.get_device_module(d), d, torch.get_device_module(d).get_rng_state(d)) for d in devices]
    of_cpu, python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  the global

    def restore() -> None:
        torch.set_rng_state(of_cpu)
        for module, device, state in states:
            module.set_rng_state(state, device)
        random.setstate(python)
        np.random.set_state(of_numpy)  # noqa: NPY002

    return restore


def undoing(model: nn.Module, inputs: Any) -> Callable[[], None]:
    """Return what undoes a step that ends before its backward.

    What it puts back: random generators, plain attributes and buffers of ``model``, tensors in ``inputs``.
    """
    state = Snapshot(model, [*model.buffers(), *(tensor for _, tensor in nested.tensors(inputs))])
    restore = random_states(model)

    def undo() -> None:
        state.restore()
        restore()

    return undo


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Put the random generators back at the end."""
    restore = random_states(model)
    try:
        yield
    finally:
        restore()
