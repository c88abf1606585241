"""What the Trainer does otherwise where a model is divided among stages; nothing where it is not.

The stock ``training_step`` goes on working: it asks for the loss, and computing that runs the whole schedule, backwards
and all. What it gets back is a number without a graph.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from grape_hf.pipeline import checkpoints
from grape_hf.pipeline.accelerator import PipelineAccelerator, show_replicas
from grape_hf.pipeline.failures import named_failures
from grape_hf.pipeline.places import take_places
from grape_hf.pipeline.refusals import refuse, refused_arguments
from grape_hf.training_args import options_of

if TYPE_CHECKING:
    from transformers import Trainer as _Base  # a mixin's methods may call what the Trainer beside it has

    from grape_hf.pipeline.step import Pipeline
else:
    _Base = object


class PipelineMixin(_Base):
    """Training over ``pipeline_stages`` for a ``Trainer``; with one stage it changes nothing.

    Every process calls the Trainer's methods alike, ``train``, ``evaluate``, ``predict`` and ``save_model``.

    Raises:
        ValueError: at construction, for a setting or a model that does not go with stages.
    """

    _pipeline: "Pipeline | None" = None
    _whole: dict[str, Tensor] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._pipeline is None:
            return
        if self.optimizer is not None:
            raise ValueError(
                "optimizers=... holds the parameters of the whole model, of which each stage keeps its own. Use "
                "optimizer_cls_and_kwargs, the arguments `optim` and `optim_args`, or override create_optimizer."
            )
        # In the instance: a subclass's own compute_loss is called for each micro-batch, from inside the schedule.
        self.__dict__["compute_loss"] = self._loss_of_batch

    # How the model comes to be divided

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, take a place among the stages, and keep this stage of the model."""
        options = options_of(self.args)
        if options.pipeline_stages == 1:
            super().create_accelerator_and_postprocess()
            return
        from grape_hf.pipeline.step import Pipeline  # only here: it takes in much of torch that one stage does not need

        refuse(refused_arguments(self))
        device = self.args.device  # by which the processes are joined
        places = take_places(options.pipeline_stages, self.args.ddp_timeout)
        show_replicas(places)
        self.args.accelerator_config.dispatch_batches = False  # accelerate's default for a stream is process 0 for all
        super().create_accelerator_and_postprocess()
        PipelineAccelerator.become(self.accelerator, places)
        self._pipeline = Pipeline(places, options, self.args.seed, device)
        if self.model is not None:
            self._divide(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model, and keep this stage of it."""
        model = super().call_model_init(trial)
        if self._pipeline is not None:
            self._divide(model)
        return model

    def _divide(self, model: nn.Module) -> None:
        pipeline: Any = self._pipeline
        accelerator: Any = self.accelerator
        assert pipeline is not None
        pipeline.divide(model, accelerator.autocast)
        accelerator.counted_elsewhere = [] if pipeline.places.is_first else pipeline.split.tied
        checkpoints.seed_stage(self.args.seed, pipeline.places.stage)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a search over stages: its trials are chosen in one process."""
        if self._pipeline is not None:
            raise ValueError(
                "hyperparameter_search does not go with pipeline_stages: the trials are chosen in one process. Search "
                "with pipeline_stages=1, or start a run for each value."
            )
        return super().hyperparameter_search(*args, **kwargs)

    # Batches: the first stage's, for all

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """Return the first stage's batches. The others go through their own data to keep in step with its ends."""
        pipeline = self._pipeline
        if pipeline is None:
            return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        if pipeline.places.is_first:
            found = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
            found = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, found)
        else:
            found = [next(epoch_iterator, None) for _ in range(num_batches)]
        return pipeline.places.handed_up(found)

    # A step

    def set_initial_training_values(self, args: Any, dataloader: Any, *rest: Any) -> Any:
        """Begin with fresh feedback, and a calibration schedule, which may need the length of an epoch."""
        values = super().set_initial_training_values(args, dataloader, *rest)
        if self._pipeline is not None:
            self._pipeline.begin_training(values[1] if has_length(dataloader) else None)
        return values

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the stock step, and bring gradients of tied weights and replicas together."""
        if self._pipeline is not None:
            self._pipeline.begin_step(self.state.global_step)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._pipeline is not None and self.accelerator.sync_gradients:
            self._pipeline.reduce_gradients()
            self._pipeline.finish_step()
        return loss

    def _loss_of_batch(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Run a batch through all stages; in training the backwards as well."""
        pipeline, train = self._pipeline, torch.is_grad_enabled() and self.model.training
        assert pipeline is not None

        def compute_loss(part: dict[str, Any], items: Any) -> tuple[Tensor, Any]:
            return type(self).compute_loss(self, self.model, part, return_outputs=True, num_items_in_batch=items)

        # transformers 5.17 does not heed it.
        scaled = self.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        loss, outputs = pipeline.run(
            inputs,
            compute_loss,
            num_items_in_batch,
            train=train,
            shifted=self._labels_are_shifted(),
            divisor=1 if scaled or not train else self.current_gradient_accumulation_steps,
            wanted=self._predicted if return_outputs and not train else None,
        )
        loss = loss.requires_grad_() if train else loss
        return (loss, {"loss": loss} if outputs is None else outputs) if return_outputs else loss

    def _labels_are_shifted(self) -> bool:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return type(self.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the first stage's batch through all stages; each gets loss and predictions."""
        pipeline = self._pipeline
        if pipeline is None:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        inputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, dict(inputs))
        inputs = pipeline.places.from_first(inputs if pipeline.places.is_first else None)
        return super().prediction_step(self._forward_of_batch, inputs, prediction_loss_only, *args, **kwargs)

    def _forward_of_batch(self, **inputs: Any) -> Any:
        """Run a batch without labels through all stages; called in the place of the model."""
        pipeline = self._pipeline
        assert pipeline is not None

        def compute_loss(part: dict[str, Any], items: Any) -> tuple[Tensor, Any]:
            outputs = self.model(**part)
            return torch.zeros((), device=self.args.device), outputs

        return pipeline.run(inputs, compute_loss, None, train=False, shifted=False, wanted=self._predicted)[1]

    def _predicted(self, outputs: Any) -> Any:
        """Return what is tensors in a model's outputs, on the CPU."""
        unwanted = getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
        kept: Any
        if isinstance(outputs, dict):
            kept = {k: v for k, v in outputs.items() if k not in unwanted and isinstance(v, Tensor | tuple | list)}
        else:
            kept = tuple(outputs)
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), kept)

    # Logs: the last stage has the loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._pipeline is not None and self.control.should_log:
            self._pipeline.share_loss(tr_loss)
            self._pipeline.share_metrics()
            self.accelerator.finish_norm()
        return super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._pipeline is not None:
            self._pipeline.share_loss(self._tr_loss)
        return super()._finalize_training(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the operations of the whole model, as the stock Trainer reckons them."""
        if self._pipeline is None:
            return super().floating_point_ops(inputs)
        split = self._pipeline.split
        main = inputs.get(split.seen.main_input)
        if not isinstance(main, Tensor) or not hasattr(self.model, "num_parameters"):
            return 0
        # Of all replicas: the stock Trainer sums over the processes that it knows of, and knows of one.
        return 6 * main.numel() * split.parameters * self._pipeline.places.replicas

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather the whole model, and save it on the first stage; to be called by all processes, as ever."""
        pipeline = self._pipeline
        if pipeline is None:
            super().save_model(output_dir, _internal_call)
            return
        # In transformers 5.17 the main process alone gets to `_save`, in 5.23 all do.
        self._whole = checkpoints.whole_state_dict(pipeline.split, pipeline.places)
        super().save_model(output_dir, _internal_call)
        if self._whole is None:
            pipeline.places.wait()  # until it is written; what the main process does then may take long
        self._whole = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self._pipeline is None:
            super()._save(output_dir, state_dict)
        elif self._whole is not None:
            super()._save(output_dir, self._whole)
            self._pipeline.places.wait()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._pipeline is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        whole = self._optimizer_states().whole()
        with nullcontext() if whole is None else checkpoints.replaced(self.optimizer, "state_dict", lambda: whole):
            super()._save_optimizer_and_scheduler(output_dir)
        pipeline = self._pipeline
        checkpoints.save_feedback(Path(output_dir), pipeline.feedback, pipeline.calibration, pipeline.places)
        self._pipeline.places.wait()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._pipeline is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        states, load = self._optimizer_states(), self.optimizer.load_state_dict
        with checkpoints.replaced(self.optimizer, "load_state_dict", lambda whole: load(states.own_part(whole))):
            super()._load_optimizer_and_scheduler(checkpoint)
        checkpoints.load_feedback(Path(checkpoint), self._pipeline.feedback, self._pipeline.calibration)

    def _optimizer_states(self) -> checkpoints.OptimizerStates:
        pipeline = self._pipeline
        assert pipeline is not None
        return checkpoints.OptimizerStates(self.model, pipeline.split, pipeline.places, self.optimizer)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if self._pipeline is not None:
            known = {name for names in self._pipeline.split.state_names for name in names}
            unexpected = load_result.unexpected_keys
            unexpected[:] = [key for key in unexpected if key not in known]
        super()._issue_warnings_after_load(load_result)

    def _save_rng_state(self, output_dir: str) -> None:
        if self._pipeline is not None:
            output_dir = checkpoints.random_state_folder(output_dir, self._pipeline.places)
        super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._pipeline is not None and checkpoint is not None:
            places = self._pipeline.places
            checkpoint = checkpoints.random_state_folder(checkpoint, places)
            if not Path(checkpoint).is_dir():  # of another number of stages
                checkpoints.seed_stage(self.args.seed + self.state.global_step, places.stage)
        super()._load_rng_state(checkpoint)

    # Failures

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self._pipeline is None:
            return super()._inner_training_loop(*args, **kwargs)
        with named_failures(self._pipeline.places, lambda: self.state, self.args.ddp_timeout):
            return super()._inner_training_loop(*args, **kwargs)
