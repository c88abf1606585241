"""Which positions of an activation are padding: what the model itself takes for it.

The masks are read that a model's modules are called with, from the model down to its first block, where they are
already folded, extended by a prompt, or brought from audio samples to frames as h_l is. A mask is known by "mask" in
its name; what its numbers say is seen by an exact gradient where the name alone does not tell.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grape_hf.core import nested
from grape_hf.core.block_lists import ends

logger = logging.getLogger(__name__)

# What the numbers of a mask say: 1 where a position counts, 1 where it is padding, below zero where it is padding (a
# mask to add to attention scores), or nothing about padding.
Meaning = Literal["counts", "padding", "additive", "nothing"]
# How the masks of a decoder's own positions are called, and those of what it attends to (torch's, transformers').
_OF_TARGETS, _OF_MEMORY = ("decoder_", "tgt", "target"), ("encoder_", "cross", "memory")


@dataclass
class _Watched:
    """A module around blocks, whose masks are noted."""

    names: list[str]
    shared: bool  # by encoder and decoder
    masks: dict[str, Tensor] = field(default_factory=dict)
    past: bool = False


class Masks:
    """The masks of one forward, by the module that was called with them.

    Args:
        model: the model.
        blocks: all its blocks, in order.
        encoder: how many of them are an encoder's, whose masks are not their decoder's; None where there is no decoder.

    Attributes:
        modules: those whose calls are to be noted.
        meanings: what the masks of a name and dtype say.
        batch: masks of the batch, for a loss that keeps them to itself.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], encoder: int | None = None) -> None:
        parts = [ends(block)[0] for block in blocks]
        # What torch.compile wraps around a module is called like it; the compiler cannot trace a list with both.
        called = (m for m in model.modules() if not is_container(m) and "_orig_mod" not in m._modules)
        inside = {module: set(module.modules()) for module in called}
        self.holders = [module for module, found in inside.items() if all(part in found for part in parts)]
        # Where the encoder is frozen and no part of the chain, the innermost is its decoder.
        of_both = [] if encoder is None else self.holders if encoder else self.holders[:-1]
        self.modules: dict[nn.Module, _Watched] = {}
        self._around: dict[nn.Module, list[_Watched]] = {}  # by block, innermost first
        self._role: dict[nn.Module, str] = {}
        for number, (block, part) in enumerate(zip(blocks, parts, strict=True)):
            self._role[block] = "" if encoder is None else "encoder" if number < encoder else "decoder"
            first = parts[encoder] if encoder is not None and number >= encoder else parts[0]  # its masks are of all
            around = [m for m, found in inside.items() if part in found and m is not part]
            self._around[block] = [
                self.modules.setdefault(m, _Watched(_argument_names(m), m in of_both))
                for m in (first, *reversed(around))
                if not is_container(m)
            ]
        self.meanings: dict[tuple[str, torch.dtype], Meaning] = {}
        self.batch: dict[str, Tensor] = {}
        self._found: dict[tuple[str, torch.Size], Tensor | None] = {}
        self._said = False

    def note_batch(self, batch: Any, rows: Sequence[int] | None = None, number: int | None = None) -> None:
        """Remember the masks of a batch that is a mapping, or of some of its ``number`` samples."""
        named = dict(batch) if isinstance(batch, Mapping) else {}
        found = {n: m for n, m in named.items() if _is_mask(n) and isinstance(m, Tensor) and m.ndim > 1}
        if rows is not None:  # a mask of something else (of positions by positions) has no rows to take
            found = {n: nested.rows_of(m, rows) for n, m in found.items() if len(m) == number}
        self.batch = found
        self._found.clear()

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember the masks that a module is called with."""
        if (watched := self.modules.get(module)) is None:
            return
        named = dict(zip(watched.names, args, strict=False)) | kwargs
        watched.masks = {n: m for n, m in named.items() if _is_mask(n) and isinstance(m, Tensor) and m.ndim > 1}
        watched.past = any("past" in name and value is not None for name, value in named.items())

    def forget(self) -> None:
        """Let go of all masks."""
        self._found.clear()
        for watched in self.modules.values():
            watched.masks, watched.past = {}, False

    def padding(self, block: nn.Module, h: Tensor) -> Tensor | None:
        """Return where h_l, ``(batch, positions, n_l)``, is no padding, ``(batch, positions)``; None if nothing says.

        Args:
            block: the block in front of it.
            h: h_l.
        """
        if h.ndim != 3 or h.is_nested or block not in self._role:
            return None
        key = self._role[block], h.shape[:2]
        if key not in self._found:
            self._found[key] = next((found for _, found in self._candidates(block, h.shape[:2])), None)
        return self._found[key]

    def _candidates(self, block: nn.Module, shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
        role = self._role[block]
        for exact in (True, False):
            for watched in (*self._around[block], _Watched([], True, self.batch)):
                masks = {n: m for n, m in watched.masks.items() if _is_of(role, n, watched.shared)}
                for name in sorted(masks, key=_rank):
                    if (meaning := self._meaning(name, masks[name])) == "nothing":
                        continue
                    fitted = fit(counts(masks[name], meaning), shape, exact, watched.past)
                    if fitted is not None:
                        yield name, fitted

    def _meaning(self, name: str, mask: Tensor) -> Meaning:
        key = name, mask.dtype
        if key not in self.meanings:
            self.meanings[key] = usual_meaning(name, mask)
        return self.meanings[key]

    def learn(self, block: nn.Module, used: Tensor) -> None:
        """See by an exact gradient at h_l what each mask says, however it is called.

        Args:
            block: the block in front of h_l.
            used: ``(batch, positions)``, whether a gradient came there: not at padding.
        """
        if not used.any():
            return
        for watched in (*self._around[block], _Watched([], True, self.batch)):
            for name, mask in watched.masks.items():
                usual = self._meaning(name, mask)
                if usual == "additive" or _rank(name) == 0:  # attention_mask is what it is, also where labels pad not
                    continue
                for meaning in (usual, "padding" if usual == "counts" else "counts", "nothing"):
                    fitted = None if meaning == "nothing" else fit(counts(mask, meaning), used.shape, True, False)
                    if fitted is None or not (used & ~fitted.to(used.device)).any():
                        self.meanings[name, mask.dtype] = usual if fitted is None and meaning != "nothing" else meaning
                        break

    def say_unmatched(self, block: nn.Module, h: Tensor) -> None:
        """Warn, once, of masks that the model was called with, if none of any module could be matched with h_l."""
        if self._said or h.ndim != 3 or self.padding(block, h) is not None:
            return
        masks = self.batch | {n: m for module in self.holders for n, m in self.modules[module].masks.items()}
        found = [
            f"{name} {tuple(mask.shape)}"
            for name, mask in masks.items()
            if _is_of(self._role[block], name, True) and self.meanings.get((name, mask.dtype)) != "nothing"
            if not (mask.ndim == 2 and _is_causal(counts(mask, self._meaning(name, mask))))  # of no sample
        ]
        if found:
            self._said = True
            logger.warning(
                f"GrAPE: the model is called with {', '.join(found)}, which does not fit the output of block 1, "
                f"{tuple(h.shape)}: if that says what is padding, padding has a say in the feedback."
            )


def mean_length(padding: Tensor | None, batch: int, positions: int) -> float:
    """Return how many positions are no padding, in the mean over samples, 1 at least; all where nothing says.

    Args:
        padding: ``(batch, positions)``, nonzero where a position is no padding. Its numbers are waited for.
        batch: how many samples there are.
        positions: how many positions, with padding.
    """
    if padding is None or padding.is_meta or padding.shape != (batch, positions):
        return positions
    return max(1.0, float(padding.count_nonzero() / batch))


def usual_meaning(name: str, mask: Tensor) -> Meaning:
    """Return what a mask of this name says where nothing else is known. Looks at the numbers of one of floats."""
    if mask.is_floating_point():
        if torch.compiler.is_compiling() or mask.is_meta or not mask.numel():
            return "additive"
        return "counts" if mask.max() == 1 and mask.min() >= 0 else "additive"
    # torch's masks of keys to ignore are boolean; transformers' are whole numbers, 1 for a position that counts
    return "padding" if "padding" in name and mask.dtype == torch.bool else "counts"


def counts(mask: Tensor, meaning: Meaning) -> Tensor:
    """Return which entries of a mask stand for what counts."""
    if meaning == "additive":
        return mask > -1000  # -10,000, -inf, or the lowest number there is, where there is padding
    return mask == 0 if meaning == "padding" else mask != 0


def fit(mask: Tensor, shape: torch.Size, exact: bool, past: bool) -> Tensor | None:
    """Bring a mask to ``(batch, positions)``, None if it is of something else.

    Args:
        mask: whether what it is about counts.
        shape: batch and positions of h_l.
        exact: take only a mask with as many positions; else those of a longer one that come last, where there is a
            past before them (prefix tuning), and a shorter one behind tokens that all count (prompt tuning).
        past: whether there is a past.
    """
    batch, positions = shape
    exact = exact or mask.ndim != 2
    if mask.ndim == 4 or (mask.ndim == 3 and mask.shape[0] == batch):
        mask = mask.flatten(1, -2).any(1)  # a key counts that any query heeds
        mask = mask.expand(batch, -1) if len(mask) == 1 else mask
    elif mask.ndim == 3:
        mask = mask.flatten(0, 1)  # several texts of a sample, which the model puts into the batch
    if mask.ndim != 2:
        return None
    if mask.shape == shape:
        return None if _is_causal(mask) else mask
    if tuple(mask.shape) == (positions, batch):
        return mask.mT
    if exact or len(mask) != batch:
        return None
    if mask.shape[1] > positions:
        return mask[:, -positions:] if past else None
    if positions - mask.shape[1] > mask.shape[1]:  # rather of something else
        return None
    return torch.cat([mask.new_ones(batch, positions - mask.shape[1]), mask], dim=1)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask is of positions by positions, as no samples are padded. Looks at its numbers if it is square."""
    if torch.compiler.is_compiling() or mask.is_meta or len(mask) == 1 or mask.shape[0] != mask.shape[1]:
        return False
    below = torch.ones_like(mask).tril()
    return torch.equal(mask, below) or torch.equal(mask, ~below)  # torch's say what is not heeded


def _rank(name: str) -> int:
    """Order masks by how surely they are of padding."""
    return 0 if name in ("attention_mask", "decoder_attention_mask") else 1 if "padding" in name or "att" in name else 2


def _is_mask(name: str) -> bool:
    return "mask" in name and "head" not in name


def _is_of(role: str, name: str, shared: bool) -> bool:
    if role == "encoder":
        return not name.startswith(_OF_TARGETS)
    if role == "decoder" and shared:
        return name.startswith(_OF_TARGETS)
    return not name.startswith(_OF_MEMORY + (("src", "source") if role else ()))


def is_container(module: nn.Module) -> bool:
    """Whether a module is never called itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def _argument_names(module: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):
        return []
