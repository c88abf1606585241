"""A block's own Jacobian from tangents that end at the next boundary: means against the exact Jacobian."""

from itertools import pairwise

import pytest
import torch
from problems import GPT2
from torch import Tensor, nn

from grape_hf.core.block_jacobian import block_jacobian_terms
from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.jacobian import Noise, activation_tangent

DOUBLE = {"dtype": torch.float64}
WIDTHS = (4, 6, 5, 3)


def linear() -> tuple[nn.Sequential, BlockMaps]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(WIDTHS))).double()
    maps = BlockMaps([torch.zeros(a, b, **DOUBLE) for a, b in pairwise(WIDTHS[1:])], [1, None])
    return model, maps


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
def test_of_linear_blocks_the_terms_are_the_weights_times_the_draws(mode):
    """q = W v for the block's own v and no other, so the sum is W sum v a^T, with the very draws."""
    model, maps = linear()
    x = torch.randn(7, 4, **DOUBLE)
    boundaries, noise = Boundaries(list(model)), Noise(3, 0, range(7))
    with boundaries.attached():
        terms = block_jacobian_terms(boundaries, lambda: model(x), noise, maps, mode=mode)
    h = x
    for index, block in enumerate(list(model)[:2]):
        h = block(h)
        v, a = activation_tangent(h, noise, index, boundaries.layout)
        expected = model[index + 1].weight @ v.flatten(0, 1).mT @ a.flatten(0, 1)
        torch.testing.assert_close(terms.sums[index], expected, rtol=1e-5, atol=1e-6)
        assert int(terms.counts[index]) == 7


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
def test_exact_maps_leave_no_residual(mode):
    model, maps = linear()
    maps.G = [model[1].weight.detach().mT, model[2].weight.detach().mT]
    x = torch.randn(7, 4, **DOUBLE)
    boundaries = Boundaries(list(model))
    with boundaries.attached():
        terms = block_jacobian_terms(boundaries, lambda: model(x), Noise(3, 0, range(7)), maps, mode=mode)
    for total in terms.sums:
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-6)


def test_both_modes_agree_on_a_transformer_and_the_mean_is_its_blocks_jacobian():
    model = GPT2.model(torch.float64).eval()
    x = torch.randint(31, (2, 8))
    blocks = list(find_blocks(model).values())
    boundaries = Boundaries(blocks)
    maps = BlockMaps([torch.eye(16, **DOUBLE)] * 2, [1, None])
    total: list[Tensor] = [torch.zeros(16, 16, **DOUBLE) for _ in range(2)]
    rounds = 200
    with boundaries.attached():
        found = [
            block_jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(2)), maps, mode=mode).mean()
            for mode in ("dual", "finite_difference")
        ]
        for dual, difference in zip(*found, strict=True):
            torch.testing.assert_close(dual, difference, rtol=1e-4, atol=1e-6)
        for step in range(rounds):
            terms = block_jacobian_terms(boundaries, lambda: model(x), Noise(0, step, range(2)), maps)
            total = [t + m / rounds for t, m in zip(total, terms.mean(), strict=True)]
        with boundaries.record() as forwards:
            model(x, labels=x).loss.backward()
    for index in range(2):
        h = forwards[0].h[index].detach()

        def run(h: Tensor, block: nn.Module = blocks[index + 1]) -> Tensor:
            out = block(h)
            return out[0] if isinstance(out, tuple) else out

        J = torch.autograd.functional.jacobian(run, h)  # (2, 8, 16, 2, 8, 16)
        own = torch.stack([J[b, s, :, b, s] for b in range(2) for s in range(8)]).mean(0)
        got = total[index] + torch.eye(16, **DOUBLE)
        # The deviation of one entry is about |branch's Jacobian| / sqrt(3200 draws).
        assert (got - own).abs().max() < 0.15 * own.abs().max()
        assert torch.cosine_similarity((got - torch.eye(16)).flatten(), (own - torch.eye(16)).flatten(), dim=0) > 0.7
