"""The rank-one estimate. First half: against oracles in float64 (torch.func). Second half: what the passes do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jacrev

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.jacobian import JacobianSum, Noise, jacobian_terms, rank_one_sum
from grape_hf.core.tangents import ForwardModeError, _ConstantFactors


class Net(nn.Module):
    """Three blocks that mix positions, as attention does, so that J_l has parts between positions as well."""

    def __init__(self, width: int = 4, n_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks))
        self.mix = 0.3

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = torch.tanh(x) + self.mix * x.cumsum(1)  # outside the blocks: behind the boundary
        return x


class Readout(Net):
    """The same, with a y that is no block's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(super().forward(x))


def setting(batch: int = 3, positions: int = 5) -> tuple[nn.Module, Boundaries, Tensor]:
    model = Readout().double()
    return model, Boundaries(model.blocks, model.out), torch.randn(batch, positions, 4, dtype=torch.float64)


def boundary_outputs(model: nn.Module, boundaries: Boundaries, x: Tensor) -> list[Tensor]:
    seen = []
    with torch.no_grad(), boundaries.attached(), boundaries.perturb(lambda i, h, *rest: seen.append(h) or h):
        model(x)
    return seen


def oracle(model: nn.Module, boundaries: Boundaries, x: Tensor) -> list[Tensor]:
    """Mean over samples and positions of the same-position block of dy/dh_l, sample by sample with jacrev."""
    result = []
    for index, h in enumerate(boundary_outputs(model, boundaries, x)):

        def y_of(h_sample: Tensor, sample: int, index: int = index) -> Tensor:
            with boundaries.perturb(lambda i, other, *rest: h_sample[None] if i == index else other) as passed:
                model(x[sample : sample + 1])
            return passed.y[0]

        with boundaries.attached():
            full = [jacrev(lambda t, s=s: y_of(t, s))(h[s]) for s in range(len(x))]  # (S, n_y, S, n_l) each
        same = [j[t, :, t] for j in full for t in range(x.shape[1])]
        result.append(torch.stack(same).mean(0))
    return result


