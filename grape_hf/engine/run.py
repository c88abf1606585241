"""What GrAPE remembers during one training run, and what it does in one optimiser step.

It ties the numerical modules together, and knows no Trainer. A step is: ``begin_step``; ``step()`` around each
micro-batch, and ``estimate`` where one is due; ``finish_step``, which refines the feedback for the next step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from grape_hf.core.alignment import feedback_alignment
from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.broadcast import Keep, Refinement
from grape_hf.core.calls import Calls, ModelCall
from grape_hf.core.feedback import Feedback
from grape_hf.core.finite import FiniteGuard
from grape_hf.core.isolation import forget_compiled_code
from grape_hf.core.jacobian import JacobianSum, Noise
from grape_hf.core.modes import Forward
from grape_hf.core.star import Matrix
from grape_hf.core.tangents import JvpMode
from grape_hf.engine import state
from grape_hf.engine.aside import Aside
from grape_hf.engine.calibration import calibration_schedule
from grape_hf.engine.drift import DriftGuard
from grape_hf.engine.estimates import Estimates
from grape_hf.engine.first_error import FirstError, number_for_ranks
from grape_hf.engine.measures import Measures
from grape_hf.engine.points import FeedbackPoints, options_for
from grape_hf.engine.ranks import ALONE, Ranks, is_sharded
from grape_hf.engine.starts import Starts
from grape_hf.engine.step import BackwardRule
from grape_hf.presets import ESTIMATING
from grape_hf.training_args import GrapeArgumentsMixin


class GrapeRun:
    """GrAPE on one model, from the first step to the last.

    Args:
        model: the model; hooks are attached by ``start`` and taken off by ``close``.
        options: GrAPE's options; those that are not given get their values for this model (``options_for``).
        seed: seed of the estimates, of a gaussian start and of the calibration schedule.
        ranks: the processes that train this model together, each on its share of the batch.
        restartable: keep what a step started from until the next one, so that a ``save`` in the middle of a step
            writes that; takes the memory of B_l a second time.
        rule: a rule of another method, by which the matrices learn from backwards.

    Attributes:
        sharded: whether FSDP2 shards the model, so that every rank must take part in each forward.
        boundaries: the feedback points, once the run has started, as are those that follow.
        feedback: the matrices.
        maps: the maps of blocks whose product the matrices are; None if there are none.
        schedule: when to calibrate.
        drift: which boundaries were given up.
        hooks: what is on the model until ``close``.
        started: whether it is there.
        began_with: the state that the step under way started from, if ``restartable``.

    Raises:
        ValueError: if no blocks are found, or an option does not suit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        options: GrapeArgumentsMixin,
        seed: int = 0,
        ranks: Ranks = ALONE,
        restartable: bool = False,
        rule: BackwardRule | None = None,
    ) -> None:
        self.model, self.options, self.seed = model, (options := options_for(model, options)), seed
        self.ranks, self.restartable, self.rule, self.sharded = ranks, restartable, rule, is_sharded(model)
        self._points = FeedbackPoints(model, options)
        self.block_names, self.blocks = self._points.names, self._points.blocks
        self.calls = Calls(model, self._points.chain, self._points.encoder_blocks)
        self.aside = Aside(model, self.calls, self.sharded)
        self.estimates = Estimates(self.aside, options, self._points.chain)
        self.first_error = FirstError(self.sharded, ranks)
        self.current_step: int | None = None
        self.calibrating = False
        self.maps: BlockMaps | None = None
        self.measures = Measures(options, ranks)
        self.hooks = ExitStack()
        self.started = False

    def start(self, forward: Callable[[], object], steps_per_epoch: int | None = None) -> None:
        """Look at the shapes in one forward, make the feedback matrices, attach the hooks.

        Args:
            forward: runs the model on a sample or more, and returns what the model does.
            steps_per_epoch: optimiser steps in an epoch, None where unknown.

        Raises:
            ValueError: if an option does not suit the shapes found (``starts.py``, ``estimates.py``), or the schedule
                needs the length of an epoch.
            RuntimeError: if the blocks do not run once each, in order, each on the output of the one before.
        """
        if self.started or not isinstance(forward, ModelCall):
            self.close()
        self.schedule = calibration_schedule(self.options, self.seed, steps_per_epoch)
        options, starts = self.options, Starts(self.model, self.options, self.block_names, self.ranks)
        calls = self.calls if isinstance(forward, ModelCall) else None
        space, self.boundaries, shapes = self._points.look(forward, self.sharded, calls, self._agreed)
        self.aside.begin(shapes.changed)
        self.boundaries.read_at = self.first_error.as_first_rank(self.boundaries.read_at, self._device)
        self.boundaries.spread = options.learns_by_maps or options.method == "dfa"  # an estimate is of the sum
        starts.refuse_size(self.boundaries, shapes)
        self.boundaries.sizes = [*(h.shape[-1] for h in shapes.h), shapes.n_y]
        some = forward  # each rank has looked at samples of its own
        if isinstance(forward, ModelCall) and (number := forward.samples) is not None:
            some = forward.take(range(min(number, 32)))  # the Jacobian of a shortcut path is a mean over samples
        self.maps = starts.initial_maps(self.boundaries, shapes, self.seed) if starts.by_block else None
        B = [] if self.maps else starts.initial_feedback(space, self.boundaries, shapes, some, self.seed)
        self.aside.reshard()
        normalize = bool(options.feedback_normalize) and options.method in ESTIMATING
        rate, finite = options.feedback_lr or 0.0, FiniteGuard(options.max_skipped_refinements)
        self.feedback = Feedback(B, options.feedback_rule or "lms", rate, normalize, finite, self.maps)
        self.feedback.put(self.ranks.first(self.feedback.learned))
        self.drift = DriftGuard(
            options.fallback, options.fallback_threshold, options.fallback_patience, self.block_names
        )
        self.measures.start(self.schedule, self.drift)
        self.note_start()
        self.estimates.start(self.block_names, self.blocks, shapes)
        self.hooks.enter_context(self.boundaries.attached())
        forget_compiled_code()
        self.started = True

    def close(self) -> None:
        """Take the hooks off the model. The feedback matrices stay."""
        self.hooks.close()
        self.started = False

    def begin_step(self, step: int) -> None:
        """Say which optimiser step the coming micro-batch belongs to; decides what kind of step it is, once."""
        self.feedback.begin(again=step == self.current_step)  # a training_step may call ours several times
        if step == self.current_step:
            return
        self._points.check(self.boundaries, step)
        self.current_step, self.calibrating = step, self.schedule.due(step) and not self.drift.everywhere
        if self.restartable:
            self.began_with = state.state_of(self)
        self.estimates.begin()
        self.measures.begin()
        if self.maps is not None:
            self.maps.whole = self.boundaries.spread and self.boundaries.read_at is not None
            self.maps.begin(step // (self.options.jvp_steps or 1))
        if self.rule is not None:
            self.rule.begin()

    @property
    def single_block(self) -> bool:
        """Whether there is no feedback point, so that every step is ordinary backpropagation."""
        return len(self.blocks) == 1

    @property
    def estimating(self) -> bool:
        """Whether an estimate is to be made in this step."""
        return self.options.feedback_rule != "local" and self._due

    @property
    def learning(self) -> bool:
        """Whether the maps of blocks learn from this step's own backward."""
        return self.options.feedback_rule == "local" and self._due

    @property
    def _due(self) -> bool:
        assert self.current_step is not None
        learned = self.options.method in ESTIMATING and not self.drift.everywhere
        return learned and not self.calibrating and self.current_step % (self.options.jvp_steps or 1) == 0

    @property
    def measuring(self) -> bool:
        """Whether the exact alignment is to be measured on the side in this step."""
        every = self.options.alignment_steps
        wanted = bool(every) and not self.calibrating and not self.drift.everywhere
        return wanted and self.current_step % every == 0  # type: ignore[operator]

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """The figures that are logged; none before the run has started."""
        return self.measures.metrics

    @property
    def jvp_mode(self) -> JvpMode:
        """How tangents are computed."""
        return self.estimates.mode

    def estimate(
        self,
        forward: Callable[[], object],
        places: Sequence[int],
        mask: Tensor | None = None,
        counts: bool = True,
        targets: Tensor | None = None,
    ) -> None:
        """Add one micro-batch to this step's estimate of the Jacobians.

        Args:
            forward: runs the model on the samples that ``estimates.sampled`` chose, in any way that reaches y.
            places: their places in the global batch.
            mask: ``(batch, positions)``, nonzero where a position is not padding.
            counts: False if none was chosen, and the forwards are run for the ranks that wait for them (``sharded``).
            targets: ``(batch, positions)``, nonzero where a target is not padding (``jacobian_terms``).
        """
        assert self.current_step is not None
        noise = Noise(self.seed, self.current_step, places)
        self.estimates.add(self.boundaries, self.feedback, forward, noise, mask, counts, targets)

    @contextmanager
    def step(self, mask: Tensor | None = None) -> Iterator[list[Forward]]:
        """Enclose the forward and backward of one micro-batch: a star, or at a calibration step a chain.

        Args:
            mask: ``(batch, positions)``, nonzero where a position is no padding; from the model's call by default.
        """
        if self.drift.everywhere:
            yield []
            return
        if self.calibrating:
            with self.boundaries.record(mask) as forwards:
                yield forwards
            self.measures.note_chain(forwards, self.feedback)
        else:
            B: list[Matrix | None] = [
                None if not self.drift.cuts(i) else "identity" if self._identity else b
                for i, b in enumerate(self.feedback.B)
            ]
            by_path = self.options.feedback_path == "shortcut"
            refinement = Refinement(self.maps, self.learning, self.options.feedback_sweeps or 0, by_path)
            with self.boundaries.broadcast(B, mask, self._keep(), refinement) as forwards:
                yield forwards
            if self.learning and self.maps is not None:
                self.maps.gather()
        if self.rule is not None:
            self.rule.observe(forwards, self.feedback.B)

    def measure(self, forwards: Sequence[Forward]) -> None:
        """Measure the alignment of a step by calls like its own, from what ``step`` handed out."""
        self.measures.replay(self.boundaries, self.aside, forwards, self.feedback)

    def finish_step(self, rate: float = 0.0, decay: float = 0.0) -> None:
        """Refine the feedback by what this optimiser step gathered on all ranks.

        Args:
            rate: learning rate of the weights in this step; only ``rule`` asks for it and the next.
            decay: weight decay of the weights.
        """
        assert self.current_step is not None
        step, feedback, measures = self.current_step, self.feedback, self.measures
        if self.first_error.changes(self.boundaries, feedback, step):
            self.estimates.sums = JacobianSum()  # those were of other pairs
            self.note_start()
        if self.estimating:
            estimate = self.estimates.total(feedback, self.ranks)
            jacobians = feedback.jacobians(estimate)
            measures.note_alignment("estimate", feedback_alignment(feedback.learned, jacobians), step)
            feedback.refine(estimate)
        if self.learning:
            assert self.maps is not None
            sums = self.maps.total(self.ranks.total)
            measures.note_alignment("estimate", self.maps.alignment(sums), step)
            feedback.refine_maps(sums)
        if self.rule is not None and (refined := self.rule.refined(feedback.B, self.ranks, rate, decay)) is not None:
            feedback.take(refined)
        measures.finish(step, feedback)
        measures.note_schedule(step, self.calibrating)

    def read_metrics(self) -> dict[str, float]:
        """Return what there is to log; see ``Measures.read``."""
        return self.measures.read(self.feedback)

    def note_start(self) -> None:
        """See whether all B_l are identities and stay so: the products with them can be left out."""
        options = self.options
        frozen = options.method == "dfa" and not (options.calibration_refit and options.calibration_strategy != "no")
        # What is an identity on the shortcut path is the path itself, to which zeros are added.
        by_path = options.feedback_path == "shortcut" and not any(b.any() for b in self.feedback.B)
        self._identity = frozen and (by_path or (options.feedback_path != "shortcut" and self.feedback.is_identity))

    def _keep(self) -> Keep:
        """Say what of the forwards of a star is needed."""
        if self.rule is not None:
            return self.rule.keep
        if self.measuring:
            return "e and deltas"
        reads = (self.boundaries.read_at is not None and self.estimating) or not self.first_error.seen
        return "e" if reads or self.first_error.due(self.boundaries, self.current_step or 0) else "nothing"

    def _agreed(self, holds: bool) -> bool:
        """Return whether something holds on all ranks."""
        return not int(self.ranks.total([number_for_ranks(int(not holds), self._device)])[0])

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
