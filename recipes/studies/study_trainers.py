r"""Trainers of the studies alone: laws of an update that no user would train with, to find out what is missing.

Each is chosen in a study's YAML by ``trainer: {<name>: <value>}`` among a method's options:

- ``late_stages: K``: backpropagation with the delay of a pipeline of K stages (``LateStages``);
- ``first_points: k``: feedback at h_1 .. h_k, the exact gradient above (``FirstPoints``);
- ``last_points: k``: feedback at h_k .. h_{L-1}, one chain below (``LastPoints``);
- ``exact_part: name``: exact weight gradients for one part of every block (``ExactPart``);
- ``measured_updates: cosine``: gradients of a block times their measured cosine (``MeasuredUpdates``);
- ``smaller_below: c``: gradients times c in the lower two thirds of the blocks (``SmallerBelow``);
- ``random_signs: true``: the exact gradient and the star's error, its sign drawn for each step (``RandomSigns``);
- ``map_kernel: 3``: maps of blocks as 3 x 3 convolutions (``MapKernel``).

They count on one backward for each optimiser step.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from wide_maps import WideMaps

from grape_hf import GrapeTrainer
from grape_hf.core.blocks import find_blocks
from grape_hf.pipeline.cuts import even_cuts


class StudyTrainer(GrapeTrainer):
    """A ``GrapeTrainer`` with one value of a study; refuses steps of several backwards."""

    def __init__(self, value: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.value = value
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError("the studies' trainers expect gradient_accumulation_steps=1.")

    @property
    def model_blocks(self) -> list[nn.Module]:
        """The model's blocks, f_1 .. f_L."""
        return list(find_blocks(self.model, self.args.blocks).values())

    def exact_gradients(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any, weights: Sequence[nn.Parameter]
    ) -> Sequence[Tensor]:
        """Return what backpropagation gives the weights, by a forward and a backward outside the star.

        A model with dropout would draw another mask there than in the step.
        """
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return torch.autograd.grad(loss, weights)


