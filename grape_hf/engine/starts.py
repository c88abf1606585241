"""The first matrices of a run: what they start as, how large they may be, and which starts suit a model."""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from grape_hf.core.block_maps import BlockMaps, map_sources
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.feedback import FeedbackInit, initial_feedback
from grape_hf.core.shortcut import shortcut_feedback
from grape_hf.engine.probe import Probe
from grape_hf.engine.ranks import ALONE, Ranks
from grape_hf.presets import ESTIMATING
from grape_hf.training_args import GrapeArgumentsMixin

logger = logging.getLogger(__name__)


class Starts:
    """Makes the first B_l, or the first maps of blocks, by the options.

    Args:
        model: the model.
        options: GrAPE's options.
        names: of the blocks that end at boundaries.
        ranks: the processes that train the model.
    """

    def __init__(
        self, model: nn.Module, options: GrapeArgumentsMixin, names: Sequence[str], ranks: Ranks = ALONE
    ) -> None:
        self.model, self.options, self.names, self.ranks = model, options, names, ranks

    def initial_feedback(
        self, space: str, boundaries: Boundaries, shapes: Probe, forward: Callable[[], object], seed: int
    ) -> list[Tensor]:
        """Make the first B_1 .. B_{L-1}, each ``(n_l, n_y)``, by ``feedback_init``.

        Args:
            space: what ``look`` returned, like the two that follow.
            boundaries: not attached at present.
            shapes: of h_l and y.
            forward: runs the model; its samples matter to the start from a shortcut path alone.
            seed: of a gaussian start.

        Raises:
            ValueError: if ``feedback_init`` does not suit the shapes or the blocks.
        """
        init, pooled = self.options.feedback_init or "auto", boundaries.pooled
        if self.options.feedback_path == "shortcut":
            if shapes.pathless and init in ("auto", "identity", "zero"):
                raise ValueError(
                    'feedback_path="shortcut" sends the error down the shortcut connections, and none leads to '
                    f"{', '.join(self.names[index] for index in shapes.pathless)}. Use "
                    'feedback_path="matrix", or feedback_rule="local", whose maps do the rest.'
                )
            init = "zero" if init in ("auto", "identity") else init
        square = space == "hidden" and all(h.shape[-1] == shapes.n_y for h in shapes.h)
        self._refuse_identity(init, pooled)
        # No shortcut path leads out of an encoder: B_l starts from zero there if it is to learn.
        of_encoder: FeedbackInit | None = None
        if init == "auto":
            init = "identity" if square else "gaussian"
            of_encoder = "zero" if self.options.method in ESTIMATING else "gaussian"
        total, numbers = len(shapes.h), sum(shapes.sizes)
        logger.info(
            f"GrAPE: {total + 1} blocks, errors measured in {space} space ({shapes.n_y} numbers), {init} start; "
            f"{total} feedback matrices of {numbers:,} numbers, {numbers * 4 / 2**20:.1f} MiB."
        )
        if init == "identity" and not square:
            if boundaries.whole:
                raise ValueError(
                    'feedback_init="identity" takes the weights of the residual branches away for a while where h_l '
                    'and y differ in size, and FSDP2 shards them. Use feedback_init="gaussian" or "zero", or DDP.'
                )
            chain = list(find_blocks(self.model, self.options.blocks).values())
            return shortcut_feedback(self.model, boundaries, forward, self.names, chain)
        generator = torch.Generator().manual_seed(seed)
        inits = [of_encoder or init if index in pooled else init for index in range(total)]
        share = _share(boundaries, shapes, init)
        return [
            share
            * initial_feedback(
                kind, h.shape[-1], shapes.n_y, generator, torch.promote_types(h.dtype, torch.float32)
            ).to(h.device)
            for kind, h in zip(inits, shapes.h, strict=True)
        ]

    def _refuse_identity(self, init: str, pooled: Collection[int]) -> None:
        if init == "identity" and pooled:
            raise ValueError(
                f'feedback_init="identity" is the Jacobian of the shortcut path, and none leads from '
                f'{self.names[min(pooled)]}, a block of the encoder, to y. Use "auto", "gaussian" or "zero".'
            )

    @property
    def by_block(self) -> bool:
        """Whether each block has a map of its own, and B_l is their product."""
        options = self.options
        return options.learns_by_maps or (options.method == "grape" and options.jvp_scope == "block")

    def initial_maps(self, boundaries: Boundaries, shapes: Probe, seed: int) -> BlockMaps:
        """Make the first maps G_l by ``feedback_init``; ``auto`` is the identity where it fits, else gaussian.

        Args:
            boundaries: not attached at present.
            shapes: of h_l and y.
            seed: of a gaussian start.

        Raises:
            ValueError: if ``feedback_init="identity"`` and the sizes of two neighbours differ or there is an encoder,
                or ``jvp_scope`` does not suit the model.
        """
        self._refuse_scope(boundaries, shapes)
        self._refuse_identity(self.options.feedback_init or "auto", boundaries.pooled)
        sources, generator = self._sources(boundaries, shapes), torch.Generator().manual_seed(seed)
        G = []
        # One for all: B_l is a product of maps, and blocks may compute in types of their own.
        dtype = reduce(torch.promote_types, [h.dtype for h in shapes.h], torch.float32)
        for index, (h, (n_l, n)) in enumerate(zip(shapes.h, self._map_shapes(boundaries, shapes), strict=True)):
            init = self.options.feedback_init or "auto"
            if self.options.feedback_path == "shortcut" and init in ("auto", "identity"):
                init = "zero"  # what the path does is not the map's to do
            if init == "auto":
                of_encoder = sources[index] is None and index in boundaries.pooled  # no shortcut leads out of it
                init = "zero" if of_encoder else "identity" if n_l == n else "gaussian"
            if init == "identity" and n_l != n:
                raise ValueError(
                    f'feedback_init="identity" needs outputs of one size, and {self.names[index]} has {n_l} numbers at '
                    f'a position, where what its map comes from has {n}. Use feedback_init="gaussian", "zero" or '
                    '"auto", which takes the identity where it fits.'
                )
            start = initial_feedback(init, n_l, n, generator, dtype)
            share = _share(boundaries, shapes, init) if sources[index] is None else 1.0
            G.append((share * start).to(h.device))
        return BlockMaps(G, sources)

    def _refuse_scope(self, boundaries: Boundaries, shapes: Probe) -> None:
        sources = self._sources(boundaries, shapes)
        lonely = [self.names[index] for index, source in enumerate(sources[:-1]) if source is None]
        if self.options.jvp_scope == "block" and lonely:
            raise ValueError(
                'jvp_scope="block" perturbs what a block reads and looks at what it makes, which must have the same '
                f'positions: that is not so behind {", ".join(lonely)}. Use jvp_scope="network", or '
                'feedback_rule="local".'
            )

    def _sources(self, boundaries: Boundaries, shapes: Probe) -> list[int | None]:
        lengths = shapes.lengths
        if self.ranks.count > 1:  # each has looked at samples of its own
            device = next(self.model.parameters()).device
            mixed = torch.tensor([i in boundaries.mixed for i in range(len(lengths))], dtype=torch.int32, device=device)
            counted, mixed = self.ranks.first([torch.tensor(lengths, device=device), mixed])
            lengths, boundaries.mixed = counted.tolist(), set(mixed.nonzero().flatten().tolist())
        sources = map_sources(lengths, [index in boundaries.pooled for index in range(len(shapes.h))])
        if boundaries.layout.turned:  # the mean is in all errors
            return sources
        return [None if index in boundaries.mixed else source for index, source in enumerate(sources)]

    def _map_shapes(self, boundaries: Boundaries, shapes: Probe) -> list[tuple[int, int]]:
        """The shapes of all matrices, ``(n_l, n)``: n is n_y, or that of the boundary which a map comes from."""
        sizes = [h.shape[-1] for h in shapes.h]
        if not self.by_block:
            return [(n_l, shapes.n_y) for n_l in sizes]
        sources = self._sources(boundaries, shapes)
        return [(n, shapes.n_y if s is None else sizes[s]) for n, s in zip(sizes, sources, strict=True)]

    def refuse_size(self, boundaries: Boundaries, shapes: Probe) -> None:
        """Refuse matrices that are larger together than ``feedback_size_limit``, before they are made.

        Args:
            boundaries: not attached at present.
            shapes: of h_l and y.

        Raises:
            ValueError: with the size, the largest of them, and the ways out.
        """
        matrices = self._map_shapes(boundaries, shapes)
        numbers = [rows * columns for rows, columns in matrices]
        size, limit = sum(numbers) * 4 / 2**30, self.options.feedback_size_limit
        if self.by_block:  # B_l, and the maps
            size += sum(h.shape[-1] * shapes.n_y for h in shapes.h) * 4 / 2**30
        if size <= limit:
            return
        largest = max(range(len(numbers)), key=numbers.__getitem__)
        h, columns = matrices[largest]
        raise ValueError(
            f"the feedback matrices would take {size:.3g} GiB, more than feedback_size_limit={limit} allows; the "
            f"largest, at {self.names[largest]}, is {h:,} x {columns:,}. Share one matrix among the positions "
            'of a map (feedback_sharing="position" or "grid"), use fewer feedback points (feedback_points), '
            'measure the error where it has fewer numbers (feedback_space="logits" for few classes), or raise the '
            "limit."
        )


def _share(boundaries: Boundaries, shapes: Probe, init: str) -> float:
    """Return what each position has, on the shortcut path, of one error for all of them."""
    one = boundaries.read_at is not None and not boundaries.spread
    return 1 / shapes.positions if one and init == "identity" else 1.0
