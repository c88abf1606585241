"""Estimates of the Jacobians in a run: on which samples, in which mode, and their sum over a step."""

import logging
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn

from grape_hf.core.block_jacobian import block_jacobian_terms
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.feedback import Feedback
from grape_hf.core.jacobian import JacobianSum, Noise, Space, jacobian_terms
from grape_hf.core.tangents import ForwardModeError, JvpMode
from grape_hf.engine.aside import Aside
from grape_hf.engine.points import are_convolutional
from grape_hf.engine.probe import Probe
from grape_hf.engine.ranks import Ranks
from grape_hf.training_args import GrapeArgumentsMixin

logger = logging.getLogger(__name__)


class Estimates:
    """The estimates that one run makes.

    Args:
        aside: calls the model on the side.
        options: GrAPE's options.
        blocks: all blocks of the model.

    Attributes:
        mode: how tangents are computed.
        spaces: for each boundary, what is perturbed.
        sums: of the step under way.
    """

    def __init__(self, aside: Aside, options: GrapeArgumentsMixin, blocks: Sequence[nn.Module]) -> None:
        self.aside, self.options = aside, options
        # On convolutions a dual forward costs 3.4 to 5.9 forwards, two for a finite difference.
        cheaper: JvpMode = "finite_difference" if are_convolutional(blocks) else "dual"
        asked = options.jvp_mode
        self._planned: JvpMode = asked if asked == "dual" or asked == "finite_difference" else cheaper
        self._batch_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in aside.model.modules())
        self.mode: JvpMode = self._planned
        self.spaces: list[Space] = []
        self.sums = JacobianSum()

    def start(self, names: Sequence[str], blocks: Sequence[nn.Module], shapes: Probe) -> None:
        """Decide what is perturbed, by the sizes found.

        Args:
            names: of the blocks that end at boundaries.
            blocks: those.
            shapes: of h_l.

        Raises:
            ValueError: if the weights of a block cannot be perturbed.
        """
        self.mode = self._planned
        asked = self.options.perturbation_space
        if asked == "weight" and shapes.apart:
            raise ValueError(
                f'perturbation_space="weight" perturbs the weights of a block and takes its output for h_l. That of '
                f"{names[shapes.apart[0]]} is changed by the model before the next block reads it, or is made by no "
                'one module. Use perturbation_space="activation".'
            )
        self.spaces = [
            "weight" if index not in shapes.apart and self._in_weight_space(block, h.shape[-1]) else "activation"
            for index, (block, h) in enumerate(zip(blocks, shapes.h, strict=False))
        ]
        if self.aside.sharded and "weight" in self.spaces:
            raise ValueError(
                f"perturbation_space={asked!r} perturbs the weights of "
                f"{names[self.spaces.index('weight')]}, which FSDP2 shards. Use "
                'perturbation_space="activation", or DDP.'
            )

    def begin(self) -> None:
        """Begin an optimiser step."""
        self.sums = JacobianSum()

    def sampled(self, places: Sequence[int]) -> list[int]:
        """Return which samples of a micro-batch the estimate is made on, given their places in the global batch.

        They are spread evenly over the global batch, its first sample always among them, so every rank and
        micro-batch has its share. A model with batch norms gets them all: its Jacobian is of the batch as it is.
        """
        if self._batch_norms:
            return list(range(len(places)))
        share = Fraction(str(self.options.jvp_fraction))
        return [i for i, place in enumerate(places) if ceil((place + 1) * share) > ceil(place * share)]

    def add(
        self,
        boundaries: Boundaries,
        feedback: Feedback,
        forward: Callable[[], object],
        noise: Noise,
        mask: Tensor | None = None,
        counts: bool = True,
        targets: Tensor | None = None,
    ) -> None:
        """Add one micro-batch to this step's estimate; see ``GrapeRun.estimate``."""
        lms = feedback.rule == "lms"

        def terms(mode: JvpMode) -> JacobianSum:
            with self.aside.entered():
                if feedback.maps is not None:
                    return block_jacobian_terms(
                        boundaries, forward, noise, feedback.maps, mode=mode, residual=lms, mask=mask, targets=targets
                    )
                return jacobian_terms(
                    boundaries,
                    forward,
                    noise,
                    mode=mode,
                    passes=self.options.jvp_passes or "joint",
                    spaces=self.spaces,
                    B=feedback.B if lms else None,
                    mask=mask,
                    targets=targets,
                )

        try:
            found = terms(self.mode)
        except ForwardModeError as error:
            # Half-way through a forward FSDP2 cannot start another one.
            if self.options.jvp_mode != "auto" or self.aside.sharded:
                raise ForwardModeError(f'{error} Use jvp_mode="finite_difference".') from error
            logger.warning(f"GrAPE: finite differences in place of dual numbers from here on: {error}")
            self.mode = "finite_difference"
            found = terms(self.mode)
        if counts:
            self.sums.add(found)

    def total(self, feedback: Feedback, ranks: Ranks) -> JacobianSum:
        """Return the sum of the step over ranks, of which others may hold the samples."""
        if not self.sums.sums:
            zeros = [b.new_zeros(b.mT.shape) for b in feedback.learned]
            none = [torch.zeros((), dtype=torch.int64, device=b.device) for b in zeros]
            self.sums.add(JacobianSum(zeros, none))
        return self.sums.total(ranks.total)

    def _in_weight_space(self, block: nn.Module, n_l: int) -> bool:
        space = self.options.perturbation_space
        return space == "weight" or (space == "auto" and sum(p.numel() for p in block.parameters()) < n_l)
