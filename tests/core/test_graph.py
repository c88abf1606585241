"""Walks through autograd's graph, against graphs of a few nodes."""

import torch

from grape_hf.core.graph import Mark, graph_of, in_backward, marks_of, parameters_of


def test_marks_end_a_walk():
    x = torch.ones(2, requires_grad=True)
    a = Mark.apply(x * 2, (0, ()))
    b = Mark.apply(a + 1, (1, ()))
    assert marks_of([b * 3]) == {(1, ())}
    assert marks_of([b * a]) == {(0, ()), (1, ())}
    assert marks_of([x * 2, x.detach()]) == set()


def test_parameters_of_a_graph():
    x, w, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    found = parameters_of([x * 2, (x * w).sum()])
    assert found == {id(x), id(w)}
    assert id(unused) not in found


def test_all_nodes_once():
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    nodes = list(graph_of(y + y))
    assert len(nodes) == len(set(nodes)) == 3  # the sum, the product, the leaf's


def test_inside_a_backward():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(in_backward()))
    seen.append(in_backward())
    y.sum().backward()
    assert seen == [False, True]
