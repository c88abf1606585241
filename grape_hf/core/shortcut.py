r"""The Jacobian of a residual network's shortcut path alone, as a start for the feedback.

With every residual branch at zero, block l is its shortcut: the identity, a projection where sizes change, and what
comes after the sum. Then :math:`B_l = (dy/dh_l)^\top` of that network, averaged over samples and positions that are no
padding, and y at the positions that the loss reads. Where h_l and y are of one size and nothing but the identity lies
between them, that is the identity matrix. Batch norms on the way have the statistics of these samples, as constants.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.isolation import isolated
from grape_hf.core.padding import mean_length

# Modules on the shortcut path, by the names that timm and transformers give them.
SHORTCUTS = ("downsample", "shortcut", "downsampling_layer")


def shortcut_feedback(
    model: nn.Module,
    boundaries: Boundaries,
    forward: Callable[[], object],
    names: Sequence[str],
    chain: Sequence[nn.Module] | None = None,
) -> list[Tensor]:
    """Return B_1 .. B_{L-1}, each ``(n_l, n_y)``, of the shortcut path alone.

    Costs a forward and n_y backward passes without the residual branches, once.

    Args:
        model: the model; its weights are as before afterwards.
        boundaries: not attached to it at present.
        forward: runs the model on a sample or more, the more the better: the Jacobian is averaged over them.
        names: of the blocks, for the message.
        chain: all blocks, where there is not a boundary behind each.

    Raises:
        ValueError: if a block has no shortcut, so that nothing of its input arrives at y.
    """
    chain = boundaries.blocks if chain is None else chain
    first = next(boundaries.blocks[0].parameters())
    start = next(i for i, block in enumerate(chain, 1) if any(p is first for p in block.parameters()))
    branches = [p for block in chain[start:] for p in _branch(block)]
    values = [p.detach().clone() for p in branches]
    h: list[Tensor] = []

    def keep(index: int, activation: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        h.append(activation.detach().requires_grad_() if index == 0 else activation)
        return h[-1].clone()

    try:
        with torch.no_grad():
            for p in branches:
                p.zero_()
        with ExitStack() as stack:
            stack.enter_context(isolated(model))
            stack.enter_context(_constant_statistics(model, forward))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(boundaries.attached())
            passed = stack.enter_context(boundaries.perturb(keep))
            forward()
        assert passed.y is not None
        vectors = boundaries.layout.vectors
        pairings = [boundaries.pairing(index, activation) for index, activation in enumerate(h)]
        shapes = [vectors(activation).shape[:2] for activation in h]
        counts = [shape[0] * mean_length(p.padding, *shape) for p, shape in zip(pairings, shapes, strict=True)]
        y = vectors(passed.y)
        read = boundaries.read_of(passed.y, pairings[-1].padding)
        y = (y if read is None else y * read.to(y)[..., None]).sum((0, 1))  # (n_y,)
        rows: list[list[Tensor]] = [[] for _ in h]
        for k in range(len(y)):
            gradients = torch.autograd.grad(y[k], h, retain_graph=True, materialize_grads=True)
            for row, gradient, pairing, count in zip(rows, gradients, pairings, counts, strict=True):
                row.append(pairing.unpadded(vectors(gradient)).sum((0, 1)) / count)
    finally:
        with torch.no_grad():
            for p, value in zip(branches, values, strict=True):
                p.copy_(value)
    B = [torch.stack(row, dim=1).detach() for row in rows]
    for name, b in zip(names, B, strict=True):
        if not b.any():
            raise ValueError(
                f'feedback_init="identity" is the Jacobian of the shortcut path, and none leads from {name} to y: a '
                "block behind it has no shortcut, or one that begins behind a norm of its branch. Use "
                'feedback_init="gaussian" or "zero".'
            )
    return B


def shortcuts_of(block: nn.Module) -> list[nn.Module]:
    """Return the modules on a block's shortcut connections, by the names that timm and transformers give them."""
    return [m for name, m in block.named_modules() if name.split(".")[-1] in SHORTCUTS]


@contextmanager
def _constant_statistics(model: nn.Module, forward: Callable[[], object]) -> Iterator[None]:
    """Have batch norms use the statistics of this forward as constants; to be called inside ``isolated``.

    Through batch statistics the gradient of a sum over all samples and positions is zero.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    before = [norm.momentum for norm in norms]
    try:
        if norms:
            for norm in norms:
                norm.momentum = 1.0
            with torch.no_grad():
                forward()
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.training, norm.momentum = True, momentum


def _branch(block: nn.Module) -> list[nn.Parameter]:
    """The parameters of a block that are not on its shortcut."""
    on_shortcut = {id(p) for m in shortcuts_of(block) for p in m.parameters()}
    return [p for p in block.parameters() if id(p) not in on_shortcut]
