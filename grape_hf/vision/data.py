"""Images as tensors on the device: whole batches by indexing, augmented in a few batched operations.

A data set is one uint8 tensor ``(N, C, H, W)``. A batch is a gather out of it: a random crop of the image with a border
of zeros, and a mirror image, are a choice of row and column for every pixel, so both are one indexing. All draws of an
epoch are made at its beginning, from (seed, epoch), one for each image: they do not depend on how the images are
batched or shared among processes, nor on where a run was resumed.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainerCallback


class Images(Dataset):
    """Images and labels that a ``DataLoader`` gets in whole batches; for the Trainer, with ``collate`` as its collator.

    Batches are ``{"pixel_values": (batch, C, H, W) float32, "labels": (batch,) int64}``, on the device of ``pixels``,
    so the loader must have no workers and pin no memory. An epoch other than the first is begun by ``set_epoch``.

    Args:
        pixels: ``(N, C, H, W)``, uint8.
        labels: ``(N,)``, int64.
        mean: of each channel, in [0, 1]; what normalisation subtracts.
        std: of each channel; what normalisation divides by.
        padding: width of the border of zeros in which crops of the size of the image are chosen at random; 0: no crop.
        flip: mirror half of the images.
        seed: of the draws.
        channels_last: give batches in that memory format.

    Attributes:
        stopwatch: the time spent in making batches.

    Raises:
        ValueError: if the shapes or types are others.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
        channels_last: bool = False,
    ) -> None:
        if pixels.ndim != 4 or pixels.dtype != torch.uint8 or labels.shape != pixels.shape[:1]:
            raise ValueError(
                "Expected pixels (N, C, H, W) in uint8 and labels (N,), got "
                f"{tuple(pixels.shape)} in {pixels.dtype} and {tuple(labels.shape)}."
            )
        self.pixels, self.labels = pixels, labels
        self.padding, self.flip, self.seed, self.channels_last = padding, flip, seed, channels_last
        self._mean, self._std = (
            torch.tensor(list(m), dtype=torch.float32, device=pixels.device).mul(255)[:, None, None]
            for m in (mean, std)
        )
        self._rows, self._columns = (torch.arange(n, device=pixels.device) for n in pixels.shape[2:])
        self.stopwatch = Stopwatch(pixels.device)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops and mirrors of an epoch; the same epoch gets the same ones again."""
        draws = np.random.default_rng((self.seed, epoch))
        device = self.pixels.device
        if self.padding:
            shifts = draws.integers(2 * self.padding + 1, size=(2, len(self)))
            self._down, self._right = torch.from_numpy(shifts).to(device)
        if self.flip:
            self._mirrored = torch.from_numpy(draws.random(len(self)) < 0.5).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Make a batch; what a ``DataLoader`` calls in place of ``__getitem__`` for each image."""
        with self.stopwatch:
            chosen = torch.tensor(indices).to(
                self.pixels.device, non_blocking=True
            )  # else it waits for the step before
            pixels = self._augmented(chosen) if self.padding or self.flip else self.pixels[chosen]
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            pixels = pixels.to(torch.float32, memory_format=layout).sub_(self._mean).div_(self._std)
            return {"pixel_values": pixels, "labels": self.labels[chosen]}

    def _augmented(self, chosen: Tensor) -> Tensor:
        """Gather the pixels of the crops, ``(batch, C, H, W)``."""
        rows, columns = (
            self._rows.expand(len(chosen), -1),
            self._columns.expand(len(chosen), -1),
        )  # (batch, H), (batch, W)
        if self.flip:
            columns = torch.where(self._mirrored[chosen, None], columns.flip(1), columns)
        pixels = self.pixels[chosen]
        if self.padding:
            rows, columns = rows + self._down[chosen, None], columns + self._right[chosen, None]
            pixels = F.pad(pixels, [self.padding] * 4)
        places = torch.arange(len(chosen), device=pixels.device)
        # The channels, not indexed, come last: (batch, H, W, C).
        gathered = pixels.permute(0, 2, 3, 1)[places[:, None, None], rows[:, :, None], columns[:, None, :]]
        return gathered.permute(0, 3, 1, 2)

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pass a batch on as it is: the Trainer's ``data_collator``."""
        return batch


class EpochDraws(TrainerCallback):
    """Tells the training images which epoch begins.

    The loader does so too, but not where several processes share the batches, nor in an epoch that is resumed midway
    (accelerate 1.15: an ``elif`` after the samplers in ``DataLoaderShard.set_epoch``).

    Args:
        images: the training set.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the draws of this epoch."""
        self.images.set_epoch(int(state.epoch or 0))


class Stopwatch:
    """Adds up the time of what it encloses, by the clock of the device, and never waits for the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._total, self._began = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        else:
            self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
            while self._events and self._events[0][1].query():  # those that are over: else they pile up
                begin, end = self._events.pop(0)
                self._total += begin.elapsed_time(end) / 1000
        else:
            self._total += time.perf_counter() - self._began

    def seconds(self) -> float:
        """Return the time so far; on a GPU, waits for what is under way."""
        for begin, end in self._events:
            end.synchronize()
            self._total += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._total


def mean_and_std(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of ``(N, C, H, W)`` uint8, in units of the range 0 to 1.

    They are taken from counts of the 256 values, so they are exact. A channel of one value gets the deviation 1.
    """
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in pixels.transpose(0, 1):
        counts = torch.bincount(channel.flatten(), minlength=256).cpu().numpy()
        mean = float(counts @ values / counts.sum())
        std = float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum()))
        means.append(mean)
        stds.append(std or 1.0)
    return means, stds
