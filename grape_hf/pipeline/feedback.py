r"""The feedback matrices of one stage: :math:`\delta_l = B_l e` at its own points.

They are those of one process with the same feedback points: the same starts, drawn in the same order, and the same file
in a checkpoint. A stage keeps its own alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from grape_hf.core.feedback import Feedback, FeedbackInit, initial_feedback
from grape_hf.core.star import Matrix
from grape_hf.engine.probe import read_position
from grape_hf.pipeline.places import Places


class StageFeedback:
    """B_l at the feedback points of one stage.

    Whoever learns B_l inside a stage replaces the matrices in ``B``; the rest follows.

    Args:
        names: all feedback points of the model: the number of the block before each, with its name.
        own: those of this stage.
        init: how B_l starts.
        width: n, the size of h_l and y, which are of one size.
        seed: of a gaussian start.
        dtype: of the matrices.
        device: where they lie.

    Attributes:
        B: by point, a matrix ``(n, n)``, or "identity", which saves the product.
        read_at: where the loss reads y, if that is one position alone; known on the last stage after the first error.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        own: Sequence[int],
        init: FeedbackInit,
        width: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.names, self.width, self.dtype, self.device = dict(names), width, dtype, device
        self.read_at: str | None = None
        self._asked = False
        self._share = 1.0  # of the error that each position gets, where there is one error for all
        self._identity = init == "identity"
        self._padding: list[Tensor | None] = []
        self.B: dict[int, Matrix] = {}
        generator = torch.Generator().manual_seed(seed)
        for point in names:
            matrix = None if init == "identity" else initial_feedback(init, width, width, generator, dtype)
            if point in own:
                self.B[point] = "identity" if matrix is None else matrix.to(device)

    def begin(self, padding: list[Tensor | None]) -> None:
        """Begin a batch.

        Args:
            padding: of each micro-batch, ``(batch, positions)``, nonzero where a position is no padding.
        """
        self._padding = padding

    def spread(self, e: Tensor, number: int) -> Tensor:
        """Return the error that goes up, for the error at y, ``(batch, positions, n)``; on the last stage.

        Where the loss reads one position of y alone, as a classifier does, there is one error for a sample: the sum
        over positions, which goes to every position that is no padding. An identity then shares it out among them. Else
        the error goes up as it is.

        Args:
            e: dLoss/dy of one micro-batch.
            number: of the micro-batch.
        """
        if not self._asked:  # once, by the first error; a host-device sync
            self.read_at, self._asked = read_position(e), True
            if self.read_at is not None and self._identity:
                self._share = 1 / e.shape[1]
        if self.read_at is None:
            return e
        whole = (self._share * e.sum(1, keepdim=True)).expand_as(e)
        padding = self._padding[number]
        return (whole if padding is None else whole * padding.to(e)[..., None]).contiguous()

    def deltas(self, points: Sequence[int], e: Tensor, number: int) -> list[Tensor]:
        """Return delta_l = B_l e at the points of this stage, ``(batch, positions, n)`` each.

        The output of the last block is y itself: it has no matrix, and gets the error at y.

        Args:
            points: in order.
            e: the error that has arrived; on the last stage, the error at y.
            number: of the micro-batch.
        """
        arrived = self.spread(e, number) if self._asked else e
        return [project(arrived, self.B[point]) if point in self.B else e for point in points]

    def save(self, path: Path, places: Places) -> None:
        """Write the matrices of all stages as one process would; to be called by all."""
        share = places.from_last(self._share)
        parts = places.gathered({point: self._dense(b, share).cpu() for point, b in self.B.items()})
        if parts is not None:
            found = {point: b for part in parts for point, b in part.items()}
            Feedback([found[point] for point in self.names]).save(path, list(self.names.values()))

    def load(self, path: Path, read_at: str | None) -> None:
        """Read the matrices of this stage back; see ``Feedback.load`` for what is refused."""
        empty = torch.empty(self.width, self.width, dtype=self.dtype)
        whole = Feedback([empty for _ in self.names])
        whole.load(path, list(self.names.values()))
        found = dict(zip(self.names, whole.B, strict=True))
        unchanged = torch.eye(self.width, dtype=self.dtype)
        self.B = {p: "identity" if torch.equal(found[p], unchanged) else found[p].to(self.device) for p in self.B}
        self.read_at, self._asked, self._share = read_at, read_at is not None, 1.0
        self._identity = False  # what positions share is in the matrices by now

    def _dense(self, b: Matrix, share: float) -> Tensor:
        return share * torch.eye(self.width, dtype=self.dtype) if isinstance(b, str) else b


def project(e: Tensor, B: Matrix) -> Tensor:
    """Return B_l e for every position: ``(batch, positions, n_y)`` to ``(batch, positions, n_l)``."""
    return e if isinstance(B, str) else e @ B.mT.to(e.dtype)
