"""PEPITA against the paper's algorithm in NumPy loops, and what it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits import ConvNet, batch, odd_net, plain_net
from helpers import count_hooks
from torch import Tensor, nn

from grape_hf import GrapeArgumentsMixin
from grape_hf.engine.step import MicroBatch
from grape_hf.methods.pepita import Pepita

OPTIONS = GrapeArgumentsMixin(method="pepita")


def gradients(model: nn.Module, inputs: dict[str, Tensor], method: Pepita, parts: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    with method.step(MicroBatch(0, range(len(inputs["labels"])), parts)):
        (model(**inputs)["loss"] / parts).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def convolve(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int) -> np.ndarray:
    """One sample, (channels, H, W); no padding."""
    k = w.shape[-1]
    places = range(0, x.shape[-1] - k + 1, stride)
    patches = [[x[:, r : r + k, c : c + k] for c in places] for r in places]
    return np.array([[[(x * k).sum() + c for x in row] for row in patches] for k, c in zip(w, b, strict=True)])


def pool(h: np.ndarray) -> np.ndarray:
    half = range(0, h.shape[-1], 2)
    return np.array([[[m[r : r + 2, c : c + 2].max() for c in half] for r in half] for m in h])


def run(x: np.ndarray, p: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input, activation) of each of the four layers of ``plain_net``."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    h1 = relu(convolve(padded, p["blocks.0.0.weight"], p["blocks.0.0.bias"], 1))
    x2 = pool(h1)
    h2 = relu(convolve(x2, p["blocks.1.0.weight"], p["blocks.1.0.bias"], 2))
    x3 = h2.flatten()
    h3 = relu(p["blocks.2.1.weight"] @ x3 + p["blocks.2.1.bias"])
    return [(padded, h1), (x2, h2), (x3, h3), (h3, p["fc.weight"] @ h3 + p["fc.bias"])]


def test_the_algorithm_in_loops():
    model = plain_net().double()
    method = Pepita(model, OPTIONS, seed=4)
    inputs = batch(5)
    got = gradients(model, inputs, method)
    p = {name: q.detach().numpy() for name, q in model.named_parameters()}
    F_ = method._F.numpy()
    expected = {name: np.zeros_like(q) for name, q in p.items()}
    for x, label in zip(inputs["pixel_values"].numpy(), inputs["labels"].tolist(), strict=True):
        standard = run(x, p)
        logits = standard[-1][1]
        e = np.exp(logits) / np.exp(logits).sum() - np.eye(10)[label]
        modulated = run(x + (F_ @ e).reshape(x.shape), p)
        for l, (name, stride) in enumerate([("blocks.0.0", 1), ("blocks.1.0", 2)]):  # noqa: E741
            difference, source = standard[l][1] - modulated[l][1], modulated[l][0]
            _, rows, columns = difference.shape
            for r in range(rows):
                for c in range(columns):
                    patch = source[:, stride * r : stride * r + 3, stride * c : stride * c + 3]
                    product = difference[:, r, c, None, None, None] * patch
                    expected[f"{name}.weight"] += product / (rows * columns) / 5
                    expected[f"{name}.bias"] += difference[:, r, c] / (rows * columns) / 5
        difference = standard[2][1] - modulated[2][1]
        expected["blocks.2.1.weight"] += np.outer(difference, modulated[2][0]) / 5
        expected["blocks.2.1.bias"] += difference / 5
        expected["fc.weight"] += np.outer(e, modulated[3][0]) / 5
        expected["fc.bias"] += e / 5
    for name, value in expected.items():
        assert np.abs(value).max() > 1e-6
        torch.testing.assert_close(got[name], torch.tensor(value), msg=lambda text, name=name: f"{name}: {text}")


def test_the_fixed_matrix():
    """Uniform on ±0.05 sqrt(6 / 64): its square has mean 0.05^2 2 / 64, of 640 draws known to 3.5 %."""
    model = plain_net().double()
    first, again, other = (Pepita(model, OPTIONS, seed) for seed in (1, 1, 2))
    for method in (first, again, other):
        gradients(model, batch(4), method)
    assert first._F.shape == (64, 10)
    assert torch.equal(first._F, again._F)
    assert not torch.equal(first._F, other._F)
    assert first._F.abs().max() <= 0.05 * (6 / 64) ** 0.5
    torch.testing.assert_close(first._F.square().mean(), torch.tensor(0.05**2 * 2 / 64).double(), rtol=0.1, atol=0)


def test_micro_batches_add_up_to_the_batch():
    model = plain_net().double()
    method = Pepita(model, OPTIONS)
    whole = {name: g.clone() for name, g in gradients(model, batch(8), method).items()}
    parts = [{name: value[i::2] for name, value in batch(8).items()} for i in range(2)]
    sums = [{name: g.clone() for name, g in gradients(model, part, method, parts=2).items()} for part in parts]
    for name, value in whole.items():
        torch.testing.assert_close(sums[0][name] + sums[1][name], value)


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "in-place": lambda: nn.ReLU(inplace=True)}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_dropout_is_the_same_in_both_passes(activation):
    """Without modulation both passes are one, if their masks are: then no layer but the last learns."""
    model = plain_net(activation).double()
    for block in model.blocks:
        block.append(nn.Dropout(0.5))
    method = Pepita(model, OPTIONS)
    method._F = torch.zeros(64, 10).double()
    torch.manual_seed(3)
    with method.step(MicroBatch(0, range(8))):
        model(**batch(8))["loss"].backward()
        drawn = torch.rand(())
    after = torch.rand(())
    hidden = [p.grad for name, p in model.named_parameters() if not name.startswith("fc")]
    assert hidden
    assert all(g.abs().max() == 0 for g in hidden)
    torch.manual_seed(3)
    model(**batch(8))
    assert torch.equal(torch.rand(()), drawn)
    assert torch.equal(torch.rand(()), after)


def test_in_place_activations_are_like_others():
    model, twin = plain_net().double(), plain_net(lambda: nn.ReLU(inplace=True)).double()
    twin.load_state_dict(model.state_dict())
    got, expected = (gradients(m, batch(8), Pepita(m, OPTIONS)) for m in (twin, model))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def test_frozen_layers_and_hooks():
    model = plain_net().double()
    model.blocks[1].requires_grad_(False)
    got = gradients(model, batch(4), Pepita(model, OPTIONS))
    assert {name for name, g in got.items() if g is None} == {"blocks.1.0.weight", "blocks.1.0.bias"}
    assert count_hooks(model) == 0


class Skip(nn.Sequential):
    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


class Reused(ConvNet):
    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = pixel_values
        for block in (self.blocks[0], self.blocks[0], self.blocks[1]):
            h = block(h)
        return {"loss": F.cross_entropy(self.fc(h.flatten(1)), labels)}


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"blocks.0.1 is a BatchNorm2d.*another method"):
        Pepita(odd_net(), OPTIONS)
    with pytest.raises(ValueError, match="at least two layers"):
        Pepita(nn.Linear(3, 3), OPTIONS)
    conv = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)]
    residual = ConvNet([nn.Sequential(conv[0], nn.ReLU()), Skip(conv[1])], nn.Linear(64, 10))
    reused = Reused([nn.Sequential(conv[0]), nn.Sequential(conv[2])], nn.Linear(64, 10))
    for model, says in (
        (residual, "behind blocks.1.0 two activations meet in"),
        (reused, "blocks.0.0 ran as number 2"),
    ):
        model.double()
        with pytest.raises(ValueError, match=says):
            gradients(model, batch(2), Pepita(model, OPTIONS))
        assert count_hooks(model) == 0


def test_generation_in_between_is_left_alone():
    """A forward without gradients (a metric, a teacher) is not a pass."""
    model = plain_net().double()
    method = Pepita(model, OPTIONS)
    expected = gradients(model, batch(4), method)
    expected = {name: g.clone() for name, g in expected.items()}
    model.zero_grad()
    with method.step(MicroBatch(0, range(4))):
        with torch.no_grad():
            model(**batch(3))
        model(**batch(4))["loss"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=0)
