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
    boundaries: Boundaries,
    forward: Callable[[], object],
    steps: Sequence[Forward],
    B: Sequence[Tensor],
    weights: bool = True,
) -> tuple[Tensor, Tensor]:
    """Measure what a star has sent by one more forward up to y, and exact gradients there.

    Args:
        boundaries: attached to the model.
        forward: calls the model as in that step.
        steps: the forwards of the star in that call, after its backward, with e and what was sent.
        B: feedback matrices, ``(n_l, n_y)``.
        weights: whether the gradients of weights are measured, too, by as much work again.

    Returns:
        The products of ``delta_products``, and the same of weight gradients, ``(L-1, 3)``: <g, g'>, |g|^2, |g'|^2, with
        g the gradient of the weights in block l that delta_l = B_l e leads to and g' the exact one. They add up over
        micro-batches; a weight's gradient is then that of a micro-batch, not their sum.
    """
    of_weights = torch.zeros(len(B), 3, dtype=B[0].dtype, device=B[0].device)
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
                if index in again.h and index in step.sent and again.h[index].requires_grad and mine:
                    of_weights[index] += _weight_products(again.h[index], step.sent[index], mine, exact).to(of_weights)
        del output
    again_and_steps = list(zip(*pairs, strict=True)) or [(), ()]
    return delta_products(again_and_steps[0], B, again_and_steps[1]), of_weights


def size_ratio(products: Tensor) -> Tensor:
    """Return |g| / |g'| of each boundary, ``(L-1,)``, from sums of products; NaN where both vanish."""
    return (products[:, 1] / products[:, 2]).sqrt()


def _trained(boundaries: Boundaries, index: int) -> list[Tensor]:
    return [p for p in boundaries.blocks[index].parameters() if p.requires_grad]


def _weight_products(h: Tensor, delta: Tensor, parameters: list[Tensor], exact: dict[int, Tensor | None]) -> Tensor:
    """Return <g, g'>, |g|^2, |g'|^2 of the weights of one block."""
    star = torch.autograd.grad(h, parameters, delta.to(h), retain_graph=True, allow_unused=True)
    total = torch.zeros(3, device=h.device)
    for p, g in zip(parameters, star, strict=True):
        true = exact.get(id(p))
        if g is not None and true is not None:
            g, true = g.float(), true.float()
            total = total + torch.stack([(g * true).sum(), g.square().sum(), true.square().sum()])
    return total


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
