"""Where a model is cut: its feedback points, and the output that the error is measured at.

What the options leave open is decided here, by the model's modules at first and then by one look at a forward; what
does not suit the model is refused. Nothing here is remembered from step to step (``run.py``).
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from grape_hf.core.block_lists import ends
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries, OutputNotReachedError
from grape_hf.core.calls import Calls
from grape_hf.core.graph import parameters_of
from grape_hf.core.isolation import is_compiled
from grape_hf.core.layout import Layout
from grape_hf.core.parts import find_encoder, find_head
from grape_hf.core.shortcut import shortcuts_of
from grape_hf.engine.layers import settle_ends
from grape_hf.engine.probe import BatchNotFirstError, Probe, look
from grape_hf.engine.ranks import is_sharded
from grape_hf.presets import BASELINES
from grape_hf.training_args import GrapeArgumentsMixin, options_of, resolved

logger = logging.getLogger(__name__)


class FeedbackPoints:
    """The blocks at whose outputs errors arrive.

    Args:
        model: the model.
        options: GrAPE's options.

    Attributes:
        blocks: f_1 .. f_L; where there are fewer feedback points than blocks, the last block before each.
        names: their names, without the last one's, as the last has no feedback point.

    Raises:
        ValueError: if no blocks are found, or too few for ``feedback_points``, or no head where
            ``feedback_space="logits"``.
    """

    def __init__(self, model: nn.Module, options: GrapeArgumentsMixin) -> None:
        self.model, self.options = model, options
        found = find_blocks(model, options.blocks)
        encoder = find_encoder(model)
        self._encoder = set() if encoder is None else set(encoder.modules())
        named: dict[str, nn.Module] = {}
        for inside in (True, False):  # no unit between two points reaches from an encoder into its decoder
            stack = {name: block for name, block in found.items() if (block in self._encoder) is inside}
            named |= feedback_blocks(stack, options.feedback_points or 0)
        self.names, self.blocks = list(named)[:-1], list(named.values())
        self._all_names, self.chain = list(found), list(found.values())  # with those that share a feedback point
        self._readers = [self._reading(block) for block in self.blocks[:-1]]
        if options.feedback_space == "logits":
            find_head(model)

    def look(
        self,
        forward: Callable[[], object],
        whole: bool = False,
        calls: Calls | None = None,
        agreed: Callable[[bool], bool] = bool,
    ) -> tuple[str, Boundaries, Probe]:
        """Decide where the error is measured, and run the model through the boundaries that follow from it.

        Args:
            forward: runs the model on a sample or more.
            whole: as for ``Boundaries``.
            calls: as for ``Boundaries``.
            agreed: says whether something holds on all ranks.

        Raises:
            ValueError: if ``feedback_space="logits"`` and the model has no head, another head beside it, or one whose
                positions lie in another dimension; if sweeps correct the error at one output of the last block and
                the loss reads two.
            RuntimeError: if the blocks do not run once each, in order, each on the output of the one before.
        """
        space = self.options.feedback_space or "auto"
        layout = Layout(self.options.feedback_sharing or "auto")

        def boundaries(output: nn.Module | None) -> Boundaries:
            readers = [list(found) for found in self._readers]
            return Boundaries(self.blocks, output, layout, whole, self._pooled(output), readers, calls)

        try:
            head = find_head(self.model)
        except ValueError:
            if space == "logits":
                raise
            head = None
        layers = settle_ends(self.model, self.chain, forward)
        at_head, at_hidden = boundaries(head), boundaries(None)
        at_head.in_place = layers  # more parts of the next layer than its first may read what a layer makes
        seen = look(self.model, at_head, forward)
        if not whole:  # of shards the graph holds others than the model does
            self._say_untrained([seen.made[index] for index in range(len(self.names))])
        first, last = seen.channels
        # timm's way of saying that maps are (batch, H, W, C).
        last = last or any(str(getattr(m, "output_fmt", "")).endswith("NHWC") for m in self.model.modules())
        at_head.layout = at_hidden.layout = replace(layout, channels_first=first, channels_last=last)
        three = seen.logits is not None and seen.logits.ndim == 3
        turned = three and first != isinstance(head, nn.Conv1d)
        if turned and space == "logits":
            raise ValueError(
                f'feedback_space="logits" pairs what the {type(head).__name__} makes with what the blocks make: '
                "expected both to have their channels in one dimension, found (batch, positions, channels) of the one "
                'and (batch, channels, positions) of the other. Use feedback_space="hidden".'
            )
        scattered = seen.scattered(at_head.layout)
        if scattered and space == "logits":
            raise ValueError(
                f'feedback_space="logits" pairs positions: expected the {type(head).__name__} to make one vector for '
                f"each sample, or for each position of the last block's output, found {scattered}. Use "
                'feedback_space="hidden".'
            )
        try:
            logits = None if head is None or turned or space == "hidden" else seen.at(at_head, numbers=not whole)
        except (OutputNotReachedError, BatchNotFirstError):  # not every loss calls the head, and calls it once
            if space == "logits":
                raise
            logits = None
        if space == "logits":
            assert logits is not None
            self._refuse_beside(logits.beside)
            return "logits", at_head, logits
        if not agreed(logits is not None and not logits.beside):
            hidden = seen.at(at_hidden, numbers=not whole)
            self._judge_split(hidden.split)
            return "hidden", at_hidden, hidden
        assert logits is not None
        hidden = seen.at(at_hidden, numbers=not whole)
        split = hidden.split == "made last" or (hidden.split and self.options.feedback_sweeps)
        if not split and (scattered or hidden.n_y <= logits.n_y or (seen.tokens(at_head.layout) and not whole)):
            self._judge_split(hidden.split)
            return "hidden", at_hidden, hidden
        return "logits", at_head, logits

    def check(self, boundaries: Boundaries, step: int) -> None:
        """Raise RuntimeError if a block, or the module whose output is y, is no part of the model any more.

        In steps 0, 1, 2, 4, 8 and so on the backward sees once more whether the loss reads h_L beside y: a loss may
        have a term that begins later.
        """
        if step & (step - 1) == 0:
            boundaries.last_checked = False
        there = set(self.model.modules())
        for module in (*(part for block in self.chain for part in ends(block)), boundaries.output):
            if module not in there:
                raise RuntimeError(
                    f"a {type(module).__name__} was taken out of the model after the first step, and the errors are "
                    "measured or used at its output: expected the blocks and the head to stay the same modules. "
                    "Replace them before train(), or call train() again, which makes feedback for what is there."
                )

    def _say_untrained(self, h: list[Tensor]) -> None:
        """Warn if no error that arrives at a feedback point can reach a weight: nothing at or below h_l trains."""
        if h and parameters_of(h).isdisjoint(map(id, self.model.parameters())):
            logger.warning(
                f"GrAPE: nothing trains in {self.names[0]} to {self.names[-1]} nor below, and all the rest gets its "
                f'exact gradient: while that is so, method="{self.options.method}" is ordinary backpropagation here. '
                "If other blocks are meant, name them with the option `blocks`."
            )

    def _refuse_beside(self, beside: list[str]) -> None:
        """Refuse an error measured at a head beside which others read the last block's output."""
        certain = [what for what in beside if what == "the loss"]
        if certain:
            raise ValueError(
                'feedback_space="logits" measures the error at one head, and the loss reads the output of the last '
                "block beside it (several heads, distillation, a loss on hidden states): what comes from there would "
                'not reach the other blocks. Use feedback_space="hidden".'
            )
        if beside:
            logger.warning(
                f'GrAPE: feedback_space="logits" measures the error at one head, and {", ".join(beside)} may read the '
                "output of the last block beside it: what comes from there does not reach the other blocks. Use "
                'feedback_space="hidden" if a loss uses it.'
            )

    def _judge_split(self, split: str) -> None:
        """Refuse sweeps, or warn, where the loss reads two outputs of the last block and y is one of them."""
        if not split:
            return
        what, way = (
            "that the blocks hand on (hidden states and a residual)",
            'feedback_space="logits" if a head alone reads both',
        )
        if split == "made last":
            names = ",".join(self._all_names[:-1])
            what, way = "(an LSTM's output and its state)", f'blocks="{names}", which leaves the last block to the head'
        problem = f"the loss reads two outputs of the last block {what}, and the error is measured at one of them"
        if self.options.feedback_sweeps:
            raise ValueError(
                f"{problem}, so that sweeps do not lead to the gradients of backpropagation. Set {way}, or "
                "feedback_sweeps=0."
            )
        logger.warning(f"GrAPE: {problem}: what comes by the other reaches the last block alone. Set {way}.")

    @property
    def encoder_blocks(self) -> int | None:
        """How many blocks of the chain are an encoder's with a decoder behind it; None where there is no decoder."""
        if not self._encoder or self.chain[-1] in self._encoder:
            return None
        return sum(block in self._encoder for block in self.chain)

    def _reading(self, block: nn.Module) -> list[nn.Module]:
        """The blocks that read what ``block`` makes: the next, or all of a decoder below which it ends an encoder."""
        place = self.chain.index(block) + 1
        next_is_decoder = block in self._encoder and self.chain[place] not in self._encoder
        return self.chain[place:] if next_is_decoder else [self.chain[place]]

    def _pooled(self, output: nn.Module | None) -> set[int]:
        """The boundaries in an encoder, if y is not in it."""
        if (output or self.blocks[-1]) in self._encoder:
            return set()
        return {index for index, block in enumerate(self.blocks[:-1]) if block in self._encoder}


