r"""How long a batch takes over K stages, reckoned: each stage does its actions in order, and waits for what they need.

Times are those of one micro-batch: F, a stage's forward; B, its whole backward, which in a star is W; a hop, the time
of one transfer. Schedules of the literature whose order depends on how fast everything is are given by their published
formulas instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Method = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "delayed", "star", "star+sweep"]
METHODS: tuple[Method, ...] = ("gpipe", "1f1b", "interleaved", "zero-bubble", "delayed", "star", "star+sweep")
BATCHES = 6  # simulated in a row; the first ones fill the pipeline
CHUNKS = 2  # of the blocks of a stage, where they are interleaved

Action = tuple[str, int]  # kind, micro-batch


@dataclass(frozen=True)
class Stages:
    """What each stage takes for one micro-batch, in any unit of time.

    Attributes:
        forward: F of each stage.
        backward: B of each stage, both gradients.
        head: of ``backward`` of the last stage what the head takes, which a star does first.
        hop: one transfer between two stages.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    head: float = 0.0
    hop: float = 0.0

    def __len__(self) -> int:
        """Count them."""
        return len(self.forward)


def time_per_batch(method: Method, stages: Stages, micro_batches: int, together: bool = False) -> float:
    """Return the time of one batch in a run of many.

    Args:
        method: a schedule of backpropagation; ``delayed``, backpropagation whose lower stages use gradients of the
            batch before; ``star``; or ``star+sweep``, a star whose errors are corrected once by all stages at once.
        stages: what each takes.
        micro_batches: M.
        together: whether all stages wait for each other at the end of a batch, as clipping by the global norm has them
            do. Without that a stage goes on with the next batch when it is done.

    Source: zero-bubble (its schedule H1) and interleaved by the bubbles of Qi et al. 2024, arXiv 2401.10241, and
    Narayanan et al. 2021, arXiv 2104.04473; the others are simulated.
    """
    slowest = max(f + b for f, b in zip(stages.forward, stages.backward, strict=True))
    fill = len(stages) - 1
    if method == "zero-bubble":  # bubble: (K - 1)(F + I - W), I and W a half of B each
        return micro_batches * slowest + fill * (max(stages.forward) + 2 * stages.hop)
    if method == "interleaved":
        return micro_batches * slowest + fill * (slowest / CHUNKS + 2 * stages.hop)
    ends = _simulate(method, stages, micro_batches, 1 if together else BATCHES)
    return ends[0] if together else (ends[-1] - ends[1]) / (len(ends) - 2)


def _order(method: Method, stage: int, count: int, micro_batches: int) -> list[Action]:
    each, last = range(micro_batches), stage == count - 1
    if method == "1f1b":
        ahead = min(micro_batches, count - stage)
        order: list[Action] = [("F", m) for m in range(ahead)]
        for m in each:
            order += [("B", m)] + [("F", m + ahead)] * (m + ahead < micro_batches)
        return order
    if method in ("star", "star+sweep"):
        backwards = [("V", "W") if method == "star+sweep" else ("W",)] * micro_batches
        own = [(kind, m) for m in each for kind in backwards[m]]
        if last:
            return [(kind, m) for m in each for kind in ("F", "E")] + own
        return [("F", m) for m in each] + own
    return [(kind, m) for kind in ("F", "B") for m in each]


def _simulate(method: Method, stages: Stages, micro_batches: int, batches: int) -> list[float]:
    """Return when each batch is done on its slowest stage."""
    count, last = len(stages), len(stages) - 1
    order = [
        [(batch, action) for batch in range(batches) for action in _order(method, s, count, micro_batches)]
        for s in range(count)
    ]
    done: dict[tuple[int, int, str, int], float] = {}
    free, next_one = [0.0] * count, [0] * count
    takes = _durations(method, stages)
    moved = True
    while moved:
        moved = False
        for s in range(count):
            while next_one[s] < len(order[s]):
                batch, (kind, m) = order[s][next_one[s]]
                needs: list[tuple[tuple[int, int, str, int], float]] = []
                if kind == "F" and s:
                    needs.append(((s - 1, batch, "F", m), stages.hop))
                elif kind == "B" and s < last and (method != "delayed" or batch):
                    needs.append(((s + 1, batch - (method == "delayed"), "B", m), stages.hop))
                elif kind in ("V", "W") and s < last:
                    needs.append(((last, batch, "E", m), stages.hop))
                if kind == "W" and method == "star+sweep" and s < last:  # corrections pass all stages, each a hop
                    needs += [((t, batch, "V", m), (t - s) * stages.hop) for t in range(s + 1, count)]
                if any(need not in done for need, _ in needs):
                    break
                begin = max([free[s], *(done[need] + hop for need, hop in needs)])
                free[s] = done[s, batch, kind, m] = begin + takes(s, kind)
                next_one[s] += 1
                moved = True
    assert all(n == len(actions) for n, actions in zip(next_one, order, strict=True)), "the stages wait for each other"
    return [max(t for (_, b, _, _), t in done.items() if b == batch) for batch in range(batches)]


def _durations(method: Method, stages: Stages) -> Callable[[int, str], float]:
    last = len(stages) - 1

    def takes(s: int, kind: str) -> float:
        if kind == "F":
            return stages.forward[s]
        if kind == "E":
            return stages.head
        own = stages.backward[s] - (stages.head if s == last and method.startswith("star") else 0.0)
        return own / 2 if kind == "V" else own  # V: without the weights' gradients

    return takes
