r"""Who does what in which order: torch's schedules for backpropagation, and the one of the star.

With M micro-batches and K stages, a stage's work on micro-batch m is, in torch's letters: F, the forward; B, the whole
backward; I, the part of a backward whose result travels to the stage below; W, the rest of it. In a star

- I makes the error e on the last stage, by a backward through its head alone; on every other it takes e in, and is no
  computation;
- W is the backward through the stage's own blocks, from :math:`\delta_l = B_l e`.

The last stage sends e to every other stage itself (``stage.FeedbackStage``). So e is not held up by what a stage on the
way computes, and no W waits for another stage's W. The actions that send and receive are put in by torch: F is followed
by a send of the hidden states, I by the sends of e.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    _Action,
    _PipelineScheduleRuntime,
)

Kind = Literal["gpipe", "1f1b", "star"]
KEPT = 8  # schedules; each holds buffers for the micro-batches of one shape


def star_order(stages: int, micro_batches: int) -> dict[int, list[Any]]:
    """Return what each stage computes in a star, in order.

    The last stage makes e as soon as a micro-batch has come through, and does its own backwards at the end: so e is on
    its way as early as can be. A stage below does all forwards, since they are what the stages above wait for; then,
    with each e that arrives, it runs its own backward.
    """
    order: dict[int, list[Any]] = {}
    for stage in range(stages):

        def act(kind: Any, m: int, stage: int = stage) -> Any:
            return _Action(stage, kind, m)

        each = range(micro_batches)
        if stage == stages - 1:
            made = [act(kind, m) for m in each for kind in (FORWARD, BACKWARD_INPUT)]
            order[stage] = made + [act(BACKWARD_WEIGHT, m) for m in each]
        else:
            with_e = [act(kind, m) for m in each for kind in (BACKWARD_INPUT, BACKWARD_WEIGHT)]
            order[stage] = [act(FORWARD, m) for m in each] + with_e
    return order


def schedule_for(kind: Kind, stage: Any, micro_batches: int) -> Any:
    """Make a schedule; 1F1B with fewer micro-batches than stages is GPipe, as torch has none.

    Args:
        kind: ``gpipe``, ``1f1b`` or ``star``.
        stage: the ``PipelineStage`` of this process.
        micro_batches: M.
    """
    settings: dict[str, Any] = dict(loss_fn=_sum_of, scale_grads=False)
    if kind == "star":
        schedule = _PipelineScheduleRuntime([stage], micro_batches, **settings)
        schedule._prepare_schedule_with_comms(star_order(stage.num_stages, micro_batches))
        return schedule
    if kind == "1f1b" and micro_batches >= stage.num_stages:
        return Schedule1F1B(stage, micro_batches, **settings)
    return ScheduleGPipe(stage, micro_batches, **settings)


def _sum_of(output: Tensor, target: Any) -> Tensor:
    """The last stage's output is the loss already, as a vector of one number."""
    return output.sum()


class Schedules:
    """The schedules of the shapes that have come up last.

    A schedule has buffers of fixed shapes, so there is one for each shape of micro-batch, number of micro-batches and
    kind. Where texts differ in length there are many: the ``KEPT`` that were used last stay.

    Args:
        make: makes one for a shape, a number of micro-batches and a kind.
    """

    def __init__(self, make: Callable[[Any, int, Kind], Any]) -> None:
        self._make, self._kept = make, OrderedDict[tuple[Any, int, Kind], Any]()

    def get(self, extent: Any, micro_batches: int, kind: Kind) -> Any:
        """Return the schedule, made if need be. All stages must ask for the same ones in the same order."""
        key = (extent, micro_batches, kind)
        if key not in self._kept:
            self._kept[key] = self._make(*key)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


def run(schedule: Any, is_last: bool, train: bool) -> None:
    """Run one batch through the pipeline: forwards and backwards, or forwards alone.

    The stage knows its micro-batches (``FeedbackStage``), so that torch is given none; what it takes for a target only
    says that there is a loss.
    """
    target = {"target": torch.zeros(schedule._n_microbatches)} if is_last else {}
    if train:
        schedule.step(return_outputs=False, **target)
    else:
        with torch.no_grad():
            schedule.eval(**target)
