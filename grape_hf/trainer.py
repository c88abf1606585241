"""``GrapeTrainer``: the stock Trainer, with some of its steps changed.

A step is a GrAPE step or a calibration step, decided once per optimiser step. Either way the stock ``training_step``
does the work; what differs is the mode that the hooks on the model's blocks are in meanwhile. Beside that, an estimate
of the Jacobians is made on part of the batch now and then. What a step does is told in ``run.py``; here is what the
Trainer has to say to it: which step, which samples, where checkpoints lie.
"""

import logging
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from grape_hf.core.calls import NoCallError
from grape_hf.engine.checkpoints import checkpoint_to_resume, complete_save
from grape_hf.engine.parallelism import refuse_parallelism
from grape_hf.engine.pushes import PushMixin
from grape_hf.engine.ranks import Ranks
from grape_hf.engine.run import FEEDBACK_NAME, STATE_NAME, GrapeRun, calibration_schedule
from grape_hf.methods import make_baseline
from grape_hf.methods.base import Baseline, MicroBatch
from grape_hf.pipeline.trainer import PipelineMixin
from grape_hf.reports.log_names import log_names
from grape_hf.reports.progress import ProgressFigures
from grape_hf.training_args import BASELINES, METHOD_OPTIONS, options_of

logger = logging.getLogger(__name__)


