"""Maps of blocks: what they learn from a backward, against plain loops; the product; sizes that do not go together."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments
from problems import transformer
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from grape_hf import GrapeTrainer
from grape_hf.core.block_maps import BlockMaps, map_sources
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.broadcast import Refinement

DOUBLE = {"dtype": torch.float64}


class Chain(nn.Module):
    """Linear blocks of several widths, so that the exact maps are the weights."""

    def __init__(self, widths: tuple[int, ...] = (4, 6, 5, 3)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.widths = widths

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def random_maps(widths: tuple[int, ...]) -> BlockMaps:
    G = [torch.randn(a, b, **DOUBLE) for a, b in pairwise(widths[1:])]
    return BlockMaps(G, [*range(1, len(G)), None])


def test_b_is_the_product_of_the_maps_above():
    maps = random_maps((4, 6, 5, 3))
    expected = [maps.G[0] @ maps.G[1], maps.G[1]]
    for got, product in zip(maps.product(), expected, strict=True):
        torch.testing.assert_close(got, product)


def test_a_map_that_takes_e_begins_a_product_of_its_own():
    maps = BlockMaps([torch.randn(4, 6), torch.randn(6, 3), torch.randn(5, 3)], [1, None, None])
    torch.testing.assert_close(maps.product()[0], maps.G[0] @ maps.G[1])
    assert maps.product()[1] is maps.G[1]


def test_neighbours_of_other_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"expected a map from delta_2 with 6 columns at h_1, got one of shape \(4, 5\)"
    ):
        BlockMaps([torch.randn(4, 5), torch.randn(6, 3)], [1, None])


def test_a_map_comes_from_the_next_boundary_with_the_same_positions():
    assert map_sources([8, 8, 8], [False] * 3) == [1, 2, None]
    assert map_sources([16, 4, 4], [False] * 3) == [None, 2, None]
    assert map_sources([8, 8, 8, 8], [True, True, False, False]) == [1, None, 3, None]


@pytest.mark.parametrize(
    ("length", "turn", "looked_at"),
    [
        pytest.param(8, 3, range(8), id="short"),
        pytest.param(31, 3, range(31), id="just-short"),
        pytest.param(40, 1, range(1, 40, 2), id="half"),
        pytest.param(64, 6, range(2, 64, 4), id="long"),
        pytest.param(130, 3, range(3, 130, 4), id="longer"),
    ],
)
def test_the_step_is_that_of_the_equation_in_plain_loops(length, turn, looked_at):
    torch.manual_seed(length)
    model = transformer("gpt2", max_position_embeddings=length, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0).double()
    x = torch.randint(31, (3, length))
    boundaries = Boundaries(list(find_blocks(model).values()))
    n = 16
    maps = BlockMaps([torch.eye(n, **DOUBLE) + 0.1 * torch.randn(n, n, **DOUBLE) for _ in range(2)], [1, None])
    B, eta = maps.product(), 0.3
    maps.begin(turn)
    with boundaries.attached(), boundaries.broadcast(B, refinement=Refinement(maps, learn=True)) as forwards:
        model(x, labels=x).loss.backward()
    got = maps.refined(maps.total(list), eta)
    assert len(forwards) == 1

    # By hand: run each block alone on its input, and pull what it is given back through it.
    with boundaries.attached(), boundaries.record() as forwards:
        model(x, labels=x).loss.backward()
    (forward,) = forwards
    e = forward.e
    deltas = [e @ B[0].mT, e @ B[1].mT, e]
    blocks = list(find_blocks(model).values())
    for i in (0, 1):
        h = forward.h[i].detach().requires_grad_()
        out = blocks[i + 1](h)
        (v,) = torch.autograd.grad(out[0] if isinstance(out, tuple) else out, h, deltas[i + 1])
        step, power, count = torch.zeros(n, n, **DOUBLE), 0.0, 0
        for sample in range(3):
            for position in looked_at:
                d, target = deltas[i + 1][sample, position], v[sample, position]
                step += torch.outer(target - maps.G[i] @ d, d)
                power += float(d @ d)
                count += bool(d.any())
        assert count == 3 * (len(looked_at) - (length - 1 in looked_at))  # the last position predicts nothing
        d = deltas[i + 1][:, looked_at].flatten(0, 1)
        largest = torch.linalg.matrix_norm(d.mT @ d)
        expected = maps.G[i] + min(eta * n / max(1, n / count) / power, 1 / largest) * step
        torch.testing.assert_close(got[i], expected)


def test_micro_batches_and_ranks_add_up():
    torch.manual_seed(1)
    v, d = torch.randn(4, 5, 6, **DOUBLE), torch.randn(4, 5, 3, **DOUBLE)

    def learned(*parts: slice) -> Tensor:
        maps = random_maps((2, 6, 3))
        maps.G[0] = torch.ones(6, 3, **DOUBLE)
        totals = []
        for part in parts:
            maps.observe(0, v[part], d[part], d[part] @ maps.G[0].mT)
        totals = maps.total(list)
        return maps.refined(totals, 0.1)[0]

    torch.testing.assert_close(learned(slice(0, 4)), learned(slice(0, 1), slice(1, 4)))


@pytest.mark.parametrize("sweeps", [0, 1, 2])
@pytest.mark.parametrize("uncut", [(1,), (2,), (1, 2)], ids=str)
def test_maps_learn_at_boundaries_that_are_not_cut(uncut, sweeps):
    """There the delta is the exact gradient of what is above, up to the next cut; G d is no delta then.

    With sweeps the deltas are the corrected ones.
    """
    model = transformer("gpt2", num_hidden_layers=4).double().eval()
    x = torch.randint(31, (3, 8))
    blocks = list(find_blocks(model).values())
    boundaries = Boundaries(blocks)
    maps = BlockMaps([torch.eye(16, **DOUBLE) + 0.1 * torch.randn(16, 16, **DOUBLE) for _ in range(3)], [1, 2, None])
    B = [None if i in uncut else b for i, b in enumerate(maps.product())]
    with boundaries.attached():
        refinement = Refinement(maps, learn=True, sweeps=sweeps)
        with boundaries.broadcast(B, keep="e and deltas", refinement=refinement) as stars:
            model(x, labels=x).loss.backward()
        with boundaries.record() as forwards:
            model(x, labels=x).loss.backward()
    (forward,), (star,) = forwards, stars

    # From the top down: v at a boundary is what the block behind makes of its delta, or that delta if it is not cut.
    delta = forward.e
    sums = maps.total(list)
    for i in reversed(range(3)):
        h = forward.h[i].detach().requires_grad_()
        (v,) = torch.autograd.grad(blocks[i + 1](h), h, delta)
        predicted = delta @ maps.G[i].mT
        expected = (v - predicted).flatten(0, 1).mT @ delta.flatten(0, 1)
        torch.testing.assert_close(sums[i].residual, expected)
        torch.testing.assert_close(sums[i].products[0], (v * predicted).sum())
        delta = v if i in uncut else star.sent[i]
        if not sweeps and i not in uncut:
            torch.testing.assert_close(delta, forward.e @ maps.product()[i].mT)


def test_maps_of_linear_blocks_become_their_transposed_weights():
    model = Chain().double()
    boundaries = Boundaries(model.blocks)
    maps = random_maps(model.widths)
    with boundaries.attached():
        for _ in range(1500):
            x, target = torch.randn(16, 4, **DOUBLE), torch.randn(16, 3, **DOUBLE)
            maps.begin()
            with boundaries.broadcast(maps.product(), refinement=Refinement(maps, learn=True)):
                F.mse_loss(model(x), target).backward()
            maps.G = maps.refined(maps.total(list), 1.0)
    torch.testing.assert_close(maps.G[1], model.blocks[2].weight.detach().mT, atol=1e-6, rtol=0)
    # The deltas of h_2 span no more than the 3 directions of e, so G_2 is known there alone: B_1 is exact.
    J = model.blocks[2].weight @ model.blocks[1].weight
    torch.testing.assert_close(maps.product()[0], J.detach().mT, atol=1e-6, rtol=0)


def test_deltas_in_one_direction_do_not_drive_a_map_away():
    """With all the power in one direction a step of eta n / sum |d|^2 is n eta times too long."""
    n = 64
    maps = BlockMaps([torch.zeros(n, n, **DOUBLE)], [None])
    direction, true = torch.randn(n, **DOUBLE), torch.randn(n, n, **DOUBLE)
    for _ in range(50):
        d = torch.randn(2, 100, 1, **DOUBLE) * direction
        maps.begin()
        maps.observe(0, d @ true.mT, d, d @ maps.G[0].mT)
        maps.G = maps.refined(maps.total(list), 0.5)
    torch.testing.assert_close(maps.G[0] @ direction, true @ direction, rtol=1e-6, atol=1e-6)


def test_in_as_many_turns_every_position_of_a_long_sample_is_looked_at_once():
    v, d = torch.randn(2, 64, 6, **DOUBLE), torch.randn(2, 64, 3, **DOUBLE)
    maps, residual, count = random_maps((2, 6, 3)), 0, 0
    for turn in range(8, 12):
        maps.begin(turn)
        maps.observe(0, *(maps.sampled(t) for t in (v, d, d @ maps.G[0].mT)))
        (sums,) = maps.total(list)
        residual += sums.residual
        count += sums.count
    assert count == 2 * 64
    torch.testing.assert_close(residual, torch.einsum("btm,btn->mn", v - d @ maps.G[0].mT, d))


def test_nothing_is_learned_from_nothing():
    maps = random_maps((4, 6, 5, 3))
    before = [g.clone() for g in maps.G]
    for g, kept in zip(maps.refined(maps.total(list), 0.5), before, strict=True):
        assert torch.equal(g, kept)


def test_the_alignment_is_the_cosine_of_what_was_predicted():
    maps = random_maps((2, 6, 3))
    v, d = torch.randn(4, 5, 6, **DOUBLE), torch.randn(4, 5, 3, **DOUBLE)
    predicted = d @ maps.G[0].mT
    maps.observe(0, v, d, predicted)
    expected = F.cosine_similarity(v.flatten(), predicted.flatten(), dim=0)
    torch.testing.assert_close(maps.alignment(maps.total(list))[0], expected)


def test_all_positions_are_looked_at_where_an_error_is_at_one(tmp_path):
    """Of long samples a map looks at one position in four, among which that one may not be."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    rows = [{"input_ids": torch.randint(1, 30, (96,)), "labels": i % 2} for i in range(8)]
    of_tokens = [row | {"labels": torch.randint(2, (96,))} for row in rows]
    for kind, data, whole in (
        (BertForSequenceClassification, rows, True),
        (BertForTokenClassification, of_tokens, False),
    ):
        trainer = GrapeTrainer(kind(config), arguments(tmp_path, max_steps=2), train_dataset=data)
        trainer.train()
        maps = trainer._run.maps
        assert maps.whole is whole
        assert maps.sampled(torch.zeros(2, 96, 8)).shape[1] == (96 if whole else 24)
