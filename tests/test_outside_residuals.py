"""Models that add up their residuals outside of blocks, ``x = x + block(x)`` in a forward of their own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LEARNED, arguments, assert_same, fitted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from grape_hf import GrapeTrainer
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.in_place import as_made, replace
from grape_hf.engine.probe import look

D, CLASSES, LAYERS = 8, 3, 3
ALL = 2 * LAYERS  # sweeps that are enough for any number of feedback points


class Attention(nn.Module):
    """A branch without its residual, as vit-pytorch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class Branches(nn.Module):
    """Attention and MLP in turn; ``add`` is x + f(x), and ``end`` makes the logits of what comes out of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, D)
        self.layers = nn.ModuleList(part for _ in range(LAYERS) for part in (Attention(), mlp()))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return x + branch(x)

    def pair(self, x: Tensor, attention: nn.Module, mlp: nn.Module) -> Tensor:
        return self.add(self.add(x, attention), mlp)

    def end(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0])

    def hidden(self, x: Tensor) -> list[Tensor]:
        states = [self.stem(x)]
        for layer in zip(self.layers[::2], self.layers[1::2], strict=True):
            states.append(self.pair(states[-1], *layer))
        return states

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.end(self.hidden(x)[-1])
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class BranchFirst(Branches):
    """The other order of the sum, with dropout."""

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return F.dropout(branch(x), 0.1, self.training) + x


class Dropped(Branches):
    """A module stands between branch and sum; it, too, reads what the last block makes, and is not what reads y."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return x + self.drop(branch(x))


class PostNorm(Branches):
    """One norm for all sums."""

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return self.norm(x + branch(x))

    def end(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0])


class Checkpointed(Branches):
    """Each branch is recomputed in the backward."""

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return x + checkpoint(branch, x, use_reentrant=False)


class InSegments(Branches):
    """Each pair is, with the sum in its middle."""

    def pair(self, x: Tensor, attention: nn.Module, mlp: nn.Module) -> Tensor:
        return checkpoint(partial(super().pair, attention=attention, mlp=mlp), x, use_reentrant=False)


class Mean(Branches):
    """No module reads the last sum itself."""

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))


class Twice(Branches):
    """The loss calls the blocks twice."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        once, again = super().forward(x, labels), super().forward(x.flip(1), labels)
        return {name: once[name] + again[name] for name in once}


class Maps(Branches):
    """The same with convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, D, 3, padding=1), nn.BatchNorm2d(D)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(D), nn.ReLU(), nn.Conv2d(D, D, 3, padding=1)) for _ in range(2 * LAYERS)
        )

    def end(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean((2, 3)))

    def hidden(self, x: Tensor) -> list[Tensor]:
        return super().hidden(x[:, None])


class Flat(Maps):
    """The head reads the last sum as one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D * 5 * 4, CLASSES)

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Inside(Branches):
    """The same network, with the sums inside of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sum(branch) for branch in self.layers)

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return branch(x)


class Sum(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Halved(Branches):
    """Reads x before the branch does."""

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return 0.5 * x + branch(x)


class Turned(Branches):
    """The sums are views."""

    def add(self, x: Tensor, branch: nn.Module) -> Tensor:
        return (x + branch(x)).mT.contiguous().mT


class ReadsHidden(Branches):
    """The loss reads what lies between two pairs."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        states = self.hidden(x)
        return {"loss": F.cross_entropy(self.end(states[-1]), labels) + states[1].square().mean()}


class TwoHeads(Branches):
    """Two modules read parts of the last sum."""

    def end(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0]) + self.head(x[:, 1])


class NoModule(Branches):
    """The logits are made without a module."""

    def end(self, x: Tensor) -> Tensor:
        return x[:, 0] @ self.head.weight.T


class Lists(Branches):
    """Each layer is a list, of which the model calls the parts: vit-pytorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer(*pair) for pair in zip(self.layers[::2], self.layers[1::2], strict=True))

    def layer(self, attention: nn.Module, mlp: nn.Module) -> nn.Module:
        return nn.ModuleList([attention, mlp])

    def run(self, layer: Any, x: Tensor) -> Tensor:
        attention, mlp = layer
        return self.add(self.add(x, attention), mlp)

    def hidden(self, x: Tensor) -> list[Tensor]:
        states = [self.stem(x)]
        for layer in self.layers:
            states.append(self.run(layer, states[-1]))
        return states


class Norms(Lists):
    """Norms are parts, too, and stand in another order than the one in which they run."""

    def layer(self, attention: nn.Module, mlp: nn.Module) -> nn.Module:
        return nn.ModuleList([attention, mlp, nn.LayerNorm(D), nn.LayerNorm(D)])

    def run(self, layer: Any, x: Tensor) -> Tensor:
        attention, mlp, first, second = layer
        x = x + attention(first(x))
        return x + mlp(second(x))


