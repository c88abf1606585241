"""How an activation is seen as vectors ``(batch, positions, n)``, which is what a feedback matrix multiplies.

All positions of one activation share its matrix, so this is also what ``feedback_sharing`` means:

==========  =======================  ============================================  ===================
            ``(batch, n)``           tokens ``(batch, S, C)``                      maps ``(batch, C, H, W)``
==========  =======================  ============================================  ===================
none        1 position, n            1 position, S C                               1 position, C H W
position    1 position, n            S positions, C                                H W positions, C
grid        1 position, n            S positions, C                                H/g W/g positions, C g g
auto        1 position, n            S positions, C                                1 position, C H W
==========  =======================  ============================================  ===================

``grid`` cuts the map into g x g cells, each with a matrix of its own that all positions inside the cell share; g is the
largest divisor of H (of W) that is no larger than ``cells``. Volumes are maps with one side more. One-dimensional
convolutions hand on ``(batch, C, S)``, and some Transformers ``(batch, H, W, C)``: these have the vectors of the same
tokens, or maps (``channels.py``).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

FeedbackSharing = Literal["auto", "none", "position", "grid"]


@dataclass(frozen=True)
class Layout:
    """Turns activations into vectors and back.

    Args:
        sharing: see above.
        channels_last: whether maps and volumes are ``(batch, H, W, C)`` (Swin).
        cells: cells of the grid along each side, at most.
        channels_first: whether three-dimensional activations are ``(batch, C, S)`` (``nn.Conv1d``).
        turned: whether they are ``(S, batch, C)``, which matters where errors are shared among positions alone.
    """

    sharing: FeedbackSharing = "auto"
    channels_last: bool = False
    cells: int = 4
    channels_first: bool = False
    turned: bool = False

    def shares(self, dimensions: int) -> bool:
        """Whether all positions of an activation of so many dimensions share one matrix."""
        return dimensions > 2 and (self.sharing == "position" or (dimensions == 3 and self.sharing != "none"))

    def tokens(self, h: Tensor) -> Tensor:
        """Return ``h`` with its positions in front of its channels, where it is of three dimensions."""
        return h.mT if h.ndim == 3 and self.channels_first else h

    def vectors(self, h: Tensor) -> Tensor:
        """Return ``h`` as ``(batch, positions, n)``."""
        if h.ndim == 2:
            return h.unsqueeze(1)
        if h.ndim == 3 and self.sharing != "none":
            return self.tokens(h)
        if h.ndim < 4 or self.sharing in ("none", "auto"):
            return h.flatten(1).unsqueeze(1)
        maps = h.movedim(-1, 1) if self.channels_last else h
        batch, channels, *sides = maps.shape
        cells = [self._cells(side) for side in sides]
        parts = [n for side, k in zip(sides, cells, strict=True) for n in (k, side // k)]
        maps = maps.reshape(batch, channels, *parts)  # (batch, C, g, H/g, g, W/g)
        inside, between = range(3, maps.ndim, 2), range(2, maps.ndim, 2)
        return maps.permute(0, *inside, 1, *between).reshape(batch, -1, channels * math.prod(cells))

    def width(self, shape: torch.Size) -> int:
        """Return n, how long the vectors of an activation of ``shape`` are."""
        if len(shape) == 2 or (len(shape) == 3 and self.sharing != "none"):
            return shape[1 if self.channels_first else -1]
        if len(shape) < 4 or self.sharing in ("none", "auto"):
            return shape[1:].numel()
        *sides, channels = shape[1:] if self.channels_last else (*shape[2:], shape[1])
        return channels * math.prod(map(self._cells, sides))

    def restore(self, vectors: Tensor, shape: torch.Size) -> Tensor:
        """Return vectors ``(batch, positions, n)`` as an activation of ``shape``: the inverse of ``vectors``."""
        if len(shape) == 3 and self.sharing != "none" and self.channels_first:
            return vectors.mT
        if len(shape) < 4 or self.sharing in ("none", "auto"):
            return vectors.reshape(shape)
        *sides, channels = shape[1:] if self.channels_last else (*shape[2:], shape[1])
        cells, d = [self._cells(side) for side in sides], len(sides)
        inside = [side // k for side, k in zip(sides, cells, strict=True)]
        maps = vectors.reshape(shape[0], *inside, channels, *cells)
        order = [place for k in range(d) for place in (d + 2 + k, 1 + k)]
        maps = maps.permute(0, d + 1, *order).reshape(shape[0], channels, *sides)
        return maps.movedim(1, -1) if self.channels_last else maps

    def _cells(self, side: int) -> int:
        if self.sharing == "position":
            return 1
        return next(cells for cells in range(min(self.cells, side), 0, -1) if side % cells == 0)


AUTO = Layout()


def align_positions(e: Tensor, positions: int, pooled: bool = False) -> Tensor:
    """Sum ``e``, ``(batch, S, n)``, over positions unless it has as many as asked for: one error per sample then.

    Args:
        e: error or tangent.
        positions: how many positions the other side has.
        pooled: sum in any case: the positions of the two sides are not the same.
    """
    return e if e.shape[1] == positions and not pooled else e.sum(1, keepdim=True)


@dataclass(frozen=True)
class Pairing:
    """Which vector of y goes with which vector of h_l: all that pair e, or q, with h_l ask it.

    Where the two have the same positions, position s of one goes with position s of the other. Else there is one error
    per sample, the sum over positions, and it goes with every position of h_l that is no padding.

    Where the loss reads y at one position alone, as a classifier reads its token, all others would get no error at all,
    though that token attends to them. So every position that is no padding gets the mean over these besides.

    Args:
        layout: how h_l and y are seen as vectors.
        pooled: one error per sample although h_l and y may have equally many positions: h_l is of another sequence (an
            encoder's).
        spread: whether every position gets the mean besides.
        padding: ``(batch, positions of h_l)``, nonzero where a position is no padding; None if there is none.
        read: ``(batch, positions of y)``, nonzero where the loss reads y; None if that is everywhere.
    """

    layout: Layout = AUTO
    pooled: bool = False
    spread: bool = False
    padding: Tensor | None = None
    read: Tensor | None = None

    def align(self, e: Tensor, positions: int) -> Tensor:
        """Return e, ``(batch, S, n_y)``, as ``(batch, positions or 1, n_y)``."""
        e = align_positions(e, positions, self.pooled)
        if not self.spread or e.shape[1] == 1:
            return e
        there = self.unpadded(e.new_ones(*e.shape[:2], 1))
        along = 0 if self.layout.turned else 1
        return e + there / there.sum(along, keepdim=True).clamp(min=1) * e.sum(along, keepdim=True)

    def padded(self, padding: Tensor | None) -> "Pairing":
        """Return the pairing with this padding."""
        return replace(self, padding=padding)

    def unpadded(self, vectors: Tensor) -> Tensor:
        """Return ``(batch, positions of h_l, n)`` with zeros where there is padding."""
        if self.padding is None or self.padding.shape != vectors.shape[:2]:
            return vectors
        return vectors * self.padding.to(vectors)[..., None]

    def at_top(self, q: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tangents of one estimate as they are paired.

        Args:
            q: tangent of y, ``(batch, S, n_y)``.
            a: ``(batch, positions, n_l)``.

        Returns:
            The two as they are, or, with one error per sample, the mean of q over what the loss reads of y,
            ``(batch, 1, n_y)``, and a without the samples of which it reads nothing.
        """
        if not self.pooled and q.shape[1] == a.shape[1]:
            return q, a
        if self.read is None or self.read.shape != q.shape[:2]:
            return q.mean(1, keepdim=True), a
        number = self.read.count_nonzero(1).to(q)[:, None, None]  # (batch, 1, 1)
        q = (q * (self.read != 0).to(q)[..., None]).sum(1, keepdim=True) / number.clamp(min=1)
        return q, a * (number > 0).to(a)


SAME = Pairing()
