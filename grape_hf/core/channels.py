"""Where activations have their channels, seen by the modules that run on them.

Convolutions and the norms that go with them have channels behind the batch, linear layers and layer norms in the last
dimension. So the first of these that runs inside a block, on as many dimensions as the block's input has, says how many
positions there are, and which dimensions of that input they are. Where that fits both ways, as where there are as many
positions as channels, the kind of that module decides. Where all of them run on another view of the input (series that
are folded into the batch), the number of channels is what they tell. Blocks vote, as one of them may have no module
that tells.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from grape_hf.core.hooks import Hook

_BEHIND_THE_BATCH = (_ConvNd, _BatchNorm, nn.GroupNorm)
_LAST = (nn.Linear, nn.MultiheadAttention)
_LAST_NORMS = (nn.LayerNorm, nn.RMSNorm)  # and no subclasses: timm's LayerNorm2d has channels behind the batch


class Channels:
    """Watches blocks in one forward.

    Args:
        blocks: the blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self._seen: dict[tuple[int, int], tuple[bool, torch.Size]] = {}  # by block and number of dimensions

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Attach hooks, and take them off again."""
        handles: list[RemovableHandle] = []
        try:
            for index, block in enumerate(self.blocks):
                for module in block.modules():
                    behind = isinstance(module, _BEHIND_THE_BATCH)
                    if behind or isinstance(module, _LAST) or type(module) in _LAST_NORMS:
                        handles.append(module.register_forward_pre_hook(Hook(self._hook(index, behind))))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int, behind: bool) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            x = next((t for t in args if isinstance(t, Tensor)), None)
            if x is not None:
                self._seen.setdefault((index, x.ndim), (behind, x.shape))

        return hook

    def found(self, read: Mapping[int, torch.Size]) -> tuple[bool, bool]:
        """Return ``channels_first`` and ``channels_last`` of a ``Layout``.

        Args:
            read: the shapes of what blocks have read, by their numbers.
        """
        votes: dict[bool, int] = {True: 0, False: 0}
        first, last = dict(votes), dict(votes)
        for index, shape in read.items():
            seen = self._seen.get((index, len(shape)))
            vote = None if seen is None else _behind_the_batch(shape, *seen)
            if vote is None:
                others = [_by_width(shape, *found) for (i, _), found in self._seen.items() if i == index]
                vote = next((other for other in others if other is not None), None)
            if vote is not None and len(shape) > 2:
                (first if len(shape) == 3 else last)[vote] += 1
        return first[True] > first[False], last[False] > last[True]


def _behind_the_batch(h: torch.Size, behind: bool, x: torch.Size) -> bool | None:
    """Whether h has its channels behind the batch, by a module that does or does not on x; None if x does not tell."""
    positions = x[2:] if behind else x[1:-1]
    first, last = h[2:] == positions, h[1:-1] == positions
    return behind if first and last else first if first or last else None


def _by_width(h: torch.Size, behind: bool, x: torch.Size) -> bool | None:
    """Whether h has its channels behind the batch, by how many a module has that runs on another view of it."""
    channels = x[1] if behind else x[-1]
    first, last = h[1] == channels, h[-1] == channels
    return behind if first and last else first if first or last else None
