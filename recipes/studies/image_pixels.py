"""Images as compressed bytes in files, so that whoever trains on them needs no `datasets` and brings few bytes along.

``prepare`` writes ``<split>.bz2`` into a folder under ``outputs/study_data``, which git ignores: 25,000 images of
32 x 32 in 44 MiB in place of 73. ``load`` reads them. The images and their split are those of ``load_images``.

Each pixel is kept as its difference from what its neighbours say (the median of left, up and left + up - corner, as in
JPEG-LS), red and blue less that of green, all modulo 256; nothing is lost.
"""

import bz2
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from grid import TOP

from grape_hf.vision.data import Images, mean_and_std

if TYPE_CHECKING:
    from grape_hf.vision.sources import ImageData

SPLITS = ("train", "validation", "test")


def folder_of(data: dict[str, Any]) -> Path:
    """Return where the images of a study's ``data`` lie."""
    return TOP / "outputs" / "study_data" / f"{Path(data['data_dir']).name}-{data['train_subset']:g}"


def prepare(data: dict[str, Any]) -> Path:
    """Decode and split the images, if that has not been done; return the folder."""
    folder = folder_of(data)
    if (folder / "about.json").exists():
        return folder
    from grape_hf.vision.sources import load_images  # only here: where the cells are run `datasets` may be missing

    write(
        folder,
        load_images(str((TOP / data["data_dir"]).resolve()), train_subset=data["train_subset"], with_test=True),
    )
    return folder


def write(folder: Path, data: "ImageData") -> None:
    """Write the files of all splits."""
    mean, std = mean_and_std(data.train.pixels)
    about: dict[str, Any] = {"labels": data.label_names, "mean": mean, "std": std, "splits": {}}
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        images = getattr(data, split)
        packed = bz2.compress(squeezed(images.pixels.numpy()).tobytes())
        (folder / f"{split}.bz2").write_bytes(packed)
        about["splits"][split] = {"shape": list(images.pixels.shape), "labels": images.labels.tolist()}
        print(f"{folder / split}.bz2: {len(images):,} images in {len(packed) / 2**20:.1f} MiB", flush=True)
    (folder / "about.json").write_text(json.dumps(about))  # last: it says that all is there


class StudyImages:
    """The splits of a study's images, on a device; each is read when it is first asked for.

    Args:
        data: the study's.
        device: where the images are to lie.

    Raises:
        FileNotFoundError: if they have not been prepared.
    """

    def __init__(self, data: dict[str, Any], device: torch.device) -> None:
        self.data, self.device, self.folder = data, device, folder_of(data)
        if not (self.folder / "about.json").exists():
            raise FileNotFoundError(
                f"{self.folder} has no about.json. Make it where `datasets` is installed: "
                "python recipes/studies/image_model.py STUDY.yaml --prepare"
            )
        self.about = json.loads((self.folder / "about.json").read_text())
        self._read: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def images(self, split: str, seed: int | None = None) -> Images:
        """Return a split; with a seed, that of the draws, the images are cropped and mirrored as the study says."""
        if split not in self._read:
            about = self.about["splits"][split]
            residuals = np.frombuffer(bz2.decompress((self.folder / f"{split}.bz2").read_bytes()), np.uint8)
            pixels = torch.from_numpy(unsqueezed(residuals.reshape(about["shape"])))
            self._read[split] = pixels.to(self.device), torch.tensor(about["labels"]).to(self.device)
        augmentation: dict[str, Any] = {}
        if seed is not None:
            augmentation = {"padding": self.data["crop_padding"], "flip": self.data["flip"], "seed": seed}
        about = self.about
        return Images(*self._read[split], about["mean"], about["std"], channels_last=True, **augmentation)


def squeezed(pixels: np.ndarray) -> np.ndarray:
    """Return the differences for ``(N, 3, H, W)`` uint8, in the same shape."""
    wide = pixels.astype(np.int16)
    left, up, corner = (np.zeros_like(wide) for _ in range(3))
    left[..., 1:], up[..., 1:, :], corner[..., 1:, 1:] = wide[..., :-1], wide[..., :-1, :], wide[..., :-1, :-1]
    residuals = (wide - _predicted(left, up, corner)).astype(np.uint8)
    residuals[:, [0, 2]] -= residuals[:, 1:2]
    return residuals


def unsqueezed(residuals: np.ndarray) -> np.ndarray:
    """Return the pixels that ``squeezed`` made the differences of."""
    residuals = residuals.copy()
    residuals[:, [0, 2]] += residuals[:, 1:2]
    height, width = residuals.shape[2:]
    # Pixel after pixel, all images at once; a border of zeros above and to the left.
    inner = np.ascontiguousarray(residuals.transpose(2, 3, 0, 1))
    wide = np.zeros((height + 1, width + 1, *inner.shape[2:]), np.int16)
    for row in range(height):
        for column in range(width):
            expected = _predicted(wide[row + 1, column], wide[row, column + 1], wide[row, column])
            wide[row + 1, column + 1] = (inner[row, column] + expected) & 255
    return np.ascontiguousarray(wide[1:, 1:].transpose(2, 3, 0, 1).astype(np.uint8))


def _predicted(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """The median of left, up and left + up - corner, in int16."""
    low, high = np.minimum(left, up), np.maximum(left, up)
    return np.clip(left + up - corner, low, high)
