"""Where images come from: a folder, a data set on the Hub, or the embedded sample; and their split.

What is asked for by name is loaded or is an error. Only where nothing is asked for, CIFAR-100 is tried and the embedded
sample takes its place if the Hub is out of reach; the name that travels with the data says which it was. Images are
decoded once, into a file beside the cache of `datasets`.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image, load_dataset
from torch import Tensor

from grape_hf import hub

logger = logging.getLogger(__name__)

CIFAR100 = ("uoft-cs/cifar100", "fine_label")
EMBEDDED = "embedded-sample"
LIMIT = 8 << 30  # bytes of a decoded split; all of it must fit the device, beside the model


@dataclass(frozen=True)
class Split:
    """Images of one size, ``(N, C, H, W)`` uint8, and their labels, ``(N,)`` int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        """Return the images of these numbers, in this order."""
        return Split(self.pixels[torch.from_numpy(rows)], self.labels[torch.from_numpy(rows)])


@dataclass(frozen=True)
class ImageData:
    """Images in splits, and their true name.

    Attributes:
        name: what the images are, for metrics and model cards.
        label_names: the classes, in the order of the labels.
        train: what is trained on.
        validation: what choices are made on.
        test: what final figures are of; None where it was not asked for.
        hub_id: the name on the Hub, for the metadata of a model card; None for files and the embedded sample.
    """

    name: str
    label_names: list[str]
    train: Split
    validation: Split
    test: Split | None = None
    hub_id: str | None = None


def load_images(
    data_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    validation_fraction: float = 0.1,
    train_subset: float | None = None,
    data_seed: int = 0,
    with_test: bool = False,
    hub_timeout: float = 15.0,
) -> ImageData:
    """Load images: from a folder, else from the Hub, else the embedded sample.

    Args:
        data_dir: a folder of parquet files or of images, as ``datasets.load_dataset`` takes them.
        dataset_name: a data set on the Hub; ``embedded-sample`` for scikit-learn's digits. Default: CIFAR-100, or the
            embedded sample if the Hub is not in reach.
        dataset_config: its configuration.
        image_column: the column of the images. Default: the only one of that type.
        label_column: the column of the labels. Default: the only one of classes.
        image_size: bring all images to this height and width. Default: as they are, all of one size.
        channels: 1 (grey) or 3 (colours). Default: as the first image.
        validation_fraction: share of the training split that is held out, where the data has no split `validation`.
        train_subset: share of the training split, counted before validation is held out, that is trained on. Default:
            all that validation leaves.
        data_seed: decides which images are held out and which are left out; not the seed of the training.
        with_test: load the split `test` too.
        hub_timeout: seconds to wait for the Hub when no data is named.

    Returns:
        The splits with their true name. Their images are the same for any seed of the training.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: columns that are missing or not clear, images of several sizes or too many, shares that leave
            nothing, two sources at once, or a data set that cannot be loaded.
    """
    if data_dir and (dataset_name or dataset_config):
        raise ValueError(
            f"Expected one source of images, got both data_dir={data_dir!r} and dataset_name={dataset_name!r}, "
            f"dataset_config={dataset_config!r}. Leave one out."
        )
    hub_id = None
    if data_dir:
        if not Path(data_dir).is_dir():
            raise FileNotFoundError(
                f"data_dir={data_dir!r}: expected a folder of parquet files or of images, found "
                f"{'a file' if Path(data_dir).exists() else 'nothing'} there ({Path(data_dir).resolve()})."
            )
        name, splits = hub.without_home(data_dir), _load_named(data_dir, None)
    elif dataset_name == EMBEDDED or (not dataset_name and not dataset_config and not _hub_in_reach(hub_timeout)):
        name, splits = "embedded sample (scikit-learn's digits, 8 x 8)", embedded_sample()
    else:
        source = dataset_name or CIFAR100[0]
        label_column = label_column or (None if dataset_name else CIFAR100[1])
        name, hub_id = hub.name_of(source, dataset_config)
        splits = _load_named(source, dataset_config)
    wanted = ["train", *(["validation"] if "validation" in splits else []), *(["test"] if with_test else [])]
    if missing := [split for split in wanted if split not in splits]:
        raise ValueError(f"{name} has no split {missing[0]!r}, only {', '.join(splits)}. Use a data set that has one.")
    image_column, label_column, label_names = _columns(splits["train"], name, image_column, label_column)
    loaded = {
        split: Split(
            _decoded(splits[split], image_column, image_size, channels, f"the {split} split of {name}"),
            _labels(splits[split], label_column, label_names, f"the {split} split of {name}"),
        )
        for split in wanted
    }
    train, held_out = _divide(
        loaded["train"], name, validation_fraction, train_subset, data_seed, "validation" in loaded
    )
    return ImageData(name, label_names, train, loaded.get("validation", held_out), loaded.get("test"), hub_id)


