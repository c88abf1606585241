"""Cosines against their definition; measuring changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grape_hf.core.alignment import (
    delta_alignment,
    delta_products,
    exact_alignment,
    feedback_alignment,
    frobenius_cosine,
    pair_products,
    replayed_alignment,
    size_ratio,
)
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.modes import Forward


def test_frobenius_cosine():
    a = torch.randn(3, 4)
    assert frobenius_cosine(a, 3 * a).item() == pytest.approx(1)
    assert frobenius_cosine(a, -a).item() == pytest.approx(-1)
    assert frobenius_cosine(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])).item() == 0
    assert math.isnan(frobenius_cosine(a, torch.zeros(3, 4)))


def test_feedback_alignment_compares_with_the_transposed_estimate():
    J = torch.randn(4, 6)
    torch.testing.assert_close(feedback_alignment([J.mT, -J.mT], [J, J]), torch.tensor([1.0, -1.0]))


def network() -> tuple[nn.Sequential, Boundaries, list[torch.Tensor]]:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4))).double()
    return model, Boundaries(list(model)[:3]), list(torch.randn(2, 5, 5, dtype=torch.float64))


def test_exact_alignment_is_the_cosine_of_b_e_with_the_gradient():
    model, boundaries, B = network()
    x, target = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    h = [model[0](x)]
    for block in model[1:]:
        h.append(block(h[-1]))
    loss = F.mse_loss(h[-1], target)
    deltas = torch.autograd.grad(loss, h[:3])
    expected = [frobenius_cosine(deltas[2] @ b.mT, d).item() for b, d in zip(B, deltas[:2], strict=True)]
    with boundaries.attached():
        products = exact_alignment(boundaries, lambda: F.mse_loss(model(x), target), B)
    assert delta_alignment(products).tolist() == pytest.approx(expected)
    assert all(p.grad is None for p in model.parameters())


def test_products_add_up_over_micro_batches():
    model, boundaries, B = network()
    x, target = torch.randn(2, 4, 7, 5, dtype=torch.float64)

    def products(part: slice) -> torch.Tensor:
        def loss() -> torch.Tensor:
            return F.mse_loss(model(x[part]), target[part], reduction="sum")

        return exact_alignment(boundaries, loss, B)

    with boundaries.attached():
        torch.testing.assert_close(products(slice(0, 4)), products(slice(0, 2)) + products(slice(2, 4)))


def test_a_recorded_backward_gives_the_same_and_leaves_gradients_alone():
    model, boundaries, B = network()
    x, target = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    F.mse_loss(model(x), target).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with boundaries.attached():
        aside = exact_alignment(boundaries, lambda: F.mse_loss(model(x), target), B)
        with boundaries.record() as forwards:
            F.mse_loss(model(x), target).backward()
        torch.testing.assert_close(delta_products(forwards, B), aside)
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_weight_gradients_of_a_star_beside_the_exact_ones(exact):
    """Of what a step sent, not of B_l e: sweeps may have changed it. The oracle is autograd on the parts."""
    model, boundaries, B = network()
    x, weight = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    h = [model[0](x)]
    for block in model[1:]:
        h.append(block(h[-1]))
    deltas = torch.autograd.grad((h[-1] * weight).sum(), h[:3], retain_graph=True)
    sent = dict(enumerate(deltas)) if exact else dict(enumerate(torch.randn(2, 3, 7, 5, dtype=torch.float64)))
    step = Forward(errors={2: deltas[2]}, site=2, sent={i: sent[i] for i in (0, 1)})
    with boundaries.attached():
        products, pairs = replayed_alignment(boundaries, lambda: model(x), [step], B)
    of_weights = pair_products(pairs)
    for i in (0, 1):
        parameters = list(model[i].parameters())
        true = torch.cat([g.flatten() for g in torch.autograd.grad(h[-1], parameters, weight, retain_graph=True)])
        mine = torch.cat([g.flatten() for g in torch.autograd.grad(h[i], parameters, sent[i], retain_graph=True)])
        assert delta_alignment(of_weights)[i].item() == pytest.approx(frobenius_cosine(mine, true).item())
        assert size_ratio(of_weights)[i].item() == pytest.approx((mine.norm() / true.norm()).item())
        assert delta_alignment(products)[i].item() == pytest.approx(frobenius_cosine(sent[i], deltas[i]).item())
        assert (delta_alignment(of_weights)[i].item() == pytest.approx(1)) is exact
    assert all(p.grad is None for p in model.parameters())
