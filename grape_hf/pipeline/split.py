"""Keep one stage of a model; the rest of it leaves this process's memory.

The model stays one model: ``model(**micro_batch)`` runs its own code for masks, positions and rotary tables. A block of
another stage becomes an ``Elsewhere``, which costs nothing. Where the next stage begins, the forward ends by an
exception that carries the hidden states. Where this stage begins, the hidden states that were received take the place
of those that the embeddings would have made. Names in the state dict stay as they were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from grape_hf.core import nested
from grape_hf.core.block_lists import Chain
from grape_hf.pipeline.look import Extent, Seen


class StageEndError(Exception):
    """Ends a forward where the next stage begins; ``h`` are the hidden states."""

    def __init__(self, h: Tensor) -> None:
        super().__init__("the forward of a stage ends here; its Trainer catches this")
        self.h = h


class Elsewhere(nn.Module):
    """Stands for a module that another stage holds; its attributes can be read as before, its weights have no numbers.

    Args:
        module: what it stands for; loses its parameters.
        kept: parameters that stay, since a module of this stage shares them (tied weights), by their place in memory.
    """

    def __init__(self, module: nn.Module, kept: frozenset[int] = frozenset()) -> None:
        super().__init__()
        for name, child in list(module.named_children()):
            if any(id(p) in kept for p in child.parameters()):
                self.add_module(name, Elsewhere(child, kept))
        for name, parameter in module._parameters.items():
            if id(parameter) in kept:
                self.register_parameter(name, parameter)
        self._there = [_without_numbers(module)]  # in a list, by which it is no child

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of what this stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_there":
                raise
            return getattr(self._there[0], name)


class BlockElsewhere(Elsewhere):
    """A block of another stage: returns what it gets, or what was received, or ends the forward.

    Args:
        block: what it stands for.
        returns: how many items its output has, None where that is a tensor.
        leaves: whether the next stage begins here.
        border: where the received hidden states lie, if this stage begins behind this block.
    """

    def __init__(self, block: nn.Module, returns: int | None, leaves: bool, border: "Border | None") -> None:
        super().__init__(block)
        self.returns, self.leaves, self._border = returns, leaves, [border]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states as the block would have returned its own."""
        path = nested.first_floating((args, kwargs))
        assert path is not None, "a block is called with hidden states"
        h = nested.get((args, kwargs), path)
        if self.leaves:
            raise StageEndError(h)
        if self._border[0] is not None:
            h = self._border[0].received
        return h if self.returns is None else (h, *[None] * (self.returns - 1))


class StemElsewhere(Elsewhere):
    """A module that runs before the blocks, in a later stage: returns zeros, of which only the shape is looked at."""

    def __init__(self, module: nn.Module, kept: frozenset[int], output: Any, seen: Seen, border: "Border") -> None:
        super().__init__(module, kept)
        self._output = [nested.map_tensors(output, lambda t: t.to("meta")), seen, border]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape that the module's output would have."""
        output, seen, border = self._output
        if isinstance(self._there[0], nn.Embedding):
            ids = args[0] if args else kwargs["input"]
            return ids.new_zeros((*ids.shape, self.embedding_dim), dtype=output.dtype)
        return nested.map_tensors(
            output, lambda t: torch.zeros(seen.scaled(t.shape, border.extent), dtype=t.dtype, device=border.device)
        )


class Border:
    """What a stage received of a micro-batch: the hidden states, and how large it is."""

    def __init__(self) -> None:
        self.received: Tensor | None = None
        self.extent = Extent(0, None)
        self.device = torch.device("cpu")

    @contextmanager
    def holding(self, received: Tensor | None, extent: Extent, device: torch.device) -> Iterator[None]:
        """Hold what was received for the length of a forward."""
        self.received, self.extent, self.device = received, extent, device
        try:
            yield
        finally:
            self.received = None


