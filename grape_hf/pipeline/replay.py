"""An ordinary backward of the very batch beside that of a star, to measure by; it leaves nothing behind.

All stages run it together, on an ordinary schedule, with the random numbers that the star's forwards had.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grape_hf.core.isolation import isolated


class Replay:
    """The gradients of one batch by a star, and exactly; make it before the star's forward.

    Args:
        model: this stage's. Gradients of earlier batches are taken off it, and are there again after ``chain``.
        device: where it computes.

    Attributes:
        star: by parameter, the gradient that the star has left.
        exact: by parameter, that of the ordinary backward.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self.star: dict[nn.Parameter, Tensor] = {}
        self.exact: dict[nn.Parameter, Tensor] = {}
        self._earlier = self._taken()
        self._random = torch.get_rng_state()
        self._random_on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def chain(self) -> Iterator[None]:
        """Enclose the ordinary forwards and backwards; at the end the star's gradients are in their places."""
        self.star = self._taken()
        try:
            with isolated(self._model, deterministic=False):
                torch.set_rng_state(self._random)
                if self._random_on_device is not None:
                    torch.cuda.set_rng_state(self._random_on_device, self._device)
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
