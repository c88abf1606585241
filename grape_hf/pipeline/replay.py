"""An ordinary backward of the very batch beside that of a star, to measure by; it leaves nothing behind.

All stages run it together, on an ordinary schedule, with the random numbers that the star's forwards had.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from grape_hf.core.isolation import isolated, random_states


class Replay:
    """The gradients of one batch by a star, and exactly; make it before the star's forward.

    Args:
        model: this stage's. Gradients of earlier batches are taken off it, and are there again after ``chain``.

    Attributes:
        star: by parameter, the gradient that the star has left.
        exact: by parameter, that of the ordinary backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.star: dict[nn.Parameter, Tensor] = {}
        self.exact: dict[nn.Parameter, Tensor] = {}
        self._earlier = self._taken()
        self._same_randomness = random_states(model)

    @contextmanager
    def chain(self) -> Iterator[None]:
        """Enclose the ordinary forwards and backwards; at the end the star's gradients are in their places."""
        self.star = self._taken()
        try:
            with isolated(self._model, deterministic=False):
                self._same_randomness()
                yield
            self.exact = self._taken()
        finally:
            self._taken()
            for found in (self._earlier, self.star):
                for parameter, gradient in found.items():
                    there = parameter.grad
                    parameter.grad = gradient if there is None else there + gradient

    def _taken(self) -> dict[nn.Parameter, Tensor]:
        """Take all gradients off the model."""
        found = {p: p.grad for p in self._model.parameters() if p.grad is not None}
        for parameter in found:
            parameter.grad = None
        return found