def _save_whole(save: Callable[..., None], folder: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
    """Save what the Trainer has gathered from all stages; refuse to save this one alone."""
    if state_dict is None:
        raise RuntimeError(
            "this process holds the blocks of its own stage alone, and save_pretrained would write no others: expected "
            "trainer.save_model(folder), called by all processes, which gathers the whole model."
        )
    save(folder, *args, state_dict=state_dict, **kwargs)


class StageModel:
    """One stage of a model.

    Args:
        model: the whole model; keeps this stage's modules.
        chain: its blocks.
        seen: what ``look`` saw.
        cuts: ``cuts[s]`` is the first block of stage s; its last item is the number of blocks.
        stage: of this process.

    Attributes:
        blocks: the blocks of this stage, by their number in the chain.
        names: names of all of the model's parameters, in order.
        state_names: keys of its state dict, those of tied weights in one list.
        tied: parameters that the first and the last stage share.
        trained_below: whether something below this stage is trained.
        parameters: how many numbers the whole model has, without its embeddings.
        loss_dtype: of losses on their way through torch's schedules.

    Raises:
        ValueError: if a stage gets no block, or blocks of two stages share a parameter.
    """

    def __init__(self, model: nn.Module, chain: Chain, seen: Seen, cuts: Sequence[int], stage: int) -> None:
        self.model, self.seen, self.cuts, self.stage, self.stages = model, seen, cuts, stage, len(cuts) - 1
        self.chain_names = list(chain)
        self.names = [name for name, _ in model.named_parameters()]
        self.state_names = _state_names(model)
        count = getattr(model, "num_parameters", None)
        self.parameters = count(exclude_embeddings=True) if count else sum(p.numel() for p in model.parameters())
        self.loss_dtype = torch.promote_types(seen.h[-1].dtype, torch.float32)
        self.border = Border()
        if (save := getattr(model, "save_pretrained", None)) is not None:
            setattr(model, "save_pretrained", partial(_save_whole, save))  # noqa: B010  a method's name
        start, end = cuts[stage], cuts[stage + 1]
        first, last = stage == 0, stage == self.stages - 1
        self.blocks = {i: block for i, block in enumerate(chain.values()) if start <= i < end}
        head, stem = (
            {id(p): p for name in names for p in model.get_submodule(name).parameters()}
            for names in (seen.after, seen.before)
        )
        _refuse_shared(chain, cuts, head.keys() | stem.keys())
        below = [*stem.values(), *(p for block in list(chain.values())[:start] for p in block.parameters())]
        below += [parameter for name, parameter in model.named_parameters() if name in seen.stem_parameters]
        self.trained_below = not first and any(p.requires_grad for p in below)
        self.tied = [p for key, p in head.items() if key in stem] if first or last else []
        kept = frozenset(map(id, self.tied))
        for i, (name, block) in enumerate(chain.items()):
            if not start <= i < end:
                border = self.border if i == start - 1 else None
                _replace(model, name, BlockElsewhere(block, seen.returns[i], i == end, border))
        if not first:
            for name, output in seen.before.items():
                module = model.get_submodule(name)
                _replace(model, name, StemElsewhere(module, kept, output, seen, self.border))
        if not last:
            for name in seen.after:
                _replace(model, name, Elsewhere(model.get_submodule(name), kept))
        _drop_own_parameters(model, seen.stem_parameters, first, last)

    def shape_after(self, block: int, extent: Extent) -> tuple[int, ...]:
        """Return the shape of what a block makes of a batch of this size."""
        return self.seen.scaled(self.seen.h[block].shape, extent)

    def differs(self, autocast: AbstractContextManager[Any]) -> str | None:
        """Run this stage on the sample, and compare with what the whole model computed.

        Returns:
            None if it is the same, else what to say: something but the hidden states passes between two stages.
        """
        seen, start, end = self.seen, self.cuts[self.stage], self.cuts[self.stage + 1]
        training = self.model.training
        self.model.eval()
        extent = Extent.of(seen.sample, seen.main_input)
        received = seen.h[start - 1] if start else None
        try:
            holding = self.border.holding(received, extent, torch.device("cpu"))
            with torch.no_grad(), torch.random.fork_rng(devices=[]), autocast, holding:
                try:
                    found, expected = [tensor for _, tensor in nested.tensors(self.model(**seen.sample))], seen.outputs
                except StageEndError as leaving:
                    found, expected = [leaving.h], [seen.h[end - 1]]
        finally:
            self.model.train(training)
        same = len(found) == len(expected) and all(
            a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
            for a, b in zip(found, expected, strict=False)
        )
        for index in range(len(seen.h)):  # their shapes are all that is needed from here on
            seen.h[index] = seen.h[index].to("meta")
        seen.outputs = []
        if same:
            return None
        return (
            f"pipeline_stages cannot divide {type(self.model).__name__}: blocks {start + 1} to {end} by themselves do "
            "not compute what they do in the whole model. Expected that nothing but the hidden states passes from "
            "block to block (no router's loss, no hidden states of all layers in the output). Switch such outputs off "
            "in the model's configuration, or train with pipeline_stages=1."
        )


def _without_numbers(module: nn.Module) -> nn.Module:
    """Take the parameters out of a module; tensors without numbers, no parameters, stay in their places."""
    for part in module.modules():
        for name in list(part._parameters):
            parameter = part._parameters.pop(name)
            vars(part)[name] = None if parameter is None else torch.empty_like(parameter, device="meta")
        for name in list(part._buffers):
            vars(part)[name] = part._buffers.pop(name)
    return module


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _drop_own_parameters(model: nn.Module, of_stem: set[str], first: bool, last: bool) -> None:
    """Parameters of the modules that hold blocks (a class token) are the first stage's, or the last one's."""
    for holder, module in list(model.named_modules()):
        if any(isinstance(child, BlockElsewhere) for child in module.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not (first if f"{holder}.{name}".lstrip(".") in of_stem else last):
                    del module._parameters[name]
                    vars(module)[name] = torch.zeros_like(parameter, requires_grad=False)


def _refuse_shared(chain: Chain, cuts: Sequence[int], around: Any) -> None:
    owner: dict[int, int] = dict.fromkeys(around, -1)
    for stage, (start, end) in enumerate(pairwise(cuts)):
        for name in list(chain)[start:end]:
            for parameter, value in chain[name].named_parameters():
                if owner.setdefault(id(value), stage) != stage:
                    raise ValueError(
                        f"pipeline_stages cannot divide this model: {name}.{parameter} is a parameter of another stage "
                        "as well. Expected blocks with parameters of their own. Train with pipeline_stages=1."
                    )


def _state_names(model: nn.Module) -> list[list[str]]:
    """The keys of the state dict, those of one tensor together."""
    groups: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr() or id(value), value.shape, value.stride())
        groups.setdefault(key, []).append(name)
    return list(groups.values())
