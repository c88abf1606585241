"""One forward of the whole model, before it is divided: what runs before the blocks, and which shapes leave them.

The forward is on a sample of two short texts or two images, in evaluation mode, on the CPU. It shows three things:
which modules run before the first block and which after the last; the shape of what each block returns; and all the
numbers on the way, by which each process checks afterwards that its stage computes the same (``split.differs``).
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grape_hf.core import nested
from grape_hf.core.block_lists import Chain, Unit, ends
from grape_hf.core.channels import Channels

INPUTS = ("input_ids", "pixel_values")
ROWS, POSITIONS = 2, 7  # of the sample; few models have 7 of anything else


@dataclass(frozen=True)
class Extent:
    """The size of a batch: its samples, and its positions if it is of tokens."""

    rows: int
    positions: int | None

    @classmethod
    def of(cls, batch: Mapping[str, Any], main_input: str) -> "Extent":
        """Return the size of a batch, by the model's main input."""
        found = batch[main_input]
        return cls(found.shape[0], found.shape[1] if main_input == "input_ids" else None)


@dataclass
class Seen:
    """What one forward of the whole model showed.

    Attributes:
        main_input: name of the model's main input, ``input_ids`` or ``pixel_values``.
        sample: the batch.
        before: outputs of the modules around the blocks that ran before the first of them, by name.
        after: names of those that ran after the last.
        h: what each block returned, the hidden states alone.
        returns: for each block how many items its output has, None where it is a tensor by itself.
        outputs: all tensors of the model's output.
        stem_parameters: parameters of the modules that hold the blocks, which the first block's input depends on.
        channels_first: whether three-dimensional activations have their channels behind the batch.
    """

    main_input: str
    sample: dict[str, Tensor]
    before: dict[str, Any] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    h: list[Tensor] = field(default_factory=list)
    returns: list[int | None] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    stem_parameters: set[str] = field(default_factory=set)
    channels_first: bool = False

    def scaled(self, shape: torch.Size, extent: Extent) -> tuple[int, ...]:
        """Return the shape that a tensor of ``shape`` has for a batch of another size.

        The first dimension is the samples where it is as long as they are in the sample. The second grows with the
        number of tokens.
        """
        sizes = list(shape)
        if sizes and sizes[0] == ROWS:
            sizes[0] = extent.rows
        if len(sizes) > 1 and extent.positions is not None and sizes[1] >= POSITIONS:
            sizes[1] += extent.positions - POSITIONS
        return tuple(sizes)


