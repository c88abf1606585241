"""Hooks that stay behind when a model is copied or saved."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from grape_hf.core.graph import in_backward


class Hook:
    """A hook on a module. What ``copy`` or ``pickle`` make of it does nothing.

    A copy of a hooked model, a teacher or a moving average, is then an ordinary model. Bound methods would be copied
    with all that lies behind them: the run, its boundaries, and the graph of the forward under way.

    In other threads than that which trains the model is an ordinary one, too: a demonstration may run it meanwhile.

    Args:
        act: called with what torch calls a hook with.
    """

    def __init__(self, act: Callable[..., Any]) -> None:
        self.act = act
        self._thread = threading.get_ident()

    def __call__(self, *args: Any) -> Any:
        """Act, in the thread that made this, and in autograd's, which runs checkpointed modules once more."""
        if torch.compiler.is_compiling() or threading.get_ident() == self._thread or in_backward():
            return self.act(*args)
        return None

    def __reduce__(self) -> tuple[type["Hook"], tuple[Callable[..., None]]]:
        """Have copies do nothing."""
        return Hook, (_do_nothing,)


def _do_nothing(*args: Any) -> None:
    """Leave the module's input or output as it is."""
