"""What the maps of blocks are shown in one backward: the delta that a block got, beside what it made of it.

The nodes in autograd's graph (``nodes.py``) report each in whatever order the backward comes by; a map learns as soon
as it has both. Only the positions that maps look at are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.layout import Pairing


@dataclass(frozen=True)
class Delta:
    """A delta as maps see it.

    Attributes:
        vectors: at the positions that are looked at, ``(batch, positions, n)``.
        pairing: how positions of h_l and of e go together.
        positions: how many h_l has.
        exact: whether it is not what maps made of e: the gradient that the block behind has computed, or corrected by
            sweeps.
    """

    vectors: Tensor
    pairing: Pairing
    positions: int
    exact: bool = False


@dataclass
class Lesson:
    """What the maps learn in one backward: v, the gradient at the input of a block, beside the delta that it got.

    It holds no part of the graph, whose nodes hold it.

    Attributes:
        maps: what learns; None where deltas are only kept.
        follows: whether v comes from the backward of the step; else from the first sweep, before it.
        corrected: whether sweeps correct the deltas that the blocks get.
        rest: whether the maps stand for what the shortcut path leaves out, which only the deltas that they made show.
        kept: where the deltas of all boundaries are put, to be looked at afterwards; None if nobody will.
    """

    maps: BlockMaps | None = None
    follows: bool = True
    corrected: bool = False
    rest: bool = False
    kept: dict[int, Tensor] | None = None
    _e: Tensor | None = None
    _deltas: dict[int, Delta] = field(default_factory=dict)
    _inputs: dict[int, Tensor] = field(default_factory=dict)

    def sent(self, index: int, delta: Tensor, pairing: Pairing, e: Tensor) -> None:
        """Note the delta of a boundary."""
        if self.kept is not None:
            self.kept[index] = delta
        if self.maps is not None and self.follows:
            self._e, self._deltas[index] = e, replace(self.delta(delta, pairing), exact=self.corrected)
            self._both(index)

    @property
    def by_sweep(self) -> bool:
        """Whether maps learn from what the first sweep shows."""
        return self.maps is not None and not self.follows

    def passed(self, index: int, delta: Tensor, pairing: Pairing, e: Tensor) -> None:
        """Note the exact gradient that flows through a boundary that is not cut."""
        if self.maps is not None and self.follows:
            self._e, self._deltas[index] = e, replace(self.delta(delta, pairing), exact=True)
            self.arrived(index, delta)

    def delta(self, delta: Tensor, pairing: Pairing) -> Delta:
        """Return what maps look at of a delta in the shape of h_l."""
        assert self.maps is not None
        vectors = pairing.layout.vectors(delta)
        return Delta(self.maps.sampled(vectors), pairing, vectors.shape[1])

    def arrived(self, index: int, v: Tensor) -> None:
        """Note the gradient at h_l as the block behind it has computed it."""
        if self.maps is not None and self.follows:
            self._inputs[index] = v
            self._both(index)

    def _both(self, index: int) -> None:
        """Learn as soon as both are there: either may come first."""
        if self._e is None or index not in self._deltas or index not in self._inputs:
            return
        assert self.maps is not None
        self.learn(index, self._inputs.pop(index), self._deltas, self._e)
        self._deltas.pop(self.maps.sources[index], None)  # type: ignore[arg-type]  # nobody else's source

    def learn(self, index: int, v: Tensor, deltas: Mapping[int, Delta], e: Tensor) -> None:
        """Have a map learn, unless the boundary that it comes from was left out, or has other positions this time.

        Args:
            index: of the boundary.
            v: gradient at h_l that the block behind it has computed.
            deltas: at h_l what the map and the path beside it made of the one behind that block, if that is not exact.
            e: the error, which a map without another source takes.
        """
        assert self.maps is not None
        here, source = deltas[index], self.maps.sources[index]
        pairing, vectors = here.pairing, here.pairing.layout.vectors(v)
        if source is None:
            d = pairing.align(pairing.layout.vectors(e), vectors.shape[1])
            if d.shape[1] != vectors.shape[1]:
                d = pairing.unpadded(d.expand(-1, vectors.shape[1], -1))
            there = Delta(self.maps.sampled(d), pairing, d.shape[1])
        elif source in deltas:
            there = deltas[source]
        else:
            return
        if not self.maps.fits(index, vectors.shape[1], there.positions):
            return
        of_maps = not (here.exact or there.exact)
        if self.rest and not of_maps:
            return
        predicted = here.vectors if of_maps else self.maps.apply(index, there.vectors)
        self.maps.observe(index, self.maps.sampled(vectors), there.vectors, predicted)