def mean_estimate(
    boundaries: Boundaries, forward, draws: int, batch: int, **kwargs
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and standard error (Frobenius) of the estimates over ``draws`` independent passes."""
    samples: list[list[Tensor]] = []
    with boundaries.attached():
        for step in range(draws):
            total = JacobianSum()
            total.add(jacobian_terms(boundaries, forward, Noise(0, step, range(batch)), **kwargs))
            samples.append(total.mean())
    stacked = [torch.stack(s) for s in zip(*samples, strict=True)]
    return [s.mean(0) for s in stacked], [s.var(0).sum().sqrt() / math.sqrt(draws) for s in stacked]


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
@pytest.mark.parametrize("passes", ["joint", "per_block"])
def test_the_estimate_is_unbiased(mode, passes):
    model, boundaries, x = setting()
    expected = oracle(model, boundaries, x)
    mean, error = mean_estimate(boundaries, lambda: model(x), 600, len(x), mode=mode, passes=passes)
    for m, se, j in zip(mean, error, expected, strict=True):
        # The Frobenius distance of a mean of n_y * n_l = 12 entries: its square has mean se^2, 3 se is far outside.
        assert (m - j).norm() < 3 * se
        assert se < 0.25 * j.norm()  # and the test could tell: half of J_l would be off by more than that


def test_per_block_passes_have_less_noise():
    model, boundaries, x = setting()
    _, joint = mean_estimate(boundaries, lambda: model(x), 300, len(x), passes="joint")
    _, single = mean_estimate(boundaries, lambda: model(x), 300, len(x), passes="per_block")
    assert all(s < j for s, j in zip(single, joint, strict=True))


def test_dual_numbers_and_finite_differences_agree():
    model, boundaries, x = setting()
    with boundaries.attached():
        dual, difference = (
            jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(3)), mode=mode).sums
            for mode in ("dual", "finite_difference")
        )
    for a, b in zip(dual, difference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_error_falls_with_the_root_of_the_number_of_draws():
    model, boundaries, x = setting()
    expected = oracle(model, boundaries, x)[0]
    numbers = [4, 16, 64, 256]
    with boundaries.attached():
        estimates = []
        for step in range(4 * numbers[-1]):
            estimates.append(jacobian_terms(boundaries, lambda: model(x), Noise(0, step, range(3))).mean()[0])
    stacked = torch.stack(estimates)
    # Root mean square error of the mean of n draws, over all disjoint groups of n.
    errors = [(stacked.unflatten(0, (-1, n)).mean(1) - expected).square().sum((1, 2)).mean().sqrt() for n in numbers]
    x_axis, y_axis = torch.tensor(numbers).double().log(), torch.stack(errors).log()
    slope = ((x_axis - x_axis.mean()) * (y_axis - y_axis.mean())).sum() / (x_axis - x_axis.mean()).square().sum()
    # The last point is a mean of 4 groups of 12 numbers: a relative error of 1/sqrt(2*48) = 0.1 there moves the slope
    # by less than 0.05.
    assert abs(slope + 0.5) < 0.1


@pytest.mark.parametrize("width", [4, 16, 64])
def test_the_papers_cosine_bound_holds(width):
    r"""E[cos_F(J, J_hat)] >= sqrt(2/(pi n_l)) |J|_2/|J|_F, one sample, one position, one boundary perturbed."""
    model = Net(width, n_blocks=2).double()
    boundaries = Boundaries(model.blocks)
    x = torch.randn(1, 1, width, dtype=torch.float64)
    (jacobian,) = oracle(model, boundaries, x)
    cosines = []
    with boundaries.attached():
        for step in range(400):
            (estimate,) = jacobian_terms(boundaries, lambda: model(x), Noise(0, step, [0])).sums
            cosines.append((estimate * jacobian).sum() / estimate.norm() / jacobian.norm())
    mean, error = torch.stack(cosines).mean(), torch.stack(cosines).std() / 20
    bound = math.sqrt(2 / (math.pi * width)) * torch.linalg.matrix_norm(jacobian, 2) / jacobian.norm()
    assert mean > bound - 3 * error
    assert mean < 1 / math.sqrt(width) + 3 * error  # cos_F = |J s|/|J|_F has mean square 1/n_l exactly


def test_lms_has_the_mean_of_ema_and_less_variance_near_the_jacobian():
    model, boundaries, x = setting()
    model.mix = 0.0  # what comes from other positions no B_l can predict
    expected = oracle(model, boundaries, x)
    B = [j.mT + 0.05 * torch.randn_like(j.mT) for j in expected]
    _, plain_error = mean_estimate(boundaries, lambda: model(x), 400, len(x))
    residual, residual_error = mean_estimate(boundaries, lambda: model(x), 400, len(x), B=B)
    for j, b, r, se in zip(expected, B, residual, residual_error, strict=True):
        assert (b.mT + r - j).norm() < 3 * se
    assert all(r < 0.7 * p for r, p in zip(residual_error, plain_error, strict=True))


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
def test_weight_space_estimates_the_jacobian_times_s(mode):
    """One perturbed weight: u = (dh_l/dW) p_W; then E[q u^T] = J_l E[u u^T], S by jacrev over the weights."""
    model, boundaries, x = setting(batch=2, positions=3)
    # c scales u to the size of h and is divided out again, so neither J S nor its estimate knows of it.
    expected = []
    for index, (block, jacobian_rows) in enumerate(
        zip(model.blocks[:-1], _full_jacobians(model, boundaries, x), strict=True)
    ):
        inputs = _block_inputs(model, x)[index]
        weights = {name: p.detach() for name, p in block.named_parameters()}
        du = jacrev(lambda w, block=block, i=inputs: functional_call(block, w, (i,)))(weights)
        flat = torch.cat([d.flatten(3) for d in du.values()], dim=3)  # (batch, S, n_l, weights)
        terms = []
        for s in range(len(x)):
            for t in range(x.shape[1]):
                # q at t hears of u at every position: sum_t' J_{t t'} u_t', with one p_W for all of them.
                response = torch.einsum("yun,unw->yw", jacobian_rows[s][t], flat[s])
                terms.append(response @ flat[s, t].mT)
        expected.append(torch.stack(terms).mean(0))
    mean, error = mean_estimate(
        boundaries, lambda: model(x), 1500, len(x), mode=mode, passes="per_block", spaces=["weight"] * 2
    )
    for m, se, j in zip(mean, error, expected, strict=True):
        assert (m - j).norm() < 3 * se
        assert se < 0.25 * j.norm()


def _full_jacobians(model: nn.Module, boundaries: Boundaries, x: Tensor) -> list[list[Tensor]]:
    """dy/dh_l with all position pairs: for each boundary and sample (S, n_y, S', n_l)."""
    result = []
    for index, h in enumerate(boundary_outputs(model, boundaries, x)):
        per_sample = []
        for s in range(len(x)):

            def y_of(t: Tensor, s: int = s, index: int = index) -> Tensor:
                with boundaries.perturb(lambda i, other, *rest: t[None] if i == index else other) as passed:
                    model(x[s : s + 1])
                return passed.y[0]

            with boundaries.attached():
                per_sample.append(jacrev(y_of)(h[s]))
        result.append(per_sample)
    return result


def _block_inputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    inputs: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach())) for b in model.blocks]
    model(x)
    for handle in handles:
        handle.remove()
    return inputs


