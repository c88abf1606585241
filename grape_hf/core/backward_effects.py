"""What a backward through blocks changes beside the gradients that it is asked for.

A sweep, or the way down the shortcut path, goes through the graphs of blocks before the step's own backward does. A
checkpointed block runs again for that, and a batch norm in it would count the batch once more. A function of a user's
own may add to ``.grad`` in its backward (reversible blocks).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

REENTRANT = 'Reentrant activation checkpointing does this: set gradient_checkpointing_kwargs={"use_reentrant": False}.'


class BackwardEffects:
    """Puts back what backwards on the side change, of that which the first has changed.

    Args:
        blocks: the blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._changed: tuple[list[Tensor], list[Tensor]] | None = None  # buffers and parameters; not known at first

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put buffers and ``.grad`` of parameters back at the end.

        Raises:
            RuntimeError: if a block is checkpointed by torch's reentrant variant, which has no such backwards.
        """
        buffers, parameters = self._changed or (
            [buffer for block in self._blocks for buffer in block.buffers() if not buffer.is_meta],
            [parameter for block in self._blocks for parameter in block.parameters()],
        )
        before = [(buffer, buffer.clone()) for buffer in buffers]
        try:
            with gradients_aside(parameters) as received:
                yield
        except RuntimeError as error:
            if "incompatible with .grad()" not in str(error):
                raise
            raise RuntimeError(
                "a sweep, or the way down the shortcut path, goes through a block that is run again in the backward, "
                f"by a function that allows no other. {REENTRANT}"
            ) from error
        if self._changed is None:  # torch does not note all changes of batch norms in a tensor's version
            before = [(buffer, was) for buffer, was in before if not torch.equal(buffer, was)]
            self._changed = [buffer for buffer, _ in before], received
        with torch.no_grad():
            for buffer, was in before:
                buffer.copy_(was)


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
