"""Find a model's blocks f_1 .. f_L, the modules between which the feedback points h_1 .. h_{L-1} lie.

In a Transformer they are the items of the one ``nn.ModuleList`` that the hidden states run through (``transformer.h``,
``model.layers``, ``gpt_neox.layers``). Vision models have stages, lists in one another or one after the other
(``layer1`` .. ``layer4``, ``stages.0.blocks``): they are joined to one chain. A plain stack of convolutions (VGG) is
cut before each of them. Without a list they are attributes: modules of one class, or else single layers that hold most
of the parameters. An encoder-decoder's are those of its encoder, then those of its decoder. This module answers which
modules and in what order; it changes nothing and runs nothing. Whether the blocks really run once each, in that order,
and each on the output of the one before, is seen at the first forward (``probe.py``), which refuses a model that does
otherwise.
"""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

from torch import nn

from grape_hf.core.block_lists import (
    WEIGHTED,
    Chain,
    Unit,
    are_unlike,
    chains,
    ends,
    has_parameters,
    is_block,
    items_of,
    join,
    whole,
)
from grape_hf.core.parts import encoder_rests, stacks

# A list is taken without asking when it holds this share of the parameters in all lists that could be meant.
DOMINANT_SHARE = 2 / 3


def find_blocks(model: nn.Module, blocks: str | None = None) -> Chain:
    """Return the blocks of ``model`` in the order in which they run, by their names in the model.

    Args:
        model: the model; a ``peft`` or ``accelerate`` wrapper around it is looked through.
        blocks: None to search, or names as ``model.named_modules()`` gives them (a trailing part of a name is enough
            where it is unique), separated by commas. A list of modules stands for its items, and so does a ModuleList
            or ModuleDict among these; any other module stands for itself.

    Raises:
        ValueError: if no list of blocks is found, if several could be meant, if a name does not exist or stands for
            several modules, or if a block has no parameters.
    """
    if blocks is None:
        return _search(model)
    found: dict[str, nn.Module] = {}
    for wanted in (part.strip() for part in blocks.split(",")):
        name, module = _named(model, wanted)
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            found |= _units(module, name) or _expanded(module, name)
        else:
            found[name] = module
    _refuse_shared(found)
    for name, block in found.items():
        if not has_parameters(block):
            raise ValueError(
                f"blocks={blocks!r}: {name} ({type(block).__name__}) has no parameters to train. Expected blocks with "
                "weights: leave it out, or name the module that holds it."
            )
    return found


def _expanded(module: nn.Module, name: str) -> Chain:
    """The items of a list, and of lists of like items among them that are never called."""
    found: Chain = {}
    for child, item in module.named_children():
        inner = f"{name}.{child}"
        listed = isinstance(item, nn.ModuleList | nn.ModuleDict) and not are_unlike(item.children())
        found |= _expanded(item, inner) if listed else {inner: whole(item)}
    return found


def _search(model: nn.Module) -> Chain:
    both = stacks(model)
    if both is None:
        return _search_in(model)
    names = {module: name for name, module in model.named_modules()}
    encoder, decoder = both
    below = {} if encoder_rests(model, encoder, decoder) else _search_in(encoder, f"{names[encoder]}.")
    return below | _search_in(decoder, f"{names[decoder]}.")


