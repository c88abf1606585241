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
largest divisor of H (of W) that is no larger than ``cells``. One-dimensional convolutions hand on ``(batch, C, S)``,
and some Transformers ``(batch, H, W, C)``: these have the vectors of the same tokens, or maps (``channels_of``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)

FeedbackSharing = Literal["auto", "none", "position", "grid"]


@dataclass(frozen=True)
class Layout:
    """Turns activations into vectors and back.

    Args:
        sharing: see above.
        channels_last: whether four-dimensional activations are ``(batch, H, W, C)`` (Swin).
        cells: cells of the grid along each side, at most.
        channels_first: whether three-dimensional activations are ``(batch, C, S)`` (``nn.Conv1d``).
    """

    sharing: FeedbackSharing = "auto"
    channels_last: bool = False
    cells: int = 4
    channels_first: bool = False

    def tokens(self, h: Tensor) -> Tensor:
        """Return ``h`` with its positions in front of its channels, where it is of three dimensions."""
        return h.mT if h.ndim == 3 and self.channels_first else h

    def vectors(self, h: Tensor) -> Tensor:
        """Return ``h`` as ``(batch, positions, n)``."""
        if h.ndim == 2:
            return h.unsqueeze(1)
        if h.ndim == 3 and self.sharing != "none":
            return self.tokens(h)
        if h.ndim != 4 or self.sharing in ("none", "auto"):
            return h.flatten(1).unsqueeze(1)
        maps = h.movedim(-1, 1) if self.channels_last else h
        batch, channels, height, width = maps.shape
        rows, columns = self._cells(height), self._cells(width)
        maps = maps.reshape(batch, channels, rows, height // rows, columns, width // columns)
        return maps.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, channels * rows * columns)

    def width(self, shape: torch.Size) -> int:
        """Return n, how long the vectors of an activation of ``shape`` are."""
        if len(shape) == 2 or (len(shape) == 3 and self.sharing != "none"):
            return shape[1 if self.channels_first else -1]
        if len(shape) != 4 or self.sharing in ("none", "auto"):
            return shape[1:].numel()
        height, width, channels = shape[1:] if self.channels_last else (*shape[2:], shape[1])
        return channels * self._cells(height) * self._cells(width)

    def restore(self, vectors: Tensor, shape: torch.Size) -> Tensor:
        """Return vectors ``(batch, positions, n)`` as an activation of ``shape``: the inverse of ``vectors``."""
        if len(shape) == 3 and self.sharing != "none" and self.channels_first:
            return vectors.mT
        if len(shape) != 4 or self.sharing in ("none", "auto"):
            return vectors.reshape(shape)
        batch, *sides = shape
        height, width, channels = sides if self.channels_last else (*sides[1:], sides[0])
        rows, columns = self._cells(height), self._cells(width)
        maps = vectors.reshape(batch, height // rows, width // columns, channels, rows, columns)
        maps = maps.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, height, width)
        return maps.movedim(1, -1) if self.channels_last else maps

    def _cells(self, side: int) -> int:
        if self.sharing == "position":
            return 1
        return next(cells for cells in range(min(self.cells, side), 0, -1) if side % cells == 0)


AUTO = Layout()


def channels_of(outputs: Iterable[tuple[nn.Module, torch.Size]]) -> tuple[bool, bool]:
    """Return ``channels_first`` and ``channels_last`` of a ``Layout``, by the modules of the blocks.

    Convolutions make channels behind the batch, linear layers and layer norms make them in the last dimension. Three
    dimensions have them last, and four behind the batch, unless only the others make as many in all blocks.

    Args:
        outputs: blocks, each with the shape of what it returns.
    """
    found: dict[int, list[tuple[bool, bool]]] = {3: [], 4: []}
    for block, shape in outputs:
        if len(shape) in found:
            found[len(shape)].append(_made_by(block, shape))
    first = bool(found[3]) and all(conv and not linear for conv, linear in found[3])
    last = bool(found[4]) and all(linear and not conv for conv, linear in found[4])
    return first, last


def _made_by(block: nn.Module, shape: torch.Size) -> tuple[bool, bool]:
    """Whether a convolution of the block makes as many channels as shape has second, and a linear layer as last."""
    conv = linear = False
    for module in block.modules():
        if isinstance(module, _CONVOLUTIONS):
            conv = conv or module.out_channels == shape[1]
        elif isinstance(module, nn.Linear):
            linear = linear or module.out_features == shape[-1]
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            linear = linear or module.normalized_shape[-1] == shape[-1]
    return conv, linear


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

    Args:
        layout: how h_l and y are seen as vectors.
        pooled: one error per sample although h_l and y may have equally many positions: h_l is of another sequence (an
            encoder's), or the loss reads y at one position alone.
        padding: ``(batch, positions of h_l)``, nonzero where a position is no padding; None if there is none.
        read: ``(batch, positions of y)``, nonzero where the loss reads y; None if that is everywhere.
    """

    layout: Layout = AUTO
    pooled: bool = False
    padding: Tensor | None = None
    read: Tensor | None = None

    def align(self, e: Tensor, positions: int) -> Tensor:
        """Return e, ``(batch, S, n_y)``, as ``(batch, positions or 1, n_y)``."""
        return align_positions(e, positions, self.pooled)

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