def options_for(model: nn.Module, args: Any) -> GrapeArgumentsMixin:
    """Return GrAPE's options with nothing left open: those not given have the values for this model.

    Args:
        model: the model, whose blocks say what ``grape_preset="auto"`` stands for, and how many feedback points of a
            preset there is room for.
        args: training arguments of any kind, or GrAPE's options; they stay as they are.

    Raises:
        ValueError: if no blocks are found, or options contradict each other.
    """
    options = options_of(args)
    # Of other methods the presets' values make no difference, and the model need not have blocks.
    if options.method in ("bp", *BASELINES):
        return resolved(options)
    blocks = list(find_blocks(model, options.blocks).values())
    shortcuts = any(map(shortcuts_of, blocks))
    found = resolved(options, are_convolutional(blocks), shortcuts, _graphs_can_be_used(model, args))
    if options.feedback_points is None and found.feedback_points:  # a preset's, for which there may be no room
        stages = options.pipeline_stages
        found.feedback_points = stages - 1 if stages > 1 else min(found.feedback_points, len(blocks) - 1)
    return found


def _graphs_can_be_used(model: nn.Module, args: Any) -> bool:
    """Whether a block's graph is there to be looked into before its backward, as paths and sweeps need it."""
    compiled = getattr(args, "torch_compile", False) or is_compiled(model)
    stages = getattr(args, "pipeline_stages", 1)
    sharded = is_sharded(model) or getattr(args, "fsdp", None) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return not (compiled or stages > 1 or sharded)


