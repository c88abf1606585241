r"""The feedback matrices B_1 .. B_{L-1}: how they start, how they are learned, how they are kept.

``B_l``, ``(n_l, n_y)``, stands for the transposed Jacobian J_l^T, so that delta_l = B_l e. Three rules refine it from
an estimate ``J_hat``, ``(n_y, n_l)``: ``cosine`` (the paper), ``ema`` and ``lms``; ``refit`` fits it to exact deltas.
The matrices are plain tensors, no parameters of the model: its optimiser, gradient clipping, wrappers and saved
weights never meet them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grape_hf.core.block_maps import BlockMaps, MapSums
from grape_hf.core.finite import FiniteGuard
from grape_hf.core.jacobian import JacobianSum
from grape_hf.core.refit import refit

FeedbackInit = Literal["identity", "gaussian", "zero"]
FeedbackRule = Literal["lms", "cosine", "ema", "local"]


def initial_feedback(
    init: FeedbackInit, n_l: int, n_y: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the first B_l, ``(n_l, n_y)``, on the CPU.

    ``identity``: the skip path's own Jacobian, where h_l and y are of one size. ``gaussian``: entries from
    N(0, 1/n_l), so that columns have unit length in the mean (DFA). ``zero``: no feedback before the first estimate.

    Raises:
        ValueError: if ``init="identity"`` and n_l != n_y.
    """
    if init == "identity":
        if n_l != n_y:
            raise ValueError(
                f'feedback_init="identity" needs h_l and y of one size, got n_l = {n_l} and n_y = {n_y}. Use '
                'feedback_init="gaussian" or "zero", or measure the error elsewhere (feedback_space).'
            )
        return torch.eye(n_l, dtype=dtype)
    if init == "zero":
        return torch.zeros(n_l, n_y, dtype=dtype)
    return torch.randn(n_l, n_y, generator=generator, dtype=dtype) / n_l**0.5


def is_identity(B: Tensor) -> bool:
    """Whether a matrix is the identity."""
    return B.shape[0] == B.shape[1] and torch.equal(B, torch.eye(len(B), dtype=B.dtype, device=B.device))


