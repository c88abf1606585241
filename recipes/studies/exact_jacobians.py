r"""All of dy/dh_l of a tiny model on a batch, by autograd, a backward for each number of y.

``J`` is ``(R, S_y, n_y, B, S_l, n_l)``: how output k at position t of sample r depends on input n at position s of
sample b. Where samples do not see one another R is 1, and ``J[0, t, k, b]`` is about sample b's own output; a batch
norm couples them, and R is B.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.isolation import isolated
from grape_hf.core.jacobian import Noise


class ExactJacobians:
    """The Jacobians of a model at its weights and on one batch.

    Args:
        model: the model, which is left as it was.
        boundaries: attached to it.
        forward: runs it on the batch.
    """

    def __init__(self, model: nn.Module, boundaries: Boundaries, forward: Callable[[], object]) -> None:
        self.pooled, self.read_at = boundaries.pooled, None if boundaries.spread else boundaries.read_at
        vectors, seen = boundaries.layout.vectors, list[Tensor]()

        def keep(index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
            seen.append(h if h.requires_grad else h.requires_grad_())
            return h.clone()  # the next block may change it in place

        with isolated(model), torch.enable_grad(), boundaries.perturb(keep) as passed:
            forward()
        assert passed.y is not None
        y = vectors(passed.y)
        self.h, self.tokens = [vectors(h.detach()) for h in seen], [h.ndim == 3 for h in seen]
        self.coupled = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        rows: list[list[Tensor]] = [[] for _ in seen]
        for outputs in y if self.coupled else [y.sum(0)]:
            for output in outputs.flatten():
                gradients = torch.autograd.grad(output, seen, retain_graph=True, materialize_grads=True)
                for row, gradient in zip(rows, gradients, strict=True):
                    row.append(vectors(gradient))
        self.J = [torch.stack(row).unflatten(0, (-1, *y.shape[1:])) for row in rows]

    def feedback(self) -> list[Tensor]:
        """Return B_l, ``(n_l, n_y)``: the mean of J^T over samples and positions, the same position on both sides."""
        means = []
        for index, J in enumerate(self.J):
            own = torch.stack(
                [J[b if self.coupled else 0, :, :, b] for b in range(J.shape[3])]
            )  # (B, S_y, n_y, S_l, n_l)
            if self._same_positions(index, J):
                own = torch.stack([own[:, s, :, s] for s in range(J.shape[1])], dim=1)  # (B, S, n_y, n_l)
                means.append(own.mean((0, 1)).mT)
            else:
                means.append(self._read(own).mean((0, 1, 3)).mT)
        return means

    def estimate(self, noise: Noise) -> list[Tensor]:
        """Return what ``jacobian_terms`` must sum up to in a joint pass, ``(n_y, n_l)`` for each boundary."""
        p = [noise.vectors(index, h) for index, h in enumerate(self.h)]
        size = [
            h.square().mean(-1 if tokens else (1, 2), keepdim=True).sqrt()
            for h, tokens in zip(self.h, self.tokens, strict=True)
        ]
        product = "rtkbsn,bsn->rtk" if self.coupled else "rtkbsn,bsn->btk"
        parts = [torch.einsum(product, J, s * v) for J, s, v in zip(self.J, size, p, strict=True)]
        q = torch.stack(parts).sum(0)  # (B, S_y, n_y)
        sums = []
        for index, (J, s, v) in enumerate(zip(self.J, size, p, strict=True)):
            a = v / s
            if self._same_positions(index, J):
                sums.append(torch.einsum("btk,btn->kn", q, a))
            else:
                sums.append(torch.einsum("bk,bn->kn", self._read(q).mean(1), a.sum(1)))
        return sums

    def _read(self, of_y: Tensor) -> Tensor:
        """What the loss reads of y, ``(batch, positions, ...)``, where samples have no padding."""
        places = {"first": slice(0, 1), "last": slice(-1, None), None: slice(None)}
        return of_y[:, places[self.read_at]]

    def _same_positions(self, index: int, J: Tensor) -> bool:
        return J.shape[1] == J.shape[4] and index not in self.pooled and self.read_at is None