def are_convolutional(blocks: Iterable[nn.Module]) -> bool:
    """Return whether there are convolutions over maps or volumes in the blocks.

    Over maps of attention (Nystromformer) they have as many channels as there are heads, which no layer has as width.
    The first block may cut the image into patches (torchvision's Swin), whatever the others are.
    """
    found = list(blocks)
    in_patches = all(conv.kernel_size == conv.stride for block in found[:1] for conv in _convolutions(block))
    return any(map(_convolves, found[1:] if in_patches else found))


def _convolves(block: nn.Module) -> bool:
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    widths = {width for m in linear for width in (m.in_features, m.out_features)}
    return any(not widths or widths & {conv.in_channels, conv.out_channels} for conv in _convolutions(block))


def _convolutions(block: nn.Module) -> list[nn.Conv2d | nn.Conv3d]:
    return [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]


def feedback_blocks(blocks: dict[str, nn.Module], points: int) -> dict[str, nn.Module]:
    """Keep the blocks at whose outputs errors arrive, evenly spaced, and the last; all of them for ``points=0``.

    Raises:
        ValueError: if there are fewer blocks than that many points need.
    """
    total, items = len(blocks), list(blocks.items())
    if points == 0 or total <= 1:
        return blocks
    if points >= total:
        raise ValueError(
            f"feedback_points={points}: {items[0][0]} to {items[-1][0]} are {total} blocks, with room for a feedback "
            f"point between two of them: expected at most {total - 1}, or 0 for one after every block."
        )
    return dict(items[j * total // (points + 1) - 1] for j in range(1, points + 2))
