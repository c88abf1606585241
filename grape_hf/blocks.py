"""Find a model's blocks f_1 .. f_L, the modules between which the feedback points h_1 .. h_{L-1} lie.

In a Transformer they are the items of the one ``nn.ModuleList`` that the hidden states run through
(``transformer.h``, ``model.layers``, ``gpt_neox.layers``). This module answers which modules and in what order; it
changes nothing and runs nothing. Whether the blocks really run once each, in that order, is seen at the first forward
(``boundaries.py``), which refuses a model that does otherwise.
"""

from collections.abc import Iterator

from torch import nn

# A list is taken without asking when it holds this share of the parameters in all lists that could be meant.
DOMINANT_SHARE = 2 / 3


def find_blocks(model: nn.Module, blocks: str | None = None) -> dict[str, nn.Module]:
    """Return the blocks of ``model`` in the order in which they run, by their names in the model.

    Args:
        model: the model; a ``peft`` or ``accelerate`` wrapper around it is looked through.
        blocks: None to search, or names as ``model.named_modules()`` gives them (a trailing part of a name is enough
            where it is unique), separated by commas. A list of modules stands for its items, any other module for
            itself.

    Raises:
        ValueError: if no list of blocks is found, if several could be meant, if a name does not exist or stands for
            several modules, or if a block has no parameters.
    """
    if blocks is None:
        return _search(model)
    found: dict[str, nn.Module] = {}
    for wanted in (part.strip() for part in blocks.split(",")):
        name, module = _named(model, wanted)
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found |= {f"{name}.{i}": item for i, item in enumerate(module)}
        else:
            found[name] = module
    for name, block in found.items():
        if not _has_parameters(block):
            raise ValueError(f"blocks={blocks!r}: {name} ({type(block).__name__}) has no parameters to train.")
    return found


def find_head(model: nn.Module) -> nn.Module:
    """Return the module whose output are the logits, for ``feedback_space="logits"``.

    It is what ``get_output_embeddings()`` returns (language models), else the one that a Hugging Face classifier
    calls ``classifier``, ``score`` or ``head``, or a timm model names in ``get_classifier()``.

    Raises:
        ValueError: if the model has no such module.
    """
    for candidate in _unwrapped(model):
        get_output_embeddings = getattr(candidate, "get_output_embeddings", None)
        get_classifier = getattr(candidate, "get_classifier", None)
        heads = [get() for get in (get_output_embeddings, get_classifier) if callable(get)]
        heads += [getattr(candidate, name, None) for name in ("classifier", "score", "lm_head", "head", "fc")]
        for head in heads:
            if isinstance(head, nn.Module) and not isinstance(head, nn.Identity):
                return head
    raise ValueError(
        f'feedback_space="logits" needs a module that makes the logits, and {type(model).__name__} has none: '
        "get_output_embeddings() and get_classifier() return no module, and there is no classifier, score, lm_head, "
        'head or fc. Use feedback_space="hidden", which measures the error at the output of the last block.'
    )


def _search(model: nn.Module) -> dict[str, nn.Module]:
    candidates = dict(_block_lists(model))
    if not candidates:
        raise ValueError(
            f"found no blocks in {type(model).__name__}: expected an nn.ModuleList whose items the hidden states run "
            'through, one after the other. Name the blocks: GrapeTrainingArguments(blocks="first_name,second_name").'
        )
    sizes = {name: sum(p.numel() for p in items.parameters()) for name, items in candidates.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] < DOMINANT_SHARE * sum(sizes.values()):
        listed = ", ".join(f"{name} ({len(c)} x {type(c[0]).__name__})" for name, c in candidates.items())
        raise ValueError(
            f"cannot tell which blocks of {type(model).__name__} get direct feedback. Expected one chain of like "
            f"blocks between input and output, found several lists: {listed}. Name one: "
            f'GrapeTrainingArguments(blocks="{largest}").'
        )
    return {f"{largest}.{i}": block for i, block in enumerate(candidates[largest])}


def _block_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost lists whose items are composite modules: what lies inside a block (experts, heads) is not listed."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) and all(_is_block(item) for item in child):
            yield prefix + name, child
        else:
            yield from _block_lists(child, f"{prefix}{name}.")


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and _has_parameters(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _named(model: nn.Module, wanted: str) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if wanted in modules:
        return wanted, modules[wanted]
    # A wrapper (peft) puts a prefix before the names that its user knows.
    matches = [name for name in modules if name.endswith(f".{wanted}")]
    if len(matches) == 1:
        return matches[0], modules[matches[0]]
    lists = [f"{name} ({len(m)} x {type(m[0]).__name__})" for name, m in _block_lists(model)]
    problem = f"stands for several modules: {', '.join(matches)}" if matches else "does not exist"
    raise ValueError(
        f"blocks={wanted!r} {problem} in {type(model).__name__}. Expected the name of a module, as in "
        f"model.named_modules(); lists of blocks in this model: {', '.join(lists) or 'none'}."
    )


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, outermost first (peft's PeftModel, timm's wrapper in transformers)."""
    yield model
    for name in ("base_model", "model", "timm_model"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and inner is not model:
            yield from _unwrapped(inner)
            return
