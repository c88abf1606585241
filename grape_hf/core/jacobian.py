r"""Estimate the Jacobians J_l = dy/dh_l from forward-mode tangents: rank one a sample and position, averaged.

At each boundary a random tangent :math:`v_l = s_l p_l`, ``p ~ N(0, I)``, is injected and the tangent ``q`` of y comes
out at the top; then

.. math:: \hat J_l = \frac{1}{N} \sum_i q_i a_{l,i}^\top, \qquad a_l = v_l / s_l^2, \qquad E[\hat J_l] = J_l.

``s_l`` is the root mean square of the h_l it is added to: of each token, so that no position drowns the others, and of
each sample's map. A sample whose h_l is zero has no say.
In a joint pass all boundaries are perturbed at once: the cross terms have mean zero, and one pass serves every l.
Shapes: ``q`` is ``(batch, positions, n_y)``, ``v_l`` and ``a_l`` are ``(batch, positions, n_l)``, sums of
``(n_y, n_l)``. The passes run under ``no_grad``; what they must not disturb is ``isolation.py``'s business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_map

from grape_hf.core import nested
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.layout import SAME, Layout, Pairing
from grape_hf.core.tangents import HALF, RUNNERS, STEP, ForwardModeError, JvpMode

Space = Literal["activation", "weight"]

_COPY = 2**40  # a place further on than any sample's: of a sample's second vector


@dataclass(frozen=True)
class Noise:
    """Standard normal draws that depend on nothing but (seed, step, place of the sample, boundary).

    So an estimate does not change with how a batch is split over micro-batches or ranks, and a resumed run needs no
    state of a generator.

    Args:
        seed: the run's seed.
        step: the optimiser step.
        places: for each sample of the batch at hand, its place in the global batch.
    """

    seed: int
    step: int
    places: Sequence[int]

    def vectors(self, index: int, like: Tensor) -> Tensor:
        """Draw p_l, shaped like ``like``, ``(batch, positions, n_l)``, one generator for each sample."""
        places: Sequence[int] = self.places
        if len(places) != len(like):  # the model makes several vectors of a sample (choices), or of all together
            each, rest = divmod(len(like), max(len(places), 1))
            first = next(iter(places), 0)
            places = (
                [p + _COPY * j for p in places for j in range(each)] if not rest else range(first, first + len(like))
            )
        draws = [self._draw(like[0].shape, like, index, place) for place in places]
        return torch.stack(draws)

    def weights(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """Draw p_W for every parameter of the block that ends at boundary ``index``, one for all samples."""
        named = list(block.named_parameters())
        return {name: self._draw(p.shape, p, index, 2**31 + i) for i, (name, p) in enumerate(named)}

    def _draw(self, shape: torch.Size, like: Tensor, index: int, place: int) -> Tensor:
        if like.is_meta:  # shapes alone (inspection.py): there is no generator
            return torch.empty(shape, device=like.device, dtype=like.dtype)
        key = np.random.SeedSequence((self.seed, self.step, place, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(like.device).manual_seed(int(key >> 1))
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


@dataclass
class JacobianSum:
    """Sums of rank-one terms over samples, positions, micro-batches and ranks; ``mean()`` is J_hat_1 .. J_hat_{L-1}.

    Attributes:
        sums: for each boundary, ``(n_y, n_l)``.
        counts: for each boundary, the number N of vectors summed.
        tangents: for each boundary, the number of different q in them: fewer than N where y has one position. N by
            default.
    """

    sums: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    tangents: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tangents = self.tangents or list(self.counts)

    def add(self, more: "JacobianSum") -> None:
        """Add the terms of one more micro-batch."""
        for mine, others in ((self.sums, more.sums), (self.counts, more.counts), (self.tangents, more.tangents)):
            mine[:] = [a + b for a, b in zip(mine, others, strict=True)] if mine else others

    def total(self, over_ranks: Callable[[list[Tensor]], list[Tensor]]) -> "JacobianSum":
        """Return the sum over ranks, by a function that sums each of the tensors in a list."""
        n, totals = len(self.sums), over_ranks([*self.sums, *self.counts, *self.tangents])
        return JacobianSum(totals[:n], totals[n : 2 * n], totals[2 * n :])

    def mean(self) -> list[Tensor]:
        """Return the estimates, ``(n_y, n_l)`` each; zero where nothing was summed (a batch of padding only)."""
        return [s / n.clamp(min=1) for s, n in zip(self.sums, self.counts, strict=True)]


def rank_one_sum(q: Tensor, a: Tensor, pairing: Pairing = SAME) -> Tensor:
    r"""Sum the rank-one terms :math:`q_i a_i^\top` over samples and positions.

    The sum is taken in float32 at least: in bf16 a long sum loses its small terms. Where y has other positions than
    h_l, the term is mean_t(q_t) a_s^T for every position s.

    Args:
        q: tangent of y, ``(batch, positions, n_y)``, in units of y.
        a: ``(batch, positions, n_l)``, in inverse units of h_l; for ``p ~ N(0, I)`` injected as it is, ``a = p``.
        pairing: how the positions of the two go together.

    Returns:
        ``(n_y, n_l)``, in units of y per unit of h_l.

    Raises:
        ValueError: if q and a are of different batches.

    Source: GrAPE (ICLR 2026), rank-1 Jacobian estimate.
    """
    if q.shape[0] != a.shape[0]:
        raise ValueError(
            f"q and a must be of the same samples, got {tuple(q.shape)} and {tuple(a.shape)}. If a block folds "
            "positions into the batch, choose blocks that do not."
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, a = pairing.at_top(q.to(dtype), a.to(dtype))
    if q.shape[1] != a.shape[1] or pairing.pooled:
        a = a.sum(1, keepdim=True)
    return (a.flatten(0, 1).mT @ q.flatten(0, 1)).mT  # laid out in memory like B_l, which it is compared with


@torch.no_grad()
def jacobian_terms(
    boundaries: Boundaries,
    forward: Callable[[], object],
    noise: Noise,
    *,
    mode: JvpMode = "dual",
    passes: Literal["joint", "per_block"] = "joint",
    spaces: Sequence[Space] | None = None,
    B: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    targets: Tensor | None = None,
) -> JacobianSum:
    r"""Compute the sums of rank-one terms of every boundary on one micro-batch, and the number of terms in each.

    With ``B``, the terms of the control-variate estimate (lms): the tangent that B predicts is taken away first,
    :math:`r = q - \sum_k B_k^\top v_k`, so that the mean of the terms is J_l - B_l^T, with a noise that shrinks as B
    gets near J.

    In weight space ``v_l`` is the tangent that a random perturbation of the weights of the block in front of the
    boundary causes at h_l, :math:`u = (dh_l/dW) p_W`, scaled; then :math:`E[\hat J_l] = J_l E[u u^\top]`, a
    direction rather than the Jacobian.

    Args:
        boundaries: attached to the model.
        forward: runs the model once on the micro-batch; it is cut short as soon as y is reached.
        noise: the draws for this micro-batch's samples.
        mode: ``dual`` numbers, or ``finite_difference`` of a perturbed and a clean forward.
        passes: ``joint``, one for all boundaries, or ``per_block``, one for each: less noise, L - 1 times the cost.
        spaces: for each boundary, where the perturbation is drawn; activation space by default.
        B: feedback matrices ``(n_l, n_y)`` for the control variate.
        mask: ``(batch, positions)``, nonzero where a position is not padding; the others have no say. Not heeded where
            the model sees another batch (chosen and rejected texts in one).
        targets: the same of the targets, for a decoder below which there is an encoder, and for any model if there is
            no ``mask``.

    Raises:
        ForwardModeError: in dual mode, if an operator has no forward-mode rule or the tangent got lost on the way.
        ValueError: in finite differences, if the activations are in half precision.
    """
    run = RUNNERS[mode](boundaries, forward)
    spaces = spaces or ["activation"] * len(boundaries)
    layout = boundaries.layout
    terms = JacobianSum()
    groups = [list(range(len(boundaries)))] if passes == "joint" else [[i] for i in range(len(boundaries))]
    for group in groups:
        injected: dict[int, _Injected] = {}

        def inject(
            index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict, rounded: bool = False
        ) -> Tensor | None:
            if index not in group:  # noqa: B023  both are of the pass under way
                return None
            if spaces[index] == "weight":
                with boundaries.off():
                    p = noise.weights(index, block)
                    part = boundaries.parts.get(index)
                    v, a = _weight_tangent(h, block, args, kwargs, p, mode, layout, rounded, part)
            else:
                v, a = activation_tangent(h, noise, index, layout)
            pairing = boundaries.pairing(index, h, mask)
            if pairing.padding is None and index not in boundaries.pooled:
                pairing = pairing.padded(targets)
            v, a = pairing.unpadded(v), pairing.unpadded(a)
            injected[index] = _Injected(v, a, pairing)  # noqa: B023
            return layout.restore(v, h.shape)

        y_tangent = run(inject)
        q = layout.vectors(y_tangent)
        if B is not None:
            q = q.to(torch.promote_types(q.dtype, torch.float32))
            for index, t in injected.items():
                q = q - t.pairing.align(t.v.to(q), q.shape[1]) @ B[index].to(q)
        for index in group:
            if (found := injected.get(index)) is None:  # the block that reads h_l was left out
                assert boundaries.sizes is not None, "known where a run has begun"
                terms.sums.append(q.new_zeros(boundaries.sizes[index], q.shape[-1]).mT)
                terms.counts.append(torch.zeros((), dtype=torch.int64, device=q.device))
                terms.tangents.append(terms.counts[-1])
                continue
            t, pairing = found, found.pairing
            if pairing.pooled:
                read = boundaries.read_of(y_tangent, None if index in boundaries.pooled else pairing.padding)
                pairing = replace(pairing, read=targets if read is None else read)
            at_top, a = pairing.at_top(q.to(t.a.device), t.a)
            terms.sums.append(rank_one_sum(at_top, a, replace(pairing, read=None)))
            terms.counts.append(a.any(-1).count_nonzero())  # neither padding nor h_l = 0
            same = q.shape[1] == a.shape[1] and not pairing.pooled
            terms.tangents.append(terms.counts[-1] if same else a.new_full((), len(q), dtype=torch.int64))
    return terms


@dataclass
class _Injected:
    v: Tensor  # what was added at h_l, (batch, positions, n_l), in units of h_l
    a: Tensor  # v / s^2, what q is multiplied with
    pairing: Pairing


def activation_tangent(h: Tensor, noise: Noise, index: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return v = s p and a = v / s^2 of one boundary, ``(batch, positions, n_l)``; see above."""
    tokens, h = h.ndim == 3, layout.vectors(h)
    p = noise.vectors(index, h)
    s = _rms(h, dim=(-1,) if tokens else (1, 2))
    return s * p, torch.where(s > 0, p / s, 0.0)


