"""What GrAPE would do to a model, and what it would cost, before anything is trained.

The model is made on the meta device, where tensors have shapes and no numbers, so that its size does not matter; where
a model cannot run there (it looks at values), on the CPU with random weights and on few samples. Then one step of
backpropagation, one star and one estimate are run by the same code as in training, and counted: floating-point
operations of matrix products and convolutions, and the bytes that autograd keeps for the backward. Both are estimates
of what a step takes: element-wise work, the optimiser and temporary tensors are not in them; attention is taken to be
fused, which keeps no attention matrices.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from grape_hf.core.block_lists import ends
from grape_hf.engine.run import GrapeRun
from grape_hf.presets import ESTIMATING
from grape_hf.reports.progress import chosen_preset
from grape_hf.training_args import GrapeArgumentsMixin

logger = logging.getLogger(__name__)

# Without the meta device, larger models would not fit, and small batches take long enough.
LARGEST_ON_CPU = 1_000_000_000
SAMPLES_ON_CPU = 2
METHODS = (*ESTIMATING, "dfa", "dkp")

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Boundary:
    """One block and what leaves it: ``h`` is the shape of the activation, ``B`` that of its matrix, None for y."""

    block: str
    kind: str
    h: tuple[int, ...]
    B: tuple[int, int] | None


@dataclass(frozen=True)
class Inspection:
    """What was found; numbers are of one process and one optimiser step without accumulation.

    Attributes:
        model: class of the model.
        parameters: numbers in it, and those among them that are trained.
        boundaries: h_1 .. h_{L-1}, and last the output of block L.
        space: where the error is measured; ``n_y`` is how many numbers it has there.
        init: the start of B_l.
        options: GrAPE's, those that were not given with their values for this model.
        jvp_mode: how tangents are computed, None where B_l is not learned from them; ``jvp_reason`` says why.
        samples: in the batch, and how many of them an estimate is made on.
        flops: operations of a ``bp`` step, of a ``star`` and of an ``estimate``.
        memory: bytes by what takes them.
        counted_on: ``meta`` or ``cpu``.
        preset: which settings ``options`` has, and why.
    """

    model: str
    parameters: tuple[int, int]
    boundaries: list[Boundary]
    space: str
    n_y: int
    options: GrapeArgumentsMixin
    jvp_mode: str | None
    jvp_reason: str
    samples: tuple[int, int]
    flops: dict[str, float]
    memory: dict[str, int]
    counted_on: str
    preset: str

    @property
    def step_cost(self) -> float:
        """Operations of a mean step, in steps of backpropagation."""
        share = 1 / (self.options.jvp_steps or 1)
        return (self.flops["star"] + share * self.flops["estimate"]) / self.flops["bp"]

    @property
    def memory_ratio(self) -> float:
        """Bytes, in those of a run by backpropagation."""
        shared = sum(self.memory[name] for name in ("weights", "gradients", "optimiser", "activations"))
        return sum(self.memory.values()) / shared


def inspect_model(
    make: Callable[[str], tuple[nn.Module, Batch]], options: GrapeArgumentsMixin, batch_size: int
) -> Inspection:
    """Inspect a model.

    Args:
        make: makes the model and a batch of ``batch_size`` samples on the device that it is given: ``meta`` or ``cpu``.
            The forward must return a ``loss`` or ``logits``.
        options: GrAPE's options.
        batch_size: samples in a step.

    Raises:
        ValueError: if the method has no feedback, or the options do not suit the model.
        RuntimeError: if the blocks are no chain, or the model is too large for the CPU and does not run on ``meta``.
    """
    if options.method not in METHODS:
        raise ValueError(
            f"method={options.method!r} has no feedback points to look at: expected one of {', '.join(METHODS)}."
        )
    model, batch = make("meta")
    unlimited = dataclasses.replace(options, feedback_size_limit=float("inf"))  # no numbers, no memory
    try:
        found = _inspect(model, batch, unlimited, batch_size, "meta")
    except RuntimeError as error:
        size = sum(p.numel() for p in model.parameters())
        if size > LARGEST_ON_CPU:
            raise RuntimeError(
                f"{type(model).__name__} ({size:,} parameters) does not run without numbers, and is too large to be "
                f"made here: {str(error).splitlines()[0]} Inspect a smaller model of its kind."
            ) from error
        logger.info(f"The model does not run on the meta device: {error!r}")
        found = None
    if found is not None:
        limit = options.feedback_size_limit
        return dataclasses.replace(found, options=dataclasses.replace(found.options, feedback_size_limit=limit))
    model, batch = make("cpu")
    few = {name: value[:SAMPLES_ON_CPU] for name, value in batch.items()}
    result = _inspect(model, few, options, batch_size, "cpu")
    assert result is not None
    return result


def _inspect(
    model: nn.Module, batch: Batch, options: GrapeArgumentsMixin, batch_size: int, device: str
) -> Inspection | None:
    """Inspect on one device; None if what was found on ``meta`` has to be seen with numbers."""
    model.train()
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # looks at values, only to warn
            vars(module)["warn_if_padding_and_no_attention_mask"] = _silent
    samples = len(next(iter(batch.values())))
    scale = batch_size / samples

    def loss(inputs: Batch = batch) -> Tensor:
        with torch.device(
            device
        ):  # where a forward makes tensors, it follows the device of its inputs or the usual one
            output = model(**inputs)
        return output.logits.square().mean() if getattr(output, "loss", None) is None else output.loss

    run = GrapeRun(model, options)
    given, options = options.grape_preset, run.options
    if run.single_block:
        raise ValueError(f"{type(model).__name__} has a single block, no feedback point. Name smaller ones: --blocks.")
    shapes: list[tuple[int, ...]] = []
    handles = [ends(block)[1].register_forward_hook(lambda *a: shapes.append(_shape(a[-1]))) for block in run.blocks]
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other comes to lie at its address
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def chain() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, _same), _FusedAttention(keep):
            value = loss()
        value.backward()

    def star() -> None:
        with run.step():
            loss().backward()

    try:
        bp = _flops(chain)
    finally:
        for handle in handles:
            handle.remove()
    first = {name: value[:1] for name, value in batch.items()}
    run.start(lambda: loss(first), steps_per_epoch=1)
    planned = run.jvp_mode
    chosen = run.estimates.sampled(range(batch_size))
    try:
        run.begin_step(0)
        run.calibrating = False
        flops = {"bp": bp * scale, "star": _flops(star) * scale, "estimate": 0.0}
        if options.method in ESTIMATING and options.feedback_rule != "local":
            counted = min(len(chosen), samples)
            some = {name: value[:counted] for name, value in batch.items()}
            estimate = _flops(lambda: run.estimate(lambda: loss(some), range(counted)))
            flops["estimate"] = estimate * len(chosen) / counted
        if run.jvp_mode != planned and device == "meta":
            return None
        feedback = sum(t.numel() * t.element_size() for t in run.feedback.tensors().values())
        n_y = run.feedback.B[0].shape[1]
        sizes = [(b.shape[0], b.shape[1]) for b in run.feedback.B]
        space = "hidden" if run.boundaries.output is ends(run.blocks[-1])[1] else "logits"
    finally:
        run.close()
    trained = [p for p in model.parameters() if p.requires_grad]
    of_weights = sum(p.numel() * p.element_size() for p in model.parameters())
    of_trained = sum(p.numel() * p.element_size() for p in trained)
    largest = max(torch.Size(shape).numel() for shape in shapes[: len(sizes)]) * 4
    names = [name for name, module in model.named_modules() if module is ends(run.blocks[-1])[1]]
    return Inspection(
        model=type(model).__name__,
        parameters=(sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)),
        boundaries=[
            Boundary(name, type(block).__name__, (batch_size, *shape[1:]), size)
            for name, block, shape, size in zip(
                [*run.block_names, names[0]], run.blocks, shapes, [*sizes, None], strict=True
            )
        ],
        space=space,
        n_y=n_y,
        options=options,
        jvp_mode=run.jvp_mode if options.method in ESTIMATING and options.feedback_rule != "local" else None,
        jvp_reason=_reason(options, run, planned),
        samples=(batch_size, len(chosen)),
        flops=flops,
        memory={
            "weights": of_weights,
            "gradients": of_trained,
            "optimiser": 2 * of_trained,
            "activations": int(sum(storage.nbytes() for storage in kept.values()) * scale),
            "feedback": feedback,
            "estimate": feedback if options.method in ESTIMATING else 0,  # or the sums that maps learn from
            "delta": int(largest * scale),
        },
        counted_on=device,
        preset=chosen_preset(options) if given == "auto" else f'grape_preset="{given}", as asked for.',
    )


def _reason(options: GrapeArgumentsMixin, run: GrapeRun, planned: str) -> str:
    if options.jvp_mode != "auto":
        return f'jvp_mode="{options.jvp_mode}"'
    if run.jvp_mode != planned:
        return "an operator has no forward-mode rule"
    if run.jvp_mode == "finite_difference":
        return "the blocks hold convolutions, on which it is cheaper"
    return "the blocks hold no convolution, and all their operators have forward-mode rules"


class _FusedAttention(TorchFunctionMode):
    """Have ``keep`` see what a fused attention keeps: its inputs. Its output is seen where the next layer keeps it.

    Without numbers, and on the CPU with dropout, torch computes it step by step and keeps every attention matrix.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            output = func(*args, **kwargs)
        for tensor in (*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)):
            self.keep(tensor)
        return output


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _silent(*_: object) -> None:
    """Do nothing."""


def _shape(output: object) -> tuple[int, ...]:
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, Tensor)
    return tuple(hidden.shape)


def _convolution_backward(grad: list[int], x: list[int], w: list[int], *others: Any, **_: Any) -> int:
    """Count the two gradients of a convolution, each as much as its forward, of those that are asked for.

    torch's own formula (2.14) leaves out the groups, and so counts the weights' gradient ``groups`` times over. Until
    https://github.com/pytorch/pytorch/pull/183405 is out.
    """
    transposed, mask = others[4], others[7]
    return sum(mask[:2]) * conv_flop_count(x, w, grad, transposed)


def _flops(act: Callable[[], object]) -> int:
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    ) as counter:
        act()
    return counter.get_total_flops()