def test_flattened_maps_against_jacrev():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()
    boundaries = Boundaries([model[0], model[3]])
    x = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    h = model[0](x).detach()
    expected = torch.stack([jacrev(lambda t: model[1:](t[None])[0])(h[s]).flatten(1) for s in range(4)]).mean(0)
    (mean,), (error,) = mean_estimate(boundaries, lambda: model(x), 600, 4)
    assert (mean - expected).norm() < 3 * error
    assert error < 0.25 * expected.norm()


def test_one_error_per_sample_against_jacrev():
    """y is the head's output on the mean token: J_hat is the mean over positions of dy_b/dh_{b,s}."""

    class Classifier(Readout):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(Net.forward(self, x).mean(1))

    model = Classifier().double()
    boundaries = Boundaries(model.blocks, model.out)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    h = boundary_outputs(model, boundaries, x)[1]

    def y_of(t: Tensor) -> Tensor:
        with boundaries.perturb(lambda i, h, *rest: t if i == 1 else h) as passed:
            model(x)
        return passed.y.sum(0)  # samples do not mix, so this is each sample's own Jacobian

    with boundaries.attached():
        expected = jacrev(y_of)(h).mean((1, 2))  # (n_y, batch, S, n_l) -> (n_y, n_l)
    for B in (None, [expected.mT] * 2):
        (_, mean), (_, error) = mean_estimate(boundaries, lambda: model(x), 600, 3, B=B)
        mean = mean if B is None else mean + expected
        assert (mean - expected).norm() < 3 * error


def test_padding_has_no_say():
    model, boundaries, x = setting(batch=2, positions=16)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[:, 8:] = 0
    with boundaries.attached():
        padded = jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(2)), mask=mask)
        short = jacobian_terms(boundaries, lambda: model(x[:, :8]), Noise(0, 0, range(2)))
    assert padded.counts == short.counts  # 2 samples x 8 positions
    for a, b in zip(padded.sums, short.sums, strict=True):
        torch.testing.assert_close(a, b)


# --- what the passes do ----------------------------------------------------------------------------------------------


