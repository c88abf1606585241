"""What ranks do together, tensor by tensor; and forwards that run to their end, which FSDP2 counts on."""

import torch
import torch.distributed as dist
from problems import PLAIN, VOCABULARY
from torch import Tensor
from torch.autograd import forward_ad

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.jacobian import Noise, jacobian_terms
from grape_hf.engine.ranks import ALONE, Ranks


def tensors(rank: int) -> list[Tensor]:
    """Of two dtypes in turn, one of them a number and one with nothing in it; not contiguous, and with gradients."""
    floats = torch.arange(6.0).reshape(2, 3).mT + rank
    return [floats, torch.tensor(3 + rank), torch.ones(2, 2).requires_grad_() * rank, torch.zeros(0), torch.tensor([7])]


def together() -> tuple[list[Tensor], list[Tensor]]:
    mine = tensors(dist.get_rank())
    before = [t.detach().clone() for t in mine]
    ranks = Ranks(dist.get_world_size())
    total, first = ranks.total(mine), ranks.first(mine)
    for old, new in zip(before, mine, strict=True):
        assert torch.equal(old, new)
    return total, first


def test_sums_and_the_first_ranks_values(processes):
    for total, first in processes.run(together):
        for index, (zero, one) in enumerate(zip(tensors(0), tensors(1), strict=True)):
            assert torch.equal(total[index], zero + one)
            assert torch.equal(first[index], zero)
            assert total[index].dtype == first[index].dtype == zero.dtype
            assert not total[index].requires_grad


def test_alone_nothing_is_copied():
    mine = tensors(0)
    for act in (ALONE.total, ALONE.first):
        assert all(a is b for a, b in zip(act(mine), mine, strict=True))


def test_a_whole_forward_computes_what_a_short_one_does():
    """It goes on behind y without tangent and graph, and a second forward for the same loss is left alone."""
    model = PLAIN.model(torch.float64)
    x = torch.randint(VOCABULARY, (2, 5))
    ended: list[Tensor] = []

    def forward() -> None:
        for _ in range(2):
            ended.append(model(x)["logits"])
            assert forward_ad.unpack_dual(ended[-1]).tangent is None
            assert not ended[-1].requires_grad

    sums = []
    for whole in (False, True):
        boundaries = Boundaries(list(model.blocks), whole=whole)
        with boundaries.attached():
            sums.append(jacobian_terms(boundaries, forward, Noise(0, 0, range(2))).sums)
        assert len(ended) == (2 if whole else 0)
    assert len(sums[0]) == 2
    for short, long in zip(*sums, strict=True):
        assert torch.equal(short, long)
    with torch.no_grad():
        for logits in ended:
            assert torch.equal(logits, model(x)["logits"])
