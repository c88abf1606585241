"""Train an image classifier: images and their splits, model, Trainer, and what a run leaves behind.

``recipes/image_classification.py`` says how it is started and what to expect. ``main`` is the whole of it.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    set_seed,
)

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.hub import without_home
from grape_hf.metrics import accuracy_of_classes, predicted_class
from grape_hf.recipes.common import (
    plot_callbacks,
    same_on_every_process,
    save_metrics,
    write_history,
    write_or_push_card,
)
from grape_hf.recipes.parsing import parse_overrides, parse_recipe
from grape_hf.vision import image_classifier, loading_note, networks
from grape_hf.vision.data import EpochDraws, Images, mean_and_std
from grape_hf.vision.sources import ImageData, Split, load_images


@dataclass
class DataArguments:
    """Which images, how they are split, and how they are varied."""

    data_dir: str | None = field(default=None, metadata={"help": "A folder of parquet files or of images."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set on the Hub, or embedded-sample. Default: uoft-cs/cifar100; the embedded sample if the "
            "Hub is out of reach."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the only column of classes."})
    image_size: int | None = field(
        default=None, metadata={"help": "Resize images to this height and width. Default: the pretrained model's."}
    )
    hub_timeout: float = field(default=15.0, metadata={"help": "Seconds to wait for the Hub when no data is named."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training images held out, where there is no validation split."}
    )
    train_subset: float | None = field(
        default=None, metadata={"help": "Share of the training images to train on. Default: all that are not held out."}
    )
    split_seed: int = field(
        default=0,
        metadata={"help": "Decides which images are held out or left out, whatever the seed of the training."},
    )
    crop_padding: int = field(
        default=4, metadata={"help": "Random crops out of the image with so wide a border of zeros; 0: none."}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror half of the images. Wrong for digits and letters."})
    evaluate_test: bool = field(
        default=False, metadata={"help": "Evaluate on the test split at the end: for final figures, not for choices."}
    )
    evaluate_only: bool = field(default=False, metadata={"help": "Train nothing: evaluate model_name_or_path."})


@dataclass
class ModelArguments:
    """Which network, and the step schedule that the Trainer lacks."""

    architecture: str = field(
        default="resnet20_cifar", metadata={"help": "A timm architecture, from scratch: timm.list_models()."}
    )
    model_args: str | None = field(
        default=None,
        metadata={
            "help": "More arguments of timm's, as `name=value,name=value` or, in a YAML file, a mapping; e.g. "
            "`img_size=32,patch_size=4`."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tune this model instead: a folder, or a name on the Hub."}
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Memory format of images and weights; faster for convolutions."}
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={"help": "Multiply the rate by lr_gamma at these shares of the training, e.g. 0.5 0.75."},
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of a step schedule."})


class ImageTrainer(GrapeTrainer):
    """``GrapeTrainer`` with a step schedule: after the warm-up, a factor ``gamma`` at each of the ``milestones``.

    The stock card, which ``method="bp"`` writes, gets a note on how to open the network where one is needed.
    """

    def __init__(
        self, *args: Any, milestones: Sequence[float] | None = None, gamma: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.milestones, self.gamma = milestones, gamma

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Make the step schedule if there are milestones, else what ``lr_scheduler_type`` says."""
        if not self.milestones:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            edges = [share * num_training_steps for share in self.milestones]

            def factor(step: int) -> float:
                return min(1.0, (step + 1) / (warmup + 1)) * self.gamma ** sum(step >= edge for edge in edges)

            self.lr_scheduler: Any = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card; here, since a push writes it too."""
        super().create_model_card(*args, **kwargs)
        architecture = getattr(self.model.config, "architecture", None)
        if architecture and self.args.method == "bp" and self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir), loading_note(architecture))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Load, train, evaluate, and leave everything in the output folder; return the metrics."""
    data_args, model_args, training_args = parse_recipe(
        DataArguments, ModelArguments, GrapeTrainingArguments, argv=argv
    )
    logging.basicConfig(level=training_args.get_process_log_level(), format="%(levelname)s %(name)s: %(message)s")
    training_args.remove_unused_columns = False  # batches come whole, from tensors on the device
    training_args.dataloader_pin_memory, training_args.dataloader_num_workers = False, 0
    set_seed(training_args.seed)

    with training_args.main_process_first(desc="loading and decoding images"):
        data = load_data(data_args, model_args)
    same_on_every_process(data.name)
    processor = load_processor(model_args)
    mean, std = statistics(processor) or mean_and_std(data.train.pixels)
    model = load_model(model_args, data, mean, std)
    if model_args.channels_last:
        model = model.to(memory_format=torch.channels_last)

    def images(split: Split, **augmentation: Any) -> Images:
        pixels, labels = (tensor.to(training_args.device) for tensor in (split.pixels, split.labels))
        return Images(pixels, labels, mean, std, channels_last=model_args.channels_last, **augmentation)

    train_images = images(data.train, padding=data_args.crop_padding, flip=data_args.flip, seed=training_args.seed)
    trainer = ImageTrainer(
        model=model,
        args=training_args,
        train_dataset=train_images,
        eval_dataset=images(data.validation),
        data_collator=Images.collate,
        processing_class=processor,  # timm models from scratch carry theirs in their configuration
        preprocess_logits_for_metrics=predicted_class,
        compute_metrics=accuracy_of_classes,
        callbacks=[EpochDraws(train_images), *plot_callbacks()],
        milestones=model_args.lr_milestones,
        gamma=model_args.lr_gamma,
    )
    card = {"dataset": data.name, "dataset_tags": data.hub_id, "tasks": "image-classification"}
    if training_args.push_to_hub and not data_args.evaluate_only:
        trainer.create_model_card(**card)  # what is pushed while training tells it too
    named = model_args.model_name_or_path and without_home(model_args.model_name_or_path)
    names = {"dataset": data.name, "train_images": len(data.train)}
    if data_args.evaluate_only:
        names |= {"model": named}
    else:
        names |= {"model": named or model_args.architecture, "method": training_args.method}
        trained = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
        trained["train_loading_share"] = loading_share(train_images, trained, trainer.state.log_history)
        save_metrics(trainer, "train", names | trained)
    results = names | trainer.evaluate()
    save_metrics(trainer, "eval", results)
    if data.test is not None:
        tested = trainer.evaluate(images(data.test), metric_key_prefix="test")
        save_metrics(trainer, "test", names | tested)
        results |= tested
    if not data_args.evaluate_only:
        output = Path(training_args.output_dir)
        trainer.save_state()
        trainer.save_model(_internal_call=True)  # else it would push now, before the rest is there
        if trainer.is_world_process_zero():
            write_history(output, trainer.state.log_history)
        write_or_push_card(trainer, card)
    return results


