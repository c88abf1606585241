"""Direct feedback in convolutional networks: the numerical core on maps, with oracles, and real timm models.

Oracles are in float64: an explicit Jacobian by ``jacrev``, a network built by hand, backpropagation itself.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from grape_hf import GrapeTrainer
from grape_hf.core.alignment import frobenius_cosine
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.feedback import Feedback
from grape_hf.core.isolation import isolated
from grape_hf.core.jacobian import JacobianSum, Noise, jacobian_terms
from grape_hf.core.layout import Layout
from grape_hf.core.shortcut import shortcut_feedback
from grape_hf.engine.probe import probe

timm = pytest.importorskip("timm", reason="the vision extra is not installed")

SHARING = ["none", "position", "grid"]


class ConvNet(nn.Module):
    """Three blocks of a convolution each, maps of 4 x 4 and 2 x 2, a pooled head."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), activation()),
                nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), activation()),
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), activation()),
            ]
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def setting(sharing: str = "none", **options: type[nn.Module]) -> tuple[ConvNet, Boundaries, Tensor]:
    model = ConvNet(**options).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    return model, Boundaries(list(model.blocks), model.fc, Layout(sharing, cells=2)), x


def jacobians(model: ConvNet, layout: Layout, x: Tensor) -> list[Tensor]:
    """Mean over samples and positions of J_l, ``(n_y, n_l)`` in the layout's vectors, sample by sample with jacrev."""
    result = []
    for index in range(2):
        h = x
        for block in model.blocks[: index + 1]:
            h = block(h)

        def rest(sample: Tensor, index: int = index) -> Tensor:
            h = sample[None]
            for block in model.blocks[index + 1 :]:
                h = block(h)
            return model.fc(h.mean((2, 3)))[0]

        rows = torch.stack([jacrev(rest)(sample) for sample in h.detach()])  # (batch, n_y, C, H, W)
        result.append(torch.stack([layout.vectors(rows[:, k]).mean((0, 1)) for k in range(rows.shape[1])]))
    return result


def test_exact_feedback_is_backpropagation_in_a_linear_conv_net():
    model, boundaries, x = setting(activation=nn.Identity)
    target = torch.randint(3, (5,))
    F.cross_entropy(model(x), target).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    B = [j.mT for j in jacobians(model, boundaries.layout, x)]
    with boundaries.attached(), boundaries.broadcast(B):
        F.cross_entropy(model(x), target).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("sharing", SHARING)
