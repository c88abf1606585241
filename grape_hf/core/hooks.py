"""Hooks that stay behind when a model is copied or saved."""

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook on a module. What ``copy`` or ``pickle`` make of it does nothing.

    A copy of a hooked model, a teacher or a moving average, is then an ordinary model. Bound methods would be copied
    with all that lies behind them: the run, its boundaries, and the graph of the forward under way.

    Args:
        act: called with what torch calls a hook with.
    """

    def __init__(self, act: Callable[..., Any]) -> None:
        self.act = act

    def __call__(self, *args: Any) -> Any:
        """Act."""
        return self.act(*args)

    def __reduce__(self) -> tuple[type["Hook"], tuple[Callable[..., None]]]:
        """Have copies do nothing."""
        return Hook, (_do_nothing,)


def _do_nothing(*args: Any) -> None:
    """Leave the module's input or output as it is."""
