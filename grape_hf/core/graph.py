"""Walks through autograd's graph, and whether it is being walked by a backward."""

import sys
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from grape_hf.core.nested import Path


def graph_of(*tensors: Tensor, ends: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Yield the nodes of autograd's graph behind tensors, each once; not what lies behind a node that ``ends`` it."""
    nodes: list[Any] = [t.grad_fn for t in tensors]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        yield node
        seen.add(node)
        if not ends(node):
            nodes.extend(parent for parent, _ in node.next_functions)


class Mark(torch.autograd.Function):
    """Identity, which a walk through the graph can tell from other nodes."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, mark: tuple[int, Path] | None) -> Tensor:
        """Return h."""
        ctx.mark = mark
        return h.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient on."""
        return grad, None


def is_mark(node: Any) -> bool:
    """Whether a node is a mark."""
    return getattr(node, "mark", None) is not None


def marks_of(tensors: Collection[Tensor]) -> set[tuple[int, Path]]:
    """Return the marks that ``tensors`` were made of, by way of no other mark."""
    found = graph_of(*tensors, ends=is_mark)
    return {mark for node in found if (mark := getattr(node, "mark", None)) is not None}


def parameters_of(tensors: Collection[Tensor], ends: Callable[[Any], bool] = lambda node: False) -> set[int]:
    """The ids of all parameters in the graph of ``tensors``, up to the nodes that ``ends`` it."""
    return {id(node.variable) for node in graph_of(*tensors, ends=ends) if getattr(node, "variable", None) is not None}


def in_backward() -> bool:
    """Whether this runs inside a backward: there, activation checkpointing runs modules once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether this runs in a forward of torch's reentrant activation checkpointing, which has no graph."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None
