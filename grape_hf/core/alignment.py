"""Measure how well the feedback is aligned; nothing here changes anything.

Cosines in [-1, 1], NaN where one side vanishes: of B_l with an estimate J_hat_l^T (Frobenius), which costs nothing
beside the estimate; of B_l e with the exact delta_l over a batch, which takes an ordinary backward; and, by the same
backward, of what the update sees: the gradient of block l's weights, made of B_l e, with the exact one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.layout import SAME
from grape_hf.core.modes import Forward
from grape_hf.core.refit import exact_pair
from grape_hf.core.star import project_error


def frobenius_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between two tensors of one shape, seen as vectors; NaN if one of them is zero."""
    return torch.linalg.vecdot(a, b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))


def feedback_alignment(B: Sequence[Tensor], J_hat: Sequence[Tensor]) -> Tensor:
    """Return cos(B_l, J_hat_l^T) of each boundary, ``(L-1,)``, from ``(n_l, n_y)`` and ``(n_y, n_l)`` matrices."""
    return torch.stack([frobenius_cosine(b, j.mT.to(b)).to(B[0].device) for b, j in zip(B, J_hat, strict=True)])


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Return <a, b>, |a|^2 and |b|^2 of two tensors of one shape, ``(3,)``."""
    return torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])


def delta_products(forwards: Sequence[Forward], B: Sequence[Tensor], steps: Sequence[Forward] | None = None) -> Tensor:
    """Return the inner products behind cos(B_l e, delta_l), ``(L-1, 3)``: <B e, delta>, |B e|^2, |delta|^2.

    Zero where no exact gradient came: nothing before the boundary is trained. They add up over micro-batches and
    ranks; ``delta_alignment`` turns the sum into cosines.

    Args:
        forwards: recorded forwards, after an ordinary backward.
        B: feedback matrices, ``(n_l, n_y)``.
        steps: for each of them a forward of a star, whose ``sent`` stands for B_l e; it is computed by default.
    """
    rows = []
    for index, b in enumerate(B):
        total = torch.zeros(3, dtype=b.dtype, device=b.device)
        for forward, sent in zip(forwards, steps or forwards, strict=True):
            if not forward.exact(index):
                continue
            _, delta = exact_pair(forward, index)
            assert forward.e is not None
            pairing = forward.pairings.get(index, SAME)
            feedback = sent.sent.get(index)
            if feedback is None:
                feedback = project_error(forward.e, b, forward.delta[index].shape, pairing)
            feedback = pairing.layout.vectors(feedback).to(delta)
            total += inner_products(feedback, delta).to(total)
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
    boundaries: Boundaries,
    forward: Callable[[], object],
    steps: Sequence[Forward],
    B: Sequence[Tensor],
    weights: bool = True,
) -> tuple[Tensor, list[list[tuple[Tensor, Tensor]]]]:
    """Measure what a star has sent by one more forward up to y, and exact gradients there.

    Args:
        boundaries: attached to the model.
        forward: calls the model as in that step.
        steps: the forwards of the star in that call, after its backward, with e and what was sent.
        B: feedback matrices, ``(n_l, n_y)``.
        weights: whether the gradients of weights are measured, too, by as much work again.

    Returns:
        The products of ``delta_products``, and for each boundary pairs (g, g'): of each weight in block l the gradient
        that delta_l = B_l e leads to, and the exact one. Both add up over micro-batches and ranks; the pairs take twice
        the memory of the weights.
    """
    pairs_of: list[list[tuple[Tensor, Tensor]]] = [[] for _ in B]
    with torch.enable_grad(), boundaries.record() as forwards:
        output = forward()
        pairs = [
            (again, step)
            for again, step in zip(forwards, steps, strict=False)
            if step.e is not None and again.y is not None and again.y.shape == step.e.shape
        ]
        for again, step in pairs:
            assert again.y is not None
            assert step.e is not None
            parameters = [_trained(boundaries, index) if weights else [] for index in range(len(B))]
            exact = _backward(again.y, step.e.to(again.y), [again], [p for mine in parameters for p in mine])
            for index, mine in enumerate(parameters):
                found = [(torch.zeros_like(p), torch.zeros_like(p)) for p in mine]
                if index in again.h and index in step.sent and again.h[index].requires_grad and mine:
                    found = _weight_gradients(again.h[index], step.sent[index], mine, exact)
                pairs_of[index] = add_pairs(pairs_of[index], found)
        del output
    again_and_steps = list(zip(*pairs, strict=True)) or [(), ()]
    return delta_products(again_and_steps[0], B, again_and_steps[1]), pairs_of


def add_pairs(
    some: Sequence[tuple[Tensor, Tensor]], more: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Add pairs one by one; either may be empty."""
    if not some or not more:
        return list(some or more)
    return [(a + c, b + d) for (a, b), (c, d) in zip(some, more, strict=True)]


def pair_products(pairs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
    """Return the inner products of all pairs of each boundary, ``(L-1, 3)``: <g, g'>, |g|^2, |g'|^2."""
    device = next((g.device for of_block in pairs for g, _ in of_block), None)  # a frozen block has no pairs
    rows = [torch.zeros(3, device=device) for _ in pairs]
    for row, of_block in zip(rows, pairs, strict=True):
        for g, true in of_block:
            row += inner_products(g.float(), true.float()).to(row.device)
    return torch.stack(rows)


def size_ratio(products: Tensor) -> Tensor:
    """Return |g| / |g'| of each boundary, ``(L-1,)``, from sums of products; NaN where both vanish."""
    return (products[:, 1] / products[:, 2]).sqrt()


def _trained(boundaries: Boundaries, index: int) -> list[Tensor]:
    return [p for p in boundaries.blocks[index].parameters() if p.requires_grad]


def _weight_gradients(
    h: Tensor, delta: Tensor, parameters: list[Tensor], exact: dict[int, Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """Return the gradient of each weight of one block that delta leads to, and the exact one."""
    star = torch.autograd.grad(h, parameters, delta.to(h), retain_graph=True, allow_unused=True)
    pairs = [(g, exact.get(id(p))) for p, g in zip(parameters, star, strict=True)]
    zeros = [torch.zeros_like(p) for p in parameters]
    return [(z if g is None else g, z if t is None else t) for (g, t), z in zip(pairs, zeros, strict=True)]


def _backward(
    value: Tensor, e: Tensor | None, forwards: Sequence[Forward], parameters: Sequence[Tensor] = ()
) -> dict[int, Tensor | None]:
    """Leave exact gradients in ``forwards``, and none in a parameter; return those of ``parameters`` by their ids."""
    reached = [h for forward in forwards for h in forward.h.values() if h.requires_grad]
    inputs = [*reached, *parameters]
    if not inputs or not value.requires_grad:  # of its inputs a backward leaves a gradient, and of parameters none
        return {}
    found = torch.autograd.grad(value, inputs, e, allow_unused=True, retain_graph=True)
    return {id(p): g for p, g in zip(parameters, found[len(reached) :], strict=True)}