def test_draws_belong_to_samples():
    like = torch.zeros(4, 5, 3)
    together = Noise(7, 3, range(4)).vectors(1, like)
    apart = torch.cat([Noise(7, 3, [place]).vectors(1, like[:1]) for place in range(4)])
    torch.testing.assert_close(together, apart, rtol=0, atol=0)
    for other in (Noise(8, 3, range(4)), Noise(7, 4, range(4)), Noise(7, 3, range(4, 8))):
        assert not torch.equal(together, other.vectors(1, like))
    assert not torch.equal(together, Noise(7, 3, range(4)).vectors(2, like))


def test_draws_are_standard_normal():
    draws = Noise(0, 0, range(200)).vectors(0, torch.zeros(200, 10, 10))
    # 20,000 numbers: the mean has standard error 0.007, the variance 0.01.
    assert abs(draws.mean()) < 0.03
    assert abs(draws.var() - 1) < 0.04


def test_a_batch_split_gives_the_same_estimate():
    model, boundaries, x = setting(batch=4)
    with boundaries.attached():
        whole, split = JacobianSum(), JacobianSum()
        whole.add(jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(4))))
        for start in (0, 2):
            part = x[start : start + 2]
            split.add(jacobian_terms(boundaries, lambda p=part: model(p), Noise(0, 0, range(start, start + 2))))
    for a, b in zip(whole.mean(), split.mean(), strict=True):
        torch.testing.assert_close(a, b)


def test_joint_takes_one_pass_and_finite_differences_one_more():
    model, boundaries, x = setting()
    passes = 0

    def forward() -> None:
        nonlocal passes
        passes += 1
        model(x)

    taken = {}
    with boundaries.attached():
        for mode in ("dual", "finite_difference"):
            for kind in ("joint", "per_block"):
                passes = 0
                jacobian_terms(boundaries, forward, Noise(0, 0, range(3)), mode=mode, passes=kind)
                taken[mode, kind] = passes
    assert taken == {
        ("dual", "joint"): 1,
        ("dual", "per_block"): 2,
        ("finite_difference", "joint"): 2,
        ("finite_difference", "per_block"): 3,
    }


def test_an_operator_without_a_forward_rule_is_reported():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, g):
            raise AssertionError

    class Custom(nn.Linear):
        def forward(self, x):
            return Square.apply(super().forward(x))

    class Usual(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    first, x = nn.Linear(3, 3).double(), torch.randn(2, 3, dtype=torch.float64)
    blocks, usual = (nn.Sequential(first, kind(3, 3).double()) for kind in (Custom, Usual))
    usual.load_state_dict(blocks.state_dict())
    boundaries, others = Boundaries(list(blocks)), Boundaries(list(usual))
    with boundaries.attached(), pytest.raises(ForwardModeError, match="jvp"):
        jacobian_terms(boundaries, lambda: blocks(x), Noise(0, 0, range(2)))
    with boundaries.attached():
        terms = jacobian_terms(boundaries, lambda: blocks(x), Noise(0, 0, range(2)), mode="finite_difference")
    with others.attached():  # the same square by an operator that has a rule
        expected = jacobian_terms(others, lambda: usual(x), Noise(0, 0, range(2)))
    torch.testing.assert_close(terms.sums[0], expected.sums[0], rtol=1e-4, atol=1e-4)


def test_an_error_of_the_models_own_passes_through():
    def fail() -> None:
        raise RuntimeError("out of paper")

    blocks = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    boundaries = Boundaries(list(blocks))
    with boundaries.attached(), pytest.raises(RuntimeError, match="out of paper") as caught:
        jacobian_terms(boundaries, fail, Noise(0, 0, range(2)))
    assert not isinstance(caught.value, ForwardModeError)


def test_finite_differences_leave_autocast_for_float32():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
    boundaries = Boundaries([model[0], model[2], model[3]])
    x = torch.randn(4, 8)

    def forward() -> None:  # as accelerate does: autocast is entered inside the model
        with torch.autocast("cpu", torch.bfloat16):
            model(x)

    with boundaries.attached():
        got = jacobian_terms(boundaries, forward, Noise(0, 0, range(4)), mode="finite_difference")
        expected = jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(4)), mode="dual")
    assert not torch.is_autocast_enabled("cpu")
    for a, b in zip(got.sums, expected.sums, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_finite_differences_refuse_half_precision():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    boundaries = Boundaries(list(model))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with boundaries.attached(), pytest.raises(ValueError, match="float32 or float64, got torch.bfloat16"):
        jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(4)), mode="finite_difference")


