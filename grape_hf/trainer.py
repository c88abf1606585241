"""``GrapeTrainer``: the stock Trainer, with some of its steps changed.

A step is a GrAPE step or a calibration step, decided once per optimiser step. Either way the stock ``training_step``
does the work; what differs is the mode that the hooks on the model's blocks are in meanwhile. Beside that, an estimate
of the Jacobians is made on part of the batch now and then. What a step does is told in ``run.py``; here is what the
Trainer has to say to it: which step, which samples, which options. Checkpoints, cards and refusals are inherited or
called from elsewhere.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

from grape_hf.core.calls import NoCallError
from grape_hf.engine.checkpoints import CheckpointMixin
from grape_hf.engine.points import options_for
from grape_hf.engine.ranks import Ranks
from grape_hf.engine.refusals import refuse_settings
from grape_hf.engine.run import GrapeRun, calibration_schedule
from grape_hf.methods import make_baseline
from grape_hf.methods.base import Baseline, MicroBatch
from grape_hf.reports.card_mixin import CardMixin
from grape_hf.reports.log_names import log_names
from grape_hf.reports.progress import ProgressFigures

logger = logging.getLogger(__name__)


class GrapeMixin(CardMixin, CheckpointMixin):
    """GrAPE for any ``Trainer`` subclass: ``class MyTrainer(GrapeMixin, SFTTrainer)``.

    The arguments may be of any kind; where they carry no GrAPE options (``GrapeArgumentsMixin``) the defaults hold.

    Attributes:
        grape_options: GrAPE's options, those that are not given with their values for this model.

    Raises:
        ValueError: at construction, if no blocks are found in the model or an option does not suit it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run: GrapeRun | None = None
        self._steps_per_epoch: int | None = None
        self._baseline: Baseline | None = None
        self._micro_batch = (-1, 0)  # optimiser step, number within it
        self._blocks_alone = False  # whether the loss calls the blocks one by one, and so has to be computed again
        self.grape_options = options_for(self.model, self.args)
        refuse_settings(self, self.grape_options)
        if self.grape_options.method != "bp":
            run = self._new_run()  # refuses now what it can
            if run is not None and run.single_block:
                logger.warning(
                    f"{type(self.model).__name__} has a single block and so no feedback point: "
                    f'method="{self.grape_options.method}" is ordinary backpropagation here.'
                )
            self.add_callback(ProgressFigures(self.callback_handler.callbacks))  # after the bar that it writes on

    @property
    def feedback(self) -> list[Tensor]:
        """The feedback matrices B_1 .. B_{L-1} of the last run, each ``(n_l, n_y)``; empty before the first step."""
        return self._run.feedback.B if self._run is not None and hasattr(self._run, "feedback") else []

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Train on one micro-batch: an estimate where one is due, then the stock step in a star or a chain."""
        run = self._current_run()
        self._count_micro_batch()
        if self._baseline is not None:
            parts = self.current_gradient_accumulation_steps
            with self._baseline.step(MicroBatch(self.state.global_step, self._places(inputs), parts)):
                return super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)
        if run is None:
            return super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)

        def step() -> Tensor:
            again = partial(self._loss, model, inputs, num_items_in_batch) if self._blocks_alone else None
            resume = partial(self._resume, run)
            with run.micro_batch(self.state.global_step, self._steps_per_epoch, resume, again, inputs):
                return super(GrapeMixin, self).training_step(model, inputs, num_items_in_batch, *args, **kwargs)

        try:
            loss = step()
        except NoCallError:  # at the first step, before anything was computed
            self._blocks_alone = True
            loss = step()
        run.look_again(self._places(inputs), inputs.get("labels") if isinstance(inputs, Mapping) else None)
        if self.accelerator.sync_gradients:
            rate = self.optimizer.param_groups[0]["lr"]
            run.finish_step(rate, self.args.weight_decay)
        return loss

    def _count_micro_batch(self) -> None:
        step, number = self._micro_batch
        self._micro_batch = (self.state.global_step, number + 1 if step == self.state.global_step else 0)

    def _places(self, inputs: dict[str, Any]) -> range:
        """Where the samples of this micro-batch stand in the global batch, however that is split (METHOD.md)."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        samples = _samples_in(inputs)
        whole = self._train_batch_size * (1 if self.accelerator.split_batches else ranks)  # of a micro-batch, all ranks
        # The batches of an epoch's end are smaller: one rank's, or where one rank reads for all, everyone's.
        dispatched = isinstance(self.callback_handler.train_dataloader, DataLoaderDispatcher)
        first = self._micro_batch[1] * whole + rank * (samples if dispatched else whole // ranks)
        return range(first, first + samples)

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        prepared = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return self.compute_loss(model, prepared, num_items_in_batch=num_items_in_batch)

    def _current_run(self) -> GrapeRun | None:
        """The run under way, begun now if this is the first step; None where every step is ordinary."""
        if self._run is None and self._baseline is None and self.grape_options.method != "bp":
            self._run = self._new_run()
        return None if self._run is None or self._run.single_block else self._run

    def _new_run(self) -> GrapeRun | None:
        """Make a run of the star; of another method make the baseline, and return None."""
        self._baseline = make_baseline(self.model, self.grape_options, self.args.seed)
        ranks = Ranks(self.accelerator.num_processes)
        # A checkpoint on SIGTERM is mostly made in the middle of a step (trainer_jit_checkpoint.py).
        restartable = bool(getattr(self.args, "enable_jit_checkpoint", False))
        return None if self._baseline else GrapeRun(self.model, self.grape_options, self.args.seed, ranks, restartable)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Entered once per train(), and again by auto_find_batch_size: each time a fresh run, with the options that the
        # arguments hold now (a hyperparameter search changes them).
        self._run, self._resumed_from, self.grape_options = None, None, options_for(self.model, self.args)
        self._baseline, self._micro_batch, self._blocks_alone = None, (-1, 0), False
        training = [(module, module.training) for module in self.model.modules()]
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except Exception:
            if self._run is not None and self.state.global_step == 0:  # refused: the model is as it was
                for module, was_training in training:
                    module.training = was_training
            raise
        finally:
            if self._run is not None:
                self._run.close()

    def set_initial_training_values(self, args: Any, dataloader: Any, *rest: Any) -> Any:
        """Note the length of an epoch, which the calibration schedule needs; refuse here if it needs and lacks it."""
        values = super().set_initial_training_values(args, dataloader, *rest)
        self._steps_per_epoch = values[1] if has_length(dataloader) else None
        calibration_schedule(self.grape_options, self.args.seed, self._steps_per_epoch)
        return values

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add alignment, and the share of calibration steps, to what is logged of the training."""
        if "loss" in logs and self._run is not None and self._run.started:
            logs.update(log_names(self._run.read_metrics()))
        super().log(logs, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        """Take over a trial's values, GrAPE's options among them, and refuse what a new Trainer would refuse."""
        super()._hp_search_setup(trial)
        if trial is None:
            return
        self.grape_options = options_for(self.model, self.args)
        refuse_settings(self, self.grape_options)


class GrapeTrainer(GrapeMixin, Trainer):
    """``transformers.Trainer`` that trains with GrAPE; same signature, arguments of either kind.

    With ``method="bp"`` it is the stock Trainer, bit for bit.
    """


def _samples_in(inputs: Any) -> int:
    """Count the samples of a batch: its rows, if that is what it holds, or the length of its tensors."""
    rows = isinstance(inputs, list | tuple) and not any(isinstance(row, Tensor) for row in inputs)
    if rows and len({type(row) for row in inputs}) == 1:
        return len(inputs)
    return find_batch_size(inputs) or 1
