"""One batch through the pipeline: cut into micro-batches, run by a schedule, its losses put together."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_pt_utils import nested_concat

from grape_hf.core.blocks import find_blocks
from grape_hf.core.isolation import isolated
from grape_hf.engine.calibration import calibration_schedule
from grape_hf.engine.points import options_for
from grape_hf.pipeline import micro_batches, schedules
from grape_hf.pipeline.cuts import given_cuts
from grape_hf.pipeline.feedback import StageFeedback, stage_feedback
from grape_hf.pipeline.look import Extent, look
from grape_hf.pipeline.measures import StageMeasures
from grape_hf.pipeline.places import Places
from grape_hf.pipeline.refusals import refuse, refused_model, refused_options
from grape_hf.pipeline.replay import Replay
from grape_hf.pipeline.split import StageModel
from grape_hf.pipeline.stage import FeedbackStage, StageModule
from grape_hf.training_args import GrapeArgumentsMixin

# Computes (loss, outputs) of a part of a batch, given the number of items that the loss is divided by.
ComputeLoss = Callable[[dict[str, Any], Any], tuple[Tensor, Any]]


class Pipeline:
    """This process's part of a pipeline.

    Args:
        places: of this process.
        options: GrAPE's, as given.
        seed: of a gaussian B_l.
        device: where this stage computes.

    Attributes:
        options: with the values for this model, once it is divided.
        split: this stage of the model, once it is divided.
        calibration: says which steps are calibration steps; made when a training begins.
        calibrating: whether the step under way is one.
        metrics: what is logged of the feedback; of alignments since ``share_metrics``.
    """

    def __init__(self, places: Places, options: GrapeArgumentsMixin, seed: int, device: torch.device) -> None:
        self.places, self.options, self.seed, self.device = places, options, seed, device
        self.split: StageModel
        self.calibration = calibration_schedule(GrapeArgumentsMixin(method="bp"), seed, None)
        self.calibrating = False
        self.metrics: dict[str, float] = {}
        self._step: int | None = None
        self._measuring = False  # whether this star is compared with an ordinary backward
        self._sums: bool | None = None  # whether losses are sums divided by the number of items that is passed on

    def divide(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Keep this stage of a model.

        Args:
            model: the whole model, on the CPU.
            autocast: makes what a forward of the training runs in.

        Raises:
            ValueError: if the model, or an option for it, does not go with stages.
        """
        refuse(refused_model(model))
        options, places = options_for(model, self.options), self.places
        self.options = options
        chain = find_blocks(model, options.blocks)
        cuts = given_cuts(options.pipeline_split, len(chain), places.stages)
        refuse(refused_options(options, len(chain)))
        seen = look(model, chain, autocast())
        points = [end - 1 for end in cuts[1:-1]] if options.feedback_points else list(range(len(chain) - 1))
        self.split = StageModel(model, chain, seen, cuts, places.stage)
        self._points = points
        self._begin_feedback()
        # All stages refuse together: one that went on alone would wait for the others.
        if differing := next(filter(None, places.together(self.split.differs(autocast()))), None):
            raise ValueError(differing)
        own = [] if self.feedback is None else self.feedback.own
        self.module = StageModule(self.split, places, self.device, own)

    def begin_training(self, steps_per_epoch: int | None) -> None:
        """Begin with feedback as it starts, and a calibration schedule; to be called by all stages.

        Args:
            steps_per_epoch: optimiser steps in an epoch, None where unknown.
        """
        self.calibration = calibration_schedule(self.options, self.seed, steps_per_epoch)
        self._step, self.metrics = None, {}
        if self.feedback is not None:
            self.feedback.settle()  # of an earlier training
            self._begin_feedback()

    def _begin_feedback(self) -> None:
        """Make the feedback as it starts, and what holds it."""
        options, split, places = self.options, self.split, self.places
        self.feedback: StageFeedback | None = None
        self.measures: StageMeasures | None = None
        if options.method != "bp":
            self.feedback = stage_feedback(options, split, self._points, self.seed, places, self.device)
            self.measures = StageMeasures(places, split, self.feedback, options)
        self._schedules = schedules.Schedules(self._schedule)

    def _schedule(self, extent: Extent, number: int, kind: schedules.Kind) -> Any:
        stage = FeedbackStage(self.module, extent, kind == "star", self.feedback)
        return schedules.schedule_for(kind, stage, number)

    def begin_step(self, step: int) -> None:
        """Decide, once for each optimiser step, whether it is ordinary backpropagation; all stages decide alike."""
        feedback = self.feedback
        if self._step == step or feedback is None:
            return
        self._step, self.calibrating = step, self.calibration.due(step)
        if self.calibrating:
            feedback.settle()
            self.calibration.taken(step)
            self.metrics["calibration/last_step"] = step + 1
        self.metrics["calibration/steps"] = self.calibration.count
        self.metrics["calibration/share"] = self.calibration.count / (step + 1)
        every = self.options.alignment_steps
        self._measuring = bool(every) and not self.calibrating and step % every == 0
        turn, rest = divmod(step, self.options.jvp_steps or 1)
        due = feedback.maps is not None and rest == 0
        self.module.learning, self.module.recording = due and not self.calibrating, self.calibrating
        if feedback.maps is not None:
            feedback.maps.begin(turn)

    def finish_step(self) -> None:
        """Have the maps learn, or put together what a step of calibration has shown; by all stages."""
        if self.feedback is None:
            return
        if self.module.learning:
            assert self.feedback.maps is not None
            self.feedback.maps.refine()
            if self.places.is_last:
                self.feedback.settle()  # nothing is to be waited for
        if self.measures is not None:
            self.measures.finish()

    def share_metrics(self) -> None:
        """Put the alignments of all stages into ``metrics``; by all, when there is something to log."""
        if self.measures is not None:
            self.metrics = self.measures.share(self.metrics)

    def run(
        self,
        batch: Mapping[str, Any],
        compute_loss: ComputeLoss,
        items: Any,
        *,
        train: bool,
        shifted: bool,
        divisor: float = 1.0,
        wanted: Callable[[Any], Any] | None = None,
    ) -> tuple[Tensor, Any]:
        """Run one batch: forwards, and in training backwards, which leave gradients in this stage's parameters.

        Args:
            batch: the batch, the same on all stages.
            compute_loss: the Trainer's.
            items: the number of items that losses are divided by, None if they are means.
            train: whether there are backwards.
            shifted: whether the loss leaves out the first label of each sample.
            divisor: what the loss is divided by before its backward.
            wanted: takes out of a micro-batch's outputs what shall be returned of them; nothing if None.

        Returns:
            The loss, undivided: in training on the last stage alone (zero on others, by which no stage waits for
            it), else on all; and the outputs of all micro-batches together, on all stages.
        """
        parts = micro_batches.cut(batch, self.split.seen.main_input, self.options.pipeline_microbatches, shifted)
        losses: list[Tensor] = []
        outputs: list[Any] = []

        def loss_of(number: int) -> Tensor:
            part = parts.parts[number]
            asked = self.places.is_last and items is not None and len(parts) > 1  # others do not get to a loss
            adds_up = asked and self._adds_up(part, compute_loss, items)
            loss, made = compute_loss(dict(part), items)
            loss = loss if adds_up else loss * parts.shares[number]
            losses.append(loss.detach())
            if wanted is not None:
                outputs.append(wanted(made))
            return loss / divisor

        self.module.loss = loss_of
        if self.feedback is not None:
            self.feedback.begin([part.get("attention_mask") for part in parts.parts])
        extent = Extent.of(parts.parts[0], self.split.seen.main_input)
        chain: schedules.Kind = "1f1b" if self.options.pipeline_schedule == "auto" else self.options.pipeline_schedule
        star = self.options.method != "bp" and not self.calibrating

        def run_schedule(kind: schedules.Kind) -> None:
            schedules.run(self._schedules.get(extent, len(parts), kind), self.places.is_last, train)
            if train and self.module.recording:
                assert self.measures is not None
                self.measures.note_chain(self.module.exact, extent, len(parts))

        try:
            if train and star and self._measuring:
                self._compared(run_schedule, chain, losses)
            else:
                run_schedule("gpipe" if not train else "star" if star else chain)
        finally:
            self.module.loss, self.module.exact = None, {}
        return self._loss(losses, train), self._outputs(outputs) if wanted is not None else None

    def _compared(
        self, run_schedule: Callable[[schedules.Kind], None], chain: schedules.Kind, losses: list[Tensor]
    ) -> None:
        """Run a star, and beside it an ordinary schedule, of which nothing is left but what it has shown."""
        assert self.measures is not None
        replay = Replay(self.split.model)
        run_schedule("star")
        number = len(losses)
        with replay.chain():
            self.module.recording = True
            run_schedule(chain)
            self.module.recording = False
        del losses[number:]
        self.measures.note_weights(replay)

    def _adds_up(self, part: dict[str, Any], compute_loss: ComputeLoss, items: Any) -> bool:
        """Whether losses of micro-batches are sums over one number of items: half as large for twice as many.

        A model may take the number and go on computing a mean. That is seen once, by two forwards on the side.
        """
        if self._sums is None:
            with torch.no_grad(), isolated(self.split.model):
                once, twice = (float(compute_loss(dict(part), items * n)[0]) for n in (1, 2))
            if once == 0:
                return True  # nothing to tell by
            self._sums = abs(once - 2 * twice) < abs(once - twice)
        return self._sums

    def _loss(self, losses: list[Tensor], train: bool) -> Tensor:
        dtype = self.split.loss_dtype
        total = torch.zeros((), dtype=dtype, device=self.device)
        if losses:
            total = torch.stack(losses).sum().to(dtype)
        if not train:
            dist.broadcast(total, src=self.places.last, group=self.places.pipe)
        return total

    def _outputs(self, outputs: list[Any]) -> Any:
        joined = None
        if outputs:
            joined = outputs[0]
            for more in outputs[1:]:
                joined = nested_concat(joined, more)
        return self.places.from_last(joined)

    def reduce_gradients(self) -> None:
        """Add up what the two stages have of tied weights, and average over replicas."""
        for parameter in self.split.tied:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.places.ends)
        if self.places.replicas == 1:
            return
        parameters = [p for p in self.split.model.parameters() if p.requires_grad]
        # A parameter that no replica used has no gradient, and no weight decay, as in one process.
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        dist.all_reduce(used, group=self.places.across)
        works = []
        for parameter, is_used in zip(parameters, used.tolist(), strict=True):
            if is_used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad /= self.places.replicas
                works.append(dist.all_reduce(parameter.grad, group=self.places.across, async_op=True))
        for work in works:
            work.wait()

    def share_loss(self, loss: Tensor) -> None:
        """Put the mean of the replicas' losses, which their last stages have, into every process's."""
        value = (loss.detach() if self.places.is_last else torch.zeros_like(loss)).cpu() / self.places.replicas
        dist.all_reduce(value, group=self.places.world)
        loss.copy_(value)