class Named(Norms):
    """The same in a dictionary, with a dropout that runs twice in each layer."""

    def layer(self, attention: nn.Module, mlp: nn.Module) -> nn.Module:
        parts = {"dropout": nn.Dropout(0.1), "mlp": mlp, "attention": attention, "norm": nn.LayerNorm(D)}
        return nn.ModuleDict(parts)

    def run(self, layer: Any, x: Tensor) -> Tensor:
        x = x + layer["dropout"](layer["attention"](layer["norm"](x)))
        return x + layer["dropout"](layer["mlp"](x))


class Added(Lists):
    """Modules add the residual, with a scale of their own, and read x later than the branch: x-transformers'."""

    def layer(self, attention: nn.Module, mlp: nn.Module) -> nn.Module:
        return nn.ModuleList([nn.ModuleList([nn.LayerNorm(D), None]), attention, Scaled(), mlp, Scaled()])

    def run(self, layer: Any, x: Tensor) -> Tensor:
        (norm, _), attention, add, mlp, add_again = layer
        x = add(attention(norm(x)), x)
        return add_again(mlp(x), x)


class Scaled(nn.Module):
    """f + s x."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        return f + self.scale * x


class Crossed(Lists):
    """The first part of a layer reads two tensors that were made of the sum."""

    def layer(self, attention: nn.Module, mlp: nn.Module) -> nn.Module:
        return nn.ModuleList([nn.Bilinear(D, D, D), mlp])

    def run(self, layer: Any, x: Tensor) -> Tensor:
        crossing, mlp = layer
        x = x + crossing(x, x.flip(1))
        return x + mlp(x)


class Modules(Lists):
    """The layers of ``Lists``, each in one module."""

    def layer(self, attention: nn.Module, mlp: nn.Module) -> nn.Module:
        return Whole(attention, mlp)

    def run(self, layer: Any, x: Tensor) -> Tensor:
        return layer(x)


class Whole(nn.Sequential):
    """Branches, each with its sum."""

    def forward(self, x: Tensor) -> Tensor:
        for branch in self:
            x = x + branch(x)
        return x


NETWORKS = [
    Branches,
    BranchFirst,
    Dropped,
    PostNorm,
    Checkpointed,
    InSegments,
    Mean,
    Twice,
    Maps,
    Flat,
    Lists,
    Norms,
    Named,
    Added,
]


def rows() -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(5, 4, generator=draws), "labels": i % CLASSES} for i in range(16)]


@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("network", NETWORKS)
def test_with_as_many_sweeps_as_points_it_is_backpropagation(
    network: type[nn.Module], points: int, tmp_path: Path
) -> None:
    """Which needs h_l and y to be the sums, and nothing to go around them."""
    stock = fitted(network, rows(), tmp_path / "stock", Trainer)
    swept = fitted(network, rows(), tmp_path / "swept", feedback_points=points, feedback_sweeps=ALL)
    assert_same(swept, stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", [Branches, PostNorm, Mean])
def test_so_it_is_where_the_error_is_measured_at_the_logits(network: type[nn.Module], tmp_path: Path) -> None:
    stock = fitted(network, rows(), tmp_path / "stock", Trainer)
    swept = fitted(network, rows(), tmp_path / "swept", feedback_space="logits", feedback_sweeps=ALL)
    assert_same(swept, stock, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", [Branches, PostNorm])
def test_the_error_is_measured_at_the_last_sum(network: type[nn.Module], tmp_path: Path) -> None:
    """Also where the head reads one token of it: then it is known which."""
    trainer = GrapeTrainer(network(), arguments(tmp_path, max_steps=1), train_dataset=rows())
    trainer.train()
    assert trainer._run.boundaries.hidden
    assert trainer._run.boundaries.read_at == "first"


def test_the_error_goes_to_every_block_and_by_no_other_way(tmp_path: Path) -> None:
    """With feedback of zero nothing but the last block and what is behind it learns."""
    once: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0}
    before = fitted(Branches, rows(), tmp_path, Trainer, **(once | {"learning_rate": 0.0}))
    stock = fitted(Branches, rows(), tmp_path, Trainer, **once)
    got = fitted(Branches, rows(), tmp_path, method="dfa", feedback_init="zero", **once)
    exact = {name for name in stock if name.startswith((f"layers.{2 * LAYERS - 1}.", "norm", "head"))}
    assert_same({name: got[name] for name in exact}, {name: stock[name] for name in exact})
    below = stock.keys() - exact
    assert_same({name: got[name] for name in below}, {name: before[name] for name in below})


@pytest.mark.parametrize(
    "options",
    [
        {"feedback_rule": "local"},
        {"feedback_rule": "local", "feedback_points": 2, "feedback_sweeps": 1},
        {"feedback_path": "shortcut"},
        LEARNED,
        LEARNED | {"jvp_scope": "block"},
        LEARNED | {"jvp_mode": "finite_difference"},
        {"method": "dfa", "feedback_init": "identity"},
        {"method": "dfa", "feedback_space": "logits"},
        {"feedback_space": "logits", "feedback_init": "identity", "feedback_rule": "lms"},
        {"method": "forward_gradient", "perturbation_space": "activation", "alignment_steps": 0},
    ],
)
@pytest.mark.parametrize("networks", [(Branches, Inside), (Lists, Modules)], ids=["blocks", "layers"])
def test_it_learns_as_with_the_sums_inside_of_blocks(
    networks: tuple[type[nn.Module], type[nn.Module]], options: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights, feedback points and draws."""
    options = {"alignment_steps": 1, "feedback_points": 0} | options
    outside, inside = (fitted(network, rows(), tmp_path / network.__name__, **options) for network in networks)
    assert_same(outside, {name.replace("branch.", ""): value for name, value in inside.items()}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [Lists, Added, Named])
