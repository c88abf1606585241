"""What a backward through blocks, or the head, changes beside the gradients that it is asked for.

A sweep, the way down the shortcut path, or the look at the head's backward goes through a graph before the step's own
backward does. What is checkpointed runs again for that, and a batch norm in it would count the batch once more. A
function of a user's own may add to ``.grad`` in its backward (reversible blocks), and a backward hook may gather
gradients (Grad-CAM), which then are of the step alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grape_hf.core.snapshot import Snapshot, runs_users_code

REENTRANT = 'Reentrant activation checkpointing does this: set gradient_checkpointing_kwargs={"use_reentrant": False}.'


class BackwardEffects:
    """Puts back what backwards on the side change, of that which the first has changed.

    Args:
        model: what they may go through.
        at_y: the module that makes y, by whose backward they are set off.
    """

    def __init__(self, model: nn.Module, at_y: nn.Module) -> None:
        self._model, self._at_y = model, at_y
        self._changed: tuple[list[Tensor], list[Tensor]] | None = None  # buffers and parameters; not known at first

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put buffers, ``.grad`` of parameters and what hooks have gathered back at the end.

        Backward hooks on the module that makes y fire here, with the step's own gradients, and then not again (torch's
        ``BackwardHook``). So nothing that hooks have gathered is put back where there is one.

        Raises:
            RuntimeError: if a block is checkpointed by torch's reentrant variant, which has no such backwards.
        """
        buffers, parameters = self._changed or (
            [buffer for buffer in self._model.buffers() if not buffer.is_meta],
            list(self._model.parameters()),
        )
        before = [(buffer, buffer.clone()) for buffer in buffers]
        gathers = not self._at_y._backward_hooks and any(map(runs_users_code, self._model.modules()))
        gathered = Snapshot(self._model) if gathers else None
        try:
            with gradients_aside(parameters) as received:
                yield
        except RuntimeError as error:
            if "incompatible with .grad()" not in str(error):
                raise
            raise RuntimeError(
                "a sweep, the way down the shortcut path, or the look at the head's backward goes through a module "
                f"that is run again in the backward, by a function that allows no other. {REENTRANT}"
            ) from error
        if self._changed is None:  # torch does not note all changes of batch norms in a tensor's version
            before = [(buffer, was) for buffer, was in before if not torch.equal(buffer, was)]
            self._changed = [buffer for buffer, _ in before], received
        with torch.no_grad():
            for buffer, was in before:
                buffer.copy_(was)
        if gathered is not None:
            gathered.restore()


@contextmanager
def gradients_aside(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Take ``.grad`` off parameters, and put it back at the end; the list has those that received one meanwhile."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    received: list[Tensor] = []
    for parameter in parameters:
        parameter.grad = None
    try:
        yield received
    finally:
        received += [parameter for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in before:
            parameter.grad = gradient
