"""Copies of what a model is called with, for calls on the side.

A forward may change its arguments: normalise pixels in place, mask labels, pop a key of a dict, fill a cache. A call on
the side gets copies, so that the step, and the next call on the side, see the arguments as they were.
"""

import copy
import dataclasses
import random
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from grape_hf.core.snapshot import CODE, DEEPEST, LIBRARIES, PLAIN

# What is not changed in place, or is not an argument's own: `isolated` puts modules and their parameters back.
_KEPT = (*PLAIN, *CODE, nn.Module, nn.Parameter)
_NOT_COPIED = LIBRARIES - {"transformers", "timm"}  # a model is called with caches and outputs of these


def copied(value: Any) -> Any:
    """Return ``value`` with a copy of each tensor, array, container and plain object in it, whatever they lie in.

    A tensor keeps its graph, and what stands at two places stands at both in the copy, too. What cannot be copied
    (iterators, for one) is the very object.
    """
    return _copy(value, {}, 0)


def _copy(value: Any, known: dict[int, Any], depth: int) -> Any:
    if isinstance(value, _KEPT):
        return value
    if id(value) not in known:
        try:
            known[id(value)] = _made(value, known, depth)
        except Exception:  # whatever an object makes of being copied
            known[id(value)] = value
    return known[id(value)]


def _made(value: Any, known: dict[int, Any], depth: int) -> Any:
    if isinstance(value, Tensor):
        clone = value.clone()  # a leaf's is none where there are no gradients
        return clone if clone.requires_grad == value.requires_grad else clone.requires_grad_()
    if isinstance(value, tuple):
        items = [_copy(item, known, depth) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, np.ndarray | set | random.Random):
        return copy.copy(value)
    if isinstance(value, Mapping | list | deque):
        known[id(value)] = new = copy.copy(value)  # first, as it may hold itself
        places: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        for place, item in list(places):
            new[place] = _copy(item, known, depth)  # type: ignore[index]
        return new
    names = _names(value)
    if not names or depth == DEEPEST or type(value).__module__.partition(".")[0] in _NOT_COPIED:
        return value
    known[id(value)] = new = copy.copy(value)
    for name in names:
        object.__setattr__(new, name, _copy(getattr(value, name), known, depth + 1))
    return new


def _names(value: Any) -> list[str]:
    """The attributes of a plain object, or of a dataclass with slots."""
    if isinstance(getattr(value, "__dict__", None), dict):
        return list(vars(value))
    return [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
