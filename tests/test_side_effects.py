"""Forwards on the side change nothing: after a step all that a forward may change is as after the stock step."""

import copy
import io
import random
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LEARNED, arguments, assert_same, fitted, make_trainer, weights
from problems import PADDED
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from grape_hf import GrapeTrainer
from grape_hf.core.isolation import isolated

EVERYTHING = LEARNED | dict(alignment_steps=1)


def encoder() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))


class Momentum(nn.Module):
    """MoCo's and BYOL's: a frozen copy of the encoder follows it in every forward, in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k, self.way = encoder(), encoder().requires_grad_(False), way

    def follow(self) -> None:
        for q, k in zip(self.q.parameters(), self.k.parameters(), strict=True):
            if self.way == "in place":
                with torch.no_grad():
                    k.mul_(0.9).add_(q, alpha=0.1)
            elif self.way == "data":
                k.data.mul_(0.9).add_(q.data, alpha=0.1)
            else:
                k.data = 0.9 * k.data + 0.1 * q.data

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.follow()
        return {"loss": F.cross_entropy(self.q(x) @ self.k(x).detach().T, torch.arange(len(x)))}


@dataclass
class Schedule:
    """An object of the user's own, as a plain attribute."""

    step: int = 0
    past: list[float] = field(default_factory=list)


class Stateful(nn.Module):
    """Changes plain attributes of many kinds in its forward, and batch norms without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = encoder(), nn.BatchNorm1d(4)
        self.calls, self.history, self.window = 0, [], deque(maxlen=3)
        self.figures, self.names = {"loss": [0.0]}, set()
        self.schedule, self.state = Schedule(), torch.zeros(4)
        self.replaced = torch.zeros(4)
        self.array = np.zeros(2)
        self.rng, self.numpy_rng = random.Random(0), np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        self.history.append(self.calls)
        self.window.append(self.calls)
        self.figures["loss"].append(float(self.calls))
        self.figures[f"call {self.calls}"] = [1.0]
        self.names.add(f"call {self.calls}")
        self.schedule.step += 1
        self.schedule.past.append(self.rng.random())
        self.state.add_(x.detach().mean(0))
        self.replaced = self.replaced + x.detach().mean(0) + torch.randn(4, generator=self.generator)
        self.seen += 1
        self.array += 1
        self.new_attribute = self.numpy_rng.random()
        with torch.no_grad():
            self.norm(x)
        self.blocks[1].touched = getattr(self.blocks[1], "touched", 0) + 1
        return {"loss": (self.blocks(x) * (1 + 0.1 * self.calls)).square().mean()}


def state(model: nn.Module) -> dict[str, Any]:
    """All that a forward changes, in forms that compare."""
    found: dict[str, Any] = {f"buffer {n}": b.tolist() for n, b in model.named_buffers()}
    found |= {f"frozen {n}": p.tolist() for n, p in model.named_parameters() if not p.requires_grad}
    if isinstance(model, Stateful):
        names = ("calls", "history", "window", "figures", "names", "schedule", "new_attribute")
        found |= {name: repr(getattr(model, name)) if name != "names" else sorted(model.names) for name in names}
        found |= {name: getattr(model, name).tolist() for name in ("state", "replaced", "array")}
        found |= {"touched": model.blocks[1].touched, "rng": model.rng.random(), "numpy": model.numpy_rng.random()}
        found |= {"generator": torch.randn(3, generator=model.generator).tolist()}
    return found


MODELS = {
    "stateful": Stateful,
    "momentum-in-place": lambda: Momentum("in place"),
    "momentum-data": lambda: Momentum("data"),
    "momentum-replaced": lambda: Momentum("replaced"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "dfa"},
        EVERYTHING,
        EVERYTHING | {"jvp_mode": "finite_difference", "jvp_passes": "per_block"},
        EVERYTHING | {"method": "dfa"},
        EVERYTHING | {"calibration_strategy": "steps", "calibration_interval": 1, "calibration_refit": True},
    ],
    ids=["dfa", "grape", "differences", "measured", "calibrated"],
)
def test_after_a_step_everything_is_as_after_the_stock_step(name, options, tmp_path):
    rows = [{"x": x} for x in torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
    after = {}
    for trainer in (Trainer, GrapeTrainer):
        torch.manual_seed(0)
        model = MODELS[name]()
        # A rate of zero: later steps start from the same weights as the stock Trainer's, and carry the same state.
        more = dict(max_steps=3, learning_rate=0.0, weight_decay=0.0, label_names=[])
        more |= options | {"blocks": "q" if "momentum" in name else "blocks"} if trainer is GrapeTrainer else {}
        kind = {} if trainer is GrapeTrainer else {"kind": TrainingArguments}
        trainer(model, arguments(tmp_path, **kind, **more), train_dataset=rows).train()
        after[trainer] = state(model)
    assert after[Trainer]
    assert after[GrapeTrainer] == after[Trainer]


class Scaled(nn.Module):
    """Scales a weight that is trained for evaluation, and back for training, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.scaled = encoder(), False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.scaled == self.training:
            with torch.no_grad():
                self.blocks[1][0].weight.mul_(2.0 if self.scaled else 0.5)
            self.scaled = not self.scaled
        return {"loss": self.blocks(x).square().mean()}