def _search_in(model: nn.Module, prefix: str = "") -> Chain:
    name = prefix.removesuffix(".")
    candidates = [chain for chain in chains(model, prefix) if chain]
    items = items_of(model, name)
    alike = len({type(item) for item in items.values()}) < len(items)
    # The model is itself a list of blocks, and of what is inside them no chain is longer.
    if alike and (not candidates or [len(chain) for chain in candidates] == [len(items)]):
        return items
    if not candidates:
        modules = [(join(name, inner), module) for inner, module in model.named_modules()]  # the outermost first
        plain = _trained([_units(m, inner) for inner, m in modules if isinstance(m, nn.Sequential)])
        longest = max(plain, key=len, default={})
        if len(longest) > 1:
            _refuse_shared(longest)
            return longest
        if attributes := _trained([_attributes(m, inner) for inner, m in modules]):
            return attributes[0]
        parameters = list(model.parameters())
        total = sum(p.numel() for p in [p for p in parameters if p.requires_grad] or parameters)
        for layers in _trained([found for inner, m in modules if len(found := _layers(m, inner)) > 1]):
            if _size(layers) >= DOMINANT_SHARE * total:
                return layers
        raise ValueError(
            f"found no blocks in {type(model).__name__}: expected modules that the hidden states run through one after "
            "the other, in an nn.ModuleList or nn.Sequential or as attributes. Name the blocks: "
            'GrapeTrainingArguments(blocks="first_name,second_name").'
        )
    candidates = _trained(candidates)
    sizes = [_size(chain) for chain in candidates]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[largest] < DOMINANT_SHARE * sum(sizes):
        if branching := _around(model, name, candidates):
            return branching
        listed = ", ".join(_describe(chain) for chain in candidates)
        raise ValueError(
            f"cannot tell which blocks of {type(model).__name__} get direct feedback. Expected one chain of like "
            f"blocks between input and output, found several lists: {listed}. Name one: "
            f'GrapeTrainingArguments(blocks="{_names(model, prefix, candidates[largest])}").{_copies(candidates)}'
        )
    return candidates[largest]


def _names(model: nn.Module, prefix: str, chain: Chain) -> str:
    """What ``blocks`` has to be for a chain: the names of its lists, and of blocks that are in none."""
    modules, names = dict(model.named_modules()), dict[str, None]()
    for name in chain:
        parent = name.rpartition(".")[0]
        listed = modules.get(parent.removeprefix(prefix))
        whole = isinstance(listed, nn.ModuleList | nn.Sequential) and all(
            f"{parent}.{child}" in chain for child, _ in listed.named_children()
        )
        names[parent if whole else name] = None
    return ",".join(names)


def _attributes(module: nn.Module, name: str) -> Chain:
    """The blocks that a module has as its attributes, in their order, if two are of one class (Inception).

    An auxiliary head is none.
    """
    parts = [(child, part) for child, part in module.named_children() if not child.lower().startswith("aux")]
    blocks = {join(name, child): part for child, part in parts if is_block(part)}
    return blocks if len({type(block) for block in blocks.values()}) < len(blocks) else {}


def _around(model: nn.Module, name: str, candidates: list[Chain]) -> Chain:
    """Attributes, three at least of one class, that hold all candidates in Sequentials: branches, as of GoogLeNet.

    Two of one class are rather towers side by side.
    """
    names = {module: join(name, inner) for inner, module in model.named_modules()}
    for module, outer in names.items():
        blocks = _attributes(module, outer)
        kinds = Counter(type(part) for part in blocks.values() if not isinstance(part, nn.Sequential | nn.ModuleList))
        inside = {inner for part in blocks.values() if kinds[type(part)] > 2 for inner in part.modules()}
        held = {names[item] for branch in inside if isinstance(branch, nn.Sequential) for item in branch.children()}
        if all(held.issuperset(chain) for chain in candidates):
            return blocks
    return {}


def _layers(module: nn.Module, name: str) -> Chain:
    """The layers that a module has as its attributes, in their order (``conv1``, ``conv2``, ``fc1``, ``fc2``).

    Those in lists join them where each can work on the output of the one before.
    """
    parts = list(module.named_children())
    layers: Chain = {child: part for child, part in parts if isinstance(part, WEIGHTED)}
    joined: Chain = {}
    for child, part in parts:
        listed = isinstance(part, nn.ModuleList)
        joined |= {f"{child}.{i}": item for i, item in part.named_children()} if listed else {child: part}
    joined = {child: part for child, part in joined.items() if isinstance(part, WEIGHTED)}
    widths = [_widths(part) for part in joined.values()]
    fit = all(before[1] == after[0] for before, after in pairwise(widths))
    return {join(name, child): part for child, part in (joined if fit else layers).items()}