def embedded_sample() -> dict[str, Dataset]:
    """Make the embedded sample: scikit-learn's digits, 1,797 grey images of 8 x 8, a fifth of each class for the test.

    Raises:
        RuntimeError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RuntimeError(
            "The embedded sample is scikit-learn's digits, and scikit-learn is missing: "
            "pip install '.[vision]' in a checkout of grape_hf, or name images with --data_dir."
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rows = train_test_split(np.arange(len(pixels)), test_size=0.2, random_state=0, stratify=digits.target)
    features = datasets.Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return {
        split: Dataset.from_dict({"image": list(pixels[chosen]), "label": digits.target[chosen]}, features=features)
        for split, chosen in zip(("train", "test"), rows, strict=True)
    }


def _hub_in_reach(timeout: float) -> bool:
    """Ask the Hub for CIFAR-100, and say loudly what follows if it does not answer in time."""
    reason = hub.why_out_of_reach(CIFAR100[0], timeout)
    if reason is None:
        return True
    logger.warning(
        "\n%s\nThis is NOT CIFAR-100. The Hub is not in reach (%s), and no data was named, so the embedded sample is\n"
        "used: 1,797 handwritten digits of 8 x 8 pixels. Its accuracies cannot be compared with any published figure.\n"
        "Name your images with --data_dir, or a data set with --dataset_name.\n%s",
        "!" * 110,
        reason,
        "!" * 110,
    )
    return False


def _load_named(name: str, config: str | None) -> dict[str, Dataset]:
    try:
        return dict(load_dataset(name, config))
    except Exception as error:
        raise ValueError(
            f"The data set {name!r}{f' ({config})' if config else ''} cannot be loaded: {type(error).__name__}: "
            f"{error}\nCheck its name and configuration and the way to the Hub, or give a folder with data_dir, or "
            f"dataset_name={EMBEDDED!r} for small images that need no network."
        ) from error


def _columns(rows: Dataset, name: str, image: str | None, label: str | None) -> tuple[str, str, list[str]]:
    """Find the columns of images and labels by their types; return them and the names of the classes."""
    found = {"image_column": image, "label_column": label}
    for option, kind in (("image_column", Image), ("label_column", ClassLabel)):
        candidates = [column for column, feature in rows.features.items() if isinstance(feature, kind)]
        if found[option] is None:
            if len(candidates) != 1:
                raise ValueError(
                    f"{name}: expected one column of type {kind.__name__}, found {', '.join(candidates) or 'none'} "
                    f"among {', '.join(rows.features)}. Set {option}."
                )
            found[option] = candidates[0]
        elif found[option] not in rows.features:
            raise ValueError(f"{name} has no column {found[option]!r}, only {', '.join(rows.features)}. Set {option}.")
    image, label = str(found["image_column"]), str(found["label_column"])
    if not isinstance(rows.features[image], Image):
        raise ValueError(f"{name}: expected images in column {image!r}, got {rows.features[image]}. Set image_column.")
    feature = rows.features[label]
    names = feature.names if isinstance(feature, ClassLabel) else sorted(set(rows[label]))
    return image, label, [str(n) for n in names]


def _labels(rows: Dataset, column: str, names: list[str], what: str) -> Tensor:
    values: Iterable[Any] = rows[column]
    if not isinstance(rows.features[column], ClassLabel):
        numbers = {name: i for i, name in enumerate(names)}
        values = [numbers.get(str(value), -1) for value in values]
    labels = torch.tensor(list(values), dtype=torch.int64)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"{what}: expected labels from 0 to {len(names) - 1}, "
            + (f"got {int(labels.min())} to {int(labels.max())}." if len(labels) else "got no rows.")
        )
    return labels


def _decoded(rows: Dataset, column: str, size: int | None, channels: int | None, what: str) -> Tensor:
    """Decode a split, or read what an earlier run has decoded; ``(N, C, H, W)`` uint8."""
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels}: expected 1 (grey) or 3 (colours).")
    if len(rows) == 0:
        raise ValueError(f"{what} is empty: expected rows with images, got none.")
    first = rows[0][column]
    grey = channels == 1 or (channels is None and first.mode in ("1", "L"))
    width, height = (size, size) if size else first.size
    shape = (len(rows), 1 if grey else 3, height, width)
    if (needed := int(np.prod(shape))) > LIMIT:
        raise ValueError(
            f"{what} decodes to {needed / 2**30:.1f} GiB ({shape[0]:,} images of {shape[1]} x {height} x {width}), and "
            f"all of it is held in the device's memory: expected at most {LIMIT >> 30} GiB. Set a smaller image_size, "
            "or use a data set of fewer images."
        )
    file = None
    if rows.cache_files:  # rows that came from memory have nothing to be recognised by
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "grape_hf"
        file = folder / f"{rows._fingerprint}-{column}-{'x'.join(map(str, shape[1:]))}.npy"
        if file.is_file():
            return torch.from_numpy(np.load(file))
    pixels = np.empty((len(rows), height, width, shape[1]), dtype=np.uint8)
    for i, image in enumerate(row for batch in rows.select_columns(column).iter(1000) for row in batch[column]):
        image = image.convert("L" if grey else "RGB")
        if image.size != (width, height):
            if size is None:
                raise ValueError(
                    f"{what}: expected images of one size, found {width} x {height} and {image.size[0]} x "
                    f"{image.size[1]} (row {i}). Set image_size."
                )
            image = image.resize((width, height), resample=2)  # bilinear, as the saved image processor resizes
        pixels[i] = np.asarray(image).reshape(height, width, -1)
    pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as stream:
            np.save(stream, pixels)
        part.replace(file)  # whole or not at all
    return torch.from_numpy(pixels)


def _divide(
    split: Split, name: str, validation_fraction: float, train_subset: float | None, seed: int, has_validation: bool
) -> tuple[Split, Split]:
    """Return training and validation: the beginning of one shuffled order is held out, what follows is trained on."""
    if not 0 <= validation_fraction < 1 or (train_subset is not None and not 0 < train_subset <= 1):
        raise ValueError(
            f"validation_fraction={validation_fraction}, train_subset={train_subset}: expected shares between 0 and 1."
        )
    order = np.random.default_rng(seed).permutation(len(split))
    held_out = 0 if has_validation else round(validation_fraction * len(split))
    left = len(split) - held_out
    count = left if train_subset in (None, 1) else round(train_subset * len(split))
    if not 0 < count <= left or not (held_out or has_validation):
        raise ValueError(
            f"{name} has {len(split):,} images for training, of which {held_out:,} are held out for validation; "
            f"{count:,} were to be trained on. Expected at least one each, and together no more than there are: set "
            "validation_fraction and train_subset."
        )
    return split.take(order[held_out : held_out + count]), split.take(order[:held_out])
