"""The recipe for images as a user starts it, and what it leaves behind; then its own functions, in this process."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from grape_hf import GrapeTrainingArguments
from grape_hf.vision.sources import EMBEDDED, load_images

TOP = Path(__file__).parents[1]
DIGITS = TOP / "recipes" / "image_classification" / "digits.yaml"
QUIET = ["--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("grape_hf.recipes.image_classification")


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "all_results.json").read_text())


@pytest.fixture(scope="module")
def grape_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on the digits with GrAPE, in a process of its own: no data named, and no Hub."""
    run = tmp_path_factory.mktemp("images") / "grape"
    options = yaml.safe_load(DIGITS.read_text()) | {"output_dir": str(run), "num_train_epochs": 4}
    options |= {"alignment_steps": 20, "calibration_strategy": "epoch", "dataset_name": None}
    (run.parent / "options.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "recipes/image_classification.py", run.parent / "options.yaml", *QUIET]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return run, done.stdout + done.stderr


class TestGrapeRun:
    def test_it_says_that_this_is_not_cifar_and_names_the_data(self, grape_run: tuple[Path, str]):
        run, output = grape_run
        assert "This is NOT CIFAR-100. The Hub is not in reach (ConnectError" in output
        name = "embedded sample (scikit-learn's digits, 8 x 8)"
        assert results(run)["dataset"] == name
        assert name in (run / "README.md").read_text()
        assert (results(run)["method"], results(run)["train_images"]) == ("grape", 1293)
        assert "test_accuracy" not in results(run)

    def test_it_learned(self, grape_run: tuple[Path, str]):
        assert results(grape_run[0])["eval_accuracy"] > 0.4

    def test_alignment_and_curves_are_there(self, grape_run: tuple[Path, str]):
        history = json.loads((grape_run[0] / "alignment.json").read_text())
        assert all(-1 <= entry["grape/alignment/estimate/h_1"] <= 1 for entry in history)
        assert any("grape/alignment/exact/mean" in entry for entry in history)
        assert history[-1]["grape/calibration/steps"] == 4
        for picture in ("alignment.png", "curves.png"):
            assert (grape_run[0] / picture).read_bytes().startswith(b"\x89PNG")
        log = json.loads((grape_run[0] / "trainer_state.json").read_text())["log_history"]
        assert {entry["epoch"] for entry in log if "eval_accuracy" in entry} == {1, 2, 3, 4}

    def test_loading_is_a_share(self, grape_run: tuple[Path, str]):
        assert 0 < results(grape_run[0])["train_loading_share"] < 0.5

    def test_a_pipeline_has_the_accuracy_that_training_reported(self, grape_run: tuple[Path, str]):
        classify = pipeline("image-classification", model=str(grape_run[0]), top_k=1)
        validation = load_images(dataset_name=EMBEDDED).validation
        found = classify([Image.fromarray(pixels[0].numpy()) for pixels in validation.pixels])
        right = [top[0]["label"] == str(int(label)) for top, label in zip(found, validation.labels, strict=True)]
        assert np.mean(right) == pytest.approx(results(grape_run[0])["eval_accuracy"], abs=1e-4)

    def test_it_is_evaluated_again_without_training(self, grape_run: tuple[Path, str], recipe: ModuleType):
        run, other = grape_run[0], grape_run[0].parent / "evaluated"
        options = ["--model_name_or_path", run, "--evaluate_only", "true", "--evaluate_test", "true", "--method", "bp"]
        found = recipe.main([str(DIGITS), *map(str, options), "--output_dir", str(other), *QUIET])
        assert found["eval_accuracy"] == results(run)["eval_accuracy"]
        assert found["eval_loss"] == pytest.approx(results(run)["eval_loss"], rel=1e-5)
        assert 0.3 < found["test_accuracy"] <= 1
        assert results(other)["test_accuracy"] == found["test_accuracy"]
        assert not (other / "config.json").exists()


def test_backpropagation_and_a_network_of_ours_with_a_step_schedule(recipe: ModuleType, tmp_path: Path):
    """MNIST's network reads the grey digits, brought to its size, and its card says how it opens."""
    arguments = ["--method", "bp", "--architecture", "mnist_cnn", "--model_args", "", "--image_size", "28"]
    arguments += ["--blocks", "", "--num_train_epochs", "2", "--lr_milestones", "0.5", "0.75", "--train_subset", "0.5"]
    arguments += ["--logging_strategy", "steps", "--logging_steps", "1", "--warmup_steps", "4"]
    found = recipe.main([str(DIGITS), *arguments, "--output_dir", str(tmp_path), *QUIET])
    assert found["train_images"] == 718  # half of the 1,437, in batches of 64: 24 steps
    assert found["eval_accuracy"] > 0.3
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    expected = [0.05 * factor for factor in [0.2, 0.4, 0.6, 0.8, *[1.0] * 8, *[0.1] * 6, *[0.01] * 6]]
    assert rates == pytest.approx(expected)
    assert "import grape_hf.vision" in (tmp_path / "README.md").read_text()
    digit = load_images(dataset_name=EMBEDDED, image_size=28).validation.pixels[0, 0]
    classify = pipeline("image-classification", model=str(tmp_path))
    assert len(classify(Image.fromarray(digit.numpy()))) == 5


def test_a_pretrained_model_is_normalised_as_before_and_keeps_its_processor(recipe: ModuleType, tmp_path: Path):
    """A ViT of transformers, whose blocks are found, trained by SGD with momentum: the optimiser that was asked for."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, image_size=10, patch_size=5
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(
        size={"height": 10, "width": 10}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path / "vit")
    seen: list[torch.Tensor] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if isinstance(module, nn.Conv2d) else None
    )
    arguments = ["--model_name_or_path", str(tmp_path / "vit"), "--method", "dfa", "--blocks", "", "--max_steps", "1"]
    recipe.main([str(DIGITS), *arguments, "--crop_padding", "0", "--output_dir", str(tmp_path / "run"), *QUIET])
    handle.remove()
    assert seen[0].shape[1:] == (3, 10, 10)
    grey = (
        seen[0].detach() * torch.tensor([0.4, 0.5, 0.6])[:, None, None] + torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    )
    assert (grey[:, 0] - grey[:, 2]).abs().max() < 1e-5
    assert results(tmp_path / "run")["method"] == "dfa"
    saved = pipeline("image-classification", model=str(tmp_path / "run")).image_processor
    assert list(saved.image_mean) == [0.1, 0.2, 0.3]


class TestOptions:
    FILES = sorted((TOP / "recipes" / "image_classification").glob("*.yaml"))

    @pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
    def test_every_option_of_our_files_exists(self, recipe: ModuleType, file: Path):
        kinds = recipe.DataArguments, recipe.ModelArguments, GrapeTrainingArguments
        _, model_args, training_args = recipe.parse_recipe(*kinds, argv=[str(file), "--use_cpu", "true"])
        assert training_args.optim == "sgd"
        data = load_images(dataset_name=EMBEDDED, image_size=32, channels=3)
        model = recipe.load_model(model_args, data, [0.5] * 3, [0.2] * 3)
        assert model.config.num_labels == 10

    def test_an_architecture_that_is_not_there(self, recipe: ModuleType):
        data = load_images(dataset_name=EMBEDDED)
        with pytest.raises(ValueError, match="knows no architecture 'resnet2_cifar'.* such as resnet20_cifar"):
            recipe.load_model(recipe.ModelArguments(architecture="resnet2_cifar"), data, [0.5], [0.2])
