"""Forward gradients: (dL . v) v for the very draws, and the gradient itself in the mean."""

from queue import SimpleQueue

import pytest
import torch
import torch.nn.functional as F
from digits import ConvNet, batch, odd_net, plain_net, small_net
from helpers import count_hooks
from problems import gpt2
from torch import Tensor, nn

from grape_hf import GrapeArgumentsMixin
from grape_hf.core.jacobian import Noise
from grape_hf.core.layout import AUTO
from grape_hf.core.tangents import ForwardModeError
from grape_hf.engine.step import MicroBatch
from grape_hf.methods.base import seeded
from grape_hf.methods.forward_gradient import ForwardGradient
from grape_hf.training_args import resolved

WEIGHT = resolved(GrapeArgumentsMixin(method="forward_gradient", perturbation_space="weight"))
ACTIVATION = resolved(GrapeArgumentsMixin(method="forward_gradient"))
BATCH = 6


def backpropagated(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = model(**inputs)["loss"]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), gradients, strict=True))


def estimate(model: nn.Module, inputs: dict[str, Tensor], method: ForwardGradient, step: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    with method.step(MicroBatch(step, range(BATCH))):
        model(**inputs)["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [plain_net, odd_net, gpt2], ids=lambda build: build.__name__)
def test_in_weight_space_it_is_the_slope_times_the_direction(build):
    model = build().double()
    tokens = torch.randint(31, (BATCH, 8))
    inputs = {"input_ids": tokens, "labels": tokens} if build is gpt2 else batch(BATCH)
    got = estimate(model, inputs, ForwardGradient(model, WEIGHT, seed=3), step=7)
    v = {n: torch.randn(p.shape, generator=seeded(3, 7, n)).double() for n, p in model.named_parameters()}
    gradient = backpropagated(model, inputs)
    slope = sum((gradient[name] * v[name]).sum() for name in v)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if build is gpt2 else {}  # transformers computes its loss in float32
    for name, direction in v.items():
        torch.testing.assert_close(got[name], slope * direction, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_in_weight_space_frozen_weights_are_left_alone():
    model = plain_net().double()
    model.blocks[1].requires_grad_(False)
    got = estimate(model, batch(BATCH), ForwardGradient(model, WEIGHT))
    assert {name for name, g in got.items() if g is None} == {"blocks.1.0.weight", "blocks.1.0.bias"}
    v = {n: torch.randn(p.shape, generator=seeded(0, 0, n)).double() for n, p in model.named_parameters()}
    model.requires_grad_(True)
    gradient = backpropagated(model, batch(BATCH))
    slope = sum((gradient[name] * v[name]).sum() for name, g in got.items() if g is not None)
    torch.testing.assert_close(got["fc.bias"], slope * v["fc.bias"])


def test_in_activation_space_it_is_each_samples_slope_times_its_direction():
    """Sample by sample: the slope of its loss by one jvp from h_1 on, the block's gradient from slope * u."""
    model = plain_net(nn.Tanh).double()
    inputs = batch(BATCH)
    got = estimate(model, inputs, ForwardGradient(model, ACTIVATION, seed=3), step=7)
    noise = Noise(3, 7, range(BATCH))
    first, second, last = model.blocks

    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(BATCH):
        x, label = inputs["pixel_values"][i : i + 1], inputs["labels"][i : i + 1]
        h1 = first(x)
        h2 = second(h1.detach())
        u1, u2 = (noise.vectors(k, AUTO.vectors(batchwise(h)))[i].reshape(h.shape) for k, h in enumerate((h1, h2)))

        def loss(a: Tensor, b: Tensor, h1: Tensor = h1, label: Tensor = label) -> Tensor:
            """The sample's share of the loss with a added at h_1 and b at h_2."""
            return F.cross_entropy(model.fc(last(second(h1.detach() + a) + b)), label) / BATCH

        zeros = torch.zeros_like(u1), torch.zeros_like(u2)
        with torch.no_grad():
            _, slope = torch.func.jvp(loss, zeros, (u1, u2))
        add(expected, model, h1, slope * u1, "blocks.0.")
        add(expected, model, h2, slope * u2, "blocks.1.")
        exact = F.cross_entropy(model.fc(last(h2.detach())), label) / BATCH
        add(expected, model, exact, torch.ones_like(exact), ("blocks.2.", "fc."))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def batchwise(h: Tensor) -> Tensor:
    return h.expand(BATCH, *h.shape[1:])


def add(total: dict[str, Tensor], model: nn.Module, output: Tensor, delta: Tensor, prefix: str | tuple) -> None:
    named = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
    gradients = torch.autograd.grad(output, list(named.values()), delta)
    for name, g in zip(named, gradients, strict=True):
        total[name] += g


@pytest.mark.parametrize(("options", "draws"), [(WEIGHT, 1000), (ACTIVATION, 400)], ids=["weight", "activation"])
def test_it_is_unbiased(options, draws):
    """The mean of n independent draws is off by s / sqrt(n), s their own standard deviation, in each number."""
    model = small_net().double()
    inputs = batch(BATCH)
    method = ForwardGradient(model, options)
    estimates = torch.stack([flat(estimate(model, inputs, method, step)) for step in range(draws)])
    exact = flat(backpropagated(model, inputs))
    mean, error = estimates.mean(0), estimates.std(0) / draws**0.5
    noisy = error > 1e-12  # in activation space the last block and the head are exact
    assert noisy.sum() >= 50
    torch.testing.assert_close(mean[~noisy], exact[~noisy])
    z = (mean - exact)[noisy] / error[noisy]
    assert z.abs().max() < 5  # of fewer than 150 numbers: once in 10^4 runs, were the seed not fixed
    assert 0.5 < z.square().mean() < 2
    assert torch.cosine_similarity(mean, exact, dim=0) > 0.8


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def noisy_net() -> ConvNet:
    net = odd_net()
    net.blocks[2].append(nn.Dropout(0.5))
    return net


@pytest.mark.parametrize("options", [WEIGHT, ACTIVATION], ids=["weight", "activation"])
def test_the_training_forward_is_that_of_backpropagation(options):
    """Same loss, same dropout, running statistics moved once; weights and hooks as they were.

    In activation space a look at the blocks goes before the first one, and another pass before each, with the dropout
    that the forward will have. They leave no trace.
    """
    model, twin = noisy_net().double(), noisy_net().double()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    loss = twin(**batch(BATCH))["loss"]
    loss.backward()
    after = torch.rand(())
    torch.manual_seed(1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = SimpleQueue[Tensor]()  # what a hook puts into a list is put back behind passes on the side
    watch = model.blocks[2][-1].register_forward_hook(lambda m, x, y: seen.put(y == 0))
    with ForwardGradient(model, options).step(MicroBatch(0, range(BATCH))):
        ours = model(**batch(BATCH))["loss"]
        ours.backward()
    assert torch.equal(torch.rand(()), after)
    watch.remove()
    dropped = [seen.get() for _ in range(seen.qsize())]
    assert len(dropped) == (1 if options is WEIGHT else 3)
    assert all(torch.equal(mask, dropped[-1]) for mask in dropped)
    torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(ours).primal, loss, rtol=0, atol=0)
    for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0, msg=name)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert count_hooks(model) == 0
    with torch.autograd.forward_ad.dual_level():
        assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in model.parameters())


def test_in_weight_space_no_graph_is_built():
    model = plain_net()
    with ForwardGradient(model, WEIGHT).step(MicroBatch(0, range(BATCH))):
        assert model(**batch(BATCH, torch.float32))["loss"].grad_fn is None


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx, delta: Tensor) -> Tensor:
        return delta


