"""What runs on the side leaves no trace."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from grape_hf.core.isolation import isolated


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.LayerNorm(4))
    model[3].eval()  # somebody froze this one
    return model


def states() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_flags_buffers_and_random_states_are_put_back(fails):
    model = network()
    flags = [m.training for m in model.modules()]
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    before = states()
    with pytest.raises(KeyError) if fails else nullcontext(), isolated(model):
        model[1].train()
        model(torch.randn(8, 4))
        torch.randn(3), random.random(), np.random.rand()  # noqa: NPY002
        assert not torch.equal(model[1].running_mean, buffers["1.running_mean"][1])  # it did move, in there
        if fails:
            raise KeyError
    assert states() == before
    assert [m.training for m in model.modules()] == flags
    for name, buffer in model.named_buffers():
        original, value = buffers[name]
        assert buffer is original
        torch.testing.assert_close(buffer, value, rtol=0, atol=0)


def test_dropout_is_off_and_batch_norms_use_their_batch():
    model = network()
    x = torch.randn(8, 4)
    with isolated(model):
        assert torch.equal(model(x), model(x))
        assert model[1].training
        assert not model[2].training
    with isolated(model, deterministic=False):
        assert model[2].training


def test_a_model_in_eval_mode_stays_so():
    model = network().eval()
    with isolated(model):
        assert not model[1].training
    assert not any(m.training for m in model.modules())
