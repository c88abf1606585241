"""What the first error of a run shows: whether the loss reads y at one position alone, where no look could tell.

A model that returns its loss is looked at before the first step (``probe.py``). Where the Trainer computes the loss, it
is the first error that shows it; errors are paired so from the second step on. In steps 1, 2, 4, 8 and so on the error
is looked at again: tasks may come by turns, and one that reads other positions has errors paired position by position.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grape_hf.core import nested
from grape_hf.core.boundaries import Boundaries, ReadAt
from grape_hf.core.calls import ModelCall
from grape_hf.core.feedback import Feedback, is_identity
from grape_hf.core.modes import Forward
from grape_hf.core.padding import mean_length
from grape_hf.engine.ranks import Ranks
from grape_hf.engine.rows import read_position, reads_several

logger = logging.getLogger(__name__)

READS_SEVERAL = (
    "GrAPE: the loss reads several positions of a sample, where in earlier batches it read one. Errors are paired "
    "position by position from now on, and what B_l has learned until now is of little use."
)


class FirstError:
    """The first error of a run.

    Args:
        sharded: whether FSDP2 shards the model.
        ranks: the processes that train the model.

    Attributes:
        seen: whether there was one.
        taken: whether what it showed is in use.
    """

    def __init__(self, sharded: bool, ranks: Ranks) -> None:
        self.sharded, self.ranks = sharded, ranks
        self.seen, self.taken, self._positions = False, False, 1.0
        self._found: ReadAt | None = None
        self._several = False
        self._shared: list[bool] | None = None  # which matrices are still the identity, or a share of it

    def see(self, boundaries: Boundaries, errors: Sequence[Tensor], labels: Any) -> None:
        """Look at e of every forward; one that is zero everywhere (labels that are ignored) says nothing yet."""
        if boundaries.read_at is not None or not errors or self.sharded:
            self.seen = True
            return
        errors = [e for e in errors if e.any()]
        self.seen = bool(errors)
        if not self.seen:
            return
        vectors = [boundaries.layout.vectors(e) for e in errors]
        self._positions = self._count(boundaries, errors[0])
        positions = vectors[0].shape[1]
        of_tokens = isinstance(labels, Tensor) and labels.ndim > 1 and positions in labels.shape[1:]
        found = {read_position(v) for v in vectors}
        self._found = found.pop() if len(found) == 1 and not of_tokens else None

    def _count(self, boundaries: Boundaries, e: Tensor) -> float:
        """How many positions are no padding, in the mean over samples."""
        batch, positions = boundaries.layout.vectors(e).shape[:2]
        return mean_length(boundaries.pairing(len(boundaries) - 1, e).padding, batch, positions)

    def due(self, boundaries: Boundaries, step: int) -> bool:
        """Whether the error of a step is to be looked at again."""
        return self.taken and boundaries.read_at is not None and not self.sharded and step & (step - 1) == 0

    def see_again(self, boundaries: Boundaries, errors: Sequence[Tensor]) -> None:
        """Look whether the loss reads several positions of a sample, where errors are paired by one."""
        self._several = self._several or any(reads_several(boundaries.layout.vectors(e)) for e in errors)

    def changes(self, boundaries: Boundaries, feedback: Feedback, step: int) -> bool:
        """Pair errors by what was seen, from the next step on, and return whether that is new; all ranks call it."""
        if self._shared is None and not boundaries.spread:  # nothing has been learned yet
            self._shared = [b.shape[0] == b.shape[1] and is_identity(b / b[0, 0]) for b in feedback.learned]
        if not self.taken:
            return self._take(boundaries, feedback)
        if not self.due(boundaries, step):
            return False
        several, self._several = self._several, False
        if self.ranks.count > 1:
            several = bool(self.ranks.total([number_for_ranks(int(several), feedback.B[0].device)])[0])
        if not several:
            return False
        logger.warning(READS_SEVERAL)
        boundaries.read_at = None
        self._forget(feedback)
        if self._shared is not None:
            whole = [
                torch.eye(len(b), dtype=b.dtype, device=b.device) if shared and takes_e else b
                for b, shared, takes_e in zip(feedback.learned, self._shared, _take_e(feedback), strict=True)
            ]
            feedback.put(self.ranks.first(whole))
        return True

    def _forget(self, feedback: Feedback) -> None:
        """Leave out what maps that take e have seen in this step: it was of other pairs."""
        if feedback.maps is not None:
            for index in (i for i, takes_e in enumerate(_take_e(feedback)) if takes_e):
                feedback.maps.sums.pop(index, None)

    def _take(self, boundaries: Boundaries, feedback: Feedback) -> bool:
        """Pair errors by what the first has shown: a step's micro-batches are paired alike. Return whether that is new.

        Where rank 0 has seen none yet, the next step's is waited for.
        """
        device = feedback.B[0].device
        alone = self.ranks.count == 1  # then nothing waits for the device
        self.taken = self.seen if alone else bool(self.ranks.first([number_for_ranks(int(self.seen), device)])[0])
        found, self._found = self.as_first_rank(self._found, device), None
        if found is None or boundaries.read_at is not None:
            return False
        boundaries.read_at = found
        self._forget(feedback)
        if not boundaries.spread:  # else most of the error stays where it arose
            shared = [
                b / self._positions if takes_e and is_identity(b) else b
                for b, takes_e in zip(feedback.learned, _take_e(feedback), strict=True)
            ]
            feedback.put(self.ranks.first(shared))
        return True

    def read_by(
        self, boundaries: Boundaries, forwards: Sequence[Forward], call: ModelCall, rows: list[int] | None
    ) -> Tensor | None:
        """Where the loss read y in a call, ``(batch, positions)``, for these samples; None if that is everywhere."""
        e = next((forward.e for forward in forwards if forward.call is call), None)
        if boundaries.read_at is None or e is None or (rows is not None and len(e) != call.samples):
            return None
        read = boundaries.layout.vectors(e).ne(0).any(-1)
        return read if rows is None else nested.rows_of(read, rows)

    def as_first_rank(self, read_at: ReadAt | None, device: torch.device) -> ReadAt | None:
        """Return what rank 0 has seen; each rank has looked at samples of its own."""
        if self.ranks.count == 1:
            return read_at
        seen: list[ReadAt | None] = [None, "first", "last"]
        return seen[int(self.ranks.first([number_for_ranks(seen.index(read_at), device)])[0])]


def _take_e(feedback: Feedback) -> list[bool]:
    """Return which matrices are paired with e: of maps those alone that have no other source."""
    maps = feedback.maps
    return [True] * len(feedback.learned) if maps is None else [source is None for source in maps.sources]


def number_for_ranks(value: int, device: torch.device) -> Tensor:
    """A number for other ranks, on a device that they can send it from."""
    return torch.tensor(value, device="cpu" if device.type == "meta" else device)
