"""Which blocks go to which pipeline stage, and what each stage takes: for ``grape-hf inspect --pipeline_stages K``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grape_hf.cli.report import _bytes, _count
from grape_hf.core.block_lists import ends
from grape_hf.core.blocks import find_blocks
from grape_hf.pipeline.cuts import balanced_cuts, given_cuts
from grape_hf.pipeline.timing import Method, Stages, time_per_batch
from grape_hf.training_args import GrapeArgumentsMixin

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Costs:
    """What the parts of a model take, without its stages.

    Attributes:
        names: of the blocks.
        parameters: numbers in each block; last what is around them.
        flops: operations of a forward and backward of each block; last those of the head.
        activations: bytes that each block keeps for its backward.
    """

    names: list[str]
    parameters: list[int]
    flops: list[float]
    activations: list[int]


def describe_stages(make: Callable[[str], tuple[nn.Module, Batch]], options: GrapeArgumentsMixin) -> str:
    """Write which blocks go where, with memory and estimated time of each stage, and the split that is fastest.

    Args:
        make: makes the model and a batch on a device; called with ``meta``, where tensors have no numbers.
        options: GrAPE's, with ``pipeline_stages`` above 1.

    Raises:
        ValueError: if the split does not fit the blocks.
    """
    model, batch = make("meta")
    costs, stages = _costs(model, batch, options.blocks), options.pipeline_stages
    blocks = len(costs.names)
    cuts = given_cuts(options.pipeline_split, blocks, stages)
    best = balanced_cuts(costs.flops[:-1], stages, head=costs.flops[-1])
    lines = ["", f"{stages} stages, {options.pipeline_microbatches} micro-batches", *_table(costs, cuts)]
    methods: dict[str, Method] = {
        "backpropagation, 1F1B": "1f1b",
        "backpropagation, delayed gradients": "delayed",
        "direct feedback": "star",
    }
    lines.append("Estimated time of a batch, as a share of one process's; no transfers, equal speed")
    for what, method in methods.items():
        lines.append(f"  {what:<36} {_time(costs, cuts, method, options.pipeline_microbatches):6.3f}")
    split = ",".join(str(b - a) for a, b in pairwise(best))
    faster = _time(costs, best, "1f1b", options.pipeline_microbatches)
    if faster < 0.995 * _time(costs, cuts, "1f1b", options.pipeline_microbatches):
        lines.append(f"  {f'backpropagation, --pipeline_split {split}':<36} {faster:6.3f}")
    return "\n".join(lines)


def _costs(model: nn.Module, batch: Batch, named: str | None) -> Costs:
    chain = find_blocks(model, named)
    kept = [dict[int, torch.UntypedStorage]() for _ in chain]
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    current: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if current and storage._cdata not in weights:
            kept[current[-1]][storage._cdata] = storage
        return tensor

    handles = []
    for index, block in enumerate(chain.values()):
        first, last = ends(block)
        handles.append(first.register_forward_pre_hook(lambda *_, i=index: current.append(i)))
        handles.append(last.register_forward_hook(lambda *_: current.clear()))
    counts: list[float] = []
    try:
        model.train()
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            with torch.device("meta"):
                output = model(**batch)
            loss = output.logits.square().mean() if getattr(output, "loss", None) is None else output.loss
            loss.backward()
        by_module = counter.get_flop_counts()
        root = type(model).__name__
        counts = [float(sum(by_module.get(f"{root}.{name}", {}).values())) for name in chain]
        total = float(counter.get_total_flops())
    finally:
        for handle in handles:
            handle.remove()
    parameters = [sum(p.numel() for p in block.parameters()) for block in chain.values()]
    around = sum(p.numel() for p in model.parameters()) - sum(parameters)
    activations = [sum(storage.nbytes() for storage in found.values()) for found in kept]
    return Costs(list(chain), [*parameters, around], [*counts, total - sum(counts)], activations)


def _table(costs: Costs, cuts: list[int]) -> list[str]:
    total, count = sum(costs.flops), len(cuts) - 1
    rows = [("stage", "blocks", "parameters", "with gradients, AdamW", "activations", "share of operations")]
    for stage in range(count):
        start, end = cuts[stage], cuts[stage + 1]
        around = costs.parameters[-1] if stage in (0, count - 1) else 0
        parameters = sum(costs.parameters[start:end]) + around
        flops = sum(costs.flops[start:end]) + (costs.flops[-1] if stage == count - 1 else 0)
        at_most = "up to " if around and count > 1 else ""
        rows.append(
            (
                str(stage),
                f"{costs.names[start]} .. {costs.names[end - 1]}" if end - start > 1 else costs.names[start],
                f"{at_most}{_count(parameters)}",
                f"{at_most}{_bytes(16 * parameters)}",
                _bytes(sum(costs.activations[start:end])),
                f"{flops / total:.1%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{text:{widths[i]}}" for i, text in enumerate(row)).rstrip() for row in rows]


def _time(costs: Costs, cuts: list[int], method: Method, micro_batches: int) -> float:
    """Return the time of a batch; a backward takes two forwards."""
    count, total = len(cuts) - 1, sum(costs.flops)
    work = [sum(costs.flops[a:b]) / total / micro_batches for a, b in pairwise(cuts)]
    head = costs.flops[-1] / total / micro_batches
    work[count - 1] += head
    stages = Stages([w / 3 for w in work], [2 * w / 3 for w in work], 2 * head / 3)
    return time_per_batch(method, stages, micro_batches)
