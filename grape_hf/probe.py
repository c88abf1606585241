"""Run a sample through a model once, to see what cannot be known from its modules: shapes, and how blocks are chained.

Direct feedback needs blocks that run once each, in order, each on the output of the one before. A model that does
otherwise is refused here, before anything is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grape_hf.boundaries import Boundaries, OutputNotReachedError
from grape_hf.isolation import isolated
from grape_hf.modes import OutputReached, graph_of


@dataclass(frozen=True)
class Probe:
    """What was seen at the boundaries.

    Attributes:
        h: a vector of each h_l, ``(1, 1, n_l)``.
        n_y: how long a vector of y is.
    """

    h: list[Tensor]
    n_y: int

    @property
    def sizes(self) -> list[int]:
        """Count the numbers in each B_l."""
        return [h.shape[-1] * self.n_y for h in self.h]


def probe(model: nn.Module, boundaries: Boundaries, forward: Callable[[], object]) -> Probe:
    """Run ``forward`` on the side, look at its shapes, and note in ``boundaries.copied`` what is changed in place.

    Args:
        model: the model.
        boundaries: not attached to it at present.
        forward: runs the model on a sample or more.

    Raises:
        OutputNotReachedError: if the forward ended, or failed, behind the blocks and before y.
        RuntimeError: if the blocks do not run once each, in order, each on the output of the one before, up to y, or
            if their activations do not begin with the batch.
    """
    order: list[int] = []
    vectors: list[Tensor] = []
    batches: set[int] = set()
    # Of each boundary: a leaf that marks it in the graph, and what block l+1 got.
    passed_on: list[tuple[Tensor, Tensor]] = []

    def look(index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        if len(order) == index and passed_on and h.requires_grad:
            _check_chain(boundaries, index, h, [leaf for leaf, _ in passed_on])
        batches.add(len(h))
        order.append(index)
        vectors.append(boundaries.layout.vectors(h.detach())[:1, :1])
        leaf = h.detach().requires_grad_()
        passed_on.append((leaf, leaf.clone()))  # a leaf may not be changed in place, and says nothing of it
        return passed_on[-1][1]

    try:
        with isolated(model), torch.enable_grad(), boundaries.attached(), boundaries.perturb(look) as seen:
            model.eval()  # a batch norm has no batch statistics of one sample
            try:
                forward()
            except OutputReached:
                raise
            except Exception as error:
                if len(order) < len(boundaries):
                    raise
                # Behind the blocks a loss that never calls the head went wrong: that of preferences, on one sample.
                raise OutputNotReachedError(
                    f"the forward failed before y, the output of the {type(boundaries.output).__name__}: {error!r}"
                ) from error
    except OutputNotReachedError:
        if order == list(range(len(boundaries))):
            raise  # else what is wrong is the order
    if order != list(range(len(boundaries))):
        raise RuntimeError(
            f"expected blocks 1 to {len(boundaries)} to run once each and in order, saw them run in the order "
            f"{[index + 1 for index in order]}. Direct feedback needs a chain of blocks: name others with the option "
            '`blocks`. With several forwards for one head use feedback_space="hidden".'
        )
    assert seen.y is not None
    if batches != {len(seen.y)}:
        raise RuntimeError(
            f"expected the batch as the first dimension of every block's output, as it is at y ({len(seen.y)}), found "
            f"{sorted(batches)}. Blocks that stack several streams of activations, or fold positions into the batch, "
            "cannot get direct feedback: name others with the option `blocks`."
        )
    if seen.y.requires_grad and passed_on:
        _check_chain(boundaries, len(boundaries), seen.y, [leaf for leaf, _ in passed_on])
    boundaries.copied = {index for index, (_, given) in enumerate(passed_on) if given._version > 0}
    return Probe(vectors, boundaries.layout.vectors(seen.y).shape[-1])


def _check_chain(boundaries: Boundaries, index: int, h: Tensor, leaves: list[Tensor]) -> None:
    used = [i for i, leaf in enumerate(leaves) if _reaches(h, leaf)]
    # Every block of a decoder also works on the encoder's output, which is cut as well.
    encoder = max(boundaries.pooled, default=index)
    allowed = {index - 1, encoder} if index > encoder else {index - 1}
    if index == len(boundaries):  # y: what else it works on is in its Jacobian
        allowed.update(used)
    if index - 1 not in used or not allowed.issuperset(used):
        names = ", ".join(f"h_{i + 1}" for i in used) or "none of them"
        block = type(boundaries.blocks[index]).__name__
        what = f"block {index + 1} ({block})" if index < len(boundaries) else f"the output y, of {block} or the head,"
        raise RuntimeError(
            f"{what} was expected to work on h_{index}, the output of block {index}, and on no other block's; it works "
            f"on {names}. Direct feedback needs a chain of blocks: name others with the option `blocks`, a whole group "
            "of blocks that share their inputs as one."
        )


def _reaches(h: Tensor, leaf: Tensor) -> bool:
    """Whether ``leaf`` is in the graph of ``h``."""
    return any(getattr(node, "variable", None) is leaf for node in graph_of(h))
