"""What the loss and the head read of the last block, as far as the first look shows (``look.py``)."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from grape_hf.core import nested
from grape_hf.core.graph import marks_of, parameters_of
from grape_hf.core.in_place import ADVICE
from grape_hf.engine.look import Watcher

Marks = set[tuple[int, nested.Path]]


def loss_of(output: Any) -> Tensor | None:
    """Return the loss that a model returned, if it did and the loss has a gradient."""
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        loss = output["loss"]
    else:
        loss = next((t for _, t in nested.tensors(output) if t.is_floating_point()), None)
        loss = loss if loss is not None and loss.ndim == 0 else None
    if loss is None or not loss.requires_grad:
        return None
    return loss.sum()


def scalar_of(seen: Watcher, positions: int) -> Tensor | None:
    """Return the loss, or what stands for it: the sum of what the model returned, if that has no positions."""
    if (loss := loss_of(seen.output)) is not None:
        return loss
    pooled = [t for t in _floating(seen) if t.ndim == 2 and t.shape[1] != positions]
    return pooled[0].sum() if pooled else None


def tells_loss(seen: Watcher) -> bool:
    """Say whether what the model returned is the loss, or what a classifier's will be made of."""
    return loss_of(seen.output) is not None or (seen.logits is not None and seen.logits.ndim == 2)


def settle_last(seen: Watcher) -> None:
    """Take for the last block's hidden states the one output that is read, where another came first."""
    last, read = len(seen.boundaries), _certain(seen)
    others = [path for path in _others(seen) if (last, path) in read]
    if read and (last, seen.parts[last]) not in read and len(others) == 1:
        seen.parts[last], seen.made[last] = others[0], seen.outputs[others[0]]


def split(seen: Watcher) -> Literal["", "handed on", "made last"]:
    """Say whether the loss reads two outputs of the last block that were made of what the blocks before have made.

    The other is one that blocks hand on (hidden states and a residual), or one that is read of the last block alone
    (an LSTM's state). What is read of all blocks is an auxiliary loss (a router's).
    """
    last, loss = len(seen.boundaries), loss_of(seen.output)
    read = marks_of(_floating(seen) if loss is None else [loss]) | seen.head_marks
    if any((last, path) in read for path in _handed_on(seen)):
        return "handed on"
    return "made last" if _made_last(seen, _certain(seen)) else ""


def refuse_read_elsewhere(seen: Watcher) -> None:
    """Raise RuntimeError if the loss, or what comes before the next block, reads a sum that is cut for all."""
    loss, last = loss_of(seen.output), len(seen.boundaries)
    read = marks_of(_floating(seen) if loss is None else [loss])
    others = sorted(k + 1 for k, path in read if k < last and path == seen.parts.get(k))
    if seen.sums.early or others:
        what = f"the loss reads h_{others[0]}" if others else "something reads such a sum before the next block does"
        raise RuntimeError(
            f"blocks read residual sums that are made outside of them, and {what}, which direct feedback would cut "
            f"off: expected the next block and the next sum alone to read it. {ADVICE}"
        )


def beside(seen: Watcher) -> list[str]:
    """Name what but the head reads the last block's output, or may in another batch."""
    last, loss, floating = len(seen.boundaries), loss_of(seen.output), _floating(seen)
    read = set() if loss is None else marks_of([loss])
    found = []
    if any((last, path) in read for path in (seen.parts[last], *_handed_on(seen), *_made_last(seen, read))):
        found.append("the loss")
    elif (last, seen.parts[last]) in marks_of(floating):
        found.append("an output of the model")
    used = parameters_of(floating)
    width = {seen.made[last].shape[-1], *seen.made[last].shape[1:2]}
    for name, module in seen.model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not weight.requires_grad or weight.ndim < 2 or id(weight) in used:
            continue
        inside = any(module is m for block in seen.boundaries.blocks for m in block.modules())
        if weight.shape[1] in width and not inside and not isinstance(module, nn.Embedding):
            found.append(f"{name}, which did not run in the first batch")
    return found


def _floating(seen: Watcher) -> list[Tensor]:
    return [t for _, t in nested.tensors(seen.output) if t.is_floating_point() and t.requires_grad]


def _certain(seen: Watcher) -> Marks:
    """What the head reads, and the loss if the model returned it."""
    loss = loss_of(seen.output)
    return seen.head_marks | (set() if loss is None else marks_of([loss]))


def _others(seen: Watcher) -> list[nested.Path]:
    """Where the last block returns something else that was made of the hidden states of blocks before it."""
    last, carried = len(seen.boundaries), seen.carried()
    return [path for path in seen.outputs if (last, path) in carried]


def _handed_on(seen: Watcher) -> set[nested.Path]:
    """Where blocks return something else that the next block reads, and that was made of the hidden states before."""
    return {
        path
        for (index, path), marks in seen.made_of.items()
        if index and path != seen.parts[index] and (index - 1, seen.parts[index - 1]) in marks
        if any((index - 1, path) in read for (i, _), read in seen.made_of.items() if i == index)
    }


def _made_last(seen: Watcher, read: Marks) -> list[nested.Path]:
    """Which other outputs are read of the last block, and of no block before it."""
    last = len(seen.boundaries)
    return [p for p in _others(seen) if (last, p) in read and not any((k, p) in read for k in range(last))]