class Opaque(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return NoRule.apply(h)


@pytest.mark.parametrize("options", [WEIGHT, ACTIVATION], ids=["weight", "activation"])
def test_an_operator_without_a_forward_mode_rule_is_refused_and_leaves_nothing(options):
    model = plain_net()
    model.blocks[2].append(Opaque())
    with pytest.raises(ForwardModeError, match="use another method"):
        estimate(model, batch(BATCH, torch.float32), ForwardGradient(model, options))
    assert count_hooks(model) == 0
    with torch.autograd.forward_ad.dual_level():  # the level of the failed step is over
        pass
    model.blocks[2].pop(-1)
    assert all(
        g is not None for g in estimate(model, batch(BATCH, torch.float32), ForwardGradient(model, options)).values()
    )


def test_a_single_block_is_refused_in_activation_space_alone():
    model = ConvNet([nn.Sequential(nn.Flatten(), nn.Linear(64, 8))], nn.Linear(8, 10))
    with pytest.raises(ValueError, match='ConvNet has one block.*perturbation_space="weight"'):
        ForwardGradient(model, ACTIVATION)
    ForwardGradient(model, WEIGHT)


def test_blocks_that_begin_in_place_change_nothing_of_the_block_before():
    """ReLU on what block 1 has made, whose own backward needs it (tanh)."""
    blocks = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh()),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 6), nn.Tanh()),
    ]
    model = ConvNet(blocks, nn.Linear(4, 10)).double()
    got = estimate(model, batch(BATCH), ForwardGradient(model, ACTIVATION))
    model.blocks[1][0].inplace = False
    expected = estimate(model, batch(BATCH), ForwardGradient(model, ACTIVATION))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
