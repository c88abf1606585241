"""Feedback alignment: backpropagation where B_l is W_l, the formula of the paper where it is not."""

from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from digits import ConvNet, batch, odd_net, plain_net
from problems import gpt2
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from transformers import MixtralConfig, MixtralForCausalLM

from grape_hf import GrapeArgumentsMixin
from grape_hf.engine.step import MicroBatch
from grape_hf.methods.fa import FeedbackAlignment

OPTIONS = GrapeArgumentsMixin(method="fa")
STEP = MicroBatch(step=0, places=range(8))


def gradients(model: nn.Module, inputs: dict[str, Tensor], fa: FeedbackAlignment | None = None) -> dict[str, Tensor]:
    """The loss, and the gradients by name; of backpropagation if there is no ``fa``."""
    model.zero_grad()
    with nullcontext() if fa is None else fa.step(STEP):
        loss = model(**inputs)["loss"]
        loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [plain_net, odd_net, gpt2], ids=lambda build: build.__name__)
def test_with_the_weights_themselves_it_is_backpropagation(build):
    model = build().double()
    tokens = torch.randint(31, (3, 8))
    inputs = {"input_ids": tokens, "labels": tokens} if build is gpt2 else batch(8)
    expected = gradients(model, inputs)
    fa = FeedbackAlignment(model, OPTIONS)
    random = gradients(model, inputs, fa)
    assert torch.equal(random["loss"], expected["loss"])
    fa._B = {name: p.detach() for name, p in model.named_parameters()}
    for name, value in gradients(model, inputs, fa).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    # Every layer but the first passes its error on through B_l, so all gradients but those of the head differ.
    exact = {name for name in expected if torch.allclose(random[name], expected[name])} - {"loss"}
    head = {"plain_net": {"fc.weight", "fc.bias"}, "odd_net": {"fc.weight", "fc.bias"}, "gpt2": set()}
    assert exact == head[build.__name__]


class Classifier(nn.Module):
    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.net = timm.create_model(architecture, num_classes=10)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm starts residual branches at zero: nothing would flow through them

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.net(x), labels)}


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_real_models(architecture):
    """Residual blocks, grouped layers, attention: again backpropagation if B_l is W_l, and else not."""
    model = Classifier(architecture).double()
    inputs = {"x": torch.randn(2, 3, 160, 160).double(), "labels": torch.tensor([1, 2])}
    expected = gradients(model, inputs)
    fa = FeedbackAlignment(model, OPTIONS)
    random = gradients(model, inputs, fa)
    weights = [name for name, p in model.named_parameters() if p.ndim > 1 and "head" not in name and "fc" not in name]
    assert weights
    assert not [name for name in weights if torch.allclose(random[name], expected[name])]
    fa._B = {name: p.detach() for name, p in model.named_parameters()}
    for name, value in gradients(model, inputs, fa).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_formula_layer_by_layer():
    model = plain_net().double()
    inputs = batch(8)
    fa = FeedbackAlignment(model, OPTIONS, seed=5)
    got = gradients(model, inputs, fa)
    with torch.no_grad():
        conv1, conv2, linear, head = model.blocks[0][0], model.blocks[1][0], model.blocks[2][1], model.fc
        B2, B3, B4 = (fa.feedback(layer.weight) for layer in (conv2, linear, head))
        x = inputs["pixel_values"]
        z1 = F.conv2d(x, conv1.weight, conv1.bias, padding=1)
        h1, where = F.max_pool2d(z1.relu(), 2, return_indices=True)
        z2 = F.conv2d(h1, conv2.weight, conv2.bias, stride=2)
        z3 = z2.relu().flatten(1) @ linear.weight.T + linear.bias
        logits = z3.relu() @ head.weight.T + head.bias
        delta4 = (logits.softmax(1) - F.one_hot(inputs["labels"], 10)) / 8
        delta3 = (delta4 @ B4) * (z3 > 0)
        delta2 = (delta3 @ B3).reshape(z2.shape) * (z2 > 0)
        unpooled = F.max_unpool2d(conv2d_input(h1.shape, B2, delta2, stride=2), where, 2)
        delta1 = unpooled * (z1 > 0)
        expected = {
            "fc.weight": delta4.T @ z3.relu(),
            "fc.bias": delta4.sum(0),
            "blocks.2.1.weight": delta3.T @ z2.relu().flatten(1),
            "blocks.2.1.bias": delta3.sum(0),
            "blocks.1.0.weight": conv2d_weight(h1, conv2.weight.shape, delta2, stride=2),
            "blocks.1.0.bias": delta2.sum((0, 2, 3)),
            "blocks.0.0.weight": conv2d_weight(x, conv1.weight.shape, delta1, padding=1),
            "blocks.0.0.bias": delta1.sum((0, 2, 3)),
        }
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_matrices_depend_on_seed_and_name_alone():
    model, other = plain_net(), plain_net()
    pairs = list(zip(model.named_parameters(), other.named_parameters(), strict=True))
    weights = [(p, o) for (name, p), (_, o) in pairs if name.endswith("weight")]
    first, again = FeedbackAlignment(model, OPTIONS, seed=1), FeedbackAlignment(other, OPTIONS, seed=1)
    again.feedback(weights[-1][1])  # in another order
    assert all(torch.equal(first.feedback(p), again.feedback(o)) for p, o in weights)
    assert not torch.equal(first.feedback(weights[0][0]), FeedbackAlignment(model, OPTIONS, 2).feedback(weights[0][0]))
    twins = ConvNet([nn.Linear(6, 6), nn.Linear(6, 6)], nn.Linear(6, 10))
    fa = FeedbackAlignment(twins, OPTIONS)
    assert not torch.equal(fa.feedback(twins.blocks[0].weight), fa.feedback(twins.blocks[1].weight))
    wide = nn.Linear(300, 500)
    B = FeedbackAlignment(wide, OPTIONS).feedback(wide.weight)
    torch.testing.assert_close(B.square().mean(), torch.tensor(2 / 800), rtol=0.02, atol=0)  # Glorot; 150,000 draws


def test_autocast():
    """In bf16 as in float32, but for the resolution of bf16, 2^-8, through four layers."""
    model = plain_net(nn.Tanh)
    inputs = batch(8, torch.float32)
    fa = FeedbackAlignment(model, OPTIONS)
    expected = gradients(model, inputs, fa)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, inputs, fa)
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - value).norm() < 4 * 2**-8 * value.norm(), name


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 64))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight.t()


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_experts_in_one_tensor_are_refused(experts: str):
    """They would learn by backpropagation, and so would all below them."""
    config = MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    x = torch.randint(31, (2, 8))
    fa = FeedbackAlignment(model, OPTIONS)
    with pytest.raises(ValueError, match=r"parameter model.layers.0.mlp.experts.gate_up_proj, or a part of it"):
        gradients(model, {"input_ids": x, "labels": x}, fa)


def test_what_it_cannot_route_is_refused():
    attention = ConvNet([nn.TransformerEncoderLayer(8, 2, 8)], nn.Linear(64, 10))
    with pytest.raises(ValueError, match=r"blocks.0.self_attn is a MultiheadAttention.*another method"):
        FeedbackAlignment(attention, OPTIONS)
    computed = ConvNet([nn.Conv2d(1, 1, 1)], nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))
    bare = ConvNet([nn.Conv2d(1, 1, 1)], Product())
    for model, says in ((computed, r"linear whose weight, \(10, 64\), is computed"), (bare, "with the parameter fc.w")):
        model.double()
        with pytest.raises(ValueError, match=says):
            gradients(model, batch(2), FeedbackAlignment(model, OPTIONS))
