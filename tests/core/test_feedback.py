"""The rules against their equations, in float64; then what is kept on disk."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from grape_hf.core.feedback import Feedback, initial_feedback, normalize_columns, refine_cosine, refine_ema, refine_lms
from grape_hf.core.jacobian import JacobianSum
from grape_hf.core.modes import Forward
from grape_hf.core.refit import refit, refit_moments


def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)  # B (n_l, n_y), J (n_y, n_l)


def alignment_loss(B: torch.Tensor, J_hat: torch.Tensor) -> torch.Tensor:
    return (1 - torch.cosine_similarity(B, J_hat.mT, dim=0)).sum()


def test_the_cosine_rule_is_a_gradient_step_on_the_alignment_loss():
    B, J_hat = matrices()
    B.requires_grad_()
    (gradient,) = torch.autograd.grad(alignment_loss(B, J_hat), B)
    torch.testing.assert_close(refine_cosine(B.detach(), J_hat, 0.1), B.detach() - 0.1 * gradient)


def test_the_cosine_rule_descends_and_leaves_unit_columns():
    B, J_hat = matrices()
    feedback = Feedback([B], rule="cosine", lr=0.1, normalize=True)
    losses = [alignment_loss(feedback.B[0], J_hat).item()]
    for _ in range(60):
        feedback.refine(JacobianSum([3 * J_hat], [torch.tensor(3)]))
        losses.append(alignment_loss(feedback.B[0], J_hat).item())
        torch.testing.assert_close(feedback.B[0].norm(dim=0), torch.ones(4, dtype=torch.float64))
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.01 * losses[0]


def test_the_cosine_rule_leaves_a_column_without_estimate_alone():
    B, J_hat = matrices()
    J_hat[2] = 0
    refined = refine_cosine(B, J_hat, 0.1)
    torch.testing.assert_close(refined[:, 2], B[:, 2], rtol=0, atol=0)
    from_zero = refine_cosine(torch.zeros_like(B), J_hat, 0.1)  # goes where the estimate points
    torch.testing.assert_close(normalize_columns(from_zero), normalize_columns(J_hat.mT), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lr", [0.1, 0.3, 2.0])
@pytest.mark.parametrize("start", [0.0, 1e-12, 1e-3])
def test_the_cosine_rule_makes_no_long_columns_of_short_ones(start, lr):
    """The gradient is 1 / |B| long: from zero columns became 3e7 long, and stayed so."""
    T = torch.randn(20, 5)
    B = start * torch.randn(20, 5)
    B = refine_cosine(B, T.mT, lr)
    assert torch.nn.functional.cosine_similarity(B, T, dim=0).min() > (0.999 if start < 1e-6 else 0.9)
    for _ in range(20):
        B = refine_cosine(B, torch.randn(20, 5).mT, lr)
    assert 0.5 < B.norm(dim=0).min() <= B.norm(dim=0).max() < 5


@pytest.mark.parametrize("rule", ["ema", "lms"])
def test_ema_and_lms_converge_to_the_mean_jacobian(rule):
    B, J = matrices()
    feedback = Feedback([B], rule=rule, lr=0.05)
    for _ in range(400):
        J_hat = J + 0.5 * torch.randn_like(J)
        estimate = J_hat if rule == "ema" else J_hat - feedback.B[0].mT
        feedback.refine(JacobianSum([100 * estimate], [torch.tensor(100)]))
    # The noise that an average with rate 0.05 leaves: 0.5 * sqrt(0.05 / 1.95) an entry, 0.08.
    assert (feedback.B[0] - J.mT).square().mean().sqrt() < 2 * 0.08


def test_ema_and_lms_by_hand():
    B, J_hat = matrices()
    torch.testing.assert_close(refine_ema(B, J_hat, 0.25), 0.75 * B + 0.25 * J_hat.mT)
    torch.testing.assert_close(refine_lms(B, J_hat, 0.25), B + 0.25 * J_hat.mT)


def test_lms_is_bounded_where_vectors_are_longer_than_samples_are_many():
    """32 flattened maps of 16,384 numbers: without the bound the error grows tenfold in 31 steps."""
    n_l, n_y, samples = 2048, 10, 16
    J = torch.randn(n_y, n_l) / n_l**0.5
    feedback = Feedback([torch.zeros(n_l, n_y)], rule="lms", lr=1.0)
    errors = []
    for _ in range(60):
        p = torch.randn(samples, n_l)
        residual = p @ J.mT - p @ feedback.B[0]
        feedback.refine(JacobianSum([residual.mT @ p], [torch.tensor(samples)]))
        errors.append((feedback.B[0] - J.mT).norm().item())
    assert errors[-1] < errors[0] < J.norm()


def test_refit_is_ridge_regression_towards_the_present_matrix():
    B, _ = matrices()
    e, delta = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    fitted = refit(B, e.mT @ e, e.mT @ delta, ridge=0.1)
    # The minimum of |delta - E B^T|^2 + ridge tr(E^T E)/n_y |B - B_0|^2, found by its gradient being zero.
    fitted.requires_grad_()
    weight = 0.1 * e.square().sum() / 4
    loss = (delta - e @ fitted.mT).square().sum() + weight * (fitted - B).square().sum()
    (gradient,) = torch.autograd.grad(loss, fitted)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_refit_finds_the_matrix_behind_the_deltas_whatever_the_scale_of_e():
    B, J = matrices()
    for scale in (1e-12, 1.0, 1e6):
        e = scale * torch.randn(500, 4, dtype=torch.float64)
        fitted = refit(B, e.mT @ e, e.mT @ (e @ J), ridge=1e-6)
        torch.testing.assert_close(fitted, J.mT, rtol=1e-4, atol=1e-4)


def test_refit_without_any_error_changes_nothing():
    B, _ = matrices()
    zero = torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(refit(B, zero, torch.zeros(4, 6, dtype=torch.float64)), B)


def test_refit_moments_sum_over_positions_and_forwards():
    forwards, terms = [], []
    for _ in range(2):
        delta, error = torch.randn(3, 5, 6), torch.randn(3, 5, 4)
        forwards.append(Forward(delta={0: delta}, errors={0: error}))
        terms += [(e[:, None] * e, e[:, None] * d) for e, d in zip(error.view(-1, 4), delta.view(-1, 6), strict=True)]
    ((ee, ed),) = refit_moments(forwards, 1)
    torch.testing.assert_close(ee, sum(t[0] for t in terms))
    torch.testing.assert_close(ed, sum(t[1] for t in terms))


def test_starts():
    torch.testing.assert_close(initial_feedback("identity", 5, 5), torch.eye(5))
    assert not initial_feedback("zero", 5, 3).any()
    gaussian = initial_feedback("gaussian", 400, 300, torch.Generator().manual_seed(0))
    # 300 squared lengths with mean 1 and variance 2/400 each.
    assert abs(gaussian.square().sum(0).mean() - 1) < 4 * (2 / 400 / 300) ** 0.5
    again = initial_feedback("gaussian", 400, 300, torch.Generator().manual_seed(0))
    torch.testing.assert_close(gaussian, again, rtol=0, atol=0)


def test_identity_needs_equal_sizes():
    with pytest.raises(ValueError, match=r"n_l = 5 and n_y = 3.*gaussian"):
        initial_feedback("identity", 5, 3)


def test_normalised_columns():
    B, _ = matrices()
    torch.testing.assert_close(normalize_columns(B).norm(dim=0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(normalize_columns(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_matrices_survive_a_round_trip(tmp_path):
    saved = Feedback([torch.randn(6, 4), torch.randn(5, 4)])
    saved.save(tmp_path / "B.safetensors", ["h.0", "h.1"])
    loaded = Feedback([torch.zeros(6, 4), torch.zeros(5, 4)])
    loaded.load(tmp_path / "B.safetensors", ["h.0", "h.1"])
    for a, b in zip(saved.B, loaded.B, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_ten_matrices_and_more_of_different_shapes_load_what_was_saved(tmp_path):
    """A file lists B_10 before B_2."""
    saved, names = Feedback([torch.randn(i, 3) for i in range(1, 13)]), [f"h.{i}" for i in range(12)]
    saved.save(tmp_path / "B.safetensors", names)
    loaded = Feedback([torch.zeros_like(b) for b in saved.B])
    loaded.load(tmp_path / "B.safetensors", names)
    for a, b in zip(saved.B, loaded.B, strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_loaded_is_said(tmp_path):
    path = tmp_path / "B.safetensors"
    feedback = Feedback([torch.randn(6, 4)])
    with pytest.raises(FileNotFoundError, match="stock Trainer"):
        feedback.load(path, ["h.0"])
    feedback.save(path, ["h.0"])
    with pytest.raises(ValueError, match=r"expected .*'other_h\.0'.* found .*'h\.0'.*feedback_points"):
        feedback.load(path, ["other_h.0"])
    with pytest.raises(ValueError, match=r"expected matrices .*\(7, 4\).* found .*\(6, 4\)"):
        Feedback([torch.randn(7, 4)]).load(path, ["h.0"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot read"):
        feedback.load(path, ["h.0"])
    save_file({"B_1": torch.zeros(6, 4)}, path, metadata={"blocks": json.dumps(["h.0"])})
    feedback.load(path, ["h.0"])
    assert not feedback.B[0].any()
