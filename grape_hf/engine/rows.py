"""Which rows of activations belong to which sample, and which positions to which: by gradients at the first look."""

import torch
from torch import Tensor, nn

from grape_hf.core.backward_effects import gradients_aside
from grape_hf.core.boundaries import ReadAt
from grape_hf.core.isolation import isolated
from grape_hf.core.layout import Layout


def is_turned(model: nn.Module, h: Tensor, y: Tensor) -> bool:
    """Whether h is ``(positions, batch, n)`` beside ``(batch, ...)``, where there are as many of both."""
    if h.ndim != 3 or h.shape[0] != h.shape[1] or len(h) == 1 or h.shape == y.shape:
        return False
    reached = _reached_by_first(model, h, y)
    if reached is None:
        return False
    by_row, by_column = (reached.any(-1).any(dim) for dim in (1, 0))
    return bool(by_row[1:].any()) and not bool(by_column[1:].any())


def is_folded(model: nn.Module, h: Tensor, y: Tensor) -> bool:
    """Whether h has several rows for each sample, one sample after the other: frames of a video, a bag of images.

    The first row of y is made of the first of them alone then. Where blocks stack streams of one sample, it is made of
    all.
    """
    if len(y) < 2 or len(h) % len(y):
        return False
    reached = _reached_by_first(model, h, y)
    if reached is None:
        return False
    by_row, each = reached.flatten(1).any(1), len(h) // len(y)
    return bool(by_row[:each].any()) and not bool(by_row[each:].any())


def _reached_by_first(model: nn.Module, h: Tensor, y: Tensor) -> Tensor | None:
    """Where h has a part in the first row of y; None if that cannot be told."""
    if h.is_meta or not y.requires_grad:
        return None
    (gradient,) = gradients(model, y[0].sum(), [h])
    return None if gradient is None else gradient.ne(0)


def sends_nothing(model: nn.Module, made: Tensor, read: Tensor, e: Tensor, layout: Layout) -> bool:
    """Whether errors at the positions of ``e`` that have one reach nothing that a block made, by what lies behind it.

    What the next block reads there are mask tokens (MAE), say.

    Args:
        model: the model.
        made: what the block made.
        read: h_l as the next block reads it.
        e: error at y.
        layout: how these are seen as vectors.
    """
    there, h = layout.vectors(e).ne(0).any(-1, keepdim=True), layout.vectors(read.detach())
    if read is made or not read.requires_grad or h.shape[:2] != there.shape[:2] or not there.any():
        return False
    generator = torch.Generator().manual_seed(0)  # no sum, which a norm sends nothing of
    errors = torch.randn(h.shape, generator=generator).to(h) * there
    (gradient,) = gradients(model, read, [made], layout.restore(errors, read.shape))
    return gradient is None or not gradient.any()


def gradients(
    model: nn.Module, output: Tensor, inputs: list[Tensor], e: Tensor | None = None, keep: bool = True
) -> list[Tensor | None]:
    """Return gradients of a graph of the model's, which runs again where it is checkpointed, without a trace.

    Args:
        model: the model.
        output: of what.
        inputs: at which.
        e: the gradient at ``output``, if that is no scalar.
        keep: whether the graph is to be used again.
    """
    with isolated(model, False), gradients_aside(list(model.parameters())):
        return list(torch.autograd.grad(output, inputs, e, retain_graph=keep, allow_unused=True))


def read_position(e: Tensor) -> ReadAt | None:
    """Return where the loss reads y, by e, ``(batch, positions, n_y)``, if that is one position alone, or two of many.

    Samples without an error (a label that is ignored) say nothing.
    """
    read = e.ne(0).any(-1)
    read = read[read.any(-1)]
    if e.shape[1] == 1 or not len(read) or reads_several(e):
        return None
    return "first" if bool(read[:, 0].all()) else "last"


def reads_several(e: Tensor) -> bool:
    """Whether a sample has an error at several positions of ``(batch, positions, n)``; waits for the device.

    Two of many are as good as one (a class and a distillation token, the two ends of a relation): all others would get
    no error.
    """
    few = 2 if e.shape[1] > 4 else 1
    return bool((e.ne(0).any(-1).count_nonzero(1) > few).any())


def reads_row(e: Tensor, samples: int, layout: Layout) -> bool:
    """Whether y is ``(positions, batch, n)`` and the loss reads one position: all others would get no error.

    Args:
        e: error at y.
        samples: how many there are.
        layout: how y is seen as vectors.
    """
    if e.ndim != 3 or not layout.shares(3) or layout.channels_first:
        return False
    return e.shape[1] == samples != len(e) and read_position(e.transpose(0, 1)) is not None
