r"""Maps of blocks as 3 x 3 convolutions: is it the neighbours that a 1 x 1 map misses? For the studies alone.

Chosen in a study's YAML by ``trainer: {map_kernel: 3}`` beside ``feedback_rule: local``, ``feedback_sharing: position``
and ``feedback_path: shortcut``. With the last, deltas are computed from the top down, each from the one above it, and
where a network has no shortcut connections the maps are all that is on the way:

.. math:: \delta_{l-1}(p) = \sum_{q \in Q} G_l^q\, \delta_l(p + q), \qquad Q = \{-1, 0, 1\}^2,

with zeros beyond the border. A map that takes e itself, where e or the next boundary has other positions, stays 1 x 1.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from grape_hf.core.block_maps import BlockMaps


class WideMaps(BlockMaps):
    """Maps that see a square of positions around each: G_l is ``(n_{l-1}, n_l * kernel ** 2)``.

    They learn by the rule of ``BlockMaps``, the numbers of a whole square being one vector d.

    Args:
        maps: what they start as, in the middle of the square, with zeros around it.
        kernel: positions on a side of the square, an odd number.
    """

    def __init__(self, maps: BlockMaps, kernel: int) -> None:
        super().__init__(maps.G, maps.sources)
        self.kernel = kernel
        for index, source in enumerate(self.sources):
            if source is not None:
                g = self.G[index]
                wide = g.new_zeros(*g.shape, kernel**2)
                wide[..., kernel**2 // 2] = g
                self.G[index] = wide.flatten(1)

    def squares(self, d: Tensor) -> Tensor:
        """Return the square around each of the positions of a square map: ``(batch, positions, n * kernel ** 2)``."""
        return F.unfold(_as_map(d), self.kernel, padding=self.kernel // 2).mT

    def product(self, above: Tensor | None = None) -> list[Tensor]:
        """Return matrices of the right shapes: of maps that see squares what they do far from a border.

        Deltas are not computed by them (``feedback_path``), but for those of maps that take e.
        """
        narrow = [
            g if source is None else g.unflatten(1, (-1, self.kernel**2)).sum(-1)
            for g, source in zip(self.G, self.sources, strict=True)
        ]
        return BlockMaps(narrow, self.sources).product(above)

    def apply(self, index: int, d: Tensor) -> Tensor:
        """Return G d."""
        if self.sources[index] is None:
            return super().apply(index, d)
        weight = self.G[index].unflatten(1, (-1, self.kernel, self.kernel)).to(d)
        return F.conv2d(_as_map(d), weight, padding=self.kernel // 2).flatten(2).mT

    def sampled(self, vectors: Tensor) -> Tensor:
        """Return all of them: a square needs its neighbours."""
        return vectors

    def observe(self, index: int, v: Tensor, d: Tensor, predicted: Tensor) -> None:
        """Take what a backward showed, of the positions that are looked at."""
        wide = d if self.sources[index] is None else self.squares(d)
        super().observe(index, *(super(WideMaps, self).sampled(t) for t in (v, wide, predicted)))


def _as_map(d: Tensor) -> Tensor:
    """Return vectors of a square map as ``(batch, n, side, side)``."""
    return d.mT.unflatten(2, (math.isqrt(d.shape[1]), -1))
