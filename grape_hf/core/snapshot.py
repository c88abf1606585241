"""Remember what a forward may change in a model's modules, and put it back.

Beside parameters and buffers a module has plain attributes: a counter of an annealed loss, a state that is carried from
batch to batch, a list of figures, a generator of its own. They are compared by identity and put back in place, so that
whoever else holds such a list or tensor sees it as it was. Modules, classes and functions are not looked into, but for
what runs in a forward beside a library's code: a user's hooks and ``forward``. The variables that these name, and the
lists behind them, are put back as well: a hook may gather features for the loss in a list that is no module's.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size, ModuleType)
CODE = (FunctionType, MethodType, BuiltinFunctionType)
DEEPEST = 4  # objects in objects
# Objects of these are not looked into: engines of torch hold memory that is not theirs at the time (FSDP2).
LIBRARIES = {"torch", "accelerate", "transformers", "peft", "tokenizers", "timm", "datasets"}


class Snapshot:
    """The plain attributes of all modules of a model, with hooks and flags, and which buffers there are.

    Args:
        model: the model.
        also: what else is put back, such as tensors of a batch, or the numbers in buffers.
    """

    def __init__(self, model: nn.Module, also: Iterable[Any] = ()) -> None:
        # Of a large model there are thousands of these two, so they are no closures.
        self._mappings: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # as they are, and as they were
        self._hooks: list[tuple[dict[Any, Any], tuple[Any, ...]]] = []
        self._undo: list[Callable[[], object]] = []
        self._seen: set[int] = set()
        self._code: set[tuple[int, int]] = set()  # objects, and functions of theirs
        self._held: list[Any] = []  # so that no other object comes to have the same id
        for module in model.modules():
            self._seen.add(id(module))
        for module in model.modules():
            attributes = vars(module)
            self._note_mapping(attributes, depth=0)
            for name in ("_buffers", "_modules", "_parameters"):
                self._mappings.append((attributes[name], dict(attributes[name])))
            if isinstance(forward := getattr(type(module), "forward", None), FunctionType):
                self._note_code(MethodType(forward, module))
        for value in also:
            self._note(value, depth=0)

    def restore(self) -> None:
        """Put everything back."""
        for attributes, before in self._mappings:
            if attributes.keys() != before.keys() or any(attributes[name] is not was for name, was in before.items()):
                _put_back(attributes, before)
        for hooks, attached in self._hooks:
            for name in [name for name in hooks if name not in attached]:
                del hooks[name]  # and one that took itself off stays off
        for undo in self._undo:
            undo()

    def _note_mapping(self, attributes: dict[Any, Any], depth: int) -> None:
        self._mappings.append((attributes, dict(attributes)))
        for name, value in attributes.items():
            if isinstance(value, PLAIN) or name in ("_buffers", "_modules", "_parameters"):
                continue
            if str(name).startswith("_") and "_hooks" in str(name) and isinstance(value, dict):
                self._hooks.append((value, tuple(value)))
                for hook in value.values():
                    self._note_code(hook)
            elif isinstance(value, (*CODE, partial)):
                self._note_code(value)
            else:
                self._note(value, depth)

    def _note_code(self, code: Any) -> None:
        """Note the variables that a user's function names: global ones, those around it, and its object's."""
        if isinstance(code, partial):
            for value in (code.func, *code.args, *code.keywords.values()):
                self._note_variable(value, set())
            return
        owner, code = _function_of(code)
        if not _is_users_code(code):
            return
        of = type(owner) if isinstance(owner, nn.Module) else owner  # what modules have is noted already
        if (id(of), id(code)) in self._code:
            return
        self._code.add((id(of), id(code)))
        self._held.append((of, code))
        names = _names(code.__code__)
        for cell in code.__closure__ or ():
            with suppress(ValueError):  # an empty one
                self._undo.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
                self._note_variable(cell.cell_contents, names)
        self._note_named(code.__globals__, names)
        if owner is not None:
            self._note_object(owner, names)

    def _note_named(self, scope: dict[str, Any], names: set[str]) -> None:
        named = {name: scope[name] for name in names if name in scope}
        self._undo.append(partial(_put_back, scope, named, names))
        for value in named.values():
            self._note_variable(value, names)

    def _note_object(self, owner: Any, names: set[str]) -> None:
        """Note the attributes of an object that a function names, and what the methods do that it names."""
        if not isinstance(owner, nn.Module):  # what modules have is noted already
            self._note_named(vars(owner), names)
        for name in names:
            if isinstance(method := getattr(type(owner), name, None), FunctionType):
                self._note_code(MethodType(method, owner))

    def _note_variable(self, value: Any, names: set[str]) -> None:
        if isinstance(value, (*CODE, partial)):
            self._note_code(value)
        elif isinstance(value, (*PLAIN, Tensor, dict, list, deque, set)) or not _is_users(value):
            self._note(value, DEEPEST)
        elif (id(value), id(names)) not in self._code:
            self._code.add((id(value), id(names)))
            self._held.append((value, names))
            self._note_object(value, names)

    def _note(self, value: Any, depth: int) -> None:
        if isinstance(value, (*PLAIN, *CODE, nn.Module, nn.Parameter)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._held.append(value)
        if isinstance(value, Tensor):
            if not value.is_meta and not value.is_nested:
                copy = value.detach().clone()
                self._undo.append(partial(value.data.copy_, copy))
        elif isinstance(value, dict):
            if value:
                self._note_mapping(value, depth)
            else:
                self._undo.append(value.clear)
        elif isinstance(value, list | deque):
            items = list(value)
            self._undo.append(lambda: _refill(value, items))
            for item in items:
                self._note(item, depth)
        elif isinstance(value, tuple | frozenset):
            for item in value:
                self._note(item, depth)
        elif isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: _remember(value, members))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and value.ndim > 0:
                self._undo.append(partial(value.__setitem__, ..., value.copy()))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(partial(value.set_state, state))
        elif isinstance(value, random.Random):
            drawn = value.getstate()
            self._undo.append(lambda: value.setstate(drawn))
        elif isinstance(value, np.random.Generator):
            bits, position = value.bit_generator, value.bit_generator.state
            self._undo.append(lambda: setattr(bits, "state", position))
        elif depth < DEEPEST and _is_users(value):
            self._note_mapping(vars(value), depth + 1)


def runs_users_code(module: nn.Module) -> bool:
    """Whether a backward through a module may run a user's code.

    That is a hook on the module, which may put another on a tensor, or what its class puts on one.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for hook in [hook for kind in kinds for hook in getattr(module, kind).values()]:
        while isinstance(hook, partial):
            hook = hook.func
        if _is_users_code(_function_of(hook)[1]):
            return True
    kind: Any = type(module)  # mypy takes a class of modules for nothing to be hashed
    of_its_own = vars(module).get("forward")  # in the place of its class's
    return _hooks_tensors(kind) or (of_its_own is not None and _puts_hook(_function_of(of_its_own)[1]))


