"""What the model is called with: kept so that the call can be made again on the side.

A loss is computed once in a step: what else needs a forward, an estimate or a measurement, makes the very call of the
model again that the loss made, with all its arguments or with some samples of them. So nothing of a Trainer runs twice,
whatever batches it has and however it computes its loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grape_hf.core import nested
from grape_hf.core.arguments import copied
from grape_hf.core.block_lists import ends
from grape_hf.core.graph import in_backward
from grape_hf.core.hooks import Hook
from grape_hf.core.isolation import random_states
from grape_hf.core.padding import Masks


@dataclass(frozen=True)
class ModelCall:
    """One call of the model, or of a module that holds all its blocks. Calling this makes it again, on copies.

    Args:
        module: what was called; or computes the loss, where that runs the blocks without it.
        args: with what.
        kwargs: and what.
        autocast: device type, dtype and whether autocast was on.
        random: sets the random generators as they were when it was called; None if that is not kept.
    """

    module: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool] | None = None
    random: Callable[[], None] | None = None

    def __call__(self) -> Any:
        """Make the call again, with arguments that it may change."""
        args, kwargs = copied((self.args, self.kwargs))
        if self.autocast is None:
            return self.module(*args, **kwargs)
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.module(*args, **kwargs)

    def same_randomness(self) -> None:
        """Set the random generators as they were, so that dropout is the same."""
        if self.random is not None:
            self.random()

    @property
    def samples(self) -> int | None:
        """The length that every tensor among the arguments begins with; None if they do not agree.

        Images of which a text has any number, packed sequences or joined graphs do not. Where token ids stand beside
        numbers (pixels, sound) they may agree by chance, so that does not count.
        """
        found = [tensor for _, tensor in nested.tensors((self.args, self.kwargs)) if tensor.ndim > 0]
        if not found or any(tensor.is_nested for tensor in found) or _has_other_objects((self.args, self.kwargs)):
            return None
        lengths = {len(tensor) for tensor in found}
        ids = any(name == "input_ids" for name in self.kwargs)
        other = ("pixel", "image", "video", "audio", "input_values", "input_features", "grid")
        if len(lengths) > 1 or (ids and any(part in name for name in self.kwargs for part in other)):
            return None
        return lengths.pop()

    def take(self, chosen: Sequence[int]) -> "ModelCall":
        """Return the same call with these samples alone."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor if tensor.ndim == 0 else nested.rows_of(tensor, chosen)

        args, kwargs = nested.map_tensors((self.args, self.kwargs), rows)
        return replace(self, args=args, kwargs=kwargs)


def _has_other_objects(value: Any) -> bool:
    """Whether there is something that may hold samples and is not looked into: a cache, a graph, a list of texts."""
    if isinstance(value, Tensor | str | bytes | bool | int | float | complex | None | torch.dtype | torch.device):
        return False
    if isinstance(value, tuple | list):
        return any(
            not isinstance(item, Tensor | bool | int | float | None) and _has_other_objects(item) for item in value
        )
    if isinstance(value, Mapping):
        return any(_has_other_objects(item) for item in value.values())
    return True


class NoCallError(Exception):
    """The blocks ran, and no module that holds them all was called: the loss calls them one by one."""


class Calls:
    """The calls of a model, by hooks on the modules around its blocks.

    Args:
        model: the model.
        blocks: all its blocks, in order.
        encoder: as for ``Masks``.

    Attributes:
        current: the call under way that has gradients: of the outermost module that holds all blocks.
        begun: called with it before it goes on, the first time.
        remember_randomness: keep the states of the random generators with each call.
        repeated: whether calls will be made again, so that their arguments are copied before the forward changes them.
        loss: stands for a call where none is under way: computes the loss once more. None if the loss calls the model.
        made: the outermost calls with gradients of the micro-batch under way.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], encoder: int | None = None) -> None:
        self.model, self.masks, self.first = model, Masks(model, blocks, encoder), ends(blocks[0])[0]
        self.current: ModelCall | None = None
        self.begun: Callable[[ModelCall], None] | None = None
        self.remember_randomness = False
        self.repeated = False
        self.loss: ModelCall | None = None
        self.made: list[ModelCall] = []
        self._inside = 0  # calls of the same module inside the current one

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks, and take every one of them off again at the end.

        They raise NoCallError when block 1 runs with gradients, the run waits to begin, and no call is under way.
        """
        handles: list[RemovableHandle] = []
        try:
            for module in self.masks.modules:
                handles.append(module.register_forward_pre_hook(Hook(self._before), with_kwargs=True, prepend=True))
            for module in self.masks.holders:
                handles.append(module.register_forward_hook(Hook(self._after), always_call=True))
            yield
        finally:
            self.forget()
            for handle in handles:
                handle.remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let calls inside this be of their own, and none of them the first."""
        before = self.current, self.begun, self.made, self.loss, self.repeated
        self.current, self.begun, self.made, self.loss, self.repeated = None, None, [], None, False
        try:
            yield
        finally:
            self.forget()
            self.current, self.begun, self.made, self.loss, self.repeated = before

    def forget(self) -> None:
        """Let go of the last call and its masks."""
        self.current, self._inside = None, 0
        self.masks.forget()

    def call(self, module: Callable[..., Any], args: tuple, kwargs: dict) -> ModelCall:
        """Make a note of a call of ``module`` under the settings of now."""
        parameter = next(self.model.parameters(), None)
        device = "cpu" if parameter is None or parameter.device.type == "meta" else parameter.device.type
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        random = random_states(self.model) if self.remember_randomness else None
        args, kwargs = copied((args, kwargs)) if self.repeated else (args, dict(kwargs))
        return ModelCall(module, args, kwargs, autocast, random)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module in self.masks.holders or not torch.compiler.is_compiling():  # a block's would cut its graph in two
            self._begin(module, args, kwargs)

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.current is None and module in self.masks.holders and torch.is_grad_enabled() and not in_backward():
            self.forget()
            self.current = self.call(module, args, kwargs)
            self.made.append(self.current)
            if self.begun is not None:
                self.begun(self.current)
        elif self.current is not None and module is self.current.module:  # it calls itself: self-conditioning
            self._inside += 1
        if self.current is not None:
            self.masks.note(module, args, kwargs)
        elif self.begun is not None and module is self.first and torch.is_grad_enabled() and not in_backward():
            raise NoCallError

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.current is not None and module is self.current.module:
            if self._inside:
                self._inside -= 1
            else:
                self.current = None
