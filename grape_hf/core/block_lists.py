"""Lists of blocks in a model, and the stages that they may lie in.

A list is an ``nn.ModuleList`` or ``nn.Sequential`` of composite modules. Vision models have stages, lists in one
another or one after the other (``layer1`` .. ``layer4``, ``stages.0.blocks``): they are joined to one chain. Which of
the chains that are found here gets direct feedback is decided in ``blocks.py``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

Chain = dict[str, nn.Module]

# Single layers that hold weights.
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase)
# How the lists of blocks inside a stage are called. A residual block may hold a list too (HF ResNet's `layer`).
_LISTS_IN_STAGES = ("blocks", "layers")


class Unit(nn.Sequential):
    """Consecutive modules of a plain stack, as one block: convolution, norm, activation, pool.

    The model calls its parts and never the unit, so that hooks belong on the parts (``ends``).
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.ends = parts[0], parts[-1]


class Layer(Unit):
    """What a list holds as one item and the model calls part by part: norm, attention, norm, MLP.

    Which part comes first, and which last, is seen when the model runs (``engine/layers.py``).
    """


def ends(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the module that gets a block's input and the one that makes its output: the block itself, twice."""
    return block.ends if isinstance(block, Unit) else (block, block)


def chains(module: nn.Module, prefix: str = "") -> Iterator[Chain]:
    """Outermost lists of composite modules, each as one chain: what lies inside a block (experts, heads) is not listed.

    Sequentials side by side run one after the other (``layer1`` .. ``layer4``) and make one chain, and so do stages
    that are modules of a class of their own.
    """
    stages: Chain = {}
    kinds = Counter(type(child) for child in module.children() if _is_stage(child))
    for name, child in module.named_children():
        listed = items_of(child, prefix + name)
        if kinds[type(child)] > 1:
            listed = {}
            for block, item in child.named_children():
                listed |= items_of(item, f"{prefix}{name}.{block}") or {f"{prefix}{name}.{block}": item}
        if listed and (isinstance(child, nn.Sequential) or kinds[type(child)] > 1):
            stages |= listed
        elif listed:
            yield listed
        else:
            yield from chains(child, f"{prefix}{name}.")
    yield stages


def items_of(module: nn.Module, name: str) -> Chain:
    """The blocks in a list, those of its stages if its items are stages; empty if this is no list of blocks."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return {}
    children = {join(name, child): item for child, item in module.named_children()}
    raw = Counter(type(item) for item in children.values() if _is_raw(item))
    blocks = {child: item for child, item in children.items() if is_block(item) or raw[type(item)] > 1}
    # A stem, norms and pools may stand in a Sequential beside the blocks (DenseNet); a ModuleList holds like items.
    if len(blocks) != len(children) and (isinstance(module, nn.ModuleList) or len(blocks) < 2):
        return {}
    found: Chain = {}
    for child, item in blocks.items():
        found |= _inner(item, child) or {child: whole(item)}
    return found


def whole(item: nn.Module) -> nn.Module:
    """An item of a list as one block, also where nobody calls it itself."""
    return Layer(*_parts(item)) if _is_uncalled(item) else item


def are_unlike(parts: Iterable[nn.Module]) -> bool:
    """Whether the items of a list are the parts of one layer, which the model takes apart: attention and MLP."""
    return len({type(part) for part in parts}) > 1


def _parts(item: nn.Module) -> list[nn.Module]:
    inner = [_parts(part) if _is_uncalled(part) else [part] for part in item.children()]
    return [part for parts in inner for part in parts]


def _is_uncalled(module: nn.Module) -> bool:
    """Whether a module holds others and is never called: it has no ``forward`` (lists, dictionaries)."""
    return type(module).forward is nn.Module.forward and any(True for _ in module.children())


def _inner(item: nn.Module, name: str) -> Chain:
    """The blocks inside an item that is itself a stage: a list, or a module with one and no shortcut around it.

    Layers behind the list join what came around it (CSPNet, HGNet, Swin2SR), other than a step down in size. A
    Sequential with single layers beside the blocks is the branch of a residual block (torchvision's MBConv).
    """
    if isinstance(item, nn.Sequential | nn.ModuleList):
        if isinstance(item, nn.Sequential) and type(item).forward is not nn.Sequential.forward:  # no chain (RDNet)
            return {}
        children = list(item.children())
        unlike = isinstance(item, nn.ModuleList) and are_unlike(children)
        return items_of(item, name) if all(map(is_block, children)) and not unlike else {}
    parts = list(item.named_children())
    lists = [place for place, (child, _) in enumerate(parts) if child in _LISTS_IN_STAGES]
    if len(lists) != 1 or hasattr(item, "shortcut"):
        return {}
    (child, listed), *behind = parts[lists[0] :]
    if any(isinstance(m, WEIGHTED) for other, part in behind if not other.startswith("down") for m in part.modules()):
        return {}
    if isinstance(listed, nn.Sequential) and any(has_parameters(m) and not is_block(m) for m in listed):
        return {}
    return items_of(listed, f"{name}.{child}")


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is nothing but blocks of one class: in numbered attributes (timm's RegNet), or in lists."""
    children = dict(module.named_children())
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict) or len(set(map(type, children.values()))) != 1:
        return False
    numbered = len({name.rstrip("0123456789") for name in children}) == 1 and all(n[-1].isdigit() for n in children)
    lists = all(isinstance(m, nn.ModuleList | nn.Sequential) and all(map(is_block, m)) for m in children.values())
    return (numbered or lists) and all(map(is_block, children.values()))


def join(name: str, child: str) -> str:
    """The name of a child; ``name`` is empty where that is the model's."""
    return f"{name}.{child}" if name and child else name or child


def is_block(module: nn.Module) -> bool:
    """Whether a module holds others with weights."""
    return any(has_parameters(child) for child in module.children())


def _is_raw(module: nn.Module) -> bool:
    """Whether a module holds matrices of its own, and is neither one of torch's layers nor made from one."""
    torchs = any(kind.__module__.startswith("torch.nn.") for kind in type(module).__mro__ if kind is not nn.Module)
    return not torchs and any(p is not None and p.ndim > 1 for p in module._parameters.values())


def has_parameters(module: nn.Module) -> bool:
    """Whether a module has weights, its own or those of what it holds."""
    return next(module.parameters(), None) is not None