@cache
def _hooks_tensors(kind: Any) -> bool:  # a class
    return any(_puts_hook(code) for base in kind.__mro__ for code in vars(base).values())


def _puts_hook(code: Any) -> bool:
    return _is_users_code(code) and "register_hook" in _names(code.__code__)


def _function_of(code: Any) -> tuple[Any, Any]:
    """The object whose method it is, or that is called itself, None of a function; and the function."""
    if isinstance(code, FunctionType):
        return None, code
    return getattr(code, "__self__", code), getattr(code, "__func__", type(code).__call__)


def _is_users_code(code: Any) -> bool:
    return isinstance(code, FunctionType) and _library(code.__module__) not in {*LIBRARIES, "grape_hf"}


def _put_back(attributes: dict[Any, Any], before: dict[Any, Any], names: Iterable[Any] | None = None) -> None:
    """Put values back, and take off what was not there; of these names alone, or of all."""
    for name in [name for name in (list(attributes) if names is None else names) if name not in before]:
        attributes.pop(name, None)
    for name, value in before.items():
        if name not in attributes or attributes[name] is not value:
            attributes[name] = value


def _is_users(value: Any) -> bool:
    """Whether it is an object with attributes, of a class that is no library's."""
    return isinstance(getattr(value, "__dict__", None), dict) and _library(type(value).__module__) not in LIBRARIES


def _library(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _names(code: CodeType) -> set[str]:
    """The names of attributes and global variables in a function, and in those inside it."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


def _remember(value: set[Any], members: set[Any]) -> None:
    value.clear()
    value.update(members)


def _refill(value: Any, items: list[Any]) -> None:
    if len(value) != len(items) or any(a is not b for a, b in zip(value, items, strict=True)):
        value.clear()
        value.extend(items)