def test_each_position_gets_b_times_e(sharing):
    model, boundaries, x = setting(sharing)
    B = [torch.randn(j.mT.shape, dtype=torch.float64) for j in jacobians(model, boundaries.layout, x)]
    y = model(x)
    e = torch.randn_like(y)
    h = model.blocks[0](x)
    if sharing == "none":
        delta = (e @ B[0].mT).view_as(h)
    elif sharing == "position":
        delta = (e @ B[0].mT)[:, :, None, None].expand_as(h)
    else:  # 2 x 2 cells of 2 x 2 positions
        delta = (e @ B[0].mT).view(5, 3, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = torch.autograd.grad(h, list(model.blocks[0].parameters()), delta)
    with boundaries.attached(), boundaries.broadcast(B):
        model(x).backward(e)
    for p, gradient in zip(model.blocks[0].parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def mean_estimate(
    boundaries: Boundaries, model: nn.Module, x: Tensor, draws: int, **options: object
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean over draws, and its standard error (Frobenius)."""
    with boundaries.attached():
        samples = [
            jacobian_terms(boundaries, lambda: model(x), Noise(0, step, range(len(x))), **options).mean()
            for step in range(draws)
        ]
    stacked = [torch.stack(s) for s in zip(*samples, strict=True)]
    return [s.mean(0) for s in stacked], [s.var(0).sum().sqrt() / draws**0.5 for s in stacked]


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
@pytest.mark.parametrize("sharing", SHARING)
def test_the_estimate_is_unbiased(sharing, mode):
    model, boundaries, x = setting(sharing)
    mean, error = mean_estimate(boundaries, model, x, 600, mode=mode)
    for m, se, j in zip(mean, error, jacobians(model, boundaries.layout, x), strict=True):
        # Of the mean of n_y n_l entries' distance, the square has mean se^2; 3 se is far outside.
        assert (m - j).norm() < 3 * se
        assert se < 0.5 * j.norm()  # else the test could not tell


@pytest.mark.parametrize("sharing", SHARING)
def test_weight_space_estimates_the_jacobian_times_s(sharing):
    """E[J_hat] = J_l S, S = E[u u^T], u = (dh_l/dW) p_W by jacrev over the weights; all positions move with one p_W."""
    model, boundaries, x = setting(sharing)
    layout = boundaries.layout
    expected, h = [], x
    for index, block in enumerate(model.blocks[:2]):
        weights = {name: p.detach() for name, p in block.named_parameters()}
        du = jacrev(lambda w, block=block, h=h: functional_call(block, w, (h,)))(weights)
        flat = torch.cat([d.flatten(4) for d in du.values()], dim=4)  # (batch, C, H, W, weights)
        h = block(h).detach()

        def rest(sample: Tensor, index: int = index) -> Tensor:
            z = sample[None]
            for later in model.blocks[index + 1 :]:
                z = later(z)
            return model.fc(z.mean((2, 3)))[0]

        terms = []
        for s in range(len(x)):
            response = torch.einsum("ychw,chwp->yp", jacrev(rest)(h[s]), flat[s])
            columns = torch.stack([layout.vectors(flat[s : s + 1, ..., w]).mean((0, 1)) for w in range(flat.shape[-1])])
            terms.append(response @ columns)
        expected.append(torch.stack(terms).mean(0))
    mean, error = mean_estimate(boundaries, model, x, 1500, mode="dual", passes="per_block", spaces=["weight"] * 2)
    for m, se, j in zip(mean, error, expected, strict=True):
        assert (m - j).norm() < 3 * se
        assert se < 0.25 * j.norm()


def test_a_sample_whose_activation_is_zero_has_no_say():
    model, boundaries, x = setting(activation=nn.ReLU)
    with torch.no_grad():
        for p in model.blocks[0].parameters():
            p.fill_(-1.0)
        x = x.abs()
        x[1:] = -x[1:]  # only these are above zero
    with boundaries.attached():
        terms = jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(5)), passes="per_block")
        rest = jacobian_terms(boundaries, lambda: model(x[1:]), Noise(0, 0, range(1, 5)), passes="per_block")
    assert not model.blocks[0](x)[0].any()
    torch.testing.assert_close(terms.sums[0], rest.sums[0])


@pytest.mark.parametrize("sharing", ["none", "position"])
def test_lms_is_bounded_on_maps(sharing):
    """n_l far above the number of tangents, and one error for 256 positions: without its bound the rule diverges."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    boundaries = Boundaries(blocks, model[-1], Layout(sharing))
    x = torch.randn(4, 3, 16, 16)
    B = [torch.zeros(8 * 256 if sharing == "none" else 8, 4) for _ in range(2)]
    feedback = Feedback(B, rule="lms", lr=0.5)

    def residual() -> float:
        """How much of the tangent of y is not predicted, over some draws kept for that."""
        total = 0.0
        for step in range(1000, 1020):
            predicted = jacobian_terms(boundaries, lambda: model(x), Noise(0, step, range(4)), B=feedback.B)
            total += sum(s.norm() for s in predicted.sums).item()
        return total

    with boundaries.attached():
        before = residual()
        for step in range(200):
            estimate = JacobianSum()
            estimate.add(jacobian_terms(boundaries, lambda: model(x), Noise(0, step, range(4)), B=feedback.B))
            feedback.refine(estimate)
        assert residual() < before


class Residual(nn.Module):
    """A residual block, with a projection where channels change; without its branch it is the shortcut alone."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        changed = width_in != width or stride > 1
        self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride)) if changed else None
        self.with_branch = True

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if not self.with_branch:
            return F.relu(shortcut)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def residual_net() -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(Residual(2, 4), Residual(4, 4), Residual(4, 6, 2), Residual(6, 6), *head).double()


@pytest.mark.parametrize("sharing", SHARING)
def test_the_shortcut_start_is_the_jacobian_of_the_shortcut_path(sharing):
    model = residual_net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    boundaries = Boundaries(list(model[:4]), model[-1], Layout(sharing, cells=2))
    B = shortcut_feedback(model, boundaries, lambda: model(x), ["h_1", "h_2", "h_3"])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    h = model[0](x).detach()  # block 1 and the stem make h_1 as they always do
    for block in model[1:4]:
        block.with_branch = False
    for index, b in enumerate(B):
        rest = model[index + 1 :]
        rows = torch.stack([jacrev(lambda s, rest=rest: rest(s[None])[0])(sample) for sample in h])
        expected = [boundaries.layout.vectors(rows[:, k]).mean((0, 1)) for k in range(3)]
        torch.testing.assert_close(b, torch.stack(expected, dim=1))
        h = model[index + 1](h).detach()


def test_a_block_without_a_shortcut_has_no_shortcut_start():
    model, boundaries, x = setting()
    with pytest.raises(ValueError, match=r'feedback_init="identity".*from blocks\.0'):
        shortcut_feedback(model, boundaries, lambda: model(x), ["blocks.0", "blocks.1"])


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(self.act(x)))


def test_a_block_may_begin_by_changing_its_input_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(*(PreActivation() for _ in range(3)), nn.Flatten(), nn.Linear(48, 2)).double()
    plain = nn.Sequential(*(PreActivation() for _ in range(3)), nn.Flatten(), nn.Linear(48, 2)).double()
    plain.load_state_dict(model.state_dict())
    for block in plain[:3]:
        block.act = nn.ReLU()
    # A convolution's own backward does not need its output; a tanh's does.
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    B = [torch.randn(48, 2, dtype=torch.float64) for _ in range(2)]
    gradients = []
    for net in (model, plain):
        boundaries = Boundaries(list(net[:3]), net[-1])
        probe(net, boundaries, lambda net=net: net(x))
        assert boundaries.copied == ({0, 1} if net is model else set())
        with boundaries.attached(), boundaries.broadcast(B):
            net(x).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
        with boundaries.attached(), boundaries.record() as forwards:
            net(x).square().sum().backward()
        gradients[-1] += [forwards[0].delta[index] for index in range(2)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks[0](x) + self.blocks[1](x))


class Dense(Towers):
    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        return self.blocks[2](first + second)


class Tapped(Towers):
    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        for block in self.blocks[1:]:
            first = block(first) + x  # the stem's output may go anywhere: it is block 1's own affair
        return first


@pytest.mark.parametrize(("kind", "works_on"), [(Towers, "none of them"), (Dense, None), (Tapped, None)])
def test_only_a_chain_passes_the_probe(kind, works_on):
    model = kind()
    boundaries = Boundaries(list(model.blocks))
    if works_on is None:
        probe(model, boundaries, lambda: model(torch.randn(2, 4)))
    else:
        with pytest.raises(RuntimeError, match=rf"block 2 \(Linear\).*{works_on}.*chain of blocks"):
            probe(model, boundaries, lambda: model(torch.randn(2, 4)))


def test_a_block_that_reads_two_outputs_is_no_link_of_a_chain():
    model = Dense()
    model.blocks.append(nn.Linear(4, 4))
    model.forward = lambda x: model.blocks[3](Dense.forward(model, x))
    with pytest.raises(RuntimeError, match=r"block 3 \(Linear\).*it works on h_1, h_2"):
        probe(model, Boundaries(list(model.blocks)), lambda: model(torch.randn(2, 4)))


# --- real models -----------------------------------------------------------------------------------------------------

MODELS = {
    "resnet18": (["layer1.0", "layer1.1", "layer2.0"], 8, {}),
    "vgg11_bn": (["features.3", "features.7", "features.10"], 8, {"mlp_ratio": 0.02}),
    "vit_tiny_patch16_224": (["blocks.0", "blocks.1", "blocks.2"], 12, {"img_size": 32, "patch_size": 8}),
    "convnext_atto": (["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"], 12, {}),
    "efficientnet_b0": (["blocks.0.0", "blocks.1.0", "blocks.1.1"], 16, {}),
    "mobilenetv3_small_050": (["blocks.0.0", "blocks.1.0", "blocks.1.1"], 12, {}),
    "densenet121": (["features.denseblock1", "features.transition1", "features.denseblock2"], 7, {}),
    "swin_tiny_patch4_window7_224": (
        ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"],
        12,
        {"img_size": 56},
    ),
}


def classifier(architecture: str, **options: object) -> nn.Module:
    from grape_hf.vision import image_classifier

    torch.manual_seed(0)
    return image_classifier(architecture, ["no", "yes", "maybe"], **options)


def samples(side: int, number: int = 8) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, side, side, generator=generator), "labels": i % 3} for i in range(number)]


@pytest.mark.parametrize("architecture", list(MODELS))
def test_timm_models_train(architecture, tmp_path):
    first, number, options = MODELS[architecture]
    model = classifier(architecture, **options)
    trainer = GrapeTrainer(
        model,
        arguments(tmp_path, max_steps=2, jvp_steps=1, feedback_rule="lms", alignment_steps=2, feedback_size_limit=4),
        train_dataset=samples(options.get("img_size", 64)),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    names = [name.removeprefix("timm_model.") for name in trainer._run.block_names]
    assert names[:3] == first
    assert len(names) == number - 1 == len(trainer.feedback)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    counters = [b.item() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert counters == [2] * len(norms)  # once a step: neither by the estimate nor by the measurement


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_bp_is_the_stock_trainer(options, tmp_path):
    from transformers import Trainer

    weights = []
    for kind in (Trainer, GrapeTrainer):
        model = classifier("resnet20_cifar")
        more = {"method": "bp"} if kind is GrapeTrainer else {}
        kind(model, arguments(tmp_path, **options, **more), train_dataset=samples(16, 40)).train()
        weights.append(model.state_dict())
    assert all(torch.equal(a, weights[1][name]) for name, a in weights[0].items())


def test_an_estimate_leaves_running_statistics_and_random_states():
    model = classifier("resnet20_cifar").train()
    x = torch.randn(4, 3, 16, 16)
    boundaries = Boundaries([*model.timm_model.layer1, *model.timm_model.layer2], model.timm_model.fc)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with boundaries.attached(), isolated(model):
        jacobian_terms(boundaries, lambda: model(x), Noise(0, 0, range(4)), mode="finite_difference")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_checkpoint_brings_back_the_feedback(tmp_path):
    options = dict(jvp_steps=1, max_steps=4, save_strategy="steps", save_steps=2, feedback_sharing="grid")
    whole = GrapeTrainer(classifier("resnet20_cifar"), arguments(tmp_path, **options), train_dataset=samples(32))
    whole.train()
    again = GrapeTrainer(classifier("resnet20_cifar"), arguments(tmp_path, **options), train_dataset=samples(32))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert whole.feedback[0].shape == (16 * 16, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.feedback, again.feedback, strict=True))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_shortcut_start_is_a_mean_over_samples(tmp_path):
    options = dict(per_device_train_batch_size=8, feedback_init="identity", method="dfa", feedback_sharing="none")
    args = arguments(tmp_path, max_steps=1, **options)
    trainer = GrapeTrainer(classifier("resnet20_cifar"), args, train_dataset=samples(16))
    trainer.train()
    model, rows = classifier("resnet20_cifar"), samples(16)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()
    x = torch.stack([rows[i]["pixel_values"] for i in order])
    inner = model.timm_model
    blocks = [*inner.layer1, *inner.layer2, *inner.layer3]
    expected = shortcut_feedback(model.train(), Boundaries(blocks, inner.fc), lambda: model(x), [""] * 8)
    for b, e in zip(trainer.feedback, expected, strict=True):
        torch.testing.assert_close(b, e, rtol=1e-3, atol=1e-6)  # the order of a sum over samples


def test_matrices_above_the_limit_are_refused_before_training(tmp_path):
    model = classifier("resnet20_cifar")
    before = [p.detach().clone() for p in model.parameters()]
    options = {"feedback_size_limit": 1e-4, "feedback_rule": "lms", "feedback_sharing": "none"}
    trainer = GrapeTrainer(model, arguments(tmp_path, **options), train_dataset=samples(32))
    with pytest.raises(ValueError, match=r"GiB, more than feedback_size_limit=0.0001.*16,384 x 3.*feedback_sharing"):
        trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_the_parts_of_a_plain_stack_are_one_block_in_weight_space(tmp_path):
    """VGG calls the parts, never the unit: a perturbed weight of it must act as in a module that holds the parts."""
    from grape_hf.core.blocks import find_blocks

    torch.manual_seed(0)
    parts = [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 3, 1),
    ]
    stack = nn.Sequential(nn.Sequential(*parts), nn.Flatten(), nn.Linear(3, 2)).double()
    units = find_blocks(stack, "0")
    assert list(units) == ["0.1", "0.4", "0.5"]
    nested = nn.Sequential(nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:5]), nn.Sequential(parts[5]), *stack[1:])
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    sums = []
    for model, blocks in ((stack, list(units.values())), (nested, list(nested[:3]))):
        boundaries = Boundaries(blocks, model[-1])
        with boundaries.attached():
            terms = jacobian_terms(boundaries, lambda m=model: m(x), Noise(0, 0, range(3)), spaces=["weight"] * 2)
        sums.append(terms.sums)
    for a, b in zip(*sums, strict=True):
        torch.testing.assert_close(a, b)


class FlatConvNet(ConvNet):
    """With batch norms, and a head that does not average their centred maps away."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.insert(1, nn.BatchNorm2d(block[0].out_channels))
        self.fc = nn.Linear(4 * 2 * 2, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.fc(x.flatten(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Rounded(Noise):
    """The same numbers in every dtype; torch 2.11 draws others in bf16."""

    def vectors(self, index: int, like: Tensor) -> Tensor:
        return super().vectors(index, like.float()).to(like.dtype)


def test_dual_numbers_in_half_precision():
    """Behind a batch norm under autocast a tangent is in another dtype than its value, unless it is brought to it."""
    model = FlatConvNet()
    batch = {"x": torch.randn(4, 2, 4, 4), "labels": torch.zeros(4, dtype=torch.long)}
    boundaries = Boundaries(list(model.blocks), model.fc)

    def estimate(half: bool) -> list[Tensor]:
        def forward() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                model(**batch)

        with isolated(model), boundaries.attached():
            return jacobian_terms(boundaries, forward, Rounded(0, 0, range(4))).mean()

    for a, b in zip(estimate(half=True), estimate(half=False), strict=True):
        assert frobenius_cosine(a, b) > 0.99  # bf16 has 8 bits


@pytest.mark.parametrize("stem", [nn.Identity(), nn.Conv2d(3, 3, 1)], ids=["no-stem", "stem"])
def test_differences_of_weights_are_none_of_rounding_where_block_1_runs_in_half_precision(stem):
    """Block 1 runs before autocast can be left: its rounded output is not what the perturbed one is compared with."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh())
    second = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Tanh())
    model = nn.Sequential(stem, first, second, nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(4, 3, 8, 8)
    sums = []
    for half in (False, True):
        boundaries = Boundaries(list(model[1:3]), model[-1])
        with boundaries.attached(), isolated(model), torch.autocast("cpu", torch.bfloat16, enabled=half):
            terms = jacobian_terms(
                boundaries, lambda: model(x), Noise(0, 0, range(4)), mode="finite_difference", spaces=["weight"] * 2
            )
        sums.append([term.float() for term in terms.sums])
    for a, b in zip(*sums, strict=True):
        assert frobenius_cosine(a, b) > 0.99  # bf16 has 8 bits
