"""The training step with direct feedback in one process, or in several that each hold the whole model.

A run starts in the very first call of the model with gradients, whoever makes it. What is due beside a step, an
estimate or a measurement, is made after it by calls like those that the step has just made.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from grape_hf.core.arguments import copied
from grape_hf.core.calls import ModelCall, NoCallError
from grape_hf.core.isolation import undoing
from grape_hf.core.modes import Forward
from grape_hf.engine.first_error import FirstError
from grape_hf.engine.look import NO_GRADIENTS
from grape_hf.engine.run import GrapeRun
from grape_hf.engine.samples import Sampler
from grape_hf.engine.step import MicroBatch


class StarEngine:
    """The training step of a run.

    Args:
        run: the run; it is started here.
        steps_per_epoch: optimiser steps in an epoch, None where unknown.
        started: called when the run has started.
    """

    def __init__(self, run: GrapeRun, steps_per_epoch: int | None, started: Callable[[GrapeRun], object]) -> None:
        self.run, self.steps_per_epoch, self._tell = run, steps_per_epoch, started
        self._sampler = Sampler(run.sharded)
        self._blocks_alone = False  # whether the loss calls the blocks one by one, and so has to be computed again
        self._forwards: list[Forward] = []  # of the micro-batch under way

    def take(self, batch: MicroBatch, stock: Callable[[], Tensor]) -> Tensor:
        """Take the stock step in a star, or at a calibration step in a chain; see ``Engine``."""

        def step() -> Tensor:
            with self.micro_batch(batch.step, batch.loss if self._blocks_alone else None, batch.inputs):
                return stock()

        undo = None if self.run.started or self._blocks_alone else undoing(self.run.model, batch.inputs)
        try:
            loss = step()
        except NoCallError:  # at the first step, in its first block
            assert undo is not None
            self._blocks_alone = True
            undo()
            loss = step()
        labels = batch.inputs.get("labels") if isinstance(batch.inputs, Mapping) else None
        self.look_again(batch.places, labels, batch.inputs)
        if batch.last:
            self.run.finish_step(batch.rate, batch.decay)
        return loss

    def close(self) -> None:
        """Take the hooks off the model."""
        self.run.close()

    @contextmanager
    def micro_batch(self, step: int, loss: Callable[[Any], object] | None = None, batch: Any = None) -> Iterator[None]:
        """Enclose the forward, loss and backward of one micro-batch, whoever computes them.

        Args:
            step: the optimiser step that the micro-batch belongs to.
            loss: computes the loss of a batch once more, if it calls the blocks by themselves; None if it calls the
                model.
            batch: the micro-batch; its masks count where the model is called without.

        Raises:
            NoCallError: the first time, if the blocks ran and no module that holds them all was called.
            RuntimeError: the first time, if nothing ran with gradients.
        """
        run, calls = self.run, self.run.calls
        calls.remember_randomness = bool(run.options.alignment_steps)
        calls.made, calls.repeated = [], not run.started
        calls.masks.note_batch(batch)

        def again() -> ModelCall | None:
            """Return what computes the loss on the batch as it is now."""
            if loss is None:
                return None
            inputs = copied(batch) if calls.repeated else batch
            return calls.call(lambda: loss(copied(inputs)), (), {})

        with ExitStack() as stack:

            def begin(call: ModelCall | None = None) -> None:
                if call is not None:
                    calls.begun = None
                    with calls.aside():
                        run.start(call, self.steps_per_epoch)
                    self._tell(run)
                run.begin_step(step)
                calls.repeated = run.estimating or run.measuring
                self._forwards = stack.enter_context(run.step())

            if run.started:
                begin()
                calls.loss = again()
            else:
                run.hooks.enter_context(calls.attached())
                if "torch._dynamo" in sys.modules:  # what is compiled now would not know hooks that come half-way
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                calls.loss = again()
                if calls.loss is None:
                    calls.begun = begin
                else:
                    begin(calls.loss)
            try:
                yield
            except NoCallError:
                run.close()
                raise
        if not run.started:
            run.close()
            raise RuntimeError(
                f"no forward with gradients through the blocks ({run.block_names[0]}, ...) took place inside "
                f"`compute_loss`. {NO_GRADIENTS}"
            )

    def look_again(self, places: Sequence[int], labels: Any = None, batch: Any = None) -> None:
        """Make what is due beside a micro-batch, by calls of the model like those that it has just made.

        Args:
            places: of the micro-batch's samples in the global batch.
            labels: of the samples, if the model is called without.
            batch: the micro-batch.
        """
        run, calls, first = self.run, self.run.calls, self.run.first_error
        errors = [forward.e for forward in self._forwards if forward.e is not None]
        if not first.seen and self._forwards:
            first.see(run.boundaries, errors, labels)
        elif first.due(run.boundaries, run.current_step or 0):
            first.see_again(run.boundaries, errors)
        if (run.estimating or run.measuring) and any(forward.apart for forward in self._forwards):
            raise RuntimeError(
                "the loss calls the encoder by itself and hands its output to the model. Estimates, and measurements "
                "of the alignment, run the model once more, and would not see the encoder: expected one call of the "
                'model, or feedback_rule="local" without alignment_steps.'
            )
        for forward, made in zip(self._forwards, calls.made, strict=False):
            forward.call = forward.call or made  # a compiled forward does not know it
        call = next((f.call for f in self._forwards if f.reached and f.call is not None), None)
        if run.estimating and call is not None:
            self._estimate(call, places, labels, batch, first)
        if run.measuring:
            calls.masks.note_batch(batch)
            run.measure(self._forwards)
        self._forwards = []
        calls.made, calls.loss = [], None
        calls.masks.note_batch(None)
        calls.forget()

    def _estimate(self, call: ModelCall, places: Sequence[int], labels: Any, batch: Any, first: FirstError) -> None:
        run = self.run

        def activation(call: ModelCall) -> Tensor:
            return run.aside.first_activation(run.boundaries, call)

        share = self._sampler.take(call, places, run.estimates.sampled(places), activation)
        if share is None:
            return
        targets = share.targets(labels if isinstance(labels, Tensor) else None)
        run.calls.masks.note_batch(batch, share.rows, call.samples)
        run.boundaries.read = first.read_by(run.boundaries, self._forwards, call, share.rows)
        run.estimate(share.call, share.places, counts=share.counts, targets=targets)
        run.boundaries.read = None