def look(model: nn.Module, blocks: Chain, autocast: AbstractContextManager[Any]) -> Seen:
    """Run the whole model once.

    Args:
        model: the model, on the CPU; it is as before afterwards.
        blocks: its blocks.
        autocast: what a forward of the training runs in.

    Raises:
        ValueError: if the model cannot be divided between its blocks: it takes neither tokens nor images, its blocks
            are no modules of their own or do not run once each in order, or something else with parameters runs
            between two of them.
    """
    main_input, sample = _sample(model)
    seen = Seen(main_input, sample)
    order: list[int] = []
    around = _around(model, blocks)
    channels = Channels(list(blocks.values())[1:])
    handles = []

    def at_around(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not order:
                seen.before[name] = output
            elif len(order) == len(blocks):
                seen.after.append(name)
            else:
                raise _refusal(model, f"{name} runs between {list(blocks)[order[-1]]} and the block after it")

        return hook

    def at_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not order:
            holders = _holders(model, blocks)
            own = {f"{n}.{p}".lstrip("."): v for n, m in holders.items() for p, v in m.named_parameters(recurse=False)}
            own = {name: value for name, value in own.items() if value.requires_grad}
            h = nested.get((args, kwargs), nested.first_floating((args, kwargs)) or ())
            if own and isinstance(h, Tensor) and h.requires_grad:
                used = torch.autograd.grad(h.sum(), list(own.values()), allow_unused=True, retain_graph=True)
                seen.stem_parameters |= {name for name, g in zip(own, used, strict=True) if g is not None}

    def at_block(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            order.append(index)
            is_sequence = isinstance(output, tuple | list)
            h = output[0] if is_sequence and len(output) else output
            if not isinstance(h, Tensor):
                raise _refusal(model, f"{list(blocks)[index]} returns a {type(output).__name__}")
            seen.h.append(h.detach())
            seen.returns.append(len(output) if is_sequence else None)

        return hook

    training = model.training
    try:
        handles += [m.register_forward_hook(at_around(name)) for name, m in around.items() if _weighs(m)]
        first = next(iter(blocks.values()))
        handles.append(first.register_forward_pre_hook(at_input, with_kwargs=True))
        handles += [b.register_forward_hook(at_block(i)) for i, b in enumerate(blocks.values())]
        model.eval()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), autocast, channels.watched():
            output = model(**sample)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if order != list(range(len(blocks))):
        raise _refusal(model, f"its blocks ran in the order {[i + 1 for i in order]}")
    if twice := set(seen.before) & set(seen.after):
        raise _refusal(model, f"{', '.join(sorted(twice))} runs before the blocks and after them")
    seen.channels_first, _ = channels.found({index: h.shape for index, h in enumerate(seen.h[:-1])})
    seen.outputs = [tensor.detach() for _, tensor in nested.tensors(output)]
    seen.before = {name: nested.map_tensors(made, Tensor.detach) for name, made in seen.before.items()}
    # What never ran (a pooler without a loss) stays with the head.
    seen.after = [name for name, module in around.items() if _weighs(module) and name not in seen.before]
    return seen


def _sample(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    takes = list(inspect.signature(model.forward).parameters)
    name = getattr(model, "main_input_name", None) or next((n for n in INPUTS if n in takes), takes[0])
    config = getattr(model, "config", None)
    if name == "input_ids":
        get_text_config = getattr(config, "get_text_config", None)
        text = get_text_config() if get_text_config else config
        vocabulary = getattr(text, "vocab_size", None) or min(
            (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2
        )
        ids = 1 + torch.arange(ROWS * POSITIONS).reshape(ROWS, POSITIONS) % max(vocabulary - 1, 1)
        return name, {"input_ids": ids}
    if name == "pixel_values":
        size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
        side = getattr(config, "image_size", None) or 224
        height, width = (side, side) if isinstance(side, int) else tuple(side)
        channels, height, width = size or (getattr(config, "num_channels", 3), height, width)
        channels = (getattr(config, "model_args", None) or {}).get("in_chans") or channels
        generator = torch.Generator().manual_seed(0)
        return name, {"pixel_values": torch.randn(ROWS, channels, height, width, generator=generator).to(_dtype(model))}
    raise _refusal(model, f"its main input is {name}, and not input_ids or pixel_values")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _holders(model: nn.Module, blocks: Chain) -> dict[str, nn.Module]:
    """The modules that have a block somewhere inside, by name; the model itself is the first."""
    paths = {name.rsplit(".", depth)[0] for name in blocks for depth in range(1, name.count(".") + 1)}
    return {name: module for name, module in model.named_modules() if not name or name in paths}


def _around(model: nn.Module, blocks: Chain) -> dict[str, nn.Module]:
    """The largest modules without a block inside, by name."""
    holders, own = _holders(model, blocks), set(blocks.values())
    if any(isinstance(block, Unit) for block in own):
        raise _refusal(model, "its blocks are parts of a plain stack, which no module holds together")
    found = {}
    for holder, module in holders.items():
        for name, child in module.named_children():
            path = f"{holder}.{name}".lstrip(".")
            if path not in holders and child not in own:
                found[path] = child
    assert all(ends(block)[0] is block for block in own)
    return found


def _weighs(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"pipeline_stages cannot divide {type(model).__name__}: {reason}. Expected a model of tokens or images whose "
        "blocks run once each, one on the output of the one before, with nothing that is trained between them. Name "
        "the blocks (`blocks`), or train with pipeline_stages=1."
    )
