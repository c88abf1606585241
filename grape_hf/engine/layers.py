"""Which part of a layer runs first, and which last, where a list holds the parts and the model calls them itself."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

import torch
from torch import nn

from grape_hf.core.block_lists import Layer
from grape_hf.core.hooks import Hook
from grape_hf.core.isolation import isolated


def settle_ends(model: nn.Module, blocks: Iterable[nn.Module], forward: Callable[[], object]) -> bool:
    """Have each ``Layer`` among the blocks begin and end with the parts that do, and say whether there is one.

    A part that runs more than once in a layer (one dropout for all branches) is neither.

    Args:
        model: the model.
        blocks: its blocks.
        forward: runs the model, once, on the side.
    """
    layers = [block for block in blocks if isinstance(block, Layer)]
    called: list[nn.Module] = []
    if not layers:
        return False
    with ExitStack() as stack:
        stack.enter_context(isolated(model, deterministic=True, saved="all"))
        stack.enter_context(torch.enable_grad())
        for part in {part for layer in layers for part in layer}:
            handle = part.register_forward_pre_hook(Hook(lambda module, args: called.append(module)))
            stack.callback(handle.remove)
        stack.enter_context(suppress(Exception))  # the look will raise it
        forward()
    times = Counter(called)
    for layer in layers:
        parts = set(layer)
        if once := [part for part in called if times[part] == 1 and part in parts]:
            layer.ends = once[0], once[-1]
    return True