class GrapeMixin(PushMixin, PipelineMixin):
    """GrAPE for any ``Trainer`` subclass: ``class MyTrainer(GrapeMixin, SFTTrainer)``.

    The arguments may be of any kind; where they carry no GrAPE options (``GrapeArgumentsMixin``) the defaults hold.

    Attributes:
        grape_options: GrAPE's options, with the preset's values filled in.

    Raises:
        ValueError: at construction, if no blocks are found in the model or an option does not suit it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run: GrapeRun | None = None
        self._resumed_from: Path | None = None
        self._steps_per_epoch: int | None = None
        self._baseline: Baseline | None = None
        self._micro_batch = (-1, 0)  # optimiser step, number within it
        self._blocks_alone = False  # whether the loss calls the blocks one by one, and so has to be computed again
        self._card_arguments: dict[str, Any] = {}
        self.grape_options = options_of(self.args)
        if self.grape_options.method != "bp":
            self._refuse_settings()
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
        """Make a run of the star; of another method make the baseline, and return None. Stages have their own star."""
        if self._pipeline is not None:
            return None
        self._baseline = make_baseline(self.model, self.grape_options, self.args.seed)
        ranks = Ranks(self.accelerator.num_processes)
        # A checkpoint on SIGTERM is mostly made in the middle of a step (trainer_jit_checkpoint.py).
        restartable = bool(getattr(self.args, "enable_jit_checkpoint", False))
        return None if self._baseline else GrapeRun(self.model, self.grape_options, self.args.seed, ranks, restartable)

    def _resume(self, run: GrapeRun) -> None:
        """Read what the checkpoint says that this training resumes from."""
        if self._resumed_from is None:
            return
        if any((self._resumed_from / name).exists() for name in (FEEDBACK_NAME, STATE_NAME)):
            run.load(self._resumed_from)
        else:
            logger.warning(
                f"GrAPE: no feedback matrices in {self._resumed_from}, which is of a stock Trainer, of another method "
                "or holds the model only. B_l and the calibration schedule start afresh."
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Entered once per train(), and again by auto_find_batch_size: each time a fresh run, with the options that the
        # arguments hold now (a hyperparameter search changes them).
        self._run, self._resumed_from, self.grape_options = None, None, options_of(self.args)
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
        if "loss" in logs and self._pipeline is not None:
            logs.update(log_names(self._pipeline.metrics))
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; with ``resume_from_checkpoint=True`` from the last complete checkpoint (``checkpoints.py``)."""
        return super().train(checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        discard = bool(self.args.save_total_limit)
        with complete_save(folder, self.state, discard) if self.args.should_save else nullcontext():
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last file of every rank but the first: then the first may declare the checkpoint complete.
        self.accelerator.wait_for_everyone()

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        bp_results: Mapping[str, float] | str | Path | None = None,
        **others: Any,
    ) -> None:
        """Write the model card, ``README.md`` in the output folder.

        With ``method="bp"``, and where this Trainer has not trained but, say, only evaluated, it is the stock one.

        What is given here holds for later cards of this Trainer too: ``push_to_hub`` and each checkpoint that is pushed
        write one.

        Args:
            language: as for the stock Trainer, like all that follow.
            license: of the model.
            tags: tags beside the method's.
            model_name: name of the model.
            finetuned_from: model that this one began with.
            tasks: what the model is for, in the Hub's words.
            dataset_tags: data sets on the Hub.
            dataset: their names in plain words.
            dataset_args: their configurations.
            bp_results: figures of the same training by the stock Trainer, to stand beside the run's: what its
                ``evaluate()`` returned, or the folder of that run.
            **others: arguments of other Trainers' cards.
        """
        given = dict(
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
            **others,
        )
        given = {name: value for name, value in given.items() if value is not None}
        if self.grape_options.method == "bp":
            super().create_model_card(**given)
            return
        from grape_hf.reports.cards import render_card  # only here: it takes in much that training does not need
        from grape_hf.reports.run_records import record_of

        self._card_arguments |= given | ({} if bp_results is None else {"bp_results": bp_results})
        named = dict(self._card_arguments)
        compared = named.pop("bp_results", None)
        # A copy of the tags: the stock card puts its own into the list.
        super().create_model_card(**named | ({"tags": list(named["tags"])} if "tags" in named else {}))
        if self.state.global_step and self.is_world_process_zero():
            render_card(record_of(self, named), compared).save(Path(self.args.output_dir) / "README.md")

    def _write_card_to_push(self) -> None:
        # Of a model without a configuration the stock Trainer makes no card, and uploads it without.
        if self.grape_options.method != "bp" and hasattr(self.model, "config"):
            hub_name = (self.args.hub_model_id or "").split("/")[-1]  # as push_to_hub names it
            self.create_model_card(model_name=self._card_arguments.get("model_name") or hub_name or None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save or self._pipeline is not None or self.grape_options.method in ("bp", *BASELINES):
            return
        if self._run is not None and self._run.started:
            self._run.save(Path(output_dir), finished=self.state.global_step != self._run.current_step)
        elif self._resumed_from is not None and self._resumed_from.resolve() != Path(output_dir).resolve():
            # On SIGTERM, before the first step: what the run resumed from is what it has.
            for name in (FEEDBACK_NAME, STATE_NAME):
                if (self._resumed_from / name).exists():
                    shutil.copy(self._resumed_from / name, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The matrices are read when their shapes are known, at the first step.
        self._resumed_from = None if checkpoint is None else Path(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # B_l belongs to the weights beside which it was learned. With save_only_model there is none in a checkpoint.
        folder = Path(self.state.best_model_checkpoint or "")
        if self._run is not None and self._run.started and (folder / FEEDBACK_NAME).exists():
            self._run.load_feedback(folder)

    def _hp_search_setup(self, trial: Any) -> None:
        """Take over a trial's values, GrAPE's options among them, and refuse what a new Trainer would refuse."""
        before = options_of(self.args)
        super()._hp_search_setup(trial)
        if trial is None:
            return
        self.grape_options = options = options_of(self.args)
        # Other methods differ in no option but `method` itself.
        implying = METHOD_OPTIONS.keys() & {before.method, options.method}
        for name, cannot in {"grape_preset": True, "method": bool(implying)}.items():
            if cannot and getattr(options, name) != getattr(before, name):
                raise ValueError(
                    f"a hyperparameter search cannot change {name} from {getattr(before, name)!r} to "
                    f"{getattr(options, name)!r}: the options that these stand for were filled in when the arguments "
                    "were made. Search over those options, or make a search for each value."
                )
        if options.method != "bp":
            self._refuse_settings()

    def _refuse_settings(self) -> None:
        method = self.grape_options.method
        if method in BASELINES:
            self._refuse_with_baseline()
        if self.args.fp16 and method in ("dkp", "pepita"):
            raise ValueError(f"fp16 scales the loss, and method={method!r} needs the error as it is. Use bf16 or fp32.")
        if getattr(self.model, "is_quantized", False):
            raise ValueError(
                f"{type(self.model).__name__} is quantised: its products have no forward-mode derivative, and finite "
                "differences are below their resolution. Load the base unquantised (adapters go with bf16=True), or "
                'use method="bp".'
            )
        refuse_parallelism(self, self.grape_options)
        checkpointing = getattr(self.args, "gradient_checkpointing_kwargs", None) or {}  # by the new name the same
        # The Trainer takes the first two for itself; of what else is said, reentrant is torch's default.
        if checkpointing.keys() - {"every_n_layers", "offload"} and checkpointing.get("use_reentrant") is not False:
            raise ValueError(
                f"gradient_checkpointing_kwargs={checkpointing}: use_reentrant, which torch takes to be True where it "
                "is not given, cuts the gradients of blocks whose inputs need none, as all inputs of blocks do here. "
                'Say {"use_reentrant": False}, which is the default where nothing is said.'
            )

    def _refuse_with_baseline(self) -> None:
        method = self.grape_options.method
        checkpointing = any(getattr(self.args, f"{kind}_checkpointing", False) for kind in ("gradient", "activation"))
        refused = {
            "several processes": self.accelerator.num_processes > 1,
            "torch_compile": self.args.torch_compile,
            "activation checkpointing": checkpointing,
            "bf16, whose resolution the difference of two passes needs": method == "pepita" and self.args.bf16,
        }
        if any(refused.values()):
            found = ", ".join(name for name, is_set in refused.items() if is_set)
            raise ValueError(f"method={method!r} is a baseline for small studies and does not go with {found}.")


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
