r"""The shortcut path of the very sample: a block's transposed Jacobian with its residual branches left out.

Of a block :math:`h_l = r(s(h_{l-1}) + f(h_{l-1}))` with branch f, shortcut s and what comes behind the sum, r, it is
:math:`S_l = J_s^\top J_r^\top` at this batch: the identity in a pre-norm Transformer, two layer norms in a post-norm
one, the mask of a ReLU and a transposed 1 x 1 convolution in a ResNet. It is cheap, exact, linear in the error, and
needs nothing learned.

The path is read off the graph that the forward has built. From the output of a block it leads backwards; at a sum (or
difference) it takes the side from which the input is nearer, and only what the sum itself sends there.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_SUMS = {"AddBackward": 1, "SubBackward": -1}  # by what the second of the two is multiplied, beside alpha


@dataclass
class Junction:
    """A sum on the path.

    Attributes:
        sum: the sum itself.
        shortcut: the side that the path takes.
        factor: what that side is multiplied by (``torch.add(x, y, alpha=...)``).
        direct: whether nothing lies between the sum and where the path was before.
    """

    sum: GradientEdge
    shortcut: GradientEdge
    factor: float
    direct: bool

    def passes(self, delta: Tensor) -> Tensor:
        """Return what the sum sends to the shortcut of its own gradient, as the shortcut's type and shape are."""
        side = self.shortcut.node._input_metadata[self.shortcut.output_nr]
        sent = (delta if self.factor == 1 else delta * self.factor).to(side.dtype)
        return sent if sent.shape == tuple(side.shape) else sent.sum_to_size(side.shape)


def pull_back(output: Tensor, cut: Tensor | GradientEdge, delta: Tensor) -> Tensor | None:
    """Return S_l delta, or None if no shortcut leads from ``cut`` to ``output``.

    Args:
        output: h_l with its graph, or y.
        cut: h_{l-1} as the block has read it, a part of that graph, or where it stands there.
        delta: in the shape of ``output``.
    """
    start = get_gradient_edge(output)
    end = get_gradient_edge(cut) if isinstance(cut, Tensor) else cut
    junctions = find_junctions(start, end)
    if not junctions:
        return None
    where: Tensor | GradientEdge = output
    for junction in junctions:
        if not junction.direct:
            delta = _gradient(where, junction.sum, delta)
        delta, where = junction.passes(delta), junction.shortcut
    if junctions[-1].shortcut.node is not end.node:
        delta = _gradient(where, end, delta)
    return delta.to(end.node._input_metadata[end.output_nr].dtype)


def has_path(output: Tensor, below: Tensor) -> bool:
    """Whether a shortcut leads from ``below`` to ``output``, which depends on it; True where nothing is trained."""
    if not output.requires_grad or not below.requires_grad:
        return True
    return bool(find_junctions(get_gradient_edge(output), get_gradient_edge(below)))


def find_junctions(start: GradientEdge, end: GradientEdge) -> list[Junction]:
    """Return the sums on the shortcut path from ``start`` down to ``end``, in that order; none if there is no path."""
    distance = _distances(start.node, end.node)
    junctions: list[Junction] = []
    node, direct = start.node, True
    while node is not end.node:
        edges = [edge for edge in _next(node) if edge.node in distance]
        if len(edges) == 1:
            node, direct = edges[0].node, False
            continue
        sign = next((s for name, s in _SUMS.items() if node.name().startswith(name)), None)
        if len(edges) != 2 or sign is None:
            return []
        shortcut, branch = sorted(edges, key=lambda edge: distance[edge.node])
        if distance[shortcut.node] == distance[branch.node]:
            return []
        factor = 1 if shortcut is edges[0] else sign * node._saved_alpha  # type: ignore[attr-defined]  # of such nodes
        junctions.append(Junction(GradientEdge(node, 0), shortcut, factor, direct))
        node, direct = shortcut.node, True
    return junctions


def _gradient(output: Tensor | GradientEdge, at: Tensor | GradientEdge, delta: Tensor) -> Tensor:
    if isinstance(output, Tensor):
        delta = delta.to(output.dtype)
    (gradient,) = torch.autograd.grad(output, at, delta, retain_graph=True)
    return gradient


def _next(node: Node) -> list[GradientEdge]:
    """Return where a node sends gradients, but for the stand-ins that tell a star's order: they lead to all blocks."""
    edges = [GradientEdge(after, number) for after, number in node.next_functions if after is not None]
    return [edge for edge in edges if edge.node.name() != "ReceiveBackward"]


def _distances(start: Node, end: Node) -> dict[Node, float]:
    """Return how far ``end`` is from each node below ``start`` that leads there, counted in nodes."""
    distance: dict[Node, float] = {end: 0}
    stack: list[tuple[Node, bool]] = [(start, False)]
    seen: set[Any] = set()
    while stack:
        node, ready = stack.pop()
        if ready:
            nearest = min((distance.get(edge.node, math.inf) for edge in _next(node)), default=math.inf)
            if nearest < math.inf:
                distance[node] = nearest + 1
        elif node not in seen and node is not end:
            seen.add(node)
            stack.append((node, True))
            stack.extend((edge.node, False) for edge in _next(node))
    return distance