class LateStages(StudyTrainer):
    r"""Backpropagation over K stages none of which waits for a gradient: stage s = 0 .. K-1 takes one K-1-s steps old.

    .. math::
        g^t = \nabla L(\theta^t; \text{batch } t), \qquad
        \theta_s^{t+1} = U(\theta_s^t, g_s^{t-(K-1-s)})

    ``U`` is the optimiser's step. A late gradient was taken at the weights of its own step, all of them, as in a
    pipeline that never waits and keeps the weights that a batch went forward with. Until its first gradient arrives a
    stage stays as it is. Clipping sees the gradients that are used. Blocks are shared out evenly; the first stage has
    all that is in front of them: of a matrix that the head shares with the embeddings, the head's part of the gradient
    is in time, and the embeddings' part is late.
    """

    def __init__(self, value: int, **kwargs: Any) -> None:
        super().__init__(value, **kwargs)
        blocks = self.model_blocks
        cuts = even_cuts(len(blocks), value)
        delays = dict.fromkeys(_behind(self.model, blocks), 0)
        for stage, (start, end) in enumerate(pairwise(cuts)):
            delays |= {id(p): value - 1 - stage for block in blocks[start:end] for p in block.parameters()}
        head = {id(p) for p in self.model.get_output_embeddings().parameters()}
        delays |= dict.fromkeys(head, 0)
        late = [(p, delays.get(id(p), value - 1)) for p in self.model.parameters()]
        self._embeddings: nn.Embedding = self.model.get_input_embeddings()
        self._shared = id(self._embeddings.weight) in head
        if self._shared:
            # The look-up's share of the gradient lands in a leaf of its own, on the same numbers.
            self._looked_up = nn.Parameter(self._embeddings.weight.detach())
            self._embeddings.register_forward_hook(self._look_up)
            late.append((self._looked_up, value - 1))
        self._late = [(p, delay, deque[Tensor | None]()) for p, delay in late if delay]

    def _look_up(self, module: nn.Embedding, args: tuple[Tensor], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if self._looked_up.data_ptr() != module.weight.data_ptr():  # the model has moved to its device
            self._looked_up.data = module.weight.detach()
        return F.embedding(args[0], self._looked_up)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the stock step, and change the lower stages' gradients for earlier ones."""
        loss = super().training_step(*args, **kwargs)
        for weight, delay, held in self._late:
            held.append(weight.grad)
            weight.grad = held.popleft() if len(held) > delay else None
        if self._shared and self._looked_up.grad is not None:
            assert self._embeddings.weight.grad is not None
            self._embeddings.weight.grad += self._looked_up.grad
            self._looked_up.grad = None
        return loss


class FirstPoints(StudyTrainer):
    """Direct feedback at h_1 .. h_k alone: the blocks above h_k are one chain, with its exact gradient.

    So block k + 1 and those behind it get what backpropagation gives them, and h_1 .. h_k get B_l e. With k = L - 1 it
    is the star, with k = 0 backpropagation.
    """

    def _resume(self, run: Any) -> None:
        super()._resume(run)  # called when the run has started, before its first step
        run.drift.cuts = lambda index: index < self.value


class LastPoints(StudyTrainer):
    """Direct feedback at h_k .. h_{L-1} alone: the blocks up to k are one unit, which gets B_k e at its end."""

    def _resume(self, run: Any) -> None:
        super()._resume(run)
        run.drift.cuts = lambda index: index + 1 >= self.value


class ExactPart(StudyTrainer):
    """The star, but for the weights of one part of the model, which get the exact gradient of the same batch.

    Parts of every block: ``attention`` and ``mlp``, each with the norm in front of it;
    ``keys_values``, the rows of the attention's projection that make keys and values. Below the first feedback point:
    ``embeddings``, and ``block_1``. GPT-2's names.
    """

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        """Take the exact gradients, then the star's step, and put the first in the place of the second."""
        chosen = part_of(self.model, self.value)
        exact = self.exact_gradients(model, inputs, num_items_in_batch, [weight for weight, _ in chosen])
        loss = super().training_step(model, inputs, num_items_in_batch, **kwargs)
        for (weight, columns), gradient in zip(chosen, exact, strict=True):
            assert weight.grad is not None
            weight.grad[..., columns] = gradient[..., columns]
        return loss


class RandomSigns(StudyTrainer):
    r"""The exact gradient g' of each step, with the star's error as noise: of its size, and zero on the mean.

    .. math::
        g \leftarrow g' + s\, (g - g'), \qquad s = \pm 1 \text{ with equal chances, drawn for each step.}

    What this loses to backpropagation, the error's size alone has lost. What the star loses beyond it, it has lost by
    errors that are the same in every batch. The signs have a generator of their own.
    """

    def __init__(self, value: bool, **kwargs: Any) -> None:
        super().__init__(value, **kwargs)
        self._signs = torch.Generator().manual_seed(self.args.seed)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        """Take the star's step, and in half of all steps turn its error round, by exact gradients taken before."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        turned = bool(torch.randint(2, (), generator=self._signs))
        exact = self.exact_gradients(model, inputs, num_items_in_batch, weights) if turned else ()
        loss = super().training_step(model, inputs, num_items_in_batch, **kwargs)
        if turned:
            for weight, gradient in zip(weights, exact, strict=True):
                assert weight.grad is not None
                weight.grad.neg_().add_(gradient, alpha=2.0)
        return loss


class ScaledBlocks(StudyTrainer):
    """A ``GrapeTrainer`` that multiplies the gradients of each block's weights by a number of its own.

    What lies in front of the first block has that block's number. Weight decay, which the optimiser adds, is as ever.
    With SGD, momentum or not, it is a learning rate for each block.
    """

    def __init__(self, value: Any, **kwargs: Any) -> None:
        super().__init__(value, **kwargs)
        blocks = self.model_blocks
        in_blocks = {id(p) for block in blocks for p in block.parameters()} | _behind(self.model, blocks)
        self._weights = [list(block.parameters()) for block in blocks]
        self._weights[0] += [p for p in self.model.parameters() if id(p) not in in_blocks]

    def scales(self) -> list[Tensor | float]:
        """Return the number of each block from the first on; of those that are left out it is 1."""
        raise NotImplementedError

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the stock step, and scale what it leaves."""
        loss = super().training_step(*args, **kwargs)
        for weights, scale in zip(self._weights, self.scales(), strict=False):
            for weight in weights:
                if weight.grad is not None:
                    weight.grad.mul_(scale)
        return loss


class MeasuredUpdates(ScaledBlocks):
    r"""The star, with the gradient g of each block's weights made smaller where it has been measured to be wrong.

    .. math::
        g \leftarrow \max(0, c)\, g \quad (\text{``cosine``}), \qquad
        g \leftarrow \max(0, c)\, \frac{|g'|}{|g|}\, g \quad (\text{``projection``}),

    with g' the exact gradient, c = cos(g, g') and both figures a moving average (0.8 of the past) over measurements,
    one in ``alignment_steps`` optimiser steps. The second is what of g' lies along g: the best step in that direction.
    The last block, whose gradient is exact, is left as it is.
    """

    def __init__(self, value: str, **kwargs: Any) -> None:
        super().__init__(value, **kwargs)
        if value not in ("cosine", "projection") or not self.args.alignment_steps:
            raise ValueError(
                f"measured_updates={value!r} with alignment_steps={self.args.alignment_steps}: expected cosine or "
                "projection, and alignment_steps of 1 at least."
            )
        self._smoothed: list[Tensor | float] = []

    def scales(self) -> list[Tensor | float]:
        """Return what was measured, after a step with a measurement, which the first is, the newest included."""
        if self.state.global_step % self.args.alignment_steps == 0:
            assert self._run is not None
            found, number = self._run.metrics, len(self._weights) - 1
            cosines = [found[f"weight_gradient/cosine/h_{i}"] for i in range(1, number + 1)]
            values = [torch.as_tensor(c).nan_to_num(0.0).clamp(min=0.0) for c in cosines]
            if self.value == "projection":
                sizes = [torch.as_tensor(found[f"weight_gradient/size/h_{i}"]) for i in range(1, number + 1)]
                values = [torch.where(s > 0, v / s, 0.0) for v, s in zip(values, sizes, strict=True)]
            past = self._smoothed or values
            self._smoothed = [0.8 * a + 0.2 * b for a, b in zip(past, values, strict=True)]
        return self._smoothed


class SmallerBelow(ScaledBlocks):
    """The control of ``MeasuredUpdates``: the lower two thirds of the blocks have one factor, nothing is measured."""

    def scales(self) -> list[Tensor | float]:
        """Return the factor of each of the lower blocks."""
        return [float(self.value)] * (2 * len(self._weights) // 3)


class MapKernel(StudyTrainer):
    """Maps of blocks that see a square of positions (``wide_maps.py``); ``value`` is the number on a side."""

    def _resume(self, run: Any) -> None:
        super()._resume(run)
        run.maps = run.feedback.maps = WideMaps(run.maps, self.value)


TRAINERS: dict[str, type[StudyTrainer]] = {
    "late_stages": LateStages,
    "first_points": FirstPoints,
    "last_points": LastPoints,
    "exact_part": ExactPart,
    "measured_updates": MeasuredUpdates,
    "smaller_below": SmallerBelow,
    "random_signs": RandomSigns,
    "map_kernel": MapKernel,
}


def part_of(model: nn.Module, part: str) -> list[tuple[nn.Parameter, slice]]:
    """Return the weights of a part of a GPT-2, each with the outputs (its last dimension) that belong to it.

    Raises:
        ValueError: if there is no part of that name.
    """
    of_blocks = {"attention": ("ln_1", "attn"), "mlp": ("ln_2", "mlp"), "keys_values": ("attn.c_attn",)}
    below = {"embeddings": ("transformer.wte", "transformer.wpe"), "block_1": ("transformer.h.0",)}
    if part in below:
        modules = [model.get_submodule(name) for name in below[part]]
        return [(weight, slice(None)) for module in modules for weight in module.parameters()]
    if part not in of_blocks:
        raise ValueError(f"exact_part={part!r}: expected one of {', '.join([*of_blocks, *below])}.")
    chosen = []
    for block in find_blocks(model).values():
        for name in of_blocks[part]:
            for weight in block.get_submodule(name).parameters():
                # transformers' Conv1D is (inputs, outputs), and its outputs are queries, keys and values.
                first = weight.shape[-1] // 3 if part == "keys_values" else 0
                chosen.append((weight, slice(first, None)))
    return chosen


def _behind(model: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """The weights behind the last block (a norm, a head), as the modules are in order."""
    modules, last = list(model.modules()), list(blocks[-1].modules())[-1]
    return {id(p) for module in modules[modules.index(last) + 1 :] for p in module.parameters()}
