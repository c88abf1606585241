"""What GrAPE remembers during one training run, and what it does in one optimiser step.

It ties the numerical modules together and knows neither Trainer nor accelerate, so a plain PyTorch loop can use it as
well (README). An optimiser step is: ``begin_step``; for each micro-batch ``estimate`` and then forward and backward
inside ``step()``; ``finish_step``, which refines the feedback for the next step. The estimate uses the weights that the
step starts from; the refined feedback is first used in the step after, so that a step split into micro-batches is the
same step.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from grape_hf.core.alignment import delta_alignment, delta_products, feedback_alignment, replayed_alignment, size_ratio
from grape_hf.core.block_jacobian import block_jacobian_terms
from grape_hf.core.boundaries import OutputNotReachedError, ReadAt
from grape_hf.core.broadcast import Keep, Refinement
from grape_hf.core.calls import Calls, ModelCall, NoCallError
from grape_hf.core.feedback import Feedback, refit_moments
from grape_hf.core.finite import FiniteGuard
from grape_hf.core.isolation import forget_compiled_code, isolated
from grape_hf.core.jacobian import JacobianSum, Noise, jacobian_terms
from grape_hf.core.modes import Forward, OutputReached
from grape_hf.core.star import Matrix
from grape_hf.core.tangents import ForwardModeError, JvpMode
from grape_hf.engine.calibration import CalibrationSchedule
from grape_hf.engine.drift import DriftGuard
from grape_hf.engine.points import FeedbackPoints, are_convolutional, options_for
from grape_hf.engine.probe import read_position
from grape_hf.engine.ranks import ALONE, Ranks, is_sharded
from grape_hf.engine.samples import Sampler
from grape_hf.methods import dkp
from grape_hf.training_args import ESTIMATING, GrapeArgumentsMixin

logger = logging.getLogger(__name__)

FEEDBACK_NAME = "grape_feedback.safetensors"
STATE_NAME = "grape_state.json"


class GrapeRun:
    """GrAPE on one model, from the first step to the last.

    Args:
        model: the model; hooks are attached by ``start`` and taken off by ``close``.
        options: GrAPE's options; those that are not given get their values for this model (``options_for``).
        seed: seed of the estimates, of a gaussian start and of the calibration schedule.
        ranks: the processes that train this model together, each on its share of the batch.
        restartable: keep what a step started from until the next one, so that a ``save`` in the middle of a step
            writes that; takes the memory of B_l a second time.

    Attributes:
        sharded: whether FSDP2 shards the model, so that every rank must take part in each forward.

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
    ) -> None:
        options = options_for(model, options)
        self.model, self.options, self.seed = model, options, seed
        self.ranks, self.restartable, self.sharded = ranks, restartable, is_sharded(model)
        self._points = FeedbackPoints(model, options)
        self.block_names, self.blocks = self._points.names, self._points.blocks
        self._convolutional = are_convolutional(self._points.chain)
        self._batch_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        self.calls = Calls(model, self._points.chain, self._points.encoder_blocks)
        self.current_step: int | None = None
        self.calibrating = False
        self.metrics: dict[str, Tensor | float] = {}
        self._changing: list[str] = []  # parameters that a forward changes
        self._known_changes: set[bool] = set()  # whether that is known of forwards in evaluation, and in training
        self._forwards: list[Forward] = []  # of the micro-batch under way
        self._batch: Any = None
        self._seen_error, self._taken_error, self._positions = False, False, 1
        self._found_read_at: ReadAt | None = None
        self._sampler = Sampler(self.sharded)
        self._hooks = ExitStack()
        self._started = False

    @contextmanager
    def micro_batch(
        self,
        step: int,
        steps_per_epoch: int | None,
        started: Callable[[], object],
        loss: Callable[[], object] | None = None,
        batch: Any = None,
    ) -> Iterator[None]:
        """Enclose the forward, loss and backward of one micro-batch, whoever computes them.

        The first time, the run starts when the model is called with gradients, by that very call.

        Args:
            step: the optimiser step that the micro-batch belongs to.
            steps_per_epoch: as for ``start``.
            started: called when the run has started.
            loss: computes the loss once more, if it calls the blocks by themselves; None if it calls the model.
            batch: the micro-batch; its masks count where the model is called without.

        Raises:
            NoCallError: the first time, if the blocks ran and no module that holds them all was called.
            RuntimeError: the first time, if nothing ran with gradients.
        """
        self.calls.remember_randomness = bool(self.options.alignment_steps)
        self.calls.made, self._batch = [], batch
        self.calls.masks.note_batch(batch)
        self.calls.loss = None if loss is None else self.calls.call(loss, (), {})
        with ExitStack() as stack:

            def begin(call: ModelCall | None = None) -> None:
                if call is not None:
                    self.calls.begun = None
                    with self.calls.aside():
                        self.start(call, steps_per_epoch)
                    started()
                self.begin_step(step)
                self._forwards = stack.enter_context(self.step())

            if self.started:
                begin()
            else:
                self._hooks.enter_context(self.calls.attached())
                if "torch._dynamo" in sys.modules:  # what is compiled now would not know hooks that come half-way
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                if self.calls.loss is None:
                    self.calls.begun = begin
                else:
                    begin(self.calls.loss)
            try:
                yield
            except NoCallError:
                self.close()
                raise
        if not self.started:
            self.close()
            raise RuntimeError(
                f"no forward with gradients through the blocks ({self.block_names[0]}, ...) took place inside "
                "`compute_loss`. A loss that runs the model without gradients first, and with them in the backward (a "
                "cached loss), cannot be trained by direct feedback: compute it at once, or use "
                'method="bp".'
            )

    def look_again(self, places: Sequence[int], labels: Any = None) -> None:
        """Make what is due beside a micro-batch, by calls of the model like those that it has just made.

        Args:
            places: of the micro-batch's samples in the global batch.
            labels: of the samples, if the model is called without.
        """
        if not self._seen_error and self._forwards:
            self._see_first_error(labels)
        for forward, made in zip(self._forwards, self.calls.made, strict=False):
            forward.call = forward.call or made  # a compiled forward does not know it
        call = next((f.call for f in self._forwards if f.reached and f.call is not None), None)
        if self.estimating and call is not None:
            share = self._sampler.take(call, places, self.sampled(places), self._first_activation)
            if share is not None:
                targets = share.targets(labels if isinstance(labels, Tensor) else None)
                self.calls.masks.note_batch(self._batch, share.rows, call.samples)
                self.boundaries.read = self._read_by(call, share.rows)
                self.estimate(share.call, share.places, counts=share.counts, targets=targets)
                self.boundaries.read = None
        if self.measuring:
            self.calls.masks.note_batch(self._batch)
            self.measure(self._forwards)
        self._forwards, self._batch = [], None
        self.calls.made, self.calls.loss = [], None
        self.calls.masks.note_batch(None)
        self.calls.forget()

    def start(self, forward: Callable[[], object], steps_per_epoch: int | None = None) -> None:
        """Look at the shapes in one forward, make the feedback matrices, attach the hooks.

        Args:
            forward: runs the model on a sample or more, and returns what the model does.
            steps_per_epoch: optimiser steps in an epoch, None where unknown.

        Raises:
            ValueError: if ``feedback_init`` does not suit the shapes found, the matrices are larger than
                ``feedback_size_limit``, the schedule needs the length of an epoch, or FSDP2 shards a model whose blocks
                would have to run with other weights.
            RuntimeError: if the blocks do not run once each, in order, each on the output of the one before.
        """
        if self._started or not isinstance(forward, ModelCall):
            self.close()
        self.schedule = calibration_schedule(self.options, self.seed, steps_per_epoch)
        options, points = self.options, self._points
        calls = self.calls if isinstance(forward, ModelCall) else None
        space, self.boundaries, shapes = points.look(forward, self.sharded, calls, self._agreed)
        self._changing, self._known_changes = shapes.changed, {False}
        self.boundaries.read_at = self._as_first_rank(self.boundaries.read_at)
        points.refuse_size(self.boundaries, shapes)
        self.boundaries.sizes = [h.shape[-1] for h in shapes.h]
        # Each rank has looked at samples of its own.
        some = forward
        if isinstance(forward, ModelCall) and (number := forward.samples) is not None:
            some = forward.take(range(min(number, 32)))  # the Jacobian of a shortcut path is a mean over samples
        self.maps = points.initial_maps(self.boundaries, shapes, self.seed) if points.by_block else None
        if self.maps is None:
            B = points.initial_feedback(space, self.boundaries, shapes, some, self.seed)
        else:
            self.maps.G = self.ranks.first(self.maps.G)
            B = self.maps.product()
        B = self.ranks.first(B)
        self._reshard()
        finite = FiniteGuard(options.max_skipped_refinements)
        rate = options.feedback_lr or 0.0
        self.feedback = Feedback(B, options.feedback_rule or "lms", rate, self._normalize(), finite, self.maps)
        self.drift = DriftGuard(
            options.fallback, options.fallback_threshold, options.fallback_patience, self.block_names
        )
        self._frozen_identity = self._is_frozen_identity()
        self.jvp_mode = self._jvp_mode()
        if options.perturbation_space == "weight" and shapes.apart:
            raise ValueError(
                f'perturbation_space="weight" perturbs the weights of a block and takes its output for h_l, and the '
                f"model changes that of {self.block_names[shapes.apart[0]]} before the next block reads it. Use "
                'perturbation_space="activation".'
            )
        self.spaces = [
            "weight" if index not in shapes.apart and self._in_weight_space(block, h.shape[-1]) else "activation"
            for index, (block, h) in enumerate(zip(self.blocks, shapes.h, strict=False))
        ]
        if self.sharded and "weight" in self.spaces:
            raise ValueError(
                f"perturbation_space={options.perturbation_space!r} perturbs the weights of "
                f"{self.block_names[self.spaces.index('weight')]}, which FSDP2 shards. Use "
                'perturbation_space="activation", or DDP.'
            )
        self._hooks.enter_context(self.boundaries.attached())
        forget_compiled_code()
        self._started = True

    def close(self) -> None:
        """Take the hooks off the model. The feedback matrices stay."""
        self._hooks.close()
        self._started = False

    def begin_step(self, step: int) -> None:
        """Say which optimiser step the coming micro-batch belongs to; decides what kind of step it is, once."""
        if step == self.current_step:
            return
        self.current_step, self.calibrating = step, self.schedule.due(step) and not self.drift.everywhere
        if self.restartable:
            self._began_with = self.feedback.tensors(), self._state()
        self._estimate = JacobianSum()
        self._products: Tensor | None = None
        self._weight_products: Tensor | None = None
        self._moments: list[tuple[Tensor, Tensor]] = []
        self._weight_gradients: list[Tensor] = []  # of B_l as a weight: dkp
        if self.maps is not None:
            self.maps.begin()

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

    def sampled(self, places: Sequence[int]) -> list[int]:
        """Return which samples of a micro-batch the estimate is made on, given their places in the global batch.

        They are spread evenly over the global batch, its first sample always among them, so every rank and
        micro-batch has its share. A model with batch norms gets them all: its Jacobian is of the batch as it is.
        """
        if self._batch_norms:
            return list(range(len(places)))
        share = Fraction(str(self.options.jvp_fraction))
        return [i for i, place in enumerate(places) if ceil((place + 1) * share) > ceil(place * share)]

    def _see_first_error(self, labels: Any) -> None:
        """See by the first error whether the loss reads one position of y, where the model itself returns no loss."""
        self._seen_error, e = True, self._forwards[0].e
        if self.boundaries.read_at is not None or e is None or self.sharded:
            return
        vectors = self.boundaries.layout.vectors(e)
        self._positions = vectors.shape[1]
        of_tokens = isinstance(labels, Tensor) and labels.ndim > 1 and self._positions in labels.shape[1:]
        self._found_read_at = None if of_tokens else read_position(vectors)

    def _take_first_error(self) -> None:
        """Pair errors as the first one asks for, from the next step on: a step's micro-batches are paired alike."""
        found, self._found_read_at = self._as_first_rank(self._found_read_at), None
        self._taken_error = True
        if found is None or self.boundaries.read_at is not None:
            return
        self.boundaries.read_at, self._estimate = found, JacobianSum()  # that was of other pairs
        starts = [b.shape[0] == b.shape[1] and torch.equal(b, torch.eye(len(b)).to(b)) for b in self.feedback.B]
        shared = [b / self._positions if start else b for b, start in zip(self.feedback.B, starts, strict=True)]
        self.feedback.B = self.ranks.first(shared)
        self._frozen_identity = self._is_frozen_identity()

    def _read_by(self, call: ModelCall, rows: list[int] | None) -> Tensor | None:
        """Where the loss read y in a call, ``(batch, positions)``, for these samples; None if that is everywhere."""
        e = next((forward.e for forward in self._forwards if forward.call is call), None)
        if self.boundaries.read_at is None or e is None or (rows is not None and len(e) != call.samples):
            return None
        read = self.boundaries.layout.vectors(e).ne(0).any(-1)
        return read if rows is None else read[torch.tensor(rows, device=read.device)]

    def _first_activation(self, call: ModelCall) -> Tensor:
        found: list[Tensor] = []

        def keep(index: int, h: Tensor, *_: object) -> Tensor:
            found.append(h.detach())
            raise OutputReached

        with (
            self._on_the_side(),
            torch.enable_grad(),
            suppress(OutputNotReachedError),
            self.boundaries.perturb(keep),
        ):
            call()
        return found[0]

    @contextmanager
    def _on_the_side(self, deterministic: bool = True) -> Iterator[None]:
        """Enclose a forward that leaves no trace."""
        known = deterministic in self._known_changes
        with isolated(self.model, deterministic, self._changing if known else "all") as trace, self.calls.aside():
            yield
        if not known:  # the first of its kind: RWKV changes weights only in evaluation
            self._known_changes.add(deterministic)
            self._changing = sorted({*self._changing, *trace.changed})
        self._reshard()

    def _reshard(self) -> None:
        """Let FSDP2 put back the shards that a forward without a backward has left whole."""
        for module in self.model.modules() if self.sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _as_first_rank(self, read_at: ReadAt | None) -> ReadAt | None:
        """Return what rank 0 has seen; each rank has looked at samples of its own."""
        if self.ranks.count == 1:
            return read_at
        seen: list[ReadAt | None] = [None, "first", "last"]
        return seen[int(self.ranks.first([self._number(seen.index(read_at))])[0])]

    def _agreed(self, holds: bool) -> bool:
        """Return whether something holds on all ranks."""
        return not int(self.ranks.total([self._number(int(not holds))])[0])

    def _number(self, value: int) -> Tensor:
        """A number for other ranks, on a device that they can send it from."""
        device = next(self.model.parameters()).device
        return torch.tensor(value, device="cpu" if device.type == "meta" else device)

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
            forward: runs the model on the samples that ``sampled`` chose, in any way that reaches y.
            places: their places in the global batch.
            mask: ``(batch, positions)``, nonzero where a position is not padding.
            counts: False if none was chosen, and the forwards are run for the ranks that wait for them (``sharded``).
            targets: ``(batch, positions)``, nonzero where a target is not padding (``jacobian_terms``).
        """
        assert self.current_step is not None
        noise = Noise(self.seed, self.current_step, places)
        lms = self.feedback.rule == "lms"
        B = self.feedback.B if lms else None

        def terms(mode: JvpMode) -> JacobianSum:
            with self._on_the_side():
                if self.maps is not None:
                    return block_jacobian_terms(
                        self.boundaries,
                        forward,
                        noise,
                        self.maps,
                        mode=mode,
                        residual=lms,
                        mask=mask,
                        targets=targets,
                    )
                return jacobian_terms(
                    self.boundaries,
                    forward,
                    noise,
                    mode=mode,
                    passes=self.options.jvp_passes or "joint",
                    spaces=self.spaces,  # type: ignore[arg-type]
                    B=B,
                    mask=mask,
                    targets=targets,
                )

        try:
            found = terms(self.jvp_mode)
        except ForwardModeError as error:
            # Half-way through a forward FSDP2 cannot start another one.
            if self.options.jvp_mode != "auto" or self.sharded:
                raise ForwardModeError(f'{error} Use jvp_mode="finite_difference".') from error
            logger.warning(f"GrAPE: finite differences in place of dual numbers from here on: {error}")
            self.jvp_mode = "finite_difference"
            found = terms(self.jvp_mode)
        if counts:
            self._estimate.add(found)

    @contextmanager
    def step(self, mask: Tensor | None = None) -> Iterator[list[Forward]]:
        """Enclose the forward and backward of one micro-batch: a star, or at a calibration step a chain.

        Args:
            mask: ``(batch, positions)``, nonzero where a position is not padding, if that is not to be taken from what
                the model is called with.
        """
        if self.drift.everywhere:
            yield []
            return
        learns_in_place = self.options.method == "dkp"
        B: list[Matrix | None] = [
            None if not self.drift.cuts(i) else "identity" if self._frozen_identity else b
            for i, b in enumerate(self.feedback.B)
        ]
        if self.calibrating:
            with self.boundaries.record(mask) as forwards:
                yield forwards
            if learns_in_place:
                self._add_weight_gradients(forwards)
            with torch.no_grad():
                self._add_products(delta_products(forwards, self.feedback.B))
                if self.options.calibration_refit and forwards:
                    self._add_moments(refit_moments(forwards, len(self.boundaries), self.feedback.B))
            return
        reads = self.boundaries.read_at is not None and self.estimating
        wanted = self.measuring or reads or not self._seen_error
        keep: Keep = "nothing"
        if learns_in_place:
            keep = "h and e"
        elif wanted:
            keep = "e and deltas" if self.measuring else "e"
        options = self.options
        refinement = Refinement(self.maps, self.learning, options.feedback_sweeps, options.feedback_path == "shortcut")
        with self.boundaries.broadcast(B, mask, keep, refinement) as forwards:
            yield forwards
            if learns_in_place:
                self._add_weight_gradients(forwards)

    def measure(self, forwards: Sequence[Forward]) -> None:
        """Measure cos(B_l e, delta_l) by calling the model once more for each forward of the step, without its loss.

        Args:
            forwards: what ``step`` handed out, after the backward.
        """
        for call in {id(forward.call): forward.call for forward in forwards if forward.call is not None}.values():
            of_call = [forward for forward in forwards if forward.call is call]
            with self._on_the_side(deterministic=False):
                call.same_randomness()
                weights = not self.sharded  # of shards there is no whole gradient
                found = replayed_alignment(self.boundaries, call, of_call, self.feedback.B, weights)
            self._add_products(found[0])
            if weights:
                self._weight_products = found[1] + (0 if self._weight_products is None else self._weight_products)

    def finish_step(self, rate: float = 0.0, decay: float = 0.0) -> None:
        """Refine the feedback by what this optimiser step gathered on all ranks.

        Args:
            rate: learning rate of the weights in this step; only ``dkp`` asks for it and the next.
            decay: weight decay of the weights.
        """
        assert self.current_step is not None
        if not self._taken_error:
            self._take_first_error()
        if self.estimating:
            if not self._estimate.sums:  # other ranks may hold the samples
                zeros = [b.new_zeros(b.mT.shape) for b in self.feedback.learned]
                none = [torch.zeros((), dtype=torch.int64, device=b.device) for b in zeros]
                self._estimate.add(JacobianSum(zeros, none))
            estimate = self._estimate.total(self.ranks.total)
            self._log_alignment(
                "estimate", feedback_alignment(self.feedback.learned, self.feedback.jacobians(estimate))
            )
            self.feedback.refine(estimate)
        if self.learning:
            assert self.maps is not None
            sums = self.maps.total(self.ranks.total)
            self._log_alignment("estimate", self.maps.alignment(sums))
            self.feedback.refine_maps(sums)
        if self._weight_gradients:
            means = [g / self.ranks.count for g in self.ranks.total(self._weight_gradients)]  # as of all gradients
            eta = rate * (self.options.feedback_lr or 0.0)
            self.feedback.take([dkp.refine(b, g, eta, decay) for b, g in zip(self.feedback.B, means, strict=True)])
        if self._products is not None:
            self._log_alignment("exact", delta_alignment(*self.ranks.total([self._products])))
        if self._weight_products is not None:
            (products,) = self.ranks.total([self._weight_products])
            for name, values in {"cosine": delta_alignment(products), "size": size_ratio(products)}.items():
                self.metrics[f"weight_gradient/{name}/mean"] = values.nanmean()
                self.metrics |= {f"weight_gradient/{name}/h_{i}": value for i, value in enumerate(values, 1)}
        if self._moments:
            totals = iter(self.ranks.total([t for pair in self._moments for t in pair]))
            self.feedback.refit(list(zip(totals, totals, strict=True)))
            self.feedback.B = self.ranks.first(self.feedback.B)
        if self.calibrating:
            self.schedule.taken(self.current_step)
            self.metrics["calibration/last_step"] = self.current_step + 1
        self.metrics["calibration/steps"] = self.schedule.count
        self.metrics["calibration/share"] = self.schedule.count / (self.current_step + 1)
        if self.drift.mode != "no":
            self.metrics["fallback/blocks"] = self.drift.uncut

    def read_metrics(self) -> dict[str, float]:
        """Return what there is to log, with a single transfer from the device.

        The alignment with the estimate is the last one made; the exact alignment is there if it was measured since the
        last call.

        Raises:
            FloatingPointError: if too many refinements in a row were skipped (``max_skipped_refinements``).
        """
        metrics = self.metrics | self.feedback.guard.metrics()
        tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        values = torch.stack([t.float() for t in tensors.values()]).tolist() if tensors else []
        read = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
        self.metrics = {
            name: value
            for name, value in self.metrics.items()
            if not name.startswith(("alignment/exact", "weight_gradient"))
        }
        read |= dict(zip(tensors, values, strict=True))
        self.feedback.guard.check(read)
        return read

    def save(self, folder: Path, finished: bool = True) -> None:
        """Write B_l and what else a resumed run has to know to ``folder``; random draws are functions of seed and step.

        Args:
            folder: the checkpoint.
            finished: False between ``finish_step`` and the update of the weights: a resumed run will do the whole step
                again, so with ``restartable`` what it started from is written.
        """
        if self.restartable and not finished:
            tensors, state = self._began_with
        else:
            tensors, state = self.feedback.tensors(), self._state()
        self.feedback.save(folder / FEEDBACK_NAME, self.block_names, tensors)
        (folder / STATE_NAME).write_text(json.dumps(state, indent=2, default=Tensor.tolist))

    def _state(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.state_dict(),
            "jvp_mode": self.jvp_mode,
            "read_at": self.boundaries.read_at,
            "skipped": self.feedback.guard.state_dict(),
            "drift": self.drift.state_dict(),
        }

    def load(self, folder: Path) -> None:
        """Read them back; see ``Feedback.load`` for what is refused."""
        self.load_feedback(folder)
        path = folder / STATE_NAME
        try:
            state = json.loads(path.read_text())
            self.schedule.load_state_dict(state["schedule"])
            if self.options.jvp_mode == "auto":  # it may have found out that dual numbers do not work
                self.jvp_mode = state["jvp_mode"]
            self.feedback.guard.load_state_dict(state["skipped"], self.feedback.B[0].device)
            self.drift.load_state_dict(state["drift"])
            self.boundaries.read_at = self.boundaries.read_at or state["read_at"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"cannot read the state of the calibration schedule in {path}: {error!r}. The checkpoint is "
                "incomplete: resume from another one that GrapeTrainer wrote."
            ) from error

    def load_feedback(self, folder: Path) -> None:
        """Read B_l alone."""
        self.feedback.load(folder / FEEDBACK_NAME, self.block_names)
        if self.maps is not None:
            self.maps.G = self.ranks.first(self.maps.G)
        self.feedback.B = self.ranks.first(self.feedback.B)  # each rank has read a file of its own
        self._frozen_identity = self._is_frozen_identity()

    @property
    def started(self) -> bool:
        """Whether the hooks are on the model."""
        return self._started

    def _is_frozen_identity(self) -> bool:
        """Whether all B_l are identities and stay so: the products with them can be left out."""
        options, B = self.options, self.feedback.B
        if options.feedback_path == "shortcut" and self.maps is None and not any(b.any() for b in B):
            return True  # the path alone, which is the identity on what the shortcuts do
        if options.method != "dfa" or (options.calibration_refit and options.calibration_strategy != "no"):
            return False
        return all(b.shape[0] == b.shape[1] and torch.equal(b, torch.eye(len(b)).to(b)) for b in B)

    def _normalize(self) -> bool:
        return bool(self.options.feedback_normalize) and self.options.method in ESTIMATING

    def _jvp_mode(self) -> JvpMode:
        if self.options.jvp_mode in ("dual", "finite_difference"):
            return self.options.jvp_mode
        # On convolutions a dual forward costs 3.4 to 5.9 forwards, two for a finite difference (DESIGN.md).
        return "finite_difference" if self._convolutional else "dual"

    def _in_weight_space(self, block: nn.Module, n_l: int) -> bool:
        space = self.options.perturbation_space
        return space == "weight" or (space == "auto" and sum(p.numel() for p in block.parameters()) < n_l)

    def _add_weight_gradients(self, forwards: Sequence[Forward]) -> None:
        gradients = dkp.products(forwards, self.feedback.B)
        earlier = self._weight_gradients or [torch.zeros_like(g) for g in gradients]
        self._weight_gradients = [a + b for a, b in zip(earlier, gradients, strict=True)]

    def _add_products(self, products: Tensor) -> None:
        self._products = products if self._products is None else self._products + products

    def _add_moments(self, moments: list[tuple[Tensor, Tensor]]) -> None:
        if self._moments:
            moments = [(a + c, b + d) for (a, b), (c, d) in zip(self._moments, moments, strict=True)]
        self._moments = moments

    def _log_alignment(self, kind: str, cosines: Tensor) -> None:
        (cosines,) = self.ranks.first([cosines])  # all ranks calibrate at the same steps
        mean = cosines.nanmean()  # NaN at a boundary before which nothing is trained
        # The adaptive schedule and the guard watch one of the two: the exact one where it is measured regularly.
        if kind == ("exact" if self.options.alignment_steps else "estimate"):
            self.schedule.observe(mean)
            assert self.current_step is not None
            self.drift.observe(self.current_step, cosines)
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
