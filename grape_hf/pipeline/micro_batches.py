"""A batch cut into micro-batches, and what each counts for in the loss of the whole.

A loss is one of two kinds. Either it is a sum that is divided by the number of items of the whole optimiser step, which
the Trainer passes on: then the losses of micro-batches add up. Or it is a mean over what it has been given: then each
counts by its share of the items.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of what has no say in a loss


@dataclass(frozen=True)
class MicroBatches:
    """The parts of one batch.

    Attributes:
        parts: the micro-batches, equally many samples each.
        shares: what part of the batch's items each has; they sum to 1.
    """

    parts: list[dict[str, Any]]
    shares: list[float]

    def __len__(self) -> int:
        """Count them."""
        return len(self.parts)


def cut(batch: Mapping[str, Any], main_input: str, wanted: int, shifted: bool) -> MicroBatches:
    """Cut a batch into micro-batches of equally many samples.

    There are as many as wanted, or the largest number below that divides the samples. A batch of which some part would
    have no item to learn from stays whole: a mean over nothing is not a number.

    Args:
        batch: the batch; tensors with as many rows as the main input are cut, everything else goes to all parts.
        main_input: name of the model's main input.
        wanted: M.
        shifted: whether the loss leaves out the first label of each sample (a causal language model's).
    """
    rows = batch[main_input].shape[0]
    number = next(m for m in range(min(wanted, max(rows, 1)), 0, -1) if rows % m == 0)
    while True:
        size = rows // number
        parts = [
            {name: _rows(value, rows, slice(i * size, (i + 1) * size)) for name, value in batch.items()}
            for i in range(number)
        ]
        items = [_items(part, size, shifted) for part in parts]
        if number == 1 or min(items) > 0:
            return MicroBatches(parts, [n / sum(items) if number > 1 else 1.0 for n in items])
        number = 1


def _rows(value: Any, rows: int, chosen: slice) -> Any:
    return value[chosen] if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows else value


def _items(part: Mapping[str, Any], rows: int, shifted: bool) -> int:
    labels = part.get("shift_labels", part.get("labels"))
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return rows
    if shifted and "shift_labels" not in part:
        labels = labels[..., 1:]
    return int(torch.count_nonzero(labels != IGNORED))
