"""Measure how well the feedback is aligned; nothing here changes anything.

Two cosines, both in [-1, 1], NaN where one side vanishes: of B_l with an estimate J_hat_l^T (Frobenius), which costs
nothing beside the estimate, and of B_l e with the exact delta_l over a batch, which takes an ordinary backward.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.feedback import exact_pair
from grape_hf.core.layout import SAME
from grape_hf.core.modes import Forward
from grape_hf.core.star import project_error


def frobenius_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between two tensors of one shape, seen as vectors; NaN if one of them is zero."""
    return torch.linalg.vecdot(a, b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))


def feedback_alignment(B: Sequence[Tensor], J_hat: Sequence[Tensor]) -> Tensor:
    """Return cos(B_l, J_hat_l^T) of each boundary, ``(L-1,)``, from ``(n_l, n_y)`` and ``(n_y, n_l)`` matrices."""
    return torch.stack([frobenius_cosine(b, j.mT.to(b)).to(B[0].device) for b, j in zip(B, J_hat, strict=True)])


def delta_products(forwards: Sequence[Forward], B: Sequence[Tensor]) -> Tensor:
    """Return the inner products behind cos(B_l e, delta_l), ``(L-1, 3)``: <B e, delta>, |B e|^2, |delta|^2.

    Zero where no exact gradient came: nothing before the boundary is trained. They add up over micro-batches and
    ranks; ``delta_alignment`` turns the sum into cosines.

    Args:
        forwards: recorded forwards, after an ordinary backward.
        B: feedback matrices, ``(n_l, n_y)``.
    """
    rows = []
    for index, b in enumerate(B):
        total = torch.zeros(3, dtype=b.dtype, device=b.device)
        for forward in (f for f in forwards if f.exact(index)):
            _, delta = exact_pair(forward, index)
            assert forward.e is not None
            pairing = forward.pairings.get(index, SAME)
            feedback = project_error(forward.e, b, forward.delta[index].shape, pairing)
            feedback = pairing.layout.vectors(feedback).to(delta)
            products = (feedback * delta).sum(), feedback.square().sum(), delta.square().sum()
            total += torch.stack(products).to(total)
        rows.append(total.to(B[0].device))
    return torch.stack(rows)


def delta_alignment(products: Tensor) -> Tensor:
    """Return cos(B_l e, delta_l) of each boundary, ``(L-1,)``, from sums of ``delta_products``."""
    return products[:, 0] / (products[:, 1] * products[:, 2]).sqrt()


def exact_alignment(
    boundaries: Boundaries, loss: Callable[[], Tensor], B: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Return the products of ``delta_products`` for a loss computed on the side; no parameter's ``grad`` is touched.

    Args:
        boundaries: attached to the model.
        loss: runs the model and returns its loss.
        B: feedback matrices, ``(n_l, n_y)``.
        mask: as in ``Boundaries.broadcast``.
    """
    with torch.enable_grad(), boundaries.record(mask) as forwards:
        value = loss()
        _backward(value, None, forwards)
    return delta_products(forwards, B)


def replayed_alignment(
    boundaries: Boundaries, forward: Callable[[], object], errors: Sequence[Tensor | None], B: Sequence[Tensor]
) -> Tensor:
    """Return the products of ``delta_products`` for the errors that a step has found, by one more forward up to y.

    Args:
        boundaries: attached to the model.
        forward: calls the model as in that step.
        errors: the error of each forward through the blocks in that call, in the shape of y; None where there is none.
        B: feedback matrices, ``(n_l, n_y)``.
    """
    with torch.enable_grad(), boundaries.record() as forwards:
        output = forward()
        for again, e in zip(forwards, errors, strict=False):
            if e is not None and again.y is not None and again.y.shape == e.shape:
                _backward(again.y, e.to(again.y), [again])
        del output
    return delta_products(forwards, B)


def _backward(value: Tensor, e: Tensor | None, forwards: Sequence[Forward]) -> None:
    """Leave exact gradients in ``forwards``, and none in a parameter."""
    reached = [h for forward in forwards for h in forward.h.values() if h.requires_grad]
    if reached and value.requires_grad:  # of its inputs a backward leaves a gradient, and of parameters none
        torch.autograd.grad(value, reached, e, allow_unused=True, retain_graph=True)
