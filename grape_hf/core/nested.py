"""Tensors inside what modules are called with and return: tuples, lists, mappings, dataclasses, in one another.

A path says where a tensor is: indices of sequences, keys of mappings, names of fields. Other objects (caches,
configurations) are not looked into, as a copy of them would be another object.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


def tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield every tensor in ``value`` with its path, in order."""
    if isinstance(value, Tensor):
        yield path, value
    else:
        for key, item in _items(value):
            yield from tensors(item, (*path, key))


def rows_of(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows of a tensor, without waiting for its device."""
    return tensor[torch.tensor(list(rows)).to(tensor.device, non_blocking=True)]


def first_floating(value: Any) -> Path | None:
    """Return the path of the first tensor of floating-point numbers, None if there is none."""
    if isinstance(value, Tensor):  # mostly
        return ()
    return next((path for path, tensor in tensors(value) if tensor.is_floating_point()), None)


def find(value: Any, path: Path | None) -> Path | None:
    """Return ``path`` if a tensor lies there, else where the first tensor of floating-point numbers does."""
    return path if path is not None and isinstance(get(value, path), Tensor) else first_floating(value)


def get(value: Any, path: Path) -> Any:
    """Return what lies at ``path``, None if there is nothing: a path ends at a tensor."""
    for key in path:
        if isinstance(value, Tensor):
            return None
        try:
            value = getattr(value, key) if _is_record(value) else value[key]
        except (AttributeError, IndexError, KeyError, TypeError):
            return None
    return value


def put(value: Any, path: Path, item: Any) -> Any:
    """Return ``value`` with ``item`` at ``path``; what lies on the way is copied, and nothing changed in place."""
    if not path:
        return item
    key, *rest = path
    old = getattr(value, key) if _is_record(value) else value[key]
    new = put(old, tuple(rest), item)
    if isinstance(value, tuple):
        parts = (*value[:key], new, *value[key + 1 :])
        return parts if type(value) is tuple else value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    if isinstance(value, Mapping) and dataclasses.is_dataclass(value):  # transformers' ModelOutput is both
        return type(value)(**{**value, key: new})
    if type(value) is dict:
        return {**value, key: new}
    changed = copy.copy(value)
    if _is_record(value):
        object.__setattr__(changed, key, new)
    else:
        changed[key] = new
    return changed


def map_tensors(value: Any, act: Any) -> Any:
    """Return ``value`` with ``act(tensor)`` in the place of each tensor in it."""
    for path, tensor in list(tensors(value)):
        if (new := act(tensor)) is not tensor:
            value = put(value, path, new)
    return value


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, tuple | list):
        yield from enumerate(value)
    elif isinstance(value, Mapping):
        yield from value.items()
    elif _is_record(value):
        yield from ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping)
