"""Which settings `auto` stands for, by the blocks of real models and by what is done with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arguments
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from grape_hf import GrapeTrainer
from grape_hf.engine.points import options_for
from grape_hf.presets import PRESETS
from grape_hf.vision import image_classifier

LABELS = list("abcde")


def timm_model(name: str, **options: Any) -> nn.Module:
    return image_classifier(name, LABELS, **options)


def of_transformers(kind: str, **options: Any) -> nn.Module:
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, num_labels=5, **options))


MODELS = {
    "resnet": (lambda: timm_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8), "resnet"),
    "cifar": (lambda: timm_model("resnet20_cifar"), "resnet"),
    "transformers": (
        lambda: of_transformers("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]),
        "resnet",
    ),
    "vgg": (lambda: timm_model("vgg16_cifar"), "convnet"),
    "mobilenet": (lambda: timm_model("mobilenetv2_035"), "convnet"),
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
def test_paths_are_left_alone_where_graphs_cannot_be_looked_into(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not given:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = arguments(tmp_path, grape_preset="auto")
    for name, value in given.items():
        setattr(args, name, value)
    assert options_for(MODELS["cifar"][0](), args).grape_preset == "convnet"


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
