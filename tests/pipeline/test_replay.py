"""A replay sees the batch as the star has seen it, and leaves the star's gradients."""

import torch
from torch import nn

from grape_hf.pipeline.replay import Replay


def test_a_replay_has_the_same_dropout_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x, weight = torch.randn(16, 8), model[0].weight
    model(x).sum().backward()  # of an earlier micro-batch
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    replay = Replay(model)
    model(x).square().sum().backward()
    mean, random = model[2].running_mean.clone(), torch.get_rng_state()
    with replay.chain():
        model(x).square().sum().backward()
    assert torch.equal(replay.star[weight], replay.exact[weight])
    assert not torch.equal(replay.star[weight], before[weight])
    assert all(torch.equal(p.grad, before[p] + replay.star[p]) for p in model.parameters() if p.grad is not None)
    assert torch.equal(model[2].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), random)
