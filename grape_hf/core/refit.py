"""Fit B_l to exact deltas, which an ordinary backward leaves at a calibration step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grape_hf.core.layout import SAME
from grape_hf.core.modes import Forward


def refit(B: Tensor, ee: Tensor, ed: Tensor, ridge: float = 0.1) -> Tensor:
    r"""Fit B_l to exact deltas by ridge regression, shrinking towards the present B_l.

    .. math::
        B^\top + \left(E^\top E + \lambda \tfrac{\mathrm{tr}(E^\top E)}{n_y} I\right)^{-1}
        E^\top (\Delta - E B^\top)

    Args:
        B: ``(n_l, n_y)``.
        ee: E^T E, ``(n_y, n_y)``, summed over samples and positions.
        ed: E^T Delta, ``(n_y, n_l)``.
        ridge: lambda.
    """
    scale = torch.diagonal(ee).mean().clamp(min=torch.finfo(ee.dtype).tiny)  # e has no natural unit
    ee, ed = ee / scale, ed / scale
    regularised = ee + ridge * torch.eye(len(ee), dtype=ee.dtype, device=ee.device)
    return B + torch.linalg.solve(regularised, ed - ee @ B.mT).mT


def refit_moments(
    forwards: Sequence[Forward], n_boundaries: int, B: Sequence[Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return (E^T E, E^T Delta) of each boundary, summed over recorded forwards after a backward.

    Positions that no gradient came to, padding above all, have no say; nor does a boundary in a forward that left out
    the block behind it, or before which nothing is trained: then the sums are zero, by which a refit changes nothing.

    Args:
        forwards: what ``Boundaries.record`` kept.
        n_boundaries: how many boundaries there are.
        B: the feedback matrices, for the shapes of sums that are zero; by default those of h_l and y.
    """
    moments = []
    for index in range(n_boundaries):
        terms = []
        for forward in (f for f in forwards if f.exact(index)):
            e, delta = exact_pair(forward, index)
            reached = delta.any(-1, keepdim=True).to(e)
            e = (e.expand(-1, delta.shape[1], -1) * reached).flatten(0, 1)
            terms.append((e.mT @ e, e.mT @ delta.flatten(0, 1)))
        if not terms:
            terms = [
                _no_moments(forwards, index)
                if B is None
                else _zeros(B[index].shape[0], B[index].shape[1], B[index].device)
            ]
        moments.append((sum(t[0] for t in terms), sum(t[1] for t in terms)))
    return moments  # type: ignore[return-value]


def _no_moments(forwards: Sequence[Forward], index: int) -> tuple[Tensor, Tensor]:
    h, y = next((f.h[index], f.y) for f in forwards if index in f.h and f.y is not None)
    vectors = forwards[0].pairings.get(index, SAME).layout.vectors
    return _zeros(vectors(h).shape[-1], vectors(y).shape[-1], h.device)


def _zeros(n_l: int, n_y: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(n_y, n_y, device=device), torch.zeros(n_y, n_l, device=device)


def exact_pair(forward: Forward, index: int) -> tuple[Tensor, Tensor]:
    """Return e, ``(batch, positions or 1, n_y)``, and the exact delta_l, ``(batch, positions, n_l)``.

    Both are in float32 at least.

    Raises:
        RuntimeError: if the backward left one of the two without a gradient.
    """
    if not forward.exact(index):
        raise RuntimeError(
            f"no exact gradient reached boundary h_{index + 1} or the output y in this backward: expected a loss that "
            "uses the output of the last block. Set calibration_refit=False."
        )
    assert forward.e is not None
    exact, pairing = forward.delta[index], forward.pairings.get(index, SAME)
    delta = pairing.layout.vectors(exact).to(torch.promote_types(exact.dtype, torch.float32))
    return pairing.align(pairing.layout.vectors(forward.e).to(delta), delta.shape[1]), delta
