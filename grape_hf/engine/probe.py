"""Run a model once, to see what cannot be known from its modules: shapes, and how blocks and heads are chained.

Direct feedback needs blocks that run once each, in order, each on the output of the one before. A model that does
otherwise is refused here, before anything is trained. What is seen by the way: where each block finds h_l among its
arguments, what is changed in place, whether anything but the head reads the last block's output, where along the
positions the loss reads it, and what the masks that the model is called with say.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from grape_hf.core import nested
from grape_hf.core.block_lists import Layer
from grape_hf.core.boundaries import Boundaries, OutputNotReachedError
from grape_hf.core.isolation import isolated
from grape_hf.core.padding import mean_length
from grape_hf.core.paths import has_path
from grape_hf.engine import reading
from grape_hf.engine.look import Watcher
from grape_hf.engine.rows import gradients, is_folded, is_turned, read_position, reads_row, sends_nothing

logger = logging.getLogger(__name__)


class BatchNotFirstError(RuntimeError):
    """Blocks and head have the batch in different dimensions."""


@dataclass(frozen=True)
class Probe:
    """What was seen at the boundaries.

    Attributes:
        h: a vector of each h_l, ``(1, 1, n_l)``.
        n_y: how long a vector of y is.
        positions: how many positions h_1 has that are no padding, in the mean over samples.
        beside: what but the head may read the output of the last block: empty if nothing does.
        changed: names of the parameters that a forward changes.
        apart: boundaries at which h_l is not the output of a module: something lies between a block and the next, or
            the model puts the block's parts together.
        lengths: how many positions each h_l has, with those that are padding.
        split: what else of the last block the loss reads than y; see ``reading.split``.
        pathless: boundaries that no shortcut connection leads down to from the next, or from y.
    """

    h: list[Tensor]
    n_y: int
    positions: float = 1
    beside: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    pathless: list[int] = field(default_factory=list)
    split: str = ""

    @property
    def sizes(self) -> list[int]:
        """Count the numbers in each B_l."""
        return [h.shape[-1] * self.n_y for h in self.h]


def probe(model: nn.Module, boundaries: Boundaries, forward: Callable[[], object], numbers: bool = True) -> Probe:
    """Run ``forward`` on the side, note in ``boundaries`` what it needs to know, and return shapes.

    Args:
        model: the model.
        boundaries: not attached to it at present.
        forward: runs the model on a sample or more, and returns what the model does.
        numbers: whether a gradient may be taken, to see where the loss reads (not of shards, nor of shapes alone).

    Raises:
        OutputNotReachedError: if the forward ended, or failed, behind the blocks and before y.
        BatchNotFirstError: if the batch is in another dimension of h_l than of y.
        RuntimeError: if the blocks do not run once each, in order, each on the output of the one before, up to y.
    """
    return look(model, boundaries, forward).at(boundaries, numbers)


def look(model: nn.Module, boundaries: Boundaries, forward: Callable[[], object]) -> "Look":
    """Run ``forward`` on the side, once; twice where blocks are left out of it at random.

    What was seen then says for several boundaries with the same blocks what ``probe`` says.
    """
    try:
        seen = _look(model, boundaries, forward, deterministic=False)
    except ValueError:  # a batch norm has no batch statistics of one sample
        seen = None
    deterministic = False
    if seen is None or seen.order != list(range(len(boundaries.blocks))):
        deterministic = True  # other than in training no block is left out (LayerDrop)
        seen = _look(model, boundaries, forward, deterministic)
    if seen.sums.found:
        boundaries.in_place = True
        seen = _look(model, boundaries, forward, deterministic)
    if boundaries.in_place:
        reading.refuse_read_elsewhere(seen)
    seen.check_order()
    reading.settle_last(seen)
    seen.labels = [t for name, t in getattr(forward, "kwargs", {}).items() if "label" in name and isinstance(t, Tensor)]
    return seen


class Look(Watcher):
    """What was seen in the first forward with gradients, and what follows from it."""

    _gradients: list[Tensor | None] | None = None

    def at(self, boundaries: Boundaries, numbers: bool = True) -> Probe:
        """Note in ``boundaries`` what it needs to know, and return shapes; see ``probe``."""
        y = self.hidden_y if boundaries.hidden else self.logits
        self._check_output(boundaries, y)
        assert y is not None
        h = [self.read.get(index, self.made[index]) for index in range(len(boundaries))]
        last, logits, blocks = self.made[len(boundaries)], self.logits, boundaries.blocks
        odd = logits is not None and any(t.ndim > 3 and len(t) != len(logits) for t in h)
        if logits is not None and odd and not is_folded(self.model, last, logits):
            raise RuntimeError(
                "expected the batch as the first dimension of every block's output, as it is at y "
                f"({len(logits)}), found {sorted({len(t) for t in h})}. Blocks that stack several streams of "
                "activations cannot get direct feedback: name others with the option `blocks`."
            )
        if h and (any(len(t) != len(y) for t in h) or (not boundaries.hidden and is_turned(self.model, h[-1], y))):
            way = 'use feedback_space="hidden"; else name others' if not boundaries.hidden else "name those alone"
            raise BatchNotFirstError(
                f"expected the batch as the first dimension of every block's output, as it is at y ({len(y)}), found "
                f"{sorted({len(t) for t in h})}. Where blocks have the batch elsewhere (batch_first=False) or fold "
                f"positions into it, {way} with the option `blocks`."
            )
        boundaries.copied, boundaries.parts, boundaries.places = self.copied, dict(self.parts), dict(self.places)
        boundaries.repeated = dict(self.repeated)
        boundaries.around, boundaries.in_place = self.around, self.boundaries.in_place
        boundaries.end = self.sums.end if boundaries.hidden else None
        for index, readers in enumerate(boundaries.readers):
            if readers and index not in self.places:  # no one place where h_l is read: it is cut where it is made
                self._say_several(index, readers[0])
                boundaries.readers[index] = []
        vectors = boundaries.layout.vectors
        lengths = [vectors(t.detach()).shape[1] for t in h]
        if numbers and h and not y.is_meta:
            self._by_gradients(boundaries, h)
        if boundaries.calls is not None and h:
            boundaries.calls.masks.say_unmatched(boundaries.blocks[0], boundaries.layout.tokens(h[0]))
        return Probe(
            h=[vectors(t.detach())[:1, :1] for t in h],
            n_y=vectors(y.detach()).shape[-1],
            positions=mean_length(boundaries.pairing(0, h[0]).padding, len(h[0]), lengths[0]) if h else 1,
            beside=[] if boundaries.hidden else reading.beside(self),
            changed=self.changed,
            apart=[i for i, h in self.read.items() if h is not self.made[i] or isinstance(blocks[i], Layer)],
            lengths=lengths,
            pathless=[index for index, below in enumerate(h) if not has_path([*h[1:], y][index], below)],
            split=reading.split(self) if boundaries.hidden else "",
        )

    def _check_output(self, boundaries: Boundaries, y: Tensor | None) -> None:
        name = type(boundaries.output).__name__
        if y is None:
            ending = f"ended before y, the output of the {name}, was computed"
            if self.error is not None:
                ending = f"failed before y, the output of the {name}: {self.error!r}"
            elif self.again:
                ending = (
                    f"ran through the blocks again before y, the output of the {name}: expected them to run once each"
                )
            raise OutputNotReachedError(
                f"the forward {ending}. trl and fused kernels compute the loss without calling the head: use "
                'feedback_space="hidden".'
            ) from self.error
        if self.heads > 1 and not boundaries.hidden:
            raise OutputNotReachedError(
                f"the {name} whose output is y ran {self.heads} times in one forward. Use "
                'feedback_space="hidden", where y is the output of the last block.'
            )
        if not boundaries.hidden:
            self._check(len(boundaries.blocks), self.head_marks)

    def _say_several(self, index: int, reader: nn.Module) -> None:
        if index in self._said:
            return
        self._said.add(index)
        logger.warning(
            f"GrAPE: block {index + 2} ({type(reader).__name__}) reads the output of block {index + 1} as several "
            "tensors, so it is cut where it is made: if the loss reads it too (auxiliary heads, hidden states), block "
            f"{index + 1} gets nothing from that."
        )

    def _by_gradients(self, boundaries: Boundaries, h: list[Tensor]) -> None:
        """Learn what the masks say, and where the loss reads y if that is one position alone."""
        positions = boundaries.layout.vectors(h[0].detach()).shape[1]
        if self._gradients is None:  # taken once, as the graph is let go
            self._gradients = self._take_gradients([h[0], self.hidden_y, self.logits], positions)
        at_h, at_hidden, at_logits = self._gradients
        at_y = at_hidden if boundaries.hidden else at_logits
        if at_h is not None and boundaries.calls is not None and at_h.ndim == 3:
            boundaries.calls.masks.learn(boundaries.blocks[0], boundaries.layout.tokens(at_h).ne(0).any(-1))
        pooled = self.logits is not None and self.logits.ndim == 2
        of_tokens = not pooled and any(t.ndim > 1 and positions in t.shape[1:] for t in self.labels)
        told = reading.tells_loss(self) and not of_tokens  # else the first error tells
        boundaries.read_at = read_position(boundaries.layout.vectors(at_y)) if told and at_y is not None else None
        if not told or at_y is None or boundaries.read_at is not None:
            return
        if pooled and self.logits is not None and reads_row(at_y, len(self.logits), boundaries.layout):
            boundaries.layout, boundaries.mixed = replace(boundaries.layout, turned=True), set(range(len(boundaries)))
        else:
            pairs = {i: (self.made[i], read) for i, read in self.read.items() if i not in boundaries.pooled}
            boundaries.mixed = {
                i for i, pair in pairs.items() if sends_nothing(self.model, *pair, at_y, boundaries.layout)
            }

    def _take_gradients(self, at: list[Tensor | None], positions: int) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(at)
        if (scalar := reading.scalar_of(self, positions)) is None:
            return found
        there = {i: t for i, t in enumerate(at) if t is not None}
        try:
            apart = any(read is not self.made[index] for index, read in self.read.items())
            taken = gradients(self.model, scalar, list(there.values()), keep=apart)
        except RuntimeError as error:  # whoever trains this model will be told in the step itself
            logger.info(f"GrAPE: no gradient could be taken at the first look: {error}")
            return found
        for i, gradient in zip(there, taken, strict=True):
            found[i] = gradient
        return found

    def check_order(self) -> None:
        """Raise RuntimeError if the blocks are no chain."""
        total = len(self.boundaries.blocks)
        if not self.order and self.error is None:
            raise RuntimeError(self.unseen())
        if self.order != list(range(total)):
            if self.error is not None:
                raise self.error
            hint = " Those under `no_grad` are not seen: freeze them instead (`requires_grad_(False)`)."
            raise RuntimeError(
                f"expected blocks 1 to {total} to run once each and in order, saw them run in the order "
                f"{[index + 1 for index in self.order]}.{hint if self.idle else ''} Direct feedback needs a chain of "
                "blocks: name others, or these in order, with the option `blocks`. With several forwards for a head "
                'use feedback_space="hidden".'
            )
        for index in range(1, total):
            self._check(index, self.inputs[index])
        self.say_apart()

    def _check(self, index: int, marks: set[tuple[int, nested.Path]]) -> None:
        used = sorted(k for k, path in marks if self.parts[k] == path)
        # Every block of a decoder also works on the encoder's output, which is cut as well.
        encoder = max(self.boundaries.pooled, default=index)
        allowed = {index - 1, encoder} if index > encoder else {index - 1}
        head = index == len(self.boundaries.blocks)
        if head or index == len(self.boundaries):  # y may work on others as well
            allowed.update(used)
        made_of = index - 1 in used or (index - 1 == encoder and not used)
        if not made_of or not allowed.issuperset(used):
            names = ", ".join(f"h_{i + 1}" for i in used) or "none of them"
            what = "the output y, of the head," if head else f"block {index + 1} ({self._kind(index)})"
            # An auxiliary head may have the name of one that makes the logits.
            raise (OutputNotReachedError if head else RuntimeError)(
                f"{what} was expected to work on h_{index}, the output of block {index}, and on no other block's; it "
                f"works on {names}. Direct feedback needs a chain of blocks: name others with the option `blocks`, a "
                f"whole group of blocks that share their inputs as one{'' if used else ', or those behind a `detach`'}."
            )

    def _kind(self, index: int) -> str:
        return type(self.boundaries.blocks[index]).__name__


def _look(model: nn.Module, boundaries: Boundaries, forward: Callable[[], object], deterministic: bool) -> Look:
    seen = Look(model, boundaries)
    with ExitStack() as stack:
        trace = stack.enter_context(isolated(model, deterministic, saved="all"))
        if deterministic:
            model.eval()  # batch norms too: they have no batch statistics of one sample
        stack.enter_context(torch.enable_grad())
        stack.enter_context(seen.attached())
        try:
            seen.output = forward()
        except Exception as error:
            if len(seen.order) < len(boundaries.blocks):
                raise
            # Behind the blocks a loss that never calls the head went wrong.
            seen.error = error
    seen.changed = trace.changed
    return seen