def test_rank_one_sum_refuses_other_batches():
    with pytest.raises(ValueError, match="same samples"):
        rank_one_sum(torch.zeros(2, 3, 4), torch.zeros(6, 1, 4))


def test_rank_one_sum_of_bf16_is_taken_in_float32():
    q = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    assert rank_one_sum(q, q).item() == 4096  # bf16 would stop at 256


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 2, 4)
BIAS = torch.ones(4, dtype=torch.float64)
WEIGHT, MASK = torch.arange(16.0, dtype=torch.float64).reshape(4, 4), torch.tensor([1, 0, 1, 1])


@pytest.mark.parametrize("dual", ["x", "w", "b", "xb", "xwb"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(x, w),
        lambda x, w, b: F.linear(x, w, bias=b),
        lambda x, w, b: torch.addmm(b, x[0], w),
        lambda x, w, b: torch.addmm(b, x[0], w, beta=0.5, alpha=2.0),
        lambda x, w, b: 2.0 * x * 3 * MASK * b,
        lambda x, w, b: w[0].mul(x) * b,
        lambda x, w, b: torch.mul(x, x) * b,
    ],
)
def test_shortcuts_through_constant_factors_change_no_tangent(function, dual):
    def run() -> list[Tensor | None]:
        values = {"x": (X, X.exp()), "w": (WEIGHT, WEIGHT.cos()), "b": (BIAS, BIAS / 3)}
        arguments = [forward_ad.make_dual(*pair) if name in dual else pair[0] for name, pair in values.items()]
        return list(forward_ad.unpack_dual(function(*arguments)))

    with torch.no_grad(), forward_ad.dual_level():
        expected = run()
        with _ConstantFactors():
            got = run()
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("passes", ["joint", "per_block"])
@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
def test_a_next_block_that_begins_in_place_changes_nothing(mode, passes):
    """lms predicts from the tangent that was injected, and not from what a ReLU in place has made of it."""

    class Pre(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.act, self.conv = nn.ReLU(inplace=inplace), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.conv(self.act(x)))

    x, B = torch.randn(4, 3, 4, 4).double(), list(torch.randn(2, 48, 2).double())
    sums = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(Pre(inplace) for _ in range(3)), nn.Flatten(), nn.Linear(48, 2)).double()
        boundaries = Boundaries(list(model[:3]), model[-1])
        options = {"mode": mode, "B": B, "passes": passes}
        with boundaries.attached():
            terms = jacobian_terms(boundaries, lambda model=model: model(x.clone()), Noise(0, 0, range(4)), **options)
        sums.append(terms.sums)
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_a_block_whose_output_is_changed_before_it_is_read():
    """u is a tangent of the block's output; h_l here is what the next block reads."""
    from grape_hf import GrapeArgumentsMixin
    from grape_hf.engine.run import GrapeRun

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = 2 * block(x)
            return x

    model = Between()
    for space, found in (("auto", ["activation", "activation"]), ("weight", None)):
        run = GrapeRun(model, GrapeArgumentsMixin(grape_preset="paper", perturbation_space=space, blocks="blocks"))
        if found is None:
            with pytest.raises(
                ValueError, match=r'That of blocks\.0 is changed by the model .*perturbation_space="activation"'
            ):
                run.start(lambda: model(torch.randn(2, 4)), 10)
        else:
            run.start(lambda: model(torch.randn(2, 4)), 10)
            assert run.estimates.spaces == found
        run.close()
