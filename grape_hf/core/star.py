r"""The star: where the error e of one forward waits for the blocks, and becomes delta_l = B_l e at each h_l.

The nodes that stand in autograd's graph are in ``nodes.py``; this is what they share. Beside the product with B_l there
are two ways to a better delta, which use the graphs of the blocks before these run their backward:

- The **shortcut path** of the very sample (``paths.py``) goes first, and the matrices add their part.
- A **sweep** corrects all deltas at once (parareal in depth). Every block applies its exact transposed Jacobian F_l to
  the delta that it has, and what that shows is passed down by cheap coarse maps C_l:

  .. math:: \delta'_{l-1} = F_l(\delta_l) + C_l(\delta'_l - \delta_l), \qquad \delta'_L = \delta_L = e.

  A sweep makes the highest delta exact that was not. The others go half way, to :math:`(\delta_l + \delta'_l) / 2`
  (relaxation): F_l of a wrong delta brings in new errors, which have little in common with those of the delta before.
  Down the shortcut path they go all the way, as the deltas before are far too small there. After n sweeps the n
  highest deltas are exact, so L - 1 sweeps are backpropagation of e. What else reads h_l (an auxiliary head, a
  router's loss) comes to block l later, with its own backward, and is in no delta below. Published for
  C = identity, without relaxation, as Highway-BP (Fagnou et al., ICLR 2025, arXiv 2501.17086).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from grape_hf.core.backward_effects import BackwardEffects
from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.head_check import HeadCheck
from grape_hf.core.layout import Pairing
from grape_hf.core.lesson import Lesson
from grape_hf.core.paths import pull_back

Matrix = Tensor | Literal["identity"]

_RELAXATION = 0.5  # how far a sweep takes a delta that it does not make exact; measured (LOG.md, 29 November 2026)


def project_error(e: Tensor, B: Matrix, h_shape: torch.Size, pairing: Pairing) -> Tensor:
    r"""Return delta_l = B_l e for every position of h_l.

    Args:
        e: dLoss/dy in the shape of y.
        B: feedback matrix, ``(n_l, n_y)``, or "identity". The product is computed in the dtype of e.
        h_shape: shape of h_l, which is the shape of the result.
        pairing: how positions of h_l and of e go together. Its padding matters only where one error per sample goes to
            several positions: at others there is no error to begin with.
    """
    layout = pairing.layout
    e = layout.vectors(e)
    n_l = e.shape[-1] if isinstance(B, str) else B.shape[0]
    batch, positions = h_shape[0], h_shape.numel() // (h_shape[0] * n_l)
    if len(e) != batch:
        raise RuntimeError(
            f"the error at y has {len(e)} rows, and a block's output {batch} samples: expected one for each, as in the "
            "first batch. A head that runs on chosen tokens alone has rows of its own. Use "
            'feedback_space="hidden".'
        )
    e = pairing.align(e, positions)
    delta = e if isinstance(B, str) else e.to(B.device) @ B.mT.to(e.dtype)  # (batch, positions or 1, n_l)
    if delta.shape[1] != positions:
        delta = pairing.unpadded(delta.expand(batch, positions, n_l))
    return layout.restore(delta, h_shape)


def autocast_dtype(h: Tensor) -> torch.dtype | None:
    """Return what autocast computes products with h in now; None if it is off, as it always is for meta tensors."""
    device = h.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@dataclass(frozen=True)
class Arm:
    """A boundary of one forward, with its graph.

    Attributes:
        h: h_l as block l made it.
        cut: where the graph of what is read in its place begins. The tensor itself may be changed by who reads it.
        B: the feedback matrix; None if it has no part in the delta.
        pairing: how positions of h_l and of e go together.
    """

    h: Tensor
    cut: GradientEdge
    B: Matrix | None
    pairing: Pairing


class Star:
    """Where the error of one forward waits for the blocks: the node at y puts it in, the nodes at each h_l read it.

    Whoever has e may put it in: a process that holds only some of the blocks gets it from the one that holds y.

    Args:
        lesson: what is noted meanwhile; nothing by default.
        sweeps: how often the deltas are corrected before they are used.
        path: whether the error takes the shortcut path of the very sample (``paths.py``), beside the matrices.
        maps: the maps of blocks. They, and the path, are the coarse maps C_l of sweeps; without either C_l is the
            identity where two boundaries have the same shape, and else nothing.
        around: whether later blocks than the next, or y, read what a block has made, too.
        effects: what backwards on the side change, and should not.

    Attributes:
        e: dLoss/dy, in the shape of y; None before the backward gets there.
        site: which node is the one at y. Where blocks are left out at random any of them may be the last that ran.
        arms: the boundaries, kept for sweeps and paths alone.
        y: the output with its graph, kept for sweeps, paths and the head's check.
        head: what is seen of a head whose output is y.
        over: whether no backward of this forward can come any more.
        aside: whether backwards are under way that are none of the step's: of sweeps, paths and the head's check. They
            come by nodes of the star, which then do nothing.
        dtype: in which products with matrices are computed: autocast's, as for the blocks' own; None for that of e.
    """

    def __init__(
        self,
        lesson: Lesson | None = None,
        sweeps: int = 0,
        path: bool = False,
        maps: BlockMaps | None = None,
        around: bool = False,
        effects: BackwardEffects | None = None,
    ) -> None:
        self.e: Tensor | None = None
        self.site: int | None = None
        self.lesson, self.sweeps, self.path, self.maps, self.around = lesson, sweeps, path, maps, around
        self._effects = effects
        self.arms: dict[int, Arm] = {}
        self.y: Tensor | None = None
        self.head: HeadCheck | None = None
        self.aside = self.over = False
        self.dtype: torch.dtype | None = None
        self._rounded: Tensor | None = None  # e in that dtype
        self._ready: dict[int, Tensor] = {}

    def put(self, e: Tensor) -> None:
        """Put the error in, and compute at once the deltas that are more than B_l e."""
        if self.over and (self.sweeps or self.path):
            raise RuntimeError(
                "a backward came after the end of the step that its forward was made in: expected it before, as "
                "feedback_sweeps and feedback_path need the graphs of all blocks."
            )
        self.e, self._rounded = e, None
        with self._aside():
            if self.head is not None:
                self.head.send(self.y, e)
            if self.arms:
                deltas = self._down_the_path(e) if self.path else self._by_matrices()
                self._ready = self._sweep(deltas, e)

    def check_last(self, gradient: Tensor) -> None:
        """Raise RuntimeError if the gradient at h_L does not all come by way of y, by which alone e is found.

        Of a head that was not called at all ``Boundaries.broadcast`` tells.
        """
        if self.head is not None and self.site is not None and not self.aside:
            self.head.arrived(gradient)

    def forget(self) -> None:
        """Let go of the graph. Until then another backward of the same forward may come."""
        self.arms, self.y, self.head, self._ready, self.over = {}, None, None, {}, True

    def delta(self, index: int, B: Matrix | None, h_shape: torch.Size, pairing: Pairing) -> Tensor:
        """Return delta_l: B_l e, or what paths and sweeps have made of it.

        Args:
            index: of the boundary.
            B: feedback matrix, ``(n_l, n_y)``.
            h_shape: shape of h_l.
            pairing: how positions of h_l and of e go together.
        """
        if self.e is None:
            raise RuntimeError(
                "a block was reached before any error: the loss does not use the output of the last block that ran (it "
                "reads a hidden state in the middle, or another exit), so that there is none to send. Expected every "
                'loss to go by way of the last block; leave the blocks behind it out of `blocks`, or use method="bp".'
            )
        delta = self._ready.pop(index, None)
        if delta is None:
            assert B is not None
            delta = self._project(B, h_shape, pairing)
        if self.lesson is not None:
            self.lesson.sent(index, delta, pairing, self.e)
        return delta

    def _project(self, B: Matrix, h_shape: torch.Size, pairing: Pairing) -> Tensor:
        """Return B_l e, computed in ``dtype``."""
        assert self.e is not None
        if self.dtype is None or isinstance(B, str):
            return project_error(self.e, B, h_shape, pairing)
        if self._rounded is None:
            self._rounded = self.e.to(self.dtype)
        return project_error(self._rounded, B, h_shape, pairing)

    def _by_matrices(self) -> dict[int, Tensor]:
        """Return B_l e of all boundaries in the shapes of their h_l."""
        return {index: part for index, arm in self.arms.items() if (part := self._by_matrix(arm)) is not None}

    def _down_the_path(self, e: Tensor) -> dict[int, Tensor]:
        """Return delta_{l-1} = S_l delta_l + G_l delta_l from the top down, or S_l delta_l + B_{l-1} e without maps."""
        deltas: dict[int, Tensor] = {}
        above: int | None = None
        for index in sorted(self.arms, reverse=True):
            arm = self.arms[index]
            parts = [self._pull(index, above, e if above is None else deltas[above])]
            if self.maps is None or self.maps.sources[index] is None:
                parts.append(self._by_matrix(arm))
            elif above is not None and self.maps.sources[index] == above:
                parts.append(self._by_map(index, deltas[above]))
            there = [part for part in parts if part is not None]
            deltas[index] = sum(there[1:], there[0]) if there else torch.zeros_like(arm.h)
            above = index
        return deltas

    def _sweep(self, deltas: dict[int, Tensor], e: Tensor) -> dict[int, Tensor]:
        """Return the corrected deltas."""
        assert self.y is not None
        indices = sorted(self.arms)
        for number in range(min(self.sweeps, len(indices))):
            below = indices[: len(indices) - number]  # those above are exact by now
            # The arms are cut from each other, so each input gets what its own block sends it, or what all do where
            # more than the next may read it: a decoder's blocks an encoder's output, or what goes around blocks.
            all_read = self.around or any(self.arms[index].pairing.pooled for index in below)
            readers = indices[1:] if all_read else indices[1 : len(below) + 1]
            outputs = [self.arms[index].h for index in readers]
            errors = [deltas[index].to(self.arms[index].h) for index in readers]
            if number == 0 or all_read:
                outputs, errors = [*outputs, self.y], [*errors, e.to(self.y.dtype)]
            inputs = [self.arms[index].cut for index in below]
            lesson = self.lesson if number == 0 and self.lesson is not None and self.lesson.by_sweep else None
            # From the deltas before they are corrected, which are what the maps have made.
            made = {i: lesson.delta(d, self.arms[i].pairing) for i, d in deltas.items()} if lesson else {}
            exact = torch.autograd.grad(outputs, inputs, errors, retain_graph=True, allow_unused=True)
            corrected = dict(deltas)
            for place, v in reversed(list(enumerate(exact))):
                index, above = below[place], indices[place + 1] if place + 1 < len(indices) else None
                if v is None:  # the block behind it was left out
                    continue
                if lesson:
                    lesson.learn(index, v, made, e)
                change = None
                if above is not None and corrected[above] is not deltas[above]:
                    change = self._coarse(index, above, corrected[above] - deltas[above].to(corrected[above]))
                corrected[index] = v if change is None else v + change.to(v)
            if not self.path:
                for index in below[:-1]:  # that of the last is exact now
                    corrected[index] = torch.lerp(deltas[index].to(corrected[index]), corrected[index], _RELAXATION)
            deltas = corrected
        return deltas

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Have nodes do nothing in a backward that is none of the step's."""
        self.aside = True
        try:
            looks = self.head is not None and self.head.looks
            with self._effects.undone() if self._effects and (self.arms or looks) else nullcontext():
                yield
        finally:
            self.aside = False

    def _coarse(self, index: int, above: int, change: Tensor) -> Tensor | None:
        """Return C_l of the change of the delta above."""
        if self.maps is None and not self.path:  # no shortcut leads out of an encoder
            arm = self.arms[index]
            alike = change.shape == arm.h.shape and arm.pairing.pooled == self.arms[above].pairing.pooled
            return change if alike else None
        parts = [self._pull(index, above, change) if self.path else None]
        if self.maps is not None and self.maps.sources[index] == above:
            parts.append(self._by_map(index, change))
        there = [part for part in parts if part is not None]
        return sum(there[1:], there[0]) if there else None

    def _pull(self, index: int, above: int | None, delta: Tensor) -> Tensor | None:
        """Return S_l delta for the delta of the boundary above, or of y."""
        output = self.y if above is None else self.arms[above].h
        assert output is not None
        return pull_back(output, self.arms[index].cut, delta)

    def _by_map(self, index: int, delta: Tensor) -> Tensor | None:
        """Return G_l delta; None if the boundary has other positions than the one that delta belongs to."""
        assert self.maps is not None
        arm = self.arms[index]
        layout = arm.pairing.layout
        d = layout.vectors(delta)
        if not self.maps.fits(index, layout.vectors(arm.h).shape[1], d.shape[1]):
            return None
        return layout.restore(self.maps.apply(index, d.to(self.dtype or d.dtype)), arm.h.shape).to(arm.h)

    def _by_matrix(self, arm: Arm) -> Tensor | None:
        """Return B_l e in the shape of h_l; None if the matrix has no part."""
        return None if arm.B is None else self._project(arm.B, arm.h.shape, arm.pairing).to(arm.h)
