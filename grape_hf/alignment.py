"""Measure how well the feedback is aligned; nothing here changes anything.

Two cosines, both in [-1, 1], NaN where one side vanishes: of B_l with an estimate J_hat_l^T (Frobenius), which costs
nothing beside the estimate, and of B_l e with the exact delta_l over a batch, which takes an ordinary backward.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grape_hf.boundaries import Boundaries
from grape_hf.feedback import exact_pair
from grape_hf.modes import Forward
from grape_hf.star import own_mask, project_error


def frobenius_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between two tensors of one shape, seen as vectors; NaN if one of them is zero."""
    return torch.linalg.vecdot(a, b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))


def feedback_alignment(B: Sequence[Tensor], J_hat: Sequence[Tensor]) -> Tensor:
    """Return cos(B_l, J_hat_l^T) of each boundary, ``(L-1,)``, from ``(n_l, n_y)`` and ``(n_y, n_l)`` matrices."""
    return torch.stack([frobenius_cosine(b, j.mT.to(b)).to(B[0].device) for b, j in zip(B, J_hat, strict=True)])


def delta_products(forwards: Sequence[Forward], B: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Return the inner products behind cos(B_l e, delta_l), ``(L-1, 3)``: <B e, delta>, |B e|^2, |delta|^2.

    Zero where no exact gradient came: nothing before the boundary is trained. They add up over micro-batches and
    ranks; ``delta_alignment`` turns the sum into cosines.

    Args:
        forwards: recorded forwards, with the ``grad`` of h_l and y filled by an ordinary backward.
        B: feedback matrices, ``(n_l, n_y)``.
        mask: as in ``Boundaries.broadcast``.
    """
    rows = []
    for index, b in enumerate(B):
        total = torch.zeros(3, dtype=b.dtype, device=b.device)
        for forward in (f for f in forwards if f.exact(index)):
            _, delta = exact_pair(forward, index)
            assert forward.y is not None
            assert forward.y.grad is not None
            layout, pooled = forward.layout, index in forward.pooled
            padding = own_mask(mask, index, forward.pooled)
            projected = project_error(forward.y.grad, b, forward.h[index].shape, padding, layout, pooled)
            feedback = layout.vectors(projected).to(delta)
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
    with torch.enable_grad(), boundaries.record() as forwards:
        value = loss()
        reached = [t for f in forwards for t in (f.y, *f.h.values()) if t is not None and t.requires_grad]
        if reached:  # as inputs of a backward they get their ``grad``, and parameters get none
            torch.autograd.backward(value, inputs=reached)
    return delta_products(forwards, B, mask)
