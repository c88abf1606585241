"""Which samples of a batch an estimate is made on, and the model's call with these alone."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grape_hf.core import nested
from grape_hf.core.calls import ModelCall

logger = logging.getLogger(__name__)

_AGAIN = 2**44  # added to the place of a sample that the model sees a second time


@dataclass(frozen=True)
class Share:
    """What an estimate is made on.

    Attributes:
        call: the model's call with the samples.
        places: theirs in the global batch.
        rows: which of the whole call's they are; None for all.
        counts: False if none was chosen, and the forward is made for the ranks that wait for it.
    """

    call: ModelCall
    places: list[int]
    rows: list[int] | None = None
    counts: bool = True

    def targets(self, labels: Tensor | None) -> Tensor | None:
        """Return the targets' padding (``target_mask``), by the batch's labels where the call has none."""
        found = target_mask(self.call.kwargs)
        if found is not None or labels is None:
            return found
        rows, number = self.rows, self.call.samples or len(labels)
        if rows is None and number == len(labels):
            return target_mask({"labels": labels})
        # The call may see every sample several times, the second time behind all others.
        return target_mask({"labels": nested.rows_of(labels, [row % len(labels) for row in rows or range(number)])})


class Sampler:
    """Takes samples out of calls, as far as a call's samples can be told apart.

    Args:
        sharded: whether every rank must take part in each forward (FSDP2).
    """

    def __init__(self, sharded: bool = False) -> None:
        self.sharded = sharded
        self._sliced: dict[Any, bool] = {}  # whether calls of one kind can be made with some of their samples

    def take(
        self,
        call: ModelCall,
        places: Sequence[int],
        chosen: Sequence[int],
        activation: Callable[[ModelCall], Tensor],
    ) -> Share | None:
        """Return what the estimate is made on; None if no sample is to be taken.

        A batch of which the samples cannot be told apart (images of which a text has any number, packed sequences,
        joined graphs) is taken whole.

        Args:
            call: of the model with a micro-batch.
            places: of the micro-batch's samples in the global batch.
            chosen: which of them are wanted.
            activation: returns h_1 of a call.
        """
        number = call.samples
        if number is None or not places or number % len(places):
            return Share(call, list(places), counts=bool(chosen)) if chosen or self.sharded else None
        # A call may see every sample several times, the second time behind all others (chosen, rejected).
        own = [places[row % len(places)] + _AGAIN * (row // len(places)) for row in range(number)]
        wanted = set(chosen)
        rows = [row for row in range(number) if row % len(places) in wanted]
        if not rows:
            return Share(call.take([0]), own[:1], [0], counts=False) if self.sharded else None
        if len(rows) == number or not self._can_slice(call, rows, activation):
            return Share(call, own)
        return Share(call.take(rows), [own[row] for row in rows], rows)

    def _can_slice(self, call: ModelCall, rows: list[int], activation: Callable[[ModelCall], Tensor]) -> bool:
        """Whether the call with some of its samples makes of them what the whole makes.

        It does not where a tensor begins with another dimension that happens to be as long (rotary positions of three
        kinds, in a batch of three). Tried once for each kind of call; shards are taken as they are.
        """
        if self.sharded:
            return True
        tensors = list(nested.tensors((call.args, call.kwargs)))
        kind = tuple((path, t.ndim, t.dtype) for path, t in tensors), len(tensors[0][1])
        if kind not in self._sliced:
            try:
                whole, some = activation(call), activation(call.take(rows))
                each, rest = divmod(len(whole), call.samples or 1)
                picked = torch.tensor([row * each + j for row in rows for j in range(each)], device=whole.device)
                same = rest == 0 and whole.shape[1:] == some.shape[1:]
                self._sliced[kind] = same and torch.allclose(whole[picked].float(), some.float(), rtol=1e-2, atol=1e-3)
            except Exception as error:  # whatever a model makes of a part of what it expects
                logger.info(f"GrAPE: estimates are made on whole batches: {error!r}")
                self._sliced[kind] = False
        return self._sliced[kind]


def target_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which positions of the targets are no padding, ``(batch, positions)``; None where nothing says so.

    That is ``decoder_attention_mask``; or else all up to a sample's last label that is not -100, which is how
    collators pad labels. A position in front of it that has no label (a prompt) counts: it is no padding, and its
    Jacobian goes into the mean like any other, although no error arises there.
    """
    mask = inputs.get("decoder_attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    return (labels != -100).flip(1).cumsum(1).flip(1) > 0
