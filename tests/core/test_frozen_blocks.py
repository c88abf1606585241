"""Which modules are the blocks where part of a model is frozen: teachers, towers and moving averages are not.

The oracle of training is the stock Trainer: with as many sweeps as feedback points ours is backpropagation.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, differ, fitted
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from grape_hf import GrapeTrainer
from grape_hf.core.blocks import find_blocks

UNTRAINED = "nothing trains in"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(h))))


class Network(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


class Plain(nn.Module):
    """Layers that are attributes, or a stack without composite modules."""

    def __init__(self, stacked: bool, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
        self.stack = nn.Sequential(*layers) if stacked else None
        if not stacked:
            self.first, self.second, self.third = layers[::2]

    def forward(self, x: Tensor) -> Tensor:
        if self.stack is not None:
            return self.stack(x.mean(1))
        return self.third(F.relu(self.second(F.relu(self.first(x.mean(1))))))


class Teacher(Plain):
    """Of one class two modules side by side would be blocks, of which the first may be frozen."""


class Distilled(nn.Module):
    def __init__(self, teacher: nn.Module, student: nn.Module, no_grad: bool) -> None:
        super().__init__()
        self.teacher, self.student, self.no_grad = teacher.requires_grad_(False), student, no_grad

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.no_grad):
            taught = self.teacher(x).softmax(-1)
        logits = self.student(x)
        return {"loss": F.cross_entropy(logits, labels) + F.cross_entropy(logits, taught), "logits": logits}


def trained(build: Callable[[], nn.Module], ours: bool, tmp_path: Any, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(5, 8, generator=generator), "labels": i % 3} for i in range(12)]
    return fitted(build, rows, tmp_path, GrapeTrainer if ours else Trainer, **options)


@pytest.mark.parametrize("no_grad", [True, False], ids=["no-grad", "with-graph"])
@pytest.mark.parametrize("teacher", [12, 4], ids=["larger", "as-large"])
def test_a_frozen_teacher_is_not_taken_for_the_blocks(teacher, no_grad, tmp_path):
    def build() -> nn.Module:
        return Distilled(Network(teacher), Network(4), no_grad)

    assert list(find_blocks(build())) == [f"student.blocks.{i}" for i in range(4)]
    stock, swept = trained(build, False, tmp_path), trained(build, True, tmp_path, feedback_sweeps=3)
    assert_same(swept, stock, rtol=1e-5, atol=1e-6)
    # Nor is it ordinary backpropagation in silence.
    assert "student.blocks.0.up.weight" in differ(trained(build, True, tmp_path), stock)


@pytest.mark.parametrize("stacked", [True, False], ids=["stack", "attributes"])
def test_a_frozen_teacher_of_plain_layers_is_not_taken_either(stacked, tmp_path):
    def build() -> nn.Module:
        return Distilled(Teacher(stacked, 32), Plain(stacked, 8), True)

    places = [f"stack.{i}" for i in (1, 3, 4)] if stacked else ["first", "second", "third"]
    assert list(find_blocks(build())) == [f"student.{place}" for place in places]
    stock, swept = trained(build, False, tmp_path), trained(build, True, tmp_path, feedback_sweeps=2)
    assert_same(swept, stock, rtol=1e-5, atol=1e-6)


class Trunk(nn.Module):
    """A tower, and behind it the trunk that is trained."""

    def __init__(self, tower: int, trunk: int) -> None:
        super().__init__()
        self.tower = nn.ModuleList(Block() for _ in range(tower))
        self.trunk, self.head = nn.ModuleList(Block() for _ in range(trunk)), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in (*self.tower, *self.trunk):
            x = block(x)
        logits = self.head(x.mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_trunk_on_a_frozen_tower_is_the_chain(tmp_path):
    def build(free: int = 0) -> Trunk:
        model = Trunk(12, 3)
        model.tower[: 12 - free].requires_grad_(False)
        return model

    assert list(find_blocks(build())) == [f"trunk.{i}" for i in range(3)]
    assert list(find_blocks(build(free=1))) == [f"trunk.{i}" for i in range(3)]  # one block of the tower trains
    with pytest.raises(ValueError, match="several lists"):
        find_blocks(build(free=3))
    assert list(find_blocks(build(free=12))) == [f"tower.{i}" for i in range(12)]
    stock, swept = trained(build, False, tmp_path), trained(build, True, tmp_path, feedback_sweeps=2)
    assert_same(swept, stock, rtol=1e-5, atol=1e-6)


def test_of_two_same_lists_one_may_be_frozen():
    model = nn.ModuleDict({"online": Network(3), "average": Network(3)})
    with pytest.raises(ValueError, match=r"found several lists.*Freeze one that only follows another.*requires_grad_"):
        find_blocks(model)
    model["average"].requires_grad_(False)
    assert list(find_blocks(model)) == [f"online.blocks.{i}" for i in range(3)]


def test_a_list_of_which_part_is_frozen_is_one_chain():
    model = Network(6)
    for frozen in (model.blocks[:3], model.blocks, model):
        frozen.requires_grad_(False)
        assert list(find_blocks(model)) == [f"blocks.{i}" for i in range(6)]


def causal() -> nn.Module:
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=31)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], r=1),
        LoraConfig(target_modules=["q_proj"], r=1, layers_to_transform=[0]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "lora-of-one-block", "prompt"],
)
def test_the_list_that_holds_adapters_is_the_chain(config):
    """Also where the heads of many layers beside it are trained whole, and hold more that trains."""
    model = get_peft_model(causal(), config)
    expected = [f"base_model.model.model.layers.{i}" for i in range(3)]
    if isinstance(config, PromptTuningConfig):
        expected = [f"base_model.model.layers.{i}" for i in range(3)]
    assert list(find_blocks(model)) == expected
    if isinstance(config, LoraConfig) and not config.layers_to_transform:
        model.extra = nn.ModuleList(Block() for _ in range(2))
        assert list(find_blocks(model)) == expected


def test_a_frozen_model_under_a_trained_head_is_told_of(tmp_path, caplog):
    """There are no other blocks, and no error that arrives at these has anything to change."""

    def build() -> nn.Module:
        model = Trunk(0, 3)
        model.trunk.requires_grad_(False)
        return model

    with caplog.at_level(logging.WARNING, "grape_hf"):
        assert_same(trained(build, True, tmp_path), trained(build, False, tmp_path))
    told = [record.getMessage() for record in caplog.records if UNTRAINED in record.getMessage()]
    assert len(told) == 1
    assert "trunk.0 to trunk.1" in told[0]
    assert "is ordinary backpropagation here" in told[0]


@pytest.mark.parametrize("trained_block", [0, 1])
def test_nothing_is_told_where_a_block_below_a_point_trains(trained_block, tmp_path, caplog):
    def build() -> nn.Module:
        model = Trunk(0, 3)
        model.trunk.requires_grad_(False)
        model.trunk[trained_block].requires_grad_(True)
        return model

    with caplog.at_level(logging.WARNING, "grape_hf"):
        trained(build, True, tmp_path)
    assert not [record for record in caplog.records if UNTRAINED in record.getMessage()]
