r"""The feedback matrices of one stage: :math:`\delta_l = B_l e` at its own points.

They are those of one process with the same feedback points: the same starts, drawn in the same order, and the same file
in a checkpoint. A stage keeps its own alone. For ``feedback_rule="local"`` they are products of maps (``maps.py``).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from grape_hf.core.alignment import inner_products
from grape_hf.core.block_maps import chained
from grape_hf.core.feedback import Feedback, FeedbackInit, initial_feedback, is_identity, normalize_columns
from grape_hf.core.layout import Pairing
from grape_hf.core.star import Matrix
from grape_hf.engine.first_error import READS_SEVERAL
from grape_hf.engine.rows import read_position, reads_several
from grape_hf.pipeline.maps import StageMaps
from grape_hf.pipeline.places import Places
from grape_hf.pipeline.split import StageModel
from grape_hf.training_args import GrapeArgumentsMixin

logger = logging.getLogger(__name__)


class StageFeedback:
    """B_l at the feedback points of one stage.

    Args:
        names: all feedback points of the model: the number of the block before each, with its name.
        blocks: of this stage, by their numbers in the chain.
        starts: of B_l by point, ``(n, n)`` on the CPU; None for identities.
        width: n, the size of h_l and y, which are of one size.
        dtype: of the matrices.
        device: where they lie.

    Attributes:
        own: the points of this stage.
        B: by point, a matrix ``(n, n)``, or "identity", which saves the product.
        maps: what B_l is the product of; None if B_l stays as it is.
        read_at: where the loss reads y, if that is one position alone; known on the last stage after the first error.
        settled: whether an error has shown that, on the last stage.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        blocks: Sequence[int],
        starts: Mapping[int, Tensor] | None,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.names, self.width, self.dtype, self.device = dict(names), width, dtype, device
        self.blocks, self.own = list(blocks), [point for point in names if point in blocks]
        self.read_at: str | None = None
        self.maps: StageMaps | None = None
        self.settled = False
        self._batches, self._several = 0, False
        self._padding: list[Tensor | None] = []
        self.B: dict[int, Matrix] = {p: "identity" if starts is None else starts[p].to(device) for p in self.own}

    def learn(self, starts: Mapping[int, Tensor] | None, places: Places, lr: float, normalize: bool) -> None:
        """Have maps learn, whose products are the matrices.

        Args:
            starts: of the maps by point; None for identities.
            places: of this process.
            lr: eta_B.
            normalize: whether columns get unit length, at the start too.
        """
        identities = dict.fromkeys(self.names, torch.eye(self.width, dtype=self.dtype))
        first = identities if starts is None else dict(starts)
        if normalize:
            first = {point: normalize_columns(start) for point, start in first.items()}
        # Products of identities need not be made.
        products = first if first is identities else dict(zip(first, chained(first.values()).product(), strict=True))
        self.B = {point: products[point].to(self.device) for point in self.own}
        held = [point for point in first if point + 1 in self.blocks]
        G = chained(first[point].to(self.device, copy=True) for point in held)
        above = None if places.is_last else products[self.blocks[-1]].to(self.device)
        self.maps = StageMaps(held, self.blocks[-1], G, above, places, lr, normalize)

    def settle(self) -> None:
        """Take in what the maps of this stage and of those above have learned; to be called by all stages."""
        if self.maps is not None:
            self.B |= {point: b for point, b in self.maps.settle().items() if point in self.own}

    def begin(self, padding: list[Tensor | None]) -> None:
        """Begin a batch.

        Args:
            padding: of each micro-batch, ``(batch, positions)``, nonzero where a position is no padding.
        """
        self._padding = padding
        self._batches += 1
        if self._several:  # seen in the batch before; as in one process, from the next step on
            logger.warning(READS_SEVERAL)
            self.read_at, self._several = None, False

    def spread(self, e: Tensor, number: int) -> Tensor:
        """Return the error that goes up, for the error at y, ``(batch, positions, n)``; on the last stage.

        Where the loss reads one position of y alone, as a classifier does, every position that is no padding gets a
        share besides (``Pairing``).

        Args:
            e: dLoss/dy of one micro-batch.
            number: of the micro-batch.
        """
        if not self.settled and bool(e.any()):  # by the first error that is one; a host-device sync
            self.read_at, self.settled = read_position(e), True
        elif self.read_at is not None and self._batches & (self._batches - 1) == 0:  # tasks may come by turns
            self._several = self._several or reads_several(e)
        if self.read_at is None:
            return e
        return Pairing(spread=True, padding=self._padding[number]).align(e, e.shape[1])

    def deltas(
        self, points: Sequence[int], arrived: Tensor, e: Tensor, dtype: torch.dtype | None = None
    ) -> dict[int, Tensor]:
        """Return delta_l = B_l e at points of this stage, ``(batch, positions, n)`` each.

        The output of the last block is y itself: it has no matrix, and gets the error at y.

        Args:
            points: in order.
            arrived: the error as it travels (``spread``).
            e: on the last stage the error at y, else the same.
            dtype: in which the products are computed, that of e by default.
        """
        self.settle()
        return {point: project(arrived, self.B[point], dtype) if point in self.B else e for point in points}

    def observe(self, inputs: Mapping[int, Tensor], deltas: Mapping[int, Tensor], arrived: Tensor) -> None:
        """Have the maps learn from the backward of a micro-batch.

        Args:
            inputs: by point, what the block behind it has read, with its gradient.
            deltas: what ``deltas`` returned.
            arrived: as there; what a map without another source takes.
        """
        assert self.maps is not None
        self.maps.observe(inputs, {p: delta if p in self.B else arrived for p, delta in deltas.items()})

    def products(self, e: Tensor, exact: Mapping[int, Tensor]) -> Tensor:
        """Return the products behind cos(B_l e, delta_l) at the points of this stage (``core/alignment.py``).

        Args:
            e: the error as it travels.
            exact: by point, the gradient there.
        """
        rows = torch.zeros(len(self.own), 3, dtype=self.dtype, device=self.device)
        for row, point in zip(rows, self.own, strict=True):
            if point in exact:
                row += inner_products(project(e, self.B[point]).to(exact[point]), exact[point]).to(row)
        return rows

    def save(self, path: Path, places: Places) -> None:
        """Write the matrices of all stages as one process would; to be called by all."""
        self.settle()
        maps = {} if self.maps is None else dict(zip(self.maps.points, self.maps.maps.G, strict=True))
        parts = places.gathered(
            ({p: self._dense(b).cpu() for p, b in self.B.items()}, {p: g.cpu() for p, g in maps.items()})
        )
        if parts is not None:
            B, G = ({p: t for part in parts for p, t in part[which].items()} for which in (0, 1))
            whole = self._whole([B[point] for point in self.names], [G[point] for point in self.names if point in G])
            whole.save(path, list(self.names.values()))

    def load(self, path: Path, read_at: str | None, settled: bool) -> None:
        """Read the matrices of this stage back.

        Raises:
            ValueError: as ``Feedback.load``, and if maps do not each come from the one behind the next block.
        """
        self.settle()  # what is on its way from an earlier training would arrive later
        empty = [torch.empty(self.width, self.width, dtype=self.dtype) for _ in self.names]
        whole = self._whole(empty, [] if self.maps is None else list(empty))
        whole.load(path, list(self.names.values()))
        B = {point: b.to(self.device) for point, b in zip(self.names, whole.B, strict=True)}
        if self.maps is None:
            self.B = {point: "identity" if is_identity(B[point]) else B[point] for point in self.B}
        else:
            assert whole.maps is not None
            expected = chained(whole.maps.G).sources
            if whole.maps.sources != expected:
                raise ValueError(
                    f"{path} holds maps of blocks that make different numbers of positions: expected each to come from "
                    f"the one behind the next block, {expected}, as over pipeline stages, found {whole.maps.sources}. "
                    "Resume in one process (pipeline_stages=1), or with the model that wrote it."
                )
            G = dict(zip(self.names, whole.maps.G, strict=True))
            self.maps.maps.G = [G[point].to(self.device) for point in self.maps.points]
            self.B = {point: B[point] for point in self.B}
            self.maps.above = None if self.maps.above is None else B[self.maps.end]
        self.read_at, self.settled = read_at, settled

    @staticmethod
    def _whole(B: list[Tensor], G: list[Tensor]) -> Feedback:
        """The matrices as one process has them."""
        return Feedback(B, maps=chained(G) if G else None)

    def _dense(self, b: Matrix) -> Tensor:
        return torch.eye(self.width, dtype=self.dtype) if isinstance(b, str) else b