def normalize_columns(B: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale each column of ``B`` to unit length: B[:,k] / (|B[:,k]| + eps)."""
    return B / (torch.linalg.vector_norm(B, dim=0, keepdim=True) + eps)


def refine_cosine(B: Tensor, J_hat: Tensor, lr: float, eps: float = 1e-8) -> Tensor:
    r"""Take one gradient step on the alignment loss, column by column.

    .. math:: L(B_l) = \sum_k \left(1 - \cos(B_l[:,k], \hat J_l^\top[:,k])\right)

    The loss is the sum over columns, so ``lr`` is a rate per column: a mean would divide the step by n_y. The gradient
    is 1 / |B_l[:,k]| long, without bound at zero, where it has no direction: a column shorter than ``lr`` is taken to
    be as long as that, by which no step is longer than one, and a column of zeros becomes J_hat's with unit length.

    Args:
        B: ``(n_l, n_y)``.
        J_hat: ``(n_y, n_l)``; a zero row leaves its column as it is.
        lr: eta_B.
        eps: keeps the division by a length defined.

    Source: GrAPE (ICLR 2026), local cosine alignment loss.
    """
    T = J_hat.mT
    B_length, T_length = (torch.linalg.vector_norm(t, dim=0, keepdim=True) + eps for t in (B, T))
    cosine = torch.linalg.vecdot(B, T, dim=0) / (B_length * T_length)
    bounded = B_length.clamp(min=lr)
    # B + lr / bounded (T / |T| - cosine B / |B|), in as few passes over the matrices as can be
    return torch.addcmul(B * (1 - lr * cosine / (B_length * bounded)), T, lr / (bounded * T_length))


def refine_ema(B: Tensor, J_hat: Tensor, lr: float | Tensor) -> Tensor:
    """Move B towards the estimate: (1 - lr) B + lr J_hat^T. B then estimates the mean Jacobian, magnitude included.

    Source: Bacho & Chu 2022 (FDFA).
    """
    return torch.lerp(B, J_hat.mT, lr)


def refine_lms(B: Tensor, residual: Tensor, lr: float | Tensor) -> Tensor:
    r"""Learn from what B did not predict: B + lr * mean(a_l r^T), r = q - sum_k B_k^T v_k.

    Args:
        B: ``(n_l, n_y)``.
        residual: mean of r a^T, ``(n_y, n_l)``: ``jacobian_terms`` with ``B``.
        lr: eta, already divided by ``max(1, sum_l n_l / N)`` (``Feedback.refine``).
    """
    return B + lr * residual.mT


class Feedback:
    """The feedback matrices of a model.

    Args:
        B: the matrices, B_1 .. B_{L-1}, each ``(n_l, n_y)``.
        rule: how ``refine`` learns.
        lr: eta_B; per column for ``cosine``.
        normalize: bring columns to unit length after each refinement, and at the start.
        guard: keeps NaN and Inf out, and counts; one that never raises by default.
        maps: the maps of blocks whose product the matrices are (``local``); none by default.

    Attributes:
        B: the matrices, replaced by each refinement.
    """

    def __init__(
        self,
        B: Sequence[Tensor],
        rule: FeedbackRule = "lms",
        lr: float = 0.02,
        normalize: bool = False,
        guard: FiniteGuard | None = None,
        maps: BlockMaps | None = None,
    ) -> None:
        self.B = [normalize_columns(b) for b in B] if normalize else list(B)
        if normalize and maps is not None:
            maps.G = [normalize_columns(g) for g in maps.G]
        self.rule, self.lr, self.normalize = rule, lr, normalize
        self.guard, self.maps = guard or FiniteGuard(), maps
        self._began: list[Tensor] | None = None  # what was learned when the step began, if it has been refined since

    def begin(self, again: bool = False) -> None:
        """Begin an optimiser step, or go on with one that seemed to have ended: what it has refined is taken back.

        Its sums go on growing, and refine what it began with when it ends once more.
        """
        if again and self._began is not None:
            self.put(self._began)
        self._began = None

    def refine(self, estimate: JacobianSum) -> None:
        """Learn from the sums of one optimiser step; for ``lms`` they must be those of the residual (``B`` given)."""
        means, matrices = estimate.mean(), self.learned
        if self.rule == "lms":
            # A joint pass predicts q from sum_l n_l numbers: a full step needs at least as many samples of it. The
            # tangent of a block's own Jacobian comes from its own n_l alone.
            width = sum(b.shape[0] for b in matrices)
            widths = [width if self.maps is None else b.shape[0] for b in matrices]
            rates = [self.lr / (w / n).clamp(min=1) for w, n in zip(widths, estimate.tangents, strict=True)]
            refined = [refine_lms(*args) for args in zip(matrices, means, rates, strict=True)]
        elif self.rule == "ema":
            rates = [self.lr * (n > 0).to(b) for b, n in zip(matrices, estimate.counts, strict=True)]  # none of nothing
            refined = [refine_ema(b, j.to(b), rate) for b, j, rate in zip(matrices, means, rates, strict=True)]
        else:
            refined = [refine_cosine(b, j.to(b), self.lr) for b, j in zip(matrices, means, strict=True)]
        self.take(refined)

    @property
    def learned(self) -> list[Tensor]:
        """What rules refine: the matrices B_l, or the maps of blocks whose products they are."""
        return self.B if self.maps is None else self.maps.G

    def refine_maps(self, sums: Sequence[MapSums]) -> None:
        """Learn the maps from the sums of one optimiser step, and make the matrices anew."""
        assert self.maps is not None
        self.take(self.maps.refined(sums, self.lr))

    @property
    def is_identity(self) -> bool:
        """Whether every matrix is the identity."""
        return all(map(is_identity, self.B))

    def jacobians(self, estimate: JacobianSum) -> list[Tensor]:
        """Return J_hat_l, ``(n_y, n_l)``: the means, plus what B predicted where the sums are of the residual."""
        means = estimate.mean()
        return [b.mT + m for b, m in zip(self.learned, means, strict=True)] if self.rule == "lms" else means

    def refit(self, moments: Sequence[tuple[Tensor, Tensor]], ridge: float = 0.1) -> None:
        """Fit every B_l to exact deltas (``refit``, ``refit_moments``)."""
        self.take([refit(b, ee.to(b), ed.to(b), ridge) for b, (ee, ed) in zip(self.B, moments, strict=True)])

    def take(self, refined: list[Tensor]) -> None:
        """Replace what was learned, unless a number in the new is NaN or Inf (``FiniteGuard``)."""
        self._began = self.learned if self._began is None else self._began
        taken = self.guard.admit(self.learned, [normalize_columns(b) for b in refined] if self.normalize else refined)
        self.put(taken)

    def put(self, learned: list[Tensor]) -> None:
        """Put others in the place of what was learned."""
        if self.maps is None:
            self.B = learned
        else:
            self.maps.G = learned
            self.B = self.maps.product()

    def tensors(self) -> dict[str, Tensor]:
        """Return the matrices and the maps by the names that they have in a file: ``B_1`` ..., ``G_1`` ..."""
        matrices = {f"B_{i}": b for i, b in enumerate(self.B, 1)}
        # The highest B_l is its map itself, and a file holds no tensor twice.
        maps = [] if self.maps is None else self.maps.G
        return matrices | {f"G_{i}": g.clone() for i, g in enumerate(maps, 1)}

    def save(self, path: Path, blocks: Sequence[str], tensors: dict[str, Tensor] | None = None) -> None:
        """Write the matrices to a safetensors file, with the names of the blocks that they end at.

        Args:
            path: the file.
            blocks: the names.
            tensors: what ``tensors`` returned earlier; what it returns now by default.
        """
        found = self.tensors() if tensors is None else tensors
        on_cpu = {name: t.contiguous().cpu() for name, t in found.items()}
        metadata = {"format": "pt", "blocks": json.dumps(list(blocks))}
        if self.maps is not None:
            metadata["sources"] = json.dumps(self.maps.sources)
        save_file(on_cpu, path, metadata=metadata)

    def load(self, path: Path, blocks: Sequence[str]) -> None:
        """Read the matrices back, and where maps come from: the first batch of this process may show it otherwise.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is of other blocks or sizes, or not readable.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"no feedback matrices at {path}: the checkpoint is of a stock Trainer, or incomplete. Resume from one "
                "that GrapeTrainer wrote, or start B_l afresh: load the model from there and call train() without "
                "resume_from_checkpoint."
            )
        try:
            with safe_open(path, "pt") as file:
                saved = json.loads(file.metadata()["blocks"])
                sources = json.loads(file.metadata().get("sources", "null"))  # an older file does not tell
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except Exception as error:
            raise ValueError(f"cannot read the feedback matrices in {path}: {error}") from error
        mine = self.tensors()
        if self.maps is not None and "G_1" not in tensors:
            raise ValueError(
                f"{path} holds matrices B_l without the maps of blocks whose product they are for "
                'feedback_rule="local": expected G_1 to '
                f"G_{len(self.B)}. Resume with the feedback_rule of the run that wrote it."
            )
        # By name: a file lists its tensors in alphabetical order, B_10 before B_2.
        shapes = {name: tuple(t.shape) for name, t in tensors.items() if name in mine or name.startswith("B_")}
        expected = {name: tuple(t.shape) for name, t in mine.items()}
        if self.maps is not None and sources is not None and saved == list(blocks):
            for i, (b, source) in enumerate(zip(self.B, sources, strict=True), 1):
                expected[f"G_{i}"] = len(b), b.shape[1] if source is None else len(self.B[source])
        if saved != list(blocks) or shapes != expected:
            raise ValueError(
                f"{path} is of another model or grouping: expected matrices {expected} at {list(blocks)}, found "
                f"{shapes} at {saved}. Resume with the model and options (blocks, feedback_points, feedback_space) "
                "of the run that wrote it."
            )
        # Copied: a tensor in the file's buffer lies anywhere, and the last digits of a product depend on where.
        self.B = [torch.empty_like(b).copy_(tensors[f"B_{i}"]) for i, b in enumerate(self.B, 1)]
        if self.maps is not None:
            pairs = [(g, tensors[f"G_{i}"]) for i, g in enumerate(self.maps.G, 1)]
            self.maps.G = [g.new_empty(read.shape).copy_(read) for g, read in pairs]
            self.maps.sources = sources or self.maps.sources
