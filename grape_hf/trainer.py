"""``GrapeTrainer``: the stock Trainer, with some of its steps changed.

A step is a GrAPE step or a calibration step, decided once per optimiser step. Either way the stock ``training_step``
does the work; what differs is the mode that the hooks on the model's blocks are in meanwhile. Beside that, an estimate
of the Jacobians is made on part of the batch now and then. What a step does is told in ``run.py``; here is what the
Trainer has to say to it: which step, which samples, which options. Checkpoints, cards and refusals are inherited or
called from elsewhere.
"""

import logging
from functools import partial
from typing import Any, NoReturn

from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

from grape_hf.engine.calibration import calibration_schedule
from grape_hf.engine.checkpoints import CheckpointMixin
from grape_hf.engine.parallelism import refuse_compiled_sums
from grape_hf.engine.points import options_for
from grape_hf.engine.ranks import Ranks
from grape_hf.engine.refusals import refuse_settings
from grape_hf.engine.run import GrapeRun
from grape_hf.engine.star_engine import StarEngine
from grape_hf.engine.step import Engine, MicroBatch
from grape_hf.methods import make_engine
from grape_hf.pipeline.trainer import PipelineMixin
from grape_hf.reports.card_mixin import CardMixin
from grape_hf.reports.log_names import log_names
from grape_hf.reports.progress import ProgressFigures
from grape_hf.training_args import GrapeArgumentsMixin, options_of

logger = logging.getLogger(__name__)