def stage_feedback(
    options: GrapeArgumentsMixin,
    split: StageModel,
    points: Sequence[int],
    seed: int,
    places: Places,
    device: torch.device,
) -> StageFeedback:
    """Make the feedback of one stage as it is when a training begins.

    Args:
        options: GrAPE's.
        split: this stage of the model.
        points: all feedback points of the model.
        seed: of a gaussian start.
        places: of this process.
        device: where this stage computes.

    Raises:
        ValueError: if blocks return something else than ``(batch, positions, n)`` of one size.
    """
    h = split.seen.h
    if split.seen.channels_first or any(made.ndim != 3 or made.shape[1:] != h[-1].shape[1:] for made in h):
        shapes = sorted({tuple(made.shape[1:]) for made in h})
        raise ValueError(
            f'method="{options.method}" with pipeline_stages expects that all blocks return (batch, positions, n) of '
            f'one size, found {shapes}. Use method="bp" over stages, or pipeline_stages=1.'
        )
    chosen = options.feedback_init
    init: FeedbackInit = "identity" if chosen is None or chosen == "auto" else chosen
    width, dtype = h[-1].shape[-1], torch.promote_types(h[-1].dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    starts = None
    if init != "identity":  # in the order of all points, as one process draws them
        starts = {point: initial_feedback(init, width, width, generator, dtype) for point in points}
    names = {point: split.chain_names[point] for point in points}
    found = StageFeedback(names, list(split.blocks), starts, width, dtype, device)
    if options.method == "grape":
        found.learn(starts, places, options.feedback_lr or 0.0, bool(options.feedback_normalize))
    return found


def project(e: Tensor, B: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """Return B_l e for every position: ``(batch, positions, n_y)`` to ``(batch, positions, n_l)``, as e is.

    The product is computed in ``dtype``, by default that of e.
    """
    dtype = dtype or e.dtype
    return e if isinstance(B, str) else (e.to(dtype) @ B.mT.to(dtype)).to(e)