def load_data(data_args: DataArguments, model_args: ModelArguments) -> ImageData:
    """Load the images that the options name, in the size and colours that a pretrained model wants."""
    size, channels = data_args.image_size, parse_overrides("model_args", model_args.model_args or None).get("in_chans")
    if not model_args.model_name_or_path and channels is None and model_args.architecture not in networks.default_cfgs:
        channels = 3  # the image processor of a timm model makes every image RGB; our networks turn it back
    elif model_args.model_name_or_path:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        size = size or getattr(config, "image_size", None)
        channels = getattr(config, "num_channels", None) or (getattr(config, "model_args", None) or {}).get("in_chans")
    return load_images(
        data_dir=data_args.data_dir,
        dataset_name=data_args.dataset_name,
        dataset_config=data_args.dataset_config,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        image_size=size,
        channels=channels,
        validation_fraction=data_args.validation_fraction,
        train_subset=data_args.train_subset,
        data_seed=data_args.split_seed,
        with_test=data_args.evaluate_test,
        hub_timeout=data_args.hub_timeout,
    )


def load_processor(args: ModelArguments) -> BaseImageProcessor | None:
    """Load a pretrained model's image processor; None for a network from scratch, or a folder without one."""
    if not args.model_name_or_path:
        return None
    return AutoImageProcessor.from_pretrained(args.model_name_or_path)


def statistics(processor: BaseImageProcessor | None) -> tuple[list[float], list[float]] | None:
    """Return the mean and std that a processor normalises with, None where there is none or it does not normalise."""
    settings = getattr(processor, "data_config", None) or vars(processor or object)  # timm's keeps them in data_config
    mean, std = (settings.get(f"image_{name}", settings.get(name)) for name in ("mean", "std"))
    return (list(mean), list(std)) if mean and std else None


def load_model(args: ModelArguments, data: ImageData, mean: list[float], std: list[float]) -> PreTrainedModel:
    """Load the pretrained model that was named, or make the timm architecture asked for, in float32.

    Raises:
        ValueError: an architecture that timm does not know, or options that it does not take.
    """
    if args.model_name_or_path:
        names = dict(enumerate(data.label_names))
        return AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    shape = list(data.train.pixels.shape[1:])
    reading = {"input_size": shape, "mean": mean, "std": std, "crop_pct": 1.0, "interpolation": "bilinear"}
    given = parse_overrides("model_args", args.model_args or None)
    model_args = {"in_chans": shape[0], "pretrained_cfg_overlay": reading} | given
    return image_classifier(args.architecture, data.label_names, **model_args)


def loading_share(images: Images, metrics: dict[str, float], history: list[dict[str, Any]]) -> float:
    """Return the share of the training time, evaluations not counted, that went into making batches."""
    evaluations = sum(entry.get("eval_runtime", 0.0) for entry in history)
    return images.stopwatch.seconds() / (metrics["train_runtime"] - evaluations)


def add_to_card(output: Path, note: str | None) -> None:
    """Add what must be known to open the model, if anything, to its card."""
    if note:
        with (output / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n### How to open it\n\n{note}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
