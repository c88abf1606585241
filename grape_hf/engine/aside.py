"""Forwards on the side: the model is called once more, for an estimate or a measurement, and keeps no trace of it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from grape_hf.core.boundaries import Boundaries, OutputNotReachedError
from grape_hf.core.calls import Calls, ModelCall
from grape_hf.core.isolation import isolated
from grape_hf.core.modes import OutputReached


class Aside:
    """What it takes to call a model on the side.

    Args:
        model: the model.
        calls: the calls made of it, of which those on the side are none.
        sharded: whether FSDP2 shards the model.
    """

    def __init__(self, model: nn.Module, calls: Calls, sharded: bool) -> None:
        self.model, self.calls, self.sharded = model, calls, sharded
        self._changing: list[str] = []  # parameters that a forward changes
        self._known: set[bool] = set()  # whether that is known of forwards in evaluation, and in training

    def begin(self, changing: list[str]) -> None:
        """Take over which parameters a forward in training changes."""
        self._changing, self._known = changing, {False}

    @contextmanager
    def entered(self, deterministic: bool = True) -> Iterator[None]:
        """Enclose a forward that leaves no trace.

        Args:
            deterministic: without dropout, and with the statistics that batch norms have in training.
        """
        known = deterministic in self._known
        with isolated(self.model, deterministic, self._changing if known else "all") as trace, self.calls.aside():
            yield
        if not known:  # the first of its kind: RWKV changes weights only in evaluation
            self._known.add(deterministic)
            self._changing = sorted({*self._changing, *trace.changed})
        self.reshard()

    def reshard(self) -> None:
        """Let FSDP2 put back the shards that a forward without a backward has left whole."""
        for module in self.model.modules() if self.sharded else ():
            if isinstance(module, FSDPModule):
                module.reshard()

    def first_activation(self, boundaries: Boundaries, call: ModelCall) -> Tensor:
        """Return h_1 of a call of the model."""
        found: list[Tensor] = []

        def keep(index: int, h: Tensor, *_: object) -> Tensor:
            found.append(h.detach())
            raise OutputReached

        with self.entered(), torch.enable_grad(), suppress(OutputNotReachedError), boundaries.perturb(keep):
            call()
        return found[0]
