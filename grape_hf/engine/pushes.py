"""Pushes to the Hub: the stock Trainer's, with four faults of it made good. Seen in transformers 5.23.

- ``training_args.bin`` holds ``hub_token``, and every push uploads it (``HubToken``). It can go when the arguments are
  saved in a form that masks tokens, as ``to_dict`` does: huggingface/transformers issue 34612, open.
- ``hub_strategy="every_save"`` is said to push a draft of the card at every save (pull request 13503), and writes none:
  ``_push_from_checkpoint``. It can go when the stock method writes the card.
- An upload in the background that fails is never heard of (``_say_if_failed``): nobody asks the futures in
  ``PushInProgress`` for their errors. We know of no issue; it can go when the Trainer logs them. At the end of training
  ``push_to_hub`` raises by itself, and our note adds the command that uploads what is on the disk.
- ``hub_model_id`` stays as it was given, without the user's name, so that a card would tell a name that does not load
  (``init_hf_repo``). We know of no issue; it can go when the Trainer puts the full name into the arguments.

What is pushed is what lies in the output folder: weights, configuration, tokenizer or image processor, card, pictures
and records. Checkpoints, and with them the feedback matrices, optimiser and random states, come along where
``hub_strategy`` is ``checkpoint`` or ``all_checkpoints``. Uploads are retried by huggingface_hub. One that fails for
good costs the push and nothing else: the next save pushes everything that is missing.
"""

import logging
import shlex
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _Base  # a mixin's methods may call what the Trainer beside it has
else:
    _Base = object


@contextmanager
def in_one_piece(path: Path) -> Iterator[Path]:
    """Hand out a file to write, which takes the place of ``path`` at the end, and only if it differs.

    A push in the background may be reading that, and would fail. No push uploads a name like that of the file to write.
    """
    part = path.with_name(f"_{path.name}")
    yield part
    if path.is_file() and path.read_bytes() == part.read_bytes():
        part.unlink()
    else:
        part.replace(path)


class HubToken(str):
    """A token that is a string to all but ``pickle``, to which it is None.

    ``training_args.bin`` is a pickle of the arguments, ``hub_token`` among them, and every push uploads it.
    """

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HubToken":
        return self


class PushMixin(_Base):
    """Pushes of a Trainer; ``GrapeMixin`` has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = HubToken(self.args.hub_token)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository, and put its full name into the arguments: cards tell it."""
        super().init_hf_repo(*args, **kwargs)
        if self.hub_model_id is not None:
            self.args.hub_model_id = self.hub_model_id

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the run as the stock Trainer does; an upload that fails raises, with a note on what to do."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            error.add_note(f"GrAPE: the push failed. {self._after_failure()}")
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        before = self._pushes()
        if not self.args.hub_always_push and not all(push.done() for push in before):
            return  # as the stock Trainer does; what is being uploaded must not change meanwhile, the card included
        self._write_card_to_push()
        super()._push_from_checkpoint(checkpoint_folder)
        step = self.state.global_step
        for push in self._pushes():
            if push not in before:
                push.add_done_callback(lambda push: self._say_if_failed(push, step))

    def _pushes(self) -> "list[Future[Any]]":
        """Uploads in the background, those that ended too; only the first process has any."""
        pushes = getattr(self, "push_in_progress", None)
        return [] if pushes is None else list(pushes.jobs)

    def _write_card_to_push(self) -> None:
        """Write what the stock Trainer does not, before a checkpoint is pushed; ``GrapeMixin`` does."""

    def _say_if_failed(self, push: "Future[Any]", step: int) -> None:
        error = None if push.cancelled() else push.exception()
        if error is not None:
            logger.error(
                f"GrAPE: the push of step {step} failed ({type(error).__name__}: {_first_line(error)}), and the "
                f"training goes on. The next save pushes again. {self._after_failure()}"
            )

    def _after_failure(self) -> str:
        return (
            f"Nothing is lost: what the run has written is in {self.args.output_dir}. Push again with "
            f"trainer.push_to_hub(), or without a Trainer: {self._upload_command()}"
        )

    def _upload_command(self) -> str:
        """The command that uploads what ``push_to_hub`` does."""
        repository = self.args.hub_model_id or "USER/NAME"
        words = ["hf", "upload", repository, str(self.args.output_dir), ".", "--exclude", f"{PREFIX_CHECKPOINT_DIR}-*"]
        words += ["--exclude", "_*"]
        words += ["--private"] if self.args.hub_private_repo else []
        words += ["--revision", self.args.hub_revision] if self.args.hub_revision else []
        return shlex.join(words)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