class _Witness(TrainerCallback):
    """Refuses updates whose gradients came by no step of ours; the first, where the stock loop makes it."""

    def __init__(self, trainer: "GrapeMixin") -> None:
        self.trainer, self.told = trainer, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise RuntimeError if there are gradients, and GrapeMixin's ``training_step`` was not called."""
        self.told = True
        if not self.trainer.stepped and any(p.grad is not None for p in self.trainer.model.parameters()):
            self._refuse()  # a batch that was left out has left no gradients

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The same, for loops that tell no more than that (trl's PPO)."""
        if not self.trainer.stepped and not self.told:
            self._refuse()
        self.told = False

    def _refuse(self) -> NoReturn:
        name = type(self.trainer).__name__
        raise RuntimeError(
            f"{name} computed gradients by ordinary backpropagation, in a training_step or a loop of its own that "
            "does not call GrapeTrainer's: expected super().training_step(...) in there. A class with a "
            f"training_step of its own may also stay as it is: derive {name} from Trainer, and train a class "
            f'New(GrapeMixin, {name}). Or use method="bp".'
        )


class GrapeMixin(CardMixin, CheckpointMixin, PipelineMixin):
    """GrAPE for any ``Trainer`` subclass: ``class MyTrainer(GrapeMixin, SFTTrainer)``.

    The arguments may be of any kind; where they carry no GrAPE options (``GrapeArgumentsMixin``) the defaults hold.

    Attributes:
        grape_options: GrAPE's options, those that are not given with their values for this model.

    Raises:
        TypeError: where a class is made that has ``Trainer`` before this mixin.
        ValueError: at construction, if no blocks are found in the model or an option does not suit it.
        RuntimeError: at the first update, if a subclass's ``training_step`` does not call this one's.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse an order of bases in which the stock Trainer's methods would be found first."""
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__[: cls.__mro__.index(GrapeMixin)]:
            raise TypeError(
                f"class {cls.__name__} would be the stock Trainer: expected GrapeMixin before it, as in "
                f"class {cls.__name__}(GrapeMixin, ...)."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._engine: Engine | None = None
        self._steps_per_epoch: int | None = None
        self._micro_batch = (-1, 0)  # optimiser step, number within it
        self.grape_options = self._options_for_model()
        refuse_settings(self, self.grape_options)
        self._witness_steps()
        if self.grape_options.method != "bp":
            self._engine = self._new_engine()  # refuses now what it can
            if self._run is not None and self._run.single_block:
                logger.warning(
                    f"{type(self.model).__name__} has a single block and so no feedback point: "
                    f'method="{self.grape_options.method}" is ordinary backpropagation here.'
                )
            # After the bar that it writes on.
            self.add_callback(ProgressFigures(self))

    @property
    def feedback(self) -> list[Tensor]:
        """The feedback matrices B_1 .. B_{L-1} of the last run, each ``(n_l, n_y)``; empty before the first step."""
        return self._run.feedback.B if self._run is not None and hasattr(self._run, "feedback") else []

    @property
    def stepped(self) -> bool:
        """Whether the training under way has come by this class's ``training_step``."""
        return self._micro_batch[0] >= 0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Train on one micro-batch: the stock step, or what an engine makes of it (``engine/step.py``)."""
        stock = partial(super().training_step, model, inputs, num_items_in_batch, *args, **kwargs)
        if self._engine is None:
            self._engine = self._new_engine()
        self._count_micro_batch()
        run = self._run
        if self._engine is None or (run is not None and run.single_block):
            return stock()
        batch = MicroBatch(
            step=self.state.global_step,
            places=self._places(inputs),
            parts=self.current_gradient_accumulation_steps,
            last=self.accelerator.sync_gradients,
            inputs=inputs,
            loss=partial(self._loss, model, num_items_in_batch),
            rate=self.optimizer.param_groups[0]["lr"],
            decay=self.args.weight_decay,
        )
        return self._engine.take(batch, stock)

    def _witness_steps(self) -> None:
        self.remove_callback(_Witness)
        if self.grape_options.method != "bp":
            self.add_callback(_Witness(self))

    def _count_micro_batch(self) -> None:
        step, number = self._micro_batch
        self._micro_batch = (self.state.global_step, number + 1 if step == self.state.global_step else 0)

    def _places(self, inputs: dict[str, Any]) -> range:
        """Where the samples of this micro-batch stand in the global batch, however that is split."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        samples = _samples_in(inputs)
        whole = self._train_batch_size * (1 if self.accelerator.split_batches else ranks)  # of a micro-batch, all ranks
        # The batches of an epoch's end are smaller: one rank's, or where one rank reads for all, everyone's.
        dispatched = isinstance(self.callback_handler.train_dataloader, DataLoaderDispatcher)
        first = self._micro_batch[1] * whole + rank * (samples if dispatched else whole // ranks)
        return range(first, first + samples)

    def _loss(self, model: nn.Module, num_items_in_batch: Any, inputs: Any) -> Tensor:
        prepared = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return self.compute_loss(model, prepared, num_items_in_batch=num_items_in_batch)

    @property
    def _run(self) -> GrapeRun | None:
        """The run of the star, if that is the engine."""
        return self._engine.run if isinstance(self._engine, StarEngine) else None

    def _options_for_model(self) -> GrapeArgumentsMixin:
        """Return GrAPE's options with the values for this model; of a stage, for the whole that it was taken from."""
        stages = 1 if self._pipeline is None else self._pipeline.places.stages
        if (asked := options_of(self.args).pipeline_stages) != stages:
            raise ValueError(
                f"pipeline_stages={asked} came when the Trainer had been made, which divides the model: it has "
                f"{stages}. Set it in the arguments that the Trainer is made with."
            )
        return options_for(self.model, self.args) if self._pipeline is None else self._pipeline.options

    def _new_engine(self) -> Engine | None:
        """Make what takes the steps of this training; stages have a star of their own."""
        if self._pipeline is not None:
            return None
        # A checkpoint on SIGTERM is mostly made in the middle of a step (trainer_jit_checkpoint.py).
        restartable = bool(getattr(self.args, "enable_jit_checkpoint", False))
        ranks, steps = Ranks(self.accelerator.num_processes), self._steps_per_epoch
        return make_engine(self.model, self.grape_options, self.args.seed, ranks, steps, self._run_started, restartable)

    def _run_started(self, run: GrapeRun) -> None:
        refuse_compiled_sums(self, run.boundaries.in_place)
        self._resume(run)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Entered once per train(), and again by auto_find_batch_size: each time a fresh run, with the options that the
        # arguments hold now (a hyperparameter search changes them).
        if self._engine is not None:  # of steps that were taken by hand
            self._engine.close()
        self._engine, self._resumed_from, self.grape_options = None, None, self._options_for_model()
        refuse_settings(self, self.grape_options)
        self._micro_batch = (-1, 0)
        self._witness_steps()
        training = [(module, module.training) for module in self.model.modules()]
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except Exception:
            if self._engine is not None and self.state.global_step == 0:  # refused: the model is as it was
                for module, was_training in training:
                    module.training = was_training
            raise
        finally:
            if self._engine is not None:
                self._engine.close()

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
        if "loss" in logs and self._pipeline is not None:
            logs.update(log_names(self._pipeline.metrics))
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
