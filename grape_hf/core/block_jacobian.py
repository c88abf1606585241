r"""Estimate each block's own Jacobian from tangents that end at the next boundary.

In one pass block l gets a random tangent v at its input, and q is the tangent at its output. There it is taken off, and
the next block gets one of its own:

.. math:: \hat J_l = \frac{1}{N} \sum_i q_i a_i^\top, \qquad E[\hat J_l] = \frac{\partial h_l}{\partial h_{l-1}},

without the noise of the other boundaries. With maps G (``block_maps.py``) the terms are those of what they did not
predict, :math:`(q - G^\top v) a^\top`. See ``jacobian.py`` for v, a and the rest.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.jacobian import JacobianSum, Noise, activation_tangent, rank_one_sum
from grape_hf.core.layout import SAME, Pairing
from grape_hf.core.tangents import RUNNERS, JvpMode


@torch.no_grad()
def block_jacobian_terms(
    boundaries: Boundaries,
    forward: Callable[[], object],
    noise: Noise,
    maps: BlockMaps,
    *,
    mode: JvpMode = "dual",
    residual: bool = True,
    mask: Tensor | None = None,
    targets: Tensor | None = None,
) -> JacobianSum:
    """Compute the sums of rank-one terms of every block behind a boundary, on one micro-batch.

    Args:
        boundaries: attached to the model.
        forward: runs the model once on the micro-batch.
        noise: the draws for this micro-batch's samples.
        maps: the blocks' maps; each but the last comes from the next boundary.
        mode: as for ``jacobian_terms``.
        residual: take away what the maps predict.
        mask: as for ``jacobian_terms``, like the next.
        targets: nonzero where a target is not padding.

    Returns:
        Sums shaped ``(n of the source, n_l)``.

    Raises:
        ForwardModeError: in dual mode, if an operator has no forward-mode rule.
        ValueError: in finite differences, if the activations are in half precision.
    """
    layout, last = boundaries.layout, len(boundaries) - 1
    injected: dict[int, tuple[Tensor, Tensor, Pairing]] = {}
    terms = JacobianSum([torch.zeros_like(g.mT) for g in maps.G], [_count(g) for g in maps.G])

    def arrive(index: int, tangent: Tensor) -> None:
        """Take in the tangent at boundary ``index``, or at y, of what was injected before it."""
        if index - 1 not in injected:  # the first, or the block between was left out
            return
        v, a, pairing = injected.pop(index - 1)
        q = layout.vectors(tangent)
        if index <= last and not maps.fits(index - 1, v.shape[1], q.shape[1]):
            return
        if residual:
            q = q.to(torch.promote_types(q.dtype, torch.float32))
            aligned = pairing.align(v.to(q), q.shape[1]) if index > last else v.to(q)
            q = q - aligned @ maps.G[index - 1].to(q)
        pair = pairing if index > last else SAME
        if pair.pooled:
            read = boundaries.read_of(tangent, pair.padding)
            pair = replace(pair, read=targets if read is None else read)
        at_top, a = pair.at_top(q.to(a.device), a)
        terms.sums[index - 1] = rank_one_sum(at_top, a, replace(pair, read=None)).to(terms.sums[index - 1])
        terms.counts[index - 1] = a.any(-1).count_nonzero()
        same = q.shape[1] == a.shape[1] and not pair.pooled
        terms.tangents[index - 1] = terms.counts[index - 1] if same else a.new_full((), len(q), dtype=torch.int64)

    def inject(index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict, rounded: bool = False) -> Tensor:
        v, a = activation_tangent(h, noise, index, layout)
        pairing = boundaries.pairing(index, h, mask)
        if pairing.padding is None:
            pairing = pairing.padded(targets)
        v, a = pairing.unpadded(v), pairing.unpadded(a)
        injected[index] = v, a, pairing
        return layout.restore(v, h.shape)

    arrive(last + 1, RUNNERS[mode](boundaries, forward)(inject, arrive))
    return terms


def _count(g: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=g.device)