def _weight_tangent(
    h: Tensor,
    block: nn.Module,
    args: tuple,
    kwargs: dict,
    p: dict[str, Tensor],
    mode: JvpMode,
    layout: Layout,
    rounded: bool,
    part: nested.Path | None,
) -> tuple[Tensor, Tensor]:
    """Return u = (dh/dW) p_W, scaled by c to the size of h, and u / c. The block's inputs are held fixed."""
    weights: dict[str, Tensor] = dict(block.named_parameters())
    if mode == "dual":
        args, kwargs = tree_map(_primal, (args, kwargs))
        weights = {name: forward_ad.make_dual(w, p[name]) for name, w in weights.items()}
        u = forward_ad.unpack_dual(_hidden(functional_call(block, weights, args, kwargs), part)).tangent
        if u is None:
            raise ForwardModeError(f"{type(block).__name__} dropped the tangent of its weights.")
    else:
        size = torch.stack([w.square().sum() for w in weights.values()]).sum() / sum(
            w.numel() for w in weights.values()
        )
        eps = STEP[h.dtype] * size.sqrt()
        perturbed = {name: w + eps * p[name] for name, w in weights.items()}
        if rounded:  # block 1 ran under autocast, before the hook at its output left it
            args, kwargs = tree_map(lambda t: _float(t, h.dtype), (args, kwargs))
            h = _hidden(functional_call(block, weights, args, kwargs), part)
        u = (_hidden(functional_call(block, perturbed, args, kwargs), part) - h) / eps
    u = layout.vectors(u)
    c = _rms(layout.vectors(h), dim=(1, 2)) / _rms(u, dim=(1, 2)).clamp(min=torch.finfo(u.dtype).tiny)
    return c * u, torch.where(c > 0, u / c, 0.0)


def _rms(h: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Root mean square over ``dim``, which is kept."""
    return h.square().mean(dim, keepdim=True).sqrt()


def _primal(value: Any) -> Any:
    return forward_ad.unpack_dual(value).primal if isinstance(value, Tensor) else value


def _float(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in HALF else value


def _hidden(output: Any, path: nested.Path | None) -> Tensor:
    path = nested.first_floating(output) if path is None else path
    assert path is not None
    return nested.get(output, path)
