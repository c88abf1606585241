"""The shortcut path of a sample: against masks, transposed shortcuts and layer norms by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
from problems import GPT2
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.broadcast import Refinement
from grape_hf.core.paths import has_path, pull_back

DOUBLE = {"dtype": torch.float64}


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=7, in_chans=3).double()


def by_hand(block: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """Mask of the output's ReLU, then the transposed shortcut."""
    h = block(x)
    delta = delta * (h > 0)
    if block.downsample is None:
        return delta
    at = x.detach().requires_grad_()
    return torch.autograd.grad(block.downsample(at), at, delta)[0]


@pytest.mark.parametrize("block", ["layer1.0", "layer1.1", "layer2.0"])
def test_a_residual_block_of_a_resnet(block):
    block = resnet().get_submodule(block)
    x = torch.randn(4, 64, 8, 8, **DOUBLE).requires_grad_() * 1
    h = block(x)
    delta = torch.randn_like(h)
    torch.testing.assert_close(pull_back(h, x, delta), by_hand(block, x, delta))


def test_a_pre_norm_transformer_is_the_identity():
    block = next(iter(find_blocks(GPT2.model()).values()))
    x = torch.randn(2, 5, 16).requires_grad_() * 1
    h = block(x)
    delta = torch.randn(2, 5, 16)
    assert pull_back(h[0] if isinstance(h, tuple) else h, x, delta) is delta


def test_a_post_norm_transformer_keeps_its_norms():
    config = BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = BertModel(config).double().encoder.layer[0]
    x = torch.randn(2, 5, 16, **DOUBLE).requires_grad_() * 1
    h = layer(x)
    h = h[0] if isinstance(h, tuple) else h
    delta = torch.randn_like(h)
    # The branches' values stand in the norms' inputs; their gradients do not.
    branch = layer.attention.output.dense(layer.attention.self(x)[0]).detach()
    at = x.detach().requires_grad_()
    middle = layer.attention.output.LayerNorm(branch + at)
    mlp = layer.output.dense(layer.intermediate(middle)).detach()
    (expected,) = torch.autograd.grad(layer.output.LayerNorm(mlp + middle), at, delta)
    torch.testing.assert_close(pull_back(h, x, delta), expected)


# A block of h, its branch f and a norm n; each holds the branch's values, and drops its gradient, by f(h.detach()).
SUMS = {
    "scaled branch": lambda h, f, n: n(torch.add(h, f(h), alpha=0.1)),
    "scaled shortcut": lambda h, f, n: torch.add(f(h), h, alpha=0.5),
    "scaled shortcut below a norm": lambda h, f, n: n(torch.add(f(h), h, alpha=0.5)),
    "the branch is taken off": lambda h, f, n: n(h - f(h)),
    "the shortcut is taken off": lambda h, f, n: n(torch.sub(f(h), h, alpha=2.0)),
    "in place": lambda h, f, n: n((h * 1.0).add_(f(h), alpha=0.3)),
    "one for all positions": lambda h, f, n: n(h + f(h.mean(1, keepdim=True))),
    "one for all positions, at the end": lambda h, f, n: h + f(h.mean(1, keepdim=True)),
    "one number a position": lambda h, f, n: torch.tanh(h + f(h)[..., :1]),
    "the shortcut is one for all": lambda h, f, n: n(h.mean(1, keepdim=True) * 1.0 + f(torch.sin(torch.cos(n(h))))),
    "three": lambda h, f, n: n(f(h) + (f(2 * h) + h)),
    "two sums": lambda h, f, n: n(torch.add(n(torch.add(h, f(h), alpha=0.2)), f(n(h)), alpha=0.3)),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_sends_the_shortcut_its_share(name):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)).double()
    norm = nn.LayerNorm(6).double()
    x = torch.randn(3, 4, 6, **DOUBLE).requires_grad_() * 1
    h = SUMS[name](x, layers, norm)
    delta = torch.randn_like(h)
    at = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(SUMS[name](at, lambda t: layers(t).detach(), norm), at, delta)
    got = pull_back(h, x, delta)
    assert got is not None
    torch.testing.assert_close(got, expected)


def test_a_plain_chain_has_no_shortcut():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(3, 4).requires_grad_() * 1
    h = block(x)
    assert pull_back(h, x, torch.randn(3, 4)) is None
    assert not has_path(h, x)


def test_the_error_goes_down_the_path_of_the_very_sample():
    """A point behind each residual block; y is the logits. The gradients are those of a chain of paths by hand."""
    model = resnet().train()
    blocks = [b for stage in (model.layer1, model.layer2) for b in stage]
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 7).double()
    x, target = torch.randn(4, 3, 32, 32, **DOUBLE), torch.randint(7, (4,))
    boundaries = Boundaries(blocks, output=model.fc)
    refinement = Refinement(path=True)
    with boundaries.attached(), boundaries.broadcast(["identity"] * 3, keep="e and deltas", refinement=refinement) as f:
        F.cross_entropy(model(x), target).backward()
    (forward,) = f
    with torch.no_grad():
        h = [model.maxpool(model.act1(model.bn1(model.conv1(x))))]
        for block in blocks:
            h.append(block(h[-1]))
    top = h[4].clone().requires_grad_()
    logits = model.fc(model.global_pool(top))
    (at_top,) = torch.autograd.grad(F.cross_entropy(logits, target), top)
    expected = at_top
    for i in (3, 2, 1):
        expected = by_hand(blocks[i], h[i], expected)
        torch.testing.assert_close(forward.sent[i - 1], expected)


def test_as_many_sweeps_as_boundaries_are_backpropagation():
    model = resnet().train()
    blocks = [b for stage in (model.layer1, model.layer2, model.layer3) for b in stage]
    x, target = torch.randn(4, 3, 32, 32, **DOUBLE), torch.randint(7, (4,))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        F.cross_entropy(model(x), target).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    boundaries = Boundaries(blocks)
    with boundaries.attached(), boundaries.broadcast(["identity"] * 5, refinement=Refinement(path=True, sweeps=5)):
        got = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12)