def test_a_trained_weight_that_an_evaluation_changes_is_put_back(tmp_path):
    """Calibration at every step is the stock Trainer's, whatever an estimate did in between."""
    rows = [{"x": x} for x in torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
    after = []
    for calibrated in (True, False):
        torch.manual_seed(0)
        model = Scaled()
        more = EVERYTHING | ({"calibration_strategy": "steps", "calibration_interval": 2} if calibrated else {})
        args = arguments(tmp_path, max_steps=4, label_names=[], learning_rate=0.0, weight_decay=0.0, **more)
        GrapeTrainer(model, args, train_dataset=rows).train()
        after.append(model.blocks[1][0].weight.detach().clone())
        assert not model.scaled
    torch.manual_seed(0)
    start = Scaled().blocks[1][0].weight
    assert all(torch.equal(weight, start) for weight in after)


class Late(Momentum):
    """Follows from the third forward on."""

    def __init__(self) -> None:
        super().__init__("in place")
        self.calls = 0

    def follow(self) -> None:
        self.calls += 1
        if self.calls > 2:
            super().follow()


def test_a_parameter_that_is_changed_late_is_named(tmp_path):
    rows = [{"x": x} for x in torch.randn(16, 4)]
    args = arguments(tmp_path, max_steps=6, blocks="q", label_names=[], **LEARNED)
    with pytest.raises(RuntimeError, match=r"k\.0\.0\.weight.*cannot be put back"):
        GrapeTrainer(Late(), args, train_dataset=rows).train()


def test_hooks_that_a_forward_attaches_are_taken_off_and_one_that_left_stays_off():
    """transformers attaches hooks of its own in the first forward that returns hidden states, and notes that it has."""
    model = Stateful()
    handle = model.norm.register_forward_hook(lambda *args: None)
    with isolated(model):
        model.blocks.register_forward_hook(lambda *args: None)
        model.hooks_installed = True
        handle.remove()
    assert not model.blocks._forward_hooks
    assert not model.norm._forward_hooks
    assert not hasattr(model, "hooks_installed")


def test_what_is_shared_with_others_is_changed_back_in_place():
    model = Stateful()
    history, held = model.history, model.state
    with isolated(model):
        model(torch.ones(2, 4))
        assert len(history) == 1
    assert model.history is history == []
    assert model.state is held
    assert not held.any()


GATHERED: list[Tensor] = []
COUNTED = 0


class Gatherer:
    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.calls = 0

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.found.append(output)
        self.calls += 1

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.keep(module, args, output)


def keep_global(module: nn.Module, args: Any, output: Tensor) -> None:
    global COUNTED
    COUNTED += 1
    for feature in [output]:
        GATHERED.append(feature)


def gathering(way: str, model: nn.Module) -> tuple[list[Tensor], Any]:
    """Put hooks on the blocks, or what else gathers, in one of the usual ways; return the list and the counter."""
    gatherer, found, calls = Gatherer(), [], 0

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        found.append(output)

    def keep_in(into: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
        into.append(output)

    hooks = {
        "global": (keep_global, GATHERED, lambda: COUNTED),
        "closure": (keep, found, lambda: calls),
        "lambda": (lambda *a: found.append(a[2]), found, lambda: 0),
        "store": (lambda *a: gatherer.keep(*a), gatherer.found, lambda: gatherer.calls),
        "partial": (partial(keep_in, found), found, lambda: 0),
        "method": (gatherer.keep, gatherer.found, lambda: gatherer.calls),
        "object": (gatherer, gatherer.found, lambda: gatherer.calls),
    }
    if way == "forward":
        for block in model.blocks:

            def forward(x: Tensor, stock: Any = block.forward, block: nn.Module = block) -> Tensor:
                y = stock(x)
                keep(block, x, y)
                return y

            block.forward = forward
        return found, lambda: calls
    hook, into, counter = hooks[way]
    for block in model.blocks:
        block.register_forward_hook(hook)
    return into, counter


def matching(kind: type[Trainer], found: list[Tensor], numbers: list[int]) -> type[Trainer]:
    class Matching(kind):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            found.clear()
            loss = model(**inputs)
            numbers.append(len(found))
            return loss + sum(feature.square().mean() for feature in found)

    return Matching


@pytest.mark.parametrize("way", ["global", "closure", "lambda", "store", "partial", "method", "object", "forward"])
def test_what_a_user_s_hooks_gather_is_of_the_step_alone(way, tmp_path):
    """Feature matching: the loss reads a list that it has emptied in front of the model's forward."""
    rows = [{"x": x} for x in torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
    seen = []
    for kind, options in ((Trainer, {}), (GrapeTrainer, EVERYTHING), (GrapeTrainer, {"feedback_sweeps": 1})):
        torch.manual_seed(0)
        model = Hooked()
        found, counter = gathering(way, model)
        before = counter()
        numbers: list[int] = []
        more = dict(max_steps=3, label_names=[], remove_unused_columns=False) | options
        args = arguments(tmp_path, **({} if kind is GrapeTrainer else {"kind": TrainingArguments}), **more)
        trainer = matching(kind, found, numbers)(model, args, train_dataset=rows)
        trainer.train()
        first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        seen.append((numbers, counter() - before, first))
    assert seen[0][0] == [3] * 3
    assert seen[0][1] in (0, 9)
    assert seen[1] == seen[2] == seen[0]


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = encoder()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Tapped(nn.Module):
    """A block, or a head, that keeps the gradient in its middle (Grad-CAM), in one of the usual ways."""

    def __init__(self, way: str, found: list[Tensor], width: int = 4) -> None:
        super().__init__()
        self.way, self.found, self.calls = way, found, 0
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, width)
        if way == "module":
            self.inner.register_full_backward_hook(lambda module, before, after: self.keep(after[0]))
        if way == "hook":
            self.inner.register_forward_hook(lambda module, args, output: self.tap(output))

    def keep(self, gradient: Tensor) -> None:
        self.calls += 1
        self.found.append(gradient)

    def tap(self, h: Tensor) -> None:
        if h.requires_grad:
            h.register_hook(self.keep)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.way == "forward":
            self.tap(h)
        return self.outer(torch.tanh(h))


class Tapping(nn.Module):
    def __init__(self, way: str, found: list[Tensor]) -> None:
        super().__init__()
        self.stem, self.classifier = nn.Linear(4, 4), Tapped(way, found, 2)
        self.blocks = nn.ModuleList(Tapped(way, found) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits = self.classifier(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # blocks of a star read what has no graph
@pytest.mark.parametrize("space", ["logits", "hidden"])
@pytest.mark.parametrize("way", ["module", "hook", "forward"])
def test_gradients_that_a_user_s_hooks_gather_are_of_the_step_alone(way, space, tmp_path):
    """Nor are those of sweeps or of looks at the head's backward; a sweep for each point makes them the stock ones."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    rows = [{"x": row, "labels": i % 2} for i, row in enumerate(x)]
    seen = []
    for kind, options in (
        (Trainer, {}),
        (GrapeTrainer, {"feedback_sweeps": 2, "feedback_space": space}),
        (GrapeTrainer, {"feedback_space": space}),
        (GrapeTrainer, EVERYTHING | {"feedback_space": space}),
    ):
        found: list[Tensor] = []
        state = fitted(lambda found=found: Tapping(way, found), rows, tmp_path, kind, **options)
        seen.append((found, state))
    assert [len(found) for found, _ in seen] == [12] * 4
    torch.testing.assert_close(seen[1][0], seen[0][0])
    assert_same(seen[1][1], seen[0][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("space", ["logits", "hidden"])
def test_gradients_of_the_module_at_y_itself_are_gathered(space, tmp_path):
    """torch calls its backward hook once for a forward: for the sweep, which has the step's own gradients there."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    rows = [{"x": row, "labels": i % 2} for i, row in enumerate(x)]
    seen: list[list[Tensor]] = [[], []]

    def build(found: list[Tensor]) -> Tapping:
        model = Tapping("", [])
        module = model.classifier if space == "logits" else model.blocks[-1]
        module.register_full_backward_hook(lambda module, before, after: found.extend([*before, *after]))
        return model

    fitted(partial(build, seen[0]), rows, tmp_path, Trainer)
    fitted(partial(build, seen[1]), rows, tmp_path, feedback_sweeps=2, feedback_space=space)
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("options", [{"feedback_sweeps": 2}, LEARNED, {}], ids=["sweeps", "estimates", "maps"])
def test_parametrised_weights_that_are_cached_are_the_step_s(options, tmp_path):
    """``parametrize.cached()`` around the step keeps weights with their graph, which are those of one forward."""
    rows = [{"x": x} for x in torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
    after = []

    class Caching(GrapeTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            with parametrize.cached():
                return model(**inputs)

    class Computing(GrapeTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return model(**inputs)

    for kind in (Computing, Caching):
        torch.manual_seed(0)
        model = Hooked()
        for block in model.blocks:
            parametrizations.spectral_norm(block[0])
        args = arguments(tmp_path, max_steps=3, label_names=[], remove_unused_columns=False, **options)
        kind(model, args, train_dataset=rows).train()
        after.append(model.state_dict())
    assert_same(after[1], after[0])


class Saving(torch.autograd.Function):
    """Runs its block again in the backward, which adds to ``.grad`` by itself, as reversible blocks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module, weight: Tensor) -> Tensor:
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return block.compute(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.x.requires_grad_()
        x.grad = None
        with torch.enable_grad():
            ctx.block.compute(x).backward(gradient)
        return x.grad, None, None


class RunAgain(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.map, self.norm = way, nn.Linear(4, 4), nn.BatchNorm1d(4)

    def compute(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.map(x if self.way == "own function" else self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "own function":
            return Saving.apply(x, self, self.map.weight)
        return 1.0 * checkpoint(self.compute, x, use_reentrant=self.way == "reentrant")  # a part of the block


class RunsAgain(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(RunAgain(way) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return {"loss": (self.head(x) - 1).square().mean()}


def runs_again(way: str, folder: Path, trainer: type[Trainer] = GrapeTrainer, **options: Any) -> dict[str, Tensor]:
    rows = [{"x": x} for x in torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]
    return fitted(lambda: RunsAgain(way), rows, folder, trainer, learning_rate=1e-2, label_names=[], **options)


@pytest.mark.parametrize("points", [3, 1])
@pytest.mark.parametrize("path", ["matrix", "shortcut"])
@pytest.mark.parametrize("way", ["checkpoint", "own function"])
def test_a_block_that_runs_again_in_sweeps_does_so_without_a_trace(way, path, points, tmp_path):
    """As many sweeps as points are backpropagation, with statistics of batch norms and what lies in ``.grad``.

    So it is for blocks that share a point, of which the last alone is a boundary's.
    """
    swept = runs_again(way, tmp_path, feedback_sweeps=3, feedback_path=path, feedback_points=points)
    assert_same(swept, runs_again(way, tmp_path, Trainer), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"method": "dfa"}, {}, {"feedback_sweeps": 1}, EVERYTHING, {"feedback_path": "shortcut"}], ids=str
)
def test_checkpointed_batch_norms_count_each_batch_as_often_as_in_the_stock_step(options, tmp_path):
    counts = [
        {name: int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
        for state in (runs_again("checkpoint", tmp_path, **options), runs_again("checkpoint", tmp_path, Trainer))
    ]
    assert set(counts[1].values()) == {6}
    assert counts[0] == counts[1]


class RunsHeadAgain(nn.Module):
    """A checkpointed head with a batch norm, over as many positions as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))
        self.classifier = RunAgain("checkpoint")

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.classifier(x.mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("options", [{"feedback_space": "logits"}, {}, {"feedback_sweeps": 1}], ids=str)
def test_so_do_those_of_a_head_that_runs_again(options, tmp_path):
    """For the first look, and for the looks at the head's backward."""
    x = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = [{"x": row, "labels": i % 4} for i, row in enumerate(x)]
    count = "classifier.norm.num_batches_tracked"
    assert fitted(RunsHeadAgain, rows, tmp_path, Trainer)[count] == 6
    assert fitted(RunsHeadAgain, rows, tmp_path, **options)[count] == 6


def test_sweeps_over_reentrant_checkpoints_inside_blocks_are_refused_by_name(tmp_path):
    with pytest.raises(RuntimeError, match=r'a sweep.*Reentrant activation.*\{"use_reentrant": False\}'):
        runs_again("reentrant", tmp_path, feedback_sweeps=1)


class Careless(nn.Module):
    """Changes what it is called with, and says what it was called with."""

    def __init__(self, way: str, seen: set[str]) -> None:
        super().__init__()
        self.blocks, self.way, self.saw = encoder(), way, seen.add

    def forward(self, batch: dict[str, Tensor], past: Schedule) -> dict[str, Tensor]:
        x = batch["x"]
        self.saw(f"{x.detach().sum():.4f} {sorted(batch)} {len(past.past)}")
        if self.way == "tensor":
            x.sub_(0.5).mul_(2)
        elif self.way == "mapping":
            batch["x"], batch["y"] = 2 * x, x
        else:
            past.past.append(1.0)
        return {"loss": (self.blocks(batch["x"]) - len(past.past)).square().mean()}


@pytest.mark.parametrize("way", ["tensor", "mapping", "object"])
def test_every_forward_sees_the_arguments_as_they_were(way, tmp_path):
    rows = list(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    after = []
    options: dict[str, Any]
    for trainer, options in ((Trainer, {}), (GrapeTrainer, {"feedback_sweeps": 9}), (GrapeTrainer, EVERYTHING)):
        torch.manual_seed(0)
        seen: set[str] = set()
        model = Careless(way, seen)
        more = dict(max_steps=2, label_names=[], remove_unused_columns=False, per_device_train_batch_size=4) | options
        kind = {} if trainer is GrapeTrainer else {"kind": TrainingArguments}

        def collate(rows: list[Tensor]) -> dict[str, Any]:
            return {"batch": {"x": torch.stack(rows)}, "past": Schedule()}

        args = arguments(tmp_path, **kind, **more)
        trainer(model, args, train_dataset=rows, data_collator=collate).train()
        after.append((seen, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert len(after[0][0]) == 2  # a step sees one batch
    assert after[0][0] == after[1][0] == after[2][0]
    torch.testing.assert_close(after[1][1], after[0][1])


class Copied(nn.Module):
    """A chain of blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = encoder(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Copies(GrapeTrainer):
    """Copies the model before and after its forward, and keeps each copy with its gradient."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        before = copy.deepcopy(model)
        output = model(inputs["x"])
        after = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        x = inputs["x"]
        self.copies = [(m, x, self.gradient(m, x)) for m in (before, after, loaded)]
        return F.mse_loss(output, after(x).detach()) + output.square().mean()

    @staticmethod
    def gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


@pytest.mark.parametrize(
    "options",
    [LEARNED, dict(feedback_rule="local"), dict(feedback_sweeps=1), dict(method="forward_gradient")],
    ids=["estimates", "maps", "sweeps", "forward gradient"],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_copy_made_in_the_loss_is_an_ordinary_model(steps, options, tmp_path):
    """A teacher, a moving average, an inner step of meta-learning: it backpropagates, in the step and after it."""
    torch.manual_seed(0)
    data = [{"x": torch.randn(4)} for _ in range(12)]
    args = arguments(tmp_path, max_steps=steps, learning_rate=0.1, remove_unused_columns=False, **options)
    trainer = Copies(Copied(), args, train_dataset=data)
    trainer.train()
    for made, x, at_the_time in trainer.copies:
        fresh = Copied()
        fresh.load_state_dict(made.state_dict())
        for then, now, wanted in zip(at_the_time, trainer.gradient(made, x), trainer.gradient(fresh, x), strict=True):
            assert wanted.any()
            assert torch.equal(then, wanted)
            assert torch.equal(now, wanted)


class Demonstration:
    """Runs the model in a thread of its own in the middle of each forward of the training."""

    def __init__(self, model: nn.Module, gradients: bool) -> None:
        self.model, self.gradients, self.runs = model, gradients, 0
        model.model.layers[1].register_forward_hook(self.meanwhile)

    def meanwhile(self, *args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=self.run)
            thread.start()
            thread.join(20)
            assert not thread.is_alive()

    def run(self) -> None:
        mask = torch.ones(3, 5, dtype=torch.long)
        mask[0, 1:] = 0
        with torch.set_grad_enabled(self.gradients):
            self.model(input_ids=torch.ones_like(mask), attention_mask=mask)
        self.runs += 1


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("options", [LEARNED, {}, {"feedback_sweeps": 9}], ids=["lms", "local", "sweeps"])
def test_a_thread_that_runs_the_model_meanwhile_changes_nothing(gradients, options, tmp_path):
    def trained(disturbed: bool) -> tuple[dict[str, Tensor], int]:
        trainer = make_trainer(PADDED, tmp_path, dtype=torch.float64, max_steps=3, alignment_steps=1, **options)
        demonstration = Demonstration(trainer.model, gradients) if disturbed else None
        trainer.train()
        return weights(trainer), demonstration.runs if demonstration else 0

    found, runs = trained(disturbed=True)
    assert runs >= 3
    assert_same(found, trained(disturbed=False)[0])
