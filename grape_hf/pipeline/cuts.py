"""Which blocks go to which stage: evenly, as given, or so that the slowest stage is as fast as can be.

Cuts are a list: ``cuts[s]`` is the first block of stage s, and the last item is the number of blocks.
"""

from collections.abc import Sequence
from itertools import pairwise


def even_cuts(blocks: int, stages: int) -> list[int]:
    """Return the first block of each stage, and the number of blocks: as many blocks to each as can be."""
    return [stage * blocks // stages for stage in range(stages + 1)]


def given_cuts(split: str | None, blocks: int, stages: int) -> list[int]:
    """Return the cuts by ``pipeline_split``, how many blocks each stage gets, or even ones.

    Raises:
        ValueError: if the numbers are not one a stage, at least 1, with the number of blocks as their sum.
    """
    if split is None:
        if blocks < stages:
            raise ValueError(
                f"pipeline_stages={stages}: the model has {blocks} blocks, and each stage needs one. Expected at most "
                f"{blocks} stages."
            )
        return even_cuts(blocks, stages)
    sizes = [int(part) if part.strip().isdigit() else 0 for part in split.split(",")]
    if len(sizes) != stages or min(sizes) < 1 or sum(sizes) != blocks:
        raise ValueError(
            f"pipeline_split={split!r}: expected {stages} whole numbers, the blocks of each stage, that are {blocks} "
            f"together. Evenly: {','.join(str(b - a) for a, b in pairwise(even_cuts(blocks, stages)))}."
        )
    return [sum(sizes[:i]) for i in range(stages + 1)]


def balanced_cuts(costs: Sequence[float], stages: int, stem: float = 0.0, head: float = 0.0) -> list[int]:
    """Return the cuts by which the slowest stage is as fast as can be.

    Args:
        costs: of each block, in any unit of time.
        stages: K, at most as many as there are blocks.
        stem: what the first stage computes beside its blocks.
        head: what the last stage computes beside its blocks.
    """
    blocks = len(costs)
    costs = [*costs]
    costs[0] += stem
    costs[-1] += head
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for stage in range(1, stages + 1):
        for end in range(stage, blocks - (stages - stage) + 1):
            found = [
                (max(best[stage - 1, start][0], sum(costs[start:end])), best[stage - 1, start][1])
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            ]
            slowest, cuts = min(found, key=lambda item: item[0])
            best[stage, end] = (slowest, [*cuts, end])
    return best[stages, blocks][1]