def _widths(layer: nn.Module) -> tuple[Any, Any]:
    """How many numbers a layer reads and makes; what equals nothing where it does not say."""
    reads, makes = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    return getattr(layer, reads, None), getattr(layer, makes, math.nan)


def _units(module: nn.Module, name: str) -> Chain:
    """A plain stack, cut before each convolution or linear layer; empty if the module holds anything composite."""
    # named_children() leaves out what stands there again.
    children = [(child, part) for child, part in module._modules.items() if part is not None]
    if not isinstance(module, nn.Sequential) or any(any(True for _ in part.children()) for _, part in children):
        return {}
    weighted = [i for i, (_, child) in enumerate(children) if isinstance(child, WEIGHTED)]
    if len(weighted) < 2:
        return {}
    times = Counter(child for _, child in children)
    units: Chain = {}
    for start, end in pairwise([0, *weighted[1:], len(children)]):
        # A unit ends before what stands at other places too (one ReLU for all), whose hooks could not tell which.
        layer = max(start, weighted[0])
        last = max((i for i in range(layer, end) if times[children[i][1]] == 1), default=layer)
        units[join(name, children[last][0])] = Unit(*(child for _, child in children[start : last + 1]))
    return units


def _refuse_shared(chain: Chain) -> None:
    """Raise ValueError if one module is an end of several units of a plain stack: its hooks could not tell which."""
    parts = Counter(part for block in chain.values() if isinstance(block, Unit) for part in set(ends(block)))
    if shared := [type(part).__name__ for part, times in parts.items() if times > 1]:
        raise ValueError(
            f"one {shared[0]} stands at several places of a plain stack: expected a module of its own at each place, "
            'or method="bp".'
        )


def _trained(found: list[Chain]) -> list[Chain]:
    """Those of the chains that have something to train, or all where none has (soft prompts, a head alone).

    A frozen teacher, tower or moving average may be larger than what is trained beside it.
    """
    found = [chain for chain in found if chain]
    return [chain for chain in found if any(map(_trains, chain.values()))] or found


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _copies(found: list[Chain]) -> str:
    """What helps where one chain is as another: a teacher or a moving average, which no optimiser trains."""
    kinds = [[type(block) for block in chain.values()] for chain in found]
    if all(kinds.count(kind) == 1 for kind in kinds):
        return ""
    return " Freeze one that only follows another (a teacher, a moving average): `requires_grad_(False)` leaves it out."


def _size(chain: Chain) -> int:
    """How many parameters the blocks hold in which something trains, be it an adapter; all, where nothing does."""
    blocks = list(chain.values())
    counted = [block for block in blocks if _trains(block)] or blocks
    return sum(p.numel() for block in counted for p in block.parameters())


def _describe(chain: Chain) -> str:
    first = next(iter(chain))
    return f"{first.rpartition('.')[0]} ({len(chain)} x {type(chain[first]).__name__})"


def _named(model: nn.Module, wanted: str) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if wanted in modules:
        return wanted, modules[wanted]
    # A wrapper (peft) puts a prefix before the names that its user knows.
    matches = [name for name in modules if name.endswith(f".{wanted}")]
    if len(matches) == 1:
        return matches[0], modules[matches[0]]
    lists = [_describe(chain) for chain in chains(model) if chain]
    problem = f"stands for several modules: {', '.join(matches)}" if matches else "does not exist"
    raise ValueError(
        f"blocks={wanted!r} {problem} in {type(model).__name__}. Expected the name of a module, as in "
        f"model.named_modules(); lists of blocks in this model: {', '.join(lists) or 'none'}."
    )