def test_layers_are_the_same_where_their_list_is_named(network: type[nn.Module]) -> None:
    found, named = find_blocks(network()), find_blocks(network(), "layers")
    assert list(found) == list(named) == [f"layers.{i}" for i in range(LAYERS)]


def test_parts_of_a_layer_are_not_perturbed_by_their_weights(tmp_path: Path) -> None:
    """What the layer computes of them is in no module."""
    options = LEARNED | {"perturbation_space": "weight", "feedback_rule": "cosine"}
    with pytest.raises(ValueError, match=r"That of layers\.0 is .* made by no one module"):
        fitted(Added, rows(), tmp_path, **options)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_sum_is_perturbed_for_all_that_read_it(with_gradients: bool) -> None:
    """What is put in the place of h_3 reaches y by the branches and by the sums."""
    torch.manual_seed(0)
    model, x, change = Branches().double(), torch.randn(2, 5, 4).double(), torch.randn(2, 5, D).double()
    blocks = list(model.layers)
    boundaries = Boundaries(blocks, readers=[[block] for block in blocks[1:]])
    shapes = look(model, boundaries, lambda: model(x, torch.tensor([0, 1]))).at(boundaries)
    assert not shapes.pathless

    def inject(index: int, h: Tensor, *_: Any) -> Tensor:
        torch.set_grad_enabled(False)
        return h.detach() + change if index == 2 else h

    with torch.set_grad_enabled(with_gradients), boundaries.attached(), boundaries.perturb(inject) as passed:
        model(x)
    with torch.no_grad():
        h = model.stem(x)
        for index, block in enumerate(blocks):
            h = h + block(h)
            h = h + change if index == 2 else h
    torch.testing.assert_close(passed.y, h)


def test_a_finite_difference_is_not_rounded() -> None:
    h = torch.ones(3, dtype=torch.bfloat16)
    with torch.no_grad():
        replace(h, torch.full((3,), 1.0001))
    assert h.tolist() == torch.full((3,), 1.0001).tolist()


def test_what_made_a_sum_keeps_its_graph() -> None:
    w = torch.randn(3, requires_grad=True)
    h = w * 2
    made = as_made(h)
    replace(h, made.detach())
    assert not h.requires_grad
    torch.testing.assert_close(torch.autograd.grad(made.sum(), w)[0], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Halved, "reads such a sum before the next block does"),
        (ReadsHidden, "the loss reads h_2"),
        (NoModule, "the loss reads h_5"),
        (TwoHeads, "the loss reads h_5"),
        (Turned, "to be a tensor of its own, got a view"),
        (Crossed, "as several tensors: expected one"),
    ],
)
def test_what_cannot_be_cut_is_refused(network: Callable[[], nn.Module], says: str, tmp_path: Path) -> None:
    """Before anything is trained, and with a way out."""
    torch.manual_seed(0)
    model = network()
    trainer = GrapeTrainer(model, arguments(tmp_path), train_dataset=rows())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=says) as raised:
        trainer.train()
    assert "write a module that does both" in str(raised.value)
    assert_same({name: p.detach() for name, p in model.named_parameters()}, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_compiled_code_is_refused(tmp_path: Path) -> None:
    """It does not show the tensors that are cut."""
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer = GrapeTrainer(Branches(), args, train_dataset=rows())
    with pytest.raises(ValueError, match="torch.compile does not go with blocks whose residuals"):
        trainer.train()
