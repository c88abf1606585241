r"""The Jacobian of a residual network's shortcut path alone, as a start for the feedback.

With every residual branch at zero, block l is its shortcut: the identity, a projection where sizes change, and what
comes after the sum. Then :math:`B_l = (dy/dh_l)^\top` of that network, averaged over samples (and positions). Where h_l
and y are of one size and nothing but the identity lies between them, that is the identity matrix.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.isolation import isolated

# Modules on the shortcut path, by the names that timm and transformers give them.
SHORTCUTS = ("downsample", "shortcut", "downsampling_layer")


def shortcut_feedback(
    model: nn.Module, boundaries: Boundaries, forward: Callable[[], object], names: Sequence[str]
) -> list[Tensor]:
    """Return B_1 .. B_{L-1}, each ``(n_l, n_y)``, of the shortcut path alone.

    Costs a forward and n_y backward passes without the residual branches, once.

    Args:
        model: the model; its weights are as before afterwards.
        boundaries: not attached to it at present.
        forward: runs the model on a sample or more, the more the better: the Jacobian is averaged over them.
        names: of the blocks, for the message.

    Raises:
        ValueError: if a block has no shortcut, so that nothing of its input arrives at y.
    """
    branches = [p for block in boundaries.blocks[1:] for p in _branch(block)]
    values = [p.detach().clone() for p in branches]
    h: list[Tensor] = []

    def keep(index: int, activation: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        h.append(activation.detach().requires_grad_() if index == 0 else activation)
        return h[-1].clone()

    try:
        with torch.no_grad():
            for p in branches:
                p.zero_()
        with isolated(model), torch.enable_grad(), boundaries.attached(), boundaries.perturb(keep) as passed:
            forward()
        assert passed.y is not None
        y = boundaries.layout.vectors(passed.y).sum((0, 1))  # (n_y,)
        rows: list[list[Tensor]] = [[] for _ in h]
        for k in range(len(y)):
            gradients = torch.autograd.grad(y[k], h, retain_graph=True, materialize_grads=True)
            for row, gradient in zip(rows, gradients, strict=True):
                row.append(boundaries.layout.vectors(gradient).mean((0, 1)))
    finally:
        with torch.no_grad():
            for p, value in zip(branches, values, strict=True):
                p.copy_(value)
    B = [torch.stack(row, dim=1).detach() for row in rows]
    for name, b in zip(names, B, strict=True):
        if not b.any():
            raise ValueError(
                f'feedback_init="identity" is the Jacobian of the shortcut path, and none leads from {name} to y: a '
                'block behind it has no shortcut. Use feedback_init="gaussian" or "zero".'
            )
    return B


def shortcuts_of(block: nn.Module) -> list[nn.Module]:
    """Return the modules on a block's shortcut connections, by the names that timm and transformers give them."""
    return [m for name, m in block.named_modules() if name.split(".")[-1] in SHORTCUTS]


def _branch(block: nn.Module) -> list[nn.Parameter]:
    """The parameters of a block that are not on its shortcut."""
    on_shortcut = {id(p) for m in shortcuts_of(block) for p in m.parameters()}
    return [p for p in block.parameters() if id(p) not in on_shortcut]
