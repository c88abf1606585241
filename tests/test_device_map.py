"""Models whose blocks lie on several devices (``device_map``): e, B_l and the estimates are on each block's own device.

There is one device here. That tensors meet only tensors of their own device is checked with ``FakeTensorMode``, which
knows shapes and devices, has as many GPUs as one likes, and refuses to mix two; values are checked on the CPU.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from helpers import LEARNED, assert_same, make_trainer, train, weights
from problems import BLOCKS, GPT2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from grape_hf.core.alignment import delta_alignment, delta_products, feedback_alignment
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.feedback import Feedback
from grape_hf.core.jacobian import JacobianSum, Noise, jacobian_terms
from grape_hf.core.layout import Layout, Pairing
from grape_hf.core.modes import Forward
from grape_hf.core.nodes import Broadcast, Receive
from grape_hf.core.refit import refit_moments
from grape_hf.core.star import Star, project_error
from grape_hf.methods import dkp

DEVICES = ["cuda:0", "cuda:1", "cuda:2"]
BATCH, POSITIONS, WIDTH = 2, 3, 4


class Spread(nn.Module):
    """A chain of blocks, one on each device, and a head on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, device=device)) for device in DEVICES)
        self.head = nn.Linear(WIDTH, WIDTH + 1, device=DEVICES[0])

    def forward(self, x: Tensor) -> Tensor:
        for block, device in zip(self.blocks, DEVICES, strict=True):
            x = block(x.to(device))
        return self.head(x.to(DEVICES[0]))


class FakeNoise(Noise):
    """A device that is not there has no generator."""

    def _draw(self, shape: torch.Size, like: Tensor, index: int, place: int) -> Tensor:
        return torch.randn(shape, device=like.device, dtype=like.dtype)


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def feedback(n_y: int) -> list[Tensor]:
    return [torch.randn(WIDTH, n_y, device=device) for device in DEVICES[:-1]]


def on_their_devices(tensors: list[Tensor]) -> None:
    assert [str(t.device) for t in tensors] == DEVICES[:-1]


@pytest.mark.parametrize("space", ["hidden", "logits"])
@pytest.mark.parametrize("passes", ["joint", "per_block"])
@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
@pytest.mark.parametrize("spaces", ["activation", "weight"])
def test_estimates_and_what_is_learned_from_them(space, passes, mode, spaces, fake):
    model = Spread()
    boundaries = Boundaries(list(model.blocks), model.head if space == "logits" else None)
    B = feedback(WIDTH + 1 if space == "logits" else WIDTH)
    mask = torch.ones(BATCH, POSITIONS, device=DEVICES[0])
    total = JacobianSum()
    with boundaries.attached():
        for _ in range(2):
            x = torch.randn(BATCH, POSITIONS, WIDTH, device=DEVICES[0])
            noise = FakeNoise(0, 0, range(BATCH))
            options = {"mode": mode, "passes": passes, "spaces": [spaces] * len(boundaries), "B": B, "mask": mask}
            total.add(jacobian_terms(boundaries, lambda x=x: model(x), noise, **options))
    for part in (total.sums, total.counts, total.tangents):
        on_their_devices(part)
    for rule in ("lms", "cosine", "ema"):
        learner = Feedback(B, rule, normalize=True)
        assert str(feedback_alignment(learner.B, learner.jacobians(total)).device) == DEVICES[0]
        learner.refine(total)
        on_their_devices(learner.B)


@pytest.mark.parametrize("per_sample", [False, True])
def test_errors_and_exact_deltas(per_sample, fake):
    """e is on the device of y, wherever that is; one error for each position, or one a sample."""
    layout, B = Layout(), feedback(WIDTH)
    mask = torch.ones(BATCH, POSITIONS, device=DEVICES[0])
    y = torch.randn(BATCH, 1 if per_sample else POSITIONS, WIDTH, device=DEVICES[2])
    e, pairings = torch.randn_like(y), {i: Pairing(layout, padding=mask) for i in range(2)}
    h = {i: torch.randn(BATCH, POSITIONS, WIDTH, device=device) for i, device in enumerate(DEVICES[:-1])}
    on_their_devices([project_error(e, b, h[i].shape, pairings[i]) for i, b in enumerate(B)])
    nothing_trained = [Forward(dict(h), pairings, y=y)]
    on_their_devices([m for pair in refit_moments(nothing_trained, 2) for m in pair[:1]])
    forwards = [Forward(h, pairings, {i: torch.randn_like(t) for i, t in h.items()}, y, {0: e})]
    assert str(delta_alignment(delta_products(forwards, B)).device) == DEVICES[0]
    moments = refit_moments(forwards, 2)
    on_their_devices([ee for ee, _ in moments])
    learner = Feedback(B)
    learner.refit(moments)
    on_their_devices(learner.B)
    on_their_devices(dkp.products(forwards, B))


def test_a_receiver_is_answered_on_its_device(fake):
    """The scalar by which a node knows the one before it, and the zero that it sends there."""
    first, second, y_context = (type("Context", (), {})() for _ in range(3))
    h = [torch.randn(BATCH, POSITIONS, WIDTH, device=device) for device in DEVICES]
    star, B = Star(), feedback(WIDTH)
    token = Receive.forward(first, h[0], None, B[0], star, 0, None, Pairing())
    later = Receive.forward(second, h[1], token, B[1], star, 1, None, Pairing())
    on_their_devices([token, later])
    Broadcast.forward(y_context, h[2], later, star, 2)
    star.site = 2
    e, to_second, *_ = Broadcast.backward.__wrapped__(y_context, torch.randn_like(h[2]))
    assert str(e.device) == DEVICES[2]
    second_delta, to_first, *_ = Receive.backward.__wrapped__(second, to_second)
    first_delta, to_none, *_ = Receive.backward.__wrapped__(first, to_first)
    on_their_devices([to_first, to_second])
    on_their_devices([first_delta, second_delta])
    assert to_none is None


# --- accelerate's hooks ----------------------------------------------------------------------------------------------

MODULES = [f"transformer.{name}" for name in ("wte", "wpe", "drop", "ln_f")] + ["lm_head"]
MODULES += [f"transformer.h.{i}" for i in range(BLOCKS)]


def dispatched(folder: Path, **elsewhere: str) -> nn.Module:
    """GPT-2 with accelerate's hooks on its modules, which move inputs, and load weights that are elsewhere."""
    places = dict.fromkeys(MODULES, "cpu") | elsewhere
    return dispatch_model(GPT2.model(), places, main_device="cpu", offload_dir=folder / "offload", force_hooks=True)


@pytest.mark.parametrize("method", ["grape", "bp"])
def test_dispatched_trains_as_it_is(method, tmp_path):
    options = LEARNED | {"method": method, "calibration_strategy": "steps", "calibration_interval": 3}
    if method == "bp":
        options = {"method": method}
    model = dispatched(tmp_path)
    assert all(hasattr(block, "_hf_hook") for block in model.transformer.h)
    there = train(GPT2, tmp_path / "there", more={"model": model}, **options)
    assert_same(weights(there), weights(train(GPT2, tmp_path / "here", **options)))


def test_offloaded_weights_are_refused(tmp_path):
    model = dispatched(tmp_path, **{"transformer.h.1": "disk"})
    with pytest.raises(ValueError, match=r"offloaded by its device_map \(cpu, disk\).*Use a device_map of devices"):
        make_trainer(GPT2, tmp_path, more={"model": model})
