"""What GrAPE remembers during one training run, and what it does in one optimiser step.

It ties the numerical modules together and knows neither Trainer nor accelerate, so a plain PyTorch loop can use it as
well (README). An optimiser step is: ``begin_step``; for each micro-batch ``estimate`` and then forward and backward
inside ``step()``; ``finish_step``, which refines the feedback for the next step. The estimate uses the weights that the
step starts from; the refined feedback is first used in the step after, so that a step split into micro-batches is the
same step.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from grape_hf.alignment import delta_alignment, delta_products, exact_alignment, feedback_alignment
from grape_hf.baselines import dkp
from grape_hf.blocks import find_blocks, find_encoder, find_head
from grape_hf.boundaries import Boundaries, OutputNotReachedError
from grape_hf.calibration import CalibrationSchedule
from grape_hf.feedback import Feedback, FeedbackInit, initial_feedback, refit_moments
from grape_hf.isolation import isolated
from grape_hf.jacobian import ForwardModeError, JacobianSum, JvpMode, Noise, jacobian_terms
from grape_hf.layout import Layout
from grape_hf.probe import Probe, probe
from grape_hf.shortcut import shortcut_feedback
from grape_hf.training_args import ESTIMATING, GrapeArgumentsMixin

logger = logging.getLogger(__name__)

FEEDBACK_NAME = "grape_feedback.safetensors"
STATE_NAME = "grape_state.json"


class GrapeRun:
    """GrAPE on one model, from the first step to the last.

    Args:
        model: the model; hooks are attached by ``start`` and taken off by ``close``.
        options: GrAPE's options.
        seed: seed of the estimates, of a gaussian start and of the calibration schedule.

    Raises:
        ValueError: if no blocks are found, or an option does not suit the model.
    """

    def __init__(self, model: nn.Module, options: GrapeArgumentsMixin, seed: int = 0) -> None:
        self.model, self.options, self.seed = model, options, seed
        found = find_blocks(model, options.blocks)
        encoder = find_encoder(model)
        self._encoder = set() if encoder is None else set(encoder.modules())
        named: dict[str, nn.Module] = {}
        for inside in (True, False):  # a group of blocks does not reach from an encoder into its decoder
            stack = {name: block for name, block in found.items() if (block in self._encoder) is inside}
            named |= feedback_blocks(stack, options.blocks_per_feedback)
        self.block_names, self.blocks = list(named)[:-1], list(named.values())
        if options.feedback_space == "logits":
            find_head(model)
        self._batch_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        self.current_step: int | None = None
        self.calibrating = False
        self.metrics: dict[str, Tensor | float] = {}
        self._hooks = ExitStack()
        self._started = False

    def start(self, forward: Callable[[], object], steps_per_epoch: int | None = None) -> None:
        """Look at the shapes in one forward, make the feedback matrices, attach the hooks.

        Args:
            forward: runs the model on a sample or more.
            steps_per_epoch: optimiser steps in an epoch, None where unknown.

        Raises:
            ValueError: if ``feedback_init`` does not suit the shapes found, the matrices are larger than
                ``feedback_size_limit``, or the schedule needs the length of an epoch.
            RuntimeError: if the blocks do not run once each, in order, each on the output of the one before.
        """
        self.close()
        self.schedule = calibration_schedule(self.options, self.seed, steps_per_epoch)
        space, self.boundaries, shapes = self._look(forward)
        self._refuse_size(shapes)
        options = self.options
        B = self._initial_feedback(space, shapes, forward)
        self.feedback = Feedback(B, options.feedback_rule or "lms", options.feedback_lr or 0.0, self._normalize())
        self.jvp_mode = self._jvp_mode()
        self.spaces = [
            "weight" if self._in_weight_space(block, h.shape[-1]) else "activation"
            for block, h in zip(self.blocks, shapes.h, strict=False)
        ]
        self._hooks.enter_context(self.boundaries.attached())
        self._started = True

    def close(self) -> None:
        """Take the hooks off the model. The feedback matrices stay."""
        self._hooks.close()
        self._started = False

    def begin_step(self, step: int) -> None:
        """Say which optimiser step the coming micro-batch belongs to; decides what kind of step it is, once."""
        if step == self.current_step:
            return
        self.current_step, self.calibrating = step, self.schedule.due(step)
        self._estimate = JacobianSum()
        self._products: Tensor | None = None
        self._moments: list[tuple[Tensor, Tensor]] = []
        self._weight_gradients: list[Tensor] = []  # of B_l as a weight: dkp

    @property
    def single_block(self) -> bool:
        """Whether there is no feedback point, so that every step is ordinary backpropagation."""
        return len(self.blocks) == 1

    @property
    def estimating(self) -> bool:
        """Whether an estimate is to be made in this step."""
        assert self.current_step is not None
        learned = self.options.method in ESTIMATING
        return learned and not self.calibrating and self.current_step % (self.options.jvp_every or 1) == 0

    @property
    def measuring(self) -> bool:
        """Whether the exact alignment is to be measured on the side in this step."""
        every = self.options.alignment_steps
        return bool(every) and not self.calibrating and self.current_step % every == 0  # type: ignore[operator]

    def sampled(self, places: Sequence[int]) -> list[int]:
        """Return which samples of a micro-batch the estimate is made on, given their places in the global batch.

        They are spread evenly over the global batch, its first sample always among them, so every rank and
        micro-batch has its share. A model with batch norms gets them all: its Jacobian is of the batch as it is.
        """
        if self._batch_norms:
            return list(range(len(places)))
        share = Fraction(str(self.options.jvp_fraction))
        return [i for i, place in enumerate(places) if ceil((place + 1) * share) > ceil(place * share)]

    def estimate(self, forward: Callable[[], object], places: Sequence[int], mask: Tensor | None = None) -> None:
        """Add one micro-batch to this step's estimate of the Jacobians.

        Args:
            forward: runs the model on the samples that ``sampled`` chose, in any way that reaches y.
            places: their places in the global batch.
            mask: ``(batch, positions)``, nonzero where a position is not padding.
        """
        assert self.current_step is not None
        noise = Noise(self.seed, self.current_step, places)
        B = self.feedback.B if self.feedback.rule == "lms" else None

        def terms(mode: JvpMode) -> JacobianSum:
            with isolated(self.model):
                return jacobian_terms(
                    self.boundaries,
                    forward,
                    noise,
                    mode=mode,
                    passes=self.options.jvp_passes or "joint",
                    spaces=self.spaces,  # type: ignore[arg-type]
                    B=B,
                    mask=mask,
                )

        try:
            self._estimate.add(terms(self.jvp_mode))
        except ForwardModeError as error:
            if self.options.jvp_mode != "auto":
                raise ForwardModeError(f'{error} Use jvp_mode="finite_difference".') from error
            logger.warning(f"GrAPE: finite differences in place of dual numbers from here on: {error}")
            self.jvp_mode = "finite_difference"
            self._estimate.add(terms(self.jvp_mode))

    @contextmanager
    def step(self, mask: Tensor | None = None) -> Iterator[None]:
        """Enclose the forward and backward of one micro-batch: a star, or at a calibration step a chain.

        Args:
            mask: ``(batch, positions)``, nonzero where a position is not padding.
        """
        learns_in_place = self.options.method == "dkp"
        if not self.calibrating and not learns_in_place:
            with self.boundaries.broadcast(self.feedback.B, mask):
                yield
            return
        star = self.boundaries.broadcast(self.feedback.B, mask, keep=True)
        with self.boundaries.record() if self.calibrating else star as forwards:
            yield
        if learns_in_place:
            gradients = dkp.products(forwards, self.feedback.B, mask)
            earlier = self._weight_gradients or [torch.zeros_like(g) for g in gradients]
            self._weight_gradients = [a + b for a, b in zip(earlier, gradients, strict=True)]
        if not self.calibrating:
            return
        with torch.no_grad():
            self._add_products(delta_products(forwards, self.feedback.B, mask))
            if self.options.calibration_refit and forwards:
                self._add_moments(refit_moments(forwards, len(self.boundaries)))

    def measure(self, loss: Callable[[], Tensor], mask: Tensor | None = None) -> None:
        """Measure cos(B_l e, delta_l) on the side, by an ordinary backward that reaches no parameter.

        Args:
            loss: runs the model and returns its loss.
            mask: as in ``step``.
        """
        with isolated(self.model, deterministic=False):
            self._add_products(exact_alignment(self.boundaries, loss, self.feedback.B, mask))

    def finish_step(
        self, total: Callable[[Tensor], Tensor] = lambda t: t, rate: float = 0.0, decay: float = 0.0
    ) -> None:
        """Refine the feedback by what this optimiser step gathered.

        Args:
            total: sums a tensor over ranks.
            rate: learning rate of the weights in this step; only ``dkp`` asks for it and the next.
            decay: weight decay of the weights.
        """
        assert self.current_step is not None
        if self.estimating:
            if not self._estimate.sums:  # other ranks may hold the samples
                zeros = [b.new_zeros(b.mT.shape) for b in self.feedback.B]
                none = [torch.zeros((), dtype=torch.int64, device=b.device) for b in zeros]
                self._estimate.add(JacobianSum(zeros, none))
            estimate = self._estimate.total(total)
            self._log_alignment("estimate", feedback_alignment(self.feedback.B, self.feedback.jacobians(estimate)))
            self.feedback.refine(estimate)
        if self._weight_gradients:
            ranks = total(torch.ones((), device=self._weight_gradients[0].device))  # as DDP averages gradients
            means = [total(g) / ranks for g in self._weight_gradients]
            eta = rate * (self.options.feedback_lr or 0.0)
            self.feedback.B = [dkp.refine(b, g, eta, decay) for b, g in zip(self.feedback.B, means, strict=True)]
        if self._products is not None:
            self._log_alignment("exact", delta_alignment(total(self._products)))
        if self._moments:
            self.feedback.refit([(total(ee), total(ed)) for ee, ed in self._moments])
        if self.calibrating:
            self.schedule.taken(self.current_step)
            self.metrics["calibration/last_step"] = self.current_step + 1
        self.metrics["calibration/steps"] = self.schedule.count
        self.metrics["calibration/share"] = self.schedule.count / (self.current_step + 1)

    def read_metrics(self) -> dict[str, float]:
        """Return what there is to log, with a single transfer from the device.

        The alignment with the estimate is the last one made; the exact alignment is there if it was measured since the
        last call.
        """
        tensors = {name: value for name, value in self.metrics.items() if isinstance(value, Tensor)}
        values = torch.stack([t.float() for t in tensors.values()]).tolist() if tensors else []
        read = {name: value for name, value in self.metrics.items() if not isinstance(value, Tensor)}
        self.metrics = {name: value for name, value in self.metrics.items() if not name.startswith("alignment/exact")}
        return read | dict(zip(tensors, values, strict=True))

    def save(self, folder: Path) -> None:
        """Write B_l and the schedule's state to ``folder``; the random draws are functions of seed and step."""
        self.feedback.save(folder / FEEDBACK_NAME, self.block_names)
        state = {"schedule": self.schedule.state_dict(), "jvp_mode": self.jvp_mode, "seed": self.seed}
        (folder / STATE_NAME).write_text(json.dumps(state, indent=2))

    def load(self, folder: Path) -> None:
        """Read them back; see ``Feedback.load`` for what is refused."""
        self.feedback.load(folder / FEEDBACK_NAME, self.block_names)
        path = folder / STATE_NAME
        try:
            state = json.loads(path.read_text())
            self.schedule.load_state_dict(state["schedule"])
            self.jvp_mode = state["jvp_mode"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"cannot read the calibration schedule in {path}: {error!r}. The checkpoint is incomplete: resume from "
                "another one that GrapeTrainer wrote."
            ) from error

    @property
    def started(self) -> bool:
        """Whether the hooks are on the model."""
        return self._started

    def _look(self, forward: Callable[[], object]) -> tuple[str, Boundaries, Probe]:
        """Decide where the error is measured, and run a sample through the boundaries that follow from it."""
        space = self.options.feedback_space or "auto"
        # timm's way of saying that maps are (batch, H, W, C).
        channels_last = any(str(getattr(m, "output_fmt", "")).endswith("NHWC") for m in self.model.modules())
        layout = Layout(self.options.feedback_sharing or "auto", channels_last)

        def look(output: nn.Module | None) -> tuple[Boundaries, Probe]:
            boundaries = Boundaries(self.blocks, output, layout, self._pooled(output))
            return boundaries, probe(self.model, boundaries, forward)

        try:
            head = None if space == "hidden" else find_head(self.model)
        except ValueError:
            if space == "logits":
                raise
            head = None
        if head is None:
            return "hidden", *look(None)
        try:
            logits = look(head)
        except OutputNotReachedError:
            if space == "logits":
                raise
            return "hidden", *look(None)
        if space == "auto" and (hidden := look(None))[1].n_y <= logits[1].n_y:
            return "hidden", *hidden
        return "logits", *logits

    def _pooled(self, output: nn.Module | None) -> set[int]:
        """The boundaries in an encoder, if y is not in it."""
        if (output or self.blocks[-1]) in self._encoder:
            return set()
        return {index for index, block in enumerate(self.blocks[:-1]) if block in self._encoder}

    def _initial_feedback(self, space: str, shapes: Probe, forward: Callable[[], object]) -> list[Tensor]:
        init, pooled = self.options.feedback_init or "auto", self.boundaries.pooled
        square = space == "hidden" and all(h.shape[-1] == shapes.n_y for h in shapes.h)
        if init == "identity" and pooled:
            raise ValueError(
                f'feedback_init="identity" is the Jacobian of the shortcut path, and none leads from '
                f'{self.block_names[min(pooled)]}, a block of the encoder, to y. Use "auto", "gaussian" or "zero".'
            )
        # No shortcut path leads out of an encoder: B_l starts from zero there if it is to learn.
        of_encoder: FeedbackInit | None = None
        if init == "auto":
            init = "identity" if square else "gaussian"
            of_encoder = "zero" if self.options.method in ESTIMATING else "gaussian"
        total, numbers = len(shapes.h), sum(shapes.sizes)
        logger.info(
            f"GrAPE: {len(self.blocks)} blocks, errors measured in {space} space ({shapes.n_y} numbers), {init} start; "
            f"{total} feedback matrices of {numbers:,} numbers, {numbers * 4 / 2**20:.1f} MiB."
        )
        if init == "identity" and not square:
            return shortcut_feedback(self.model, self.boundaries, forward, self.block_names)
        generator = torch.Generator().manual_seed(self.seed)
        inits = [of_encoder or init if index in pooled else init for index in range(total)]
        return [
            initial_feedback(kind, h.shape[-1], shapes.n_y, generator, torch.promote_types(h.dtype, torch.float32)).to(
                h.device
            )
            for kind, h in zip(inits, shapes.h, strict=True)
        ]

    def _refuse_size(self, shapes: Probe) -> None:
        size, limit = sum(shapes.sizes) * 4 / 2**30, self.options.feedback_size_limit
        if size <= limit:
            return
        largest = max(range(len(shapes.sizes)), key=shapes.sizes.__getitem__)
        h = shapes.h[largest].shape[-1]
        raise ValueError(
            f"the feedback matrices would take {size:.1f} GiB, more than feedback_size_limit={limit} allows; the "
            f"largest, at {self.block_names[largest]}, is {h:,} x {shapes.n_y:,}. Share one matrix among the positions "
            'of a map (feedback_sharing="position" or "grid"), use fewer feedback points (blocks_per_feedback), '
            'measure the error where it has fewer numbers (feedback_space="logits" for few classes), or raise the '
            "limit."
        )

    def _normalize(self) -> bool:
        return bool(self.options.feedback_normalize) and self.options.method in ESTIMATING

    def _jvp_mode(self) -> JvpMode:
        if self.options.jvp_mode in ("dual", "finite_difference"):
            return self.options.jvp_mode
        convolutions = (nn.Conv2d, nn.Conv3d)
        # On convolutions a dual forward costs 3.4 to 5.9 forwards, two for a finite difference (DESIGN.md).
        found = any(isinstance(m, convolutions) for block in self.blocks for m in block.modules())
        return "finite_difference" if found else "dual"

    def _in_weight_space(self, block: nn.Module, n_l: int) -> bool:
        space = self.options.perturbation_space
        return space == "weight" or (space == "auto" and sum(p.numel() for p in block.parameters()) < n_l)

    def _add_products(self, products: Tensor) -> None:
        self._products = products if self._products is None else self._products + products

    def _add_moments(self, moments: list[tuple[Tensor, Tensor]]) -> None:
        if self._moments:
            moments = [(a + c, b + d) for (a, b), (c, d) in zip(self._moments, moments, strict=True)]
        self._moments = moments

    def _log_alignment(self, kind: str, cosines: Tensor) -> None:
        mean = cosines.nanmean()  # NaN at a boundary before which nothing is trained
        # The adaptive schedule watches one of the two: the exact one where it is measured regularly.
        if kind == ("exact" if self.options.alignment_steps else "estimate"):
            self.schedule.observe(mean)
        self.metrics[f"alignment/{kind}/mean"] = mean
        self.metrics |= {f"alignment/{kind}/h_{i}": c for i, c in enumerate(cosines, 1)}


def calibration_schedule(options: GrapeArgumentsMixin, seed: int, steps_per_epoch: int | None) -> CalibrationSchedule:
    """Make the schedule that the options ask for; see ``CalibrationSchedule`` for what is refused."""
    return CalibrationSchedule(
        "no" if options.method == "bp" else options.calibration_strategy or "no",
        options.calibration_interval or 1.0,
        options.calibration_threshold,
        options.calibration_cooldown,
        seed,
        steps_per_epoch,
    )


def feedback_blocks(blocks: dict[str, nn.Module], per_feedback: int) -> dict[str, nn.Module]:
    """Keep the blocks at whose outputs errors arrive: every ``per_feedback``-th, and the last."""
    last = len(blocks) - 1
    return {
        name: block
        for i, (name, block) in enumerate(blocks.items())
        if i == last or ((i + 1) % per_feedback == 0 and last - i >= per_feedback)
    }
