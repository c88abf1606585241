"""Which settings `auto` stands for, by the blocks of real models and by what is done with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import arguments
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    NystromformerConfig,
    NystromformerForSequenceClassification,
)

from grape_hf import GrapeTrainer
from grape_hf.engine.points import options_for
from grape_hf.presets import PRESETS
from grape_hf.vision import image_classifier

LABELS = list("abcde")


def timm_model(name: str, **options: Any) -> nn.Module:
    return image_classifier(name, LABELS, **options)


def of_transformers(kind: str, **options: Any) -> nn.Module:
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, num_labels=5, **options))


def nystromformer() -> nn.Module:
    return NystromformerForSequenceClassification(
        NystromformerConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    )


MODELS = {
    "resnet": (lambda: timm_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8), "resnet"),
    "cifar": (lambda: timm_model("resnet20_cifar"), "resnet"),
    "transformers": (
        lambda: of_transformers("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]),
        "resnet",
    ),
    "vgg": (lambda: timm_model("vgg16_cifar"), "convnet"),
    "mobilenet": (lambda: timm_model("mobilenetv2_035"), "convnet"),
    "nystromformer": (lambda: nystromformer(), "recommended"),  # convolutions over maps of attention
    # The patches stand among the blocks there, and are the only convolution.
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=5),
        "recommended",
    ),
    "convolution first": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), *(nn.Linear(4, 4) for _ in range(3)))),
        "convnet",
    ),
    "vit": (lambda: of_transformers("vit", hidden_size=16, num_hidden_layers=2, num_attention_heads=2), "recommended"),
}


@pytest.mark.parametrize("name", MODELS)
def test_auto_stands_for_what_the_blocks_are(name: str, tmp_path: Path):
    build, preset = MODELS[name]
    options = options_for(build(), arguments(tmp_path, grape_preset="auto"))
    assert options.grape_preset == preset
    assert {key: getattr(options, key) for key in PRESETS[preset]} == PRESETS[preset]


@pytest.mark.parametrize(
    "given",
    [{"torch_compile": True}, {"pipeline_stages": 2}, {"fsdp": True}, {}],
    ids=["compiled", "stages", "fsdp", "fsdp-of-accelerate"],
)
def test_paths_and_sweeps_are_left_alone_where_graphs_cannot_be_looked_into(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not given:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = arguments(tmp_path, grape_preset="auto")
    for name, value in given.items():
        setattr(args, name, value)
    options = options_for(MODELS["cifar"][0](), args)
    assert (options.grape_preset, options.feedback_path, options.feedback_sweeps) == ("convnet", "matrix", 0)
    args.feedback_sweeps = 1  # asked for, and refused by whoever starts such a training
    assert options_for(MODELS["cifar"][0](), args).feedback_sweeps == 1


def test_a_residual_network_trains_down_its_shortcuts_by_default(tmp_path: Path):
    rows = [
        {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 5}
        for i in range(16)
    ]

    def trained(**options: Any) -> GrapeTrainer:
        torch.manual_seed(0)
        options = {"grape_preset": "auto"} | options
        trainer = GrapeTrainer(
            MODELS["resnet"][0](),
            arguments(tmp_path, max_steps=3, logging_steps=1, remove_unused_columns=False, **options),
            train_dataset=rows,
        )
        trainer.train()
        return trainer

    told = {
        "grape_preset": "recommended",
        "feedback_points": 0,
        "feedback_space": "hidden",
        "feedback_sharing": "position",
        "feedback_rule": "local",
        "feedback_path": "shortcut",
        "feedback_sweeps": 1,
        "feedback_lr": 0.02,
        "feedback_init": "auto",
    }
    by_default, as_told, before = trained(), trained(**told), trained(grape_preset="convnet")
    for (name, p), q, r in zip(
        by_default.model.named_parameters(), as_told.model.parameters(), before.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        if name.endswith("conv1.weight"):
            assert not torch.equal(p, r), name
    assert by_default.state.log_history[0]["grape/preset"] == "resnet"


def test_positions_of_maps_share_a_matrix_by_default(tmp_path: Path):
    """A Swin of 224 x 224 images, whose first maps have 75,264 numbers: no matrix is of such a size."""
    sizes = dict(depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 2, 4, 8))
    rows = [{"pixel_values": torch.randn(3, 224, 224), "labels": i} for i in range(4)]
    args = arguments(tmp_path, grape_preset="auto", max_steps=2, per_device_train_batch_size=4)
    trainer = GrapeTrainer(timm_model("swin_tiny_patch4_window7_224", **sizes), args, train_dataset=rows)
    trainer.train()
    assert trainer.grape_options.grape_preset == "recommended"
    assert [tuple(B.shape) for B in trainer.feedback] == [(n, 192) for n in (48, 96, 96, 192)]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trainer.model.parameters())


@pytest.mark.parametrize(("blocks", "points"), [(2, 1), (3, 2), (5, 3)])
def test_a_presets_points_are_as_many_as_there_is_room_for(blocks: int, points: int, tmp_path: Path):
    stack = nn.Sequential(nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(blocks))))
    for preset in ("auto", "convnet"):
        assert options_for(stack, arguments(tmp_path, grape_preset=preset)).feedback_points == points
    given = arguments(tmp_path, grape_preset="convnet", feedback_points=9)
    assert options_for(stack, given).feedback_points == 9  # refused by FeedbackPoints, with how many there may be


class Shaped(nn.Linear):
    """A head that makes (batch, horizon, channels) of all positions together."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.flatten(1)).view(len(h), -1, 2)


class Forecaster(nn.Module):
    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = Shaped(48, 2 * horizon)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        y = self.head(x)
        return {"loss": F.mse_loss(y, labels), "logits": y}


@pytest.mark.parametrize("horizon", [8, 5], ids=["as many steps as positions", "fewer"])
def test_the_error_of_a_forecast_is_measured_at_the_last_block(horizon, tmp_path):
    """Step s of y has nothing to do with position s: the head's output has no positions to pair."""

    def run(**options: Any) -> GrapeTrainer:
        torch.manual_seed(0)
        model = Forecaster(horizon)
        data = [{"x": torch.randn(8, 6), "labels": torch.randn(horizon, 2)} for _ in range(8)]
        trainer = GrapeTrainer(
            model, arguments(tmp_path, max_steps=2, alignment_steps=1, **options), train_dataset=data
        )
        trainer.train()
        return trainer

    assert run().feedback[0].shape == (6, 6)
    if horizon == 8:
        with pytest.raises(RuntimeError, match='made of other positions.*feedback_space="hidden"'):
            run(feedback_space="logits")
    else:
        with pytest.raises(ValueError, match='5 of these, and 8 of those.*feedback_space="hidden"'):
            run(feedback_space="logits")


def test_a_classifier_of_sequences_has_its_error_measured_in_hidden_space(tmp_path):
    """Of maps there are more numbers than classes, and of vectors the smaller number counts."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    data = [{"input_ids": torch.randint(9, (5,)), "labels": i % 2} for i in range(8)]
    trainer = GrapeTrainer(BertForSequenceClassification(config), arguments(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    assert trainer.feedback[0].shape == (8, 8)
    assert trainer._run.boundaries.read_at == "first"
