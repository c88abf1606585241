r"""A block's own map: G_l stands for block l's transposed Jacobian, and B_l is the product of those above it.

The exact deltas obey delta_{l-1} = F_l(delta_l), with F_l the transposed Jacobian of block l, which the block's own
backward applies. G_l, ``(n_{l-1}, n_l)``, stands for F_l at one position, so that

.. math:: B_l = G_{l+1} G_{l+2} \cdots G_L.

The step itself stays a broadcast of e. After it G_l learns by normalised least mean squares from what block l has just
computed: ``d = delta_l``, which it was given, and ``v = F_l(d)``, the gradient at its input:

.. math:: G_l \leftarrow G_l + \min\left(\frac{\eta \, n_l}{\max(1, n_l / N) \sum_i |d_i|^2},
    \frac{1}{\lambda}\right) \sum_i (v_i - G_l d_i) d_i^\top,

the sums over the N vectors of a global batch whose d is not zero. Of long samples one position in four is looked at,
another in each turn: a batch has many more vectors than a map has columns, and all of them teach it no more. lambda is
no less than the largest eigenvalue of :math:`\sum_i d_i d_i^\top`: a longer step diverges where the d have few
directions. It is the Frobenius norm of that matrix, taken from up to 256 of the vectors of each backward. No
forward-mode pass is made and no block waits. What blocks of one shape have shown is added up in one go, when the
backward is over: on a GPU many small kernels would cost more than their arithmetic.
In this file ``maps[i]`` belongs to boundary i, h_{i+1}: it leads to the gradient there.

Source: ours (docs/how_it_works.md); the update is Widrow and Hoff's, normalised.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_EVERY, _ENOUGH = 4, 16  # one position in four is looked at, but for that at least as many in a sample
_STACKED = 2**24  # numbers in a stack: of larger tensors a copy would cost more memory than it saves kernels


@dataclass
class MapSums:
    """What one optimiser step teaches one map: sums over vectors, micro-batches and ranks.

    Attributes:
        residual: of (v - G d) d^T, shaped like G.
        power: of |d|^2.
        largest: of lambda.
        count: of vectors whose d is not zero.
        products: of (G d . v, |G d|^2, |v|^2), ``(3,)``: how well the map does.
    """

    residual: Tensor
    power: Tensor
    largest: Tensor
    count: Tensor
    products: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [self.residual, self.power, self.largest, self.count, self.products]


class BlockMaps:
    """The maps of all blocks behind a boundary, their product, and how they learn.

    Args:
        G: for each boundary the map to it, ``(n_l, n of its source)``.
        sources: for each boundary the one behind the next block, whose delta the map takes; None where it takes e
            itself: at the last boundary, and where the next has other positions in the first batch.

    Attributes:
        whole: whether all positions are looked at, as where most of an error is at one of them.

    Raises:
        ValueError: if the sizes of two neighbours do not go together.
    """

    def __init__(self, G: Sequence[Tensor], sources: Sequence[int | None]) -> None:
        self.G, self.sources = list(G), list(sources)
        for index, source in enumerate(self.sources):
            if source is not None and self.G[index].shape[1] != self.G[source].shape[0]:
                raise ValueError(
                    f"expected a map from delta_{source + 1} with {self.G[source].shape[0]} columns at h_{index + 1}, "
                    f"got one of shape {tuple(self.G[index].shape)}."
                )
        self.sums: dict[int, MapSums] = {}
        self.turn, self.whole, self._warned = 0, False, False
        self._seen: list[tuple[int, list[Tensor]]] = []  # what was observed, and is not yet in the sums

    def product(self, above: Tensor | None = None) -> list[Tensor]:
        """Return B_1 .. B_{L-1}, each ``(n_l, n_y)``.

        Args:
            above: the matrix of what a map without a source takes, ``(n, n_y)``, where that is no e: a pipeline stage
                holds the maps of its own blocks alone.
        """
        B = list(self.G)
        for index in reversed(range(len(B))):
            source = self.sources[index]
            factor = above if source is None else B[source]
            if factor is not None:
                B[index] = self.G[index] @ factor.to(self.G[index].device)
        return B

    def begin(self, turn: int = 0) -> None:
        """Forget the sums of the step before.

        Args:
            turn: number of the step among those in which maps learn; decides which positions of long samples count.
        """
        self.sums, self.turn, self._seen = {}, turn, []

    def fits(self, index: int, here: int, there: int) -> bool:
        """Whether a map can lead from the positions of its source to those of its boundary in this batch.

        Args:
            index: the boundary.
            here: how many positions it has.
            there: how many its source has; as many in the first batch.
        """
        if here != there and not self._warned:
            self._warned = True
            logger.warning(
                f"GrAPE: blocks {index + 1} and {index + 2} make {here} and {there} positions of a sample in this "
                "batch, and made as many as each other in the first. From such batches the map between them learns "
                "nothing, and paths and sweeps leave it out. This is said once."
            )
        return here == there

    def apply(self, index: int, d: Tensor) -> Tensor:
        """Return G d for vectors ``(batch, positions, n)`` of the boundary's source, in their dtype."""
        return d @ self.G[index].mT.to(d)

    def sampled(self, vectors: Tensor) -> Tensor:
        """Return the vectors, of ``(batch, positions, n)``, that are looked at in this turn.

        A copy where these are not all: the others need not be kept.
        """
        stride = 1 if self.whole else min(_EVERY, max(1, vectors.shape[1] // _ENOUGH))
        return vectors if stride == 1 else vectors[:, self.turn % stride :: stride].clone()

    def observe(self, index: int, v: Tensor, d: Tensor, predicted: Tensor) -> None:
        """Take what one backward of the block behind a boundary showed, of the positions that are looked at.

        Args:
            index: the boundary.
            v: gradient at its h_l, ``(batch, positions, n_l)``.
            d: delta of its source, ``(batch, positions, n)``.
            predicted: G d, ``(batch, positions, n_l)``.
        """
        self._seen.append((index, [t.detach() for t in (v, d, predicted)]))

    @torch.no_grad()
    def gather(self) -> None:
        """Add what was observed to the sums; to be called when a backward is over, so that nothing of it is kept."""
        seen, self._seen = self._seen, []
        for places in _alike([[*tensors, self.G[index]] for index, tensors in seen]):
            indices = [seen[place][0] for place in places]
            G = self.G[indices[0]]
            stacks = [torch.stack(of_all) for of_all in zip(*(seen[place][1] for place in places), strict=True)]
            wide = [t.to(G).flatten(1, 2) for t in stacks]
            for index, *found in zip(indices, *_sums(*wide), strict=True):
                earlier = self.sums.get(index)
                if earlier is not None:
                    found = [a + b for a, b in zip(earlier.tensors, found, strict=True)]
                self.sums[index] = MapSums(*found)

    def total(self, over_ranks: Callable[[list[Tensor]], list[Tensor]]) -> list[MapSums]:
        """Return the sums of every boundary over ranks; zero where no block was seen.

        Args:
            over_ranks: sums each of the tensors in a list.
        """
        self.gather()
        mine = [self.sums.get(index) or self._nothing(g) for index, g in enumerate(self.G)]
        totals = iter(over_ranks([tensor for sums in mine for tensor in sums.tensors]))
        return [MapSums(*five) for five in zip(*[totals] * 5, strict=True)]

    def refined(self, totals: Sequence[MapSums], lr: float) -> list[Tensor]:
        """Return the maps after the step of the equation above; a map that saw nothing stays as it is.

        Args:
            totals: what ``total`` returned.
            lr: eta.
        """
        refined = list(self.G)
        for places in _alike([[g] for g in self.G]):
            g = torch.stack([self.G[i] for i in places])
            fields = zip(*(totals[i].tensors for i in places), strict=True)
            residual, power, largest, count, _ = (torch.stack(of_all) for of_all in fields)
            n, tiny = g.shape[-1], torch.finfo(g.dtype).tiny
            rate = lr * n / (n / count.clamp(min=1)).clamp(min=1)
            step = torch.minimum(rate / power.clamp(min=tiny), 1 / largest.clamp(min=tiny))
            step = torch.where(power > 0, step, 0.0).to(g)
            for i, of_one in zip(places, g + step[:, None, None] * residual, strict=True):
                refined[i] = of_one
        return refined

    @staticmethod
    def alignment(totals: Sequence[MapSums]) -> Tensor:
        """Return the cosine of G d with v at each boundary, ``(L-1,)``; NaN where one of them vanishes."""
        products = torch.stack([sums.products.to(totals[0].products) for sums in totals])
        return products[:, 0] / (products[:, 1] * products[:, 2]).sqrt()

    @staticmethod
    def _nothing(g: Tensor) -> MapSums:
        zero = g.new_zeros(())
        return MapSums(
            torch.zeros_like(g), zero, zero, torch.zeros((), dtype=torch.int64, device=g.device), g.new_zeros(3)
        )


def chained(G: Iterable[Tensor]) -> BlockMaps:
    """Return maps each of which leads from the boundary behind the next, and the last from e."""
    maps = list(G)
    return BlockMaps(maps, [*range(1, len(maps)), None][: len(maps)])


def _sums(v: Tensor, d: Tensor, predicted: Tensor) -> list[Tensor]:
    """Return the sums of ``MapSums`` for several boundaries, stacked; vectors are ``(boundaries, N, n)``."""
    squares = d.square().sum(-1)
    products = torch.stack([(predicted * v).sum((1, 2)), predicted.square().sum((1, 2)), v.square().sum((1, 2))], -1)
    return [(v - predicted).mT @ d, squares.sum(-1), _largest(d), (squares > 0).sum(-1), products]


def _largest(d: Tensor, rows: int = 256) -> Tensor:
    """Bound the largest eigenvalues of d^T d, ``d`` being ``(boundaries, N, n)``, by evenly chosen rows."""
    number = d.shape[1]
    some = d[:, :: max(1, number // rows)][:, :rows]
    return torch.linalg.matrix_norm(some @ some.mT) * (number / max(some.shape[1], 1))


def _alike(rows: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
    """Yield the places of rows whose tensors can be stacked, not too many at once."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[tuple((t.shape, t.dtype, t.device) for t in row)].append(place)
    for places in groups.values():
        most = max(1, _STACKED // max(1, *(t.numel() for t in rows[places[0]])))
        yield from (places[i : i + most] for i in range(0, len(places), most))


def map_sources(positions: Sequence[int], pooled: Sequence[bool]) -> list[int | None]:
    """Return from where each boundary's map leads: the next one with the same positions, else None, which is e.

    Args:
        positions: of each h_l.
        pooled: whether h_l is of another sequence than y: an encoder's.
    """
    last = len(positions) - 1
    alike = [
        i < last and positions[i] == positions[i + 1] and pooled[i] == pooled[i + 1] for i in range(len(positions))
    ]
    return [i + 1 if same else None for i, same in enumerate(alike)]
