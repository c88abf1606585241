"""A Trainer's model cards: the stock one, with what GrAPE adds to it (``cards.py``)."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grape_hf.engine.pushes import PushMixin, in_one_piece
from grape_hf.training_args import GrapeArgumentsMixin


class CardMixin(PushMixin):
    """Model cards of a Trainer, written and pushed; ``GrapeMixin`` has it."""

    grape_options: GrapeArgumentsMixin

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._card_arguments: dict[str, Any] = {}

    def create_model_card(
        self, *args: Any, bp_results: Mapping[str, float] | str | Path | None = None, **kwargs: Any
    ) -> None:
        """Write the model card, ``README.md`` in the output folder.

        With ``method="bp"``, and where this Trainer has not trained but, say, only evaluated, it is the stock one.

        What is given here holds for later cards of this Trainer too: ``push_to_hub`` and each checkpoint that is pushed
        write one.

        Args:
            *args: as for the stock Trainer: ``language``, ``license``, ``tags``, ``model_name``, ``finetuned_from``,
                ``tasks``, ``dataset_tags``, ``dataset``, ``dataset_args``.
            bp_results: figures of the same training by the stock Trainer, to stand beside the run's: what its
                ``evaluate()`` returned, or the folder of that run.
            **kwargs: as for the stock Trainer, or for the one that is mixed with.
        """
        given = inspect.signature(super().create_model_card).bind_partial(*args).arguments | kwargs
        given = {name: value for name, value in given.items() if value is not None}
        if self.grape_options.method == "bp":
            super().create_model_card(**given)
            return
        from grape_hf.reports.cards import render_card  # only here: it takes in much that training does not need
        from grape_hf.reports.run_records import record_of

        self._card_arguments |= given | ({} if bp_results is None else {"bp_results": bp_results})
        named = dict(self._card_arguments)
        compared = named.pop("bp_results", None)
        if tags := named.get("tags"):
            named["tags"] = [tags] if isinstance(tags, str) else list(tags)  # the stock card puts its own into the list
        super().create_model_card(**named)
        if self.state.global_step and self.is_world_process_zero():
            with in_one_piece(Path(self.args.output_dir) / "README.md") as part:
                render_card(record_of(self, named), compared).save(part)

    def _write_card_to_push(self) -> None:
        # Of a model without a configuration the stock Trainer makes no card, and uploads it without.
        if self.grape_options.method != "bp" and hasattr(self.model, "config"):
            hub_name = (self.args.hub_model_id or "").split("/")[-1]  # as push_to_hub names it
            self.create_model_card(model_name=self._card_arguments.get("model_name") or hub_name or None)
