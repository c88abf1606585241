"""Who waits for whom. The first half reads the order of actions, the second watches real processes."""

import time
from pathlib import Path
from typing import Any

import pytest
import stages
from helpers import OnEvent, make_trainer
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    SEND_B,
    SEND_F,
    _add_send_recv,
)

from grape_hf.pipeline import schedules
from grape_hf.pipeline.stage import FeedbackStage


def ancestors(count: int, micro_batches: int) -> dict[Any, set[Any]]:
    """For each action of a star all that it has to wait for: on its own stage, and by transfers."""
    order = _add_send_recv(schedules.star_order(count, micro_batches), lambda stage: stage, count)
    waits: dict[Any, set[Any]] = {}
    done: dict[int, int] = dict.fromkeys(order, 0)
    while any(done[stage] < len(actions) for stage, actions in order.items()):
        before = dict(done)
        for stage, actions in order.items():
            while done[stage] < len(actions):
                action = actions[done[stage]]
                kind, m = action.computation_type, action.microbatch_index
                needs = [actions[done[stage] - 1]] if done[stage] else []
                # A receive is asked for and not waited for: who computes with it waits.
                if kind == FORWARD and stage:
                    needs += [a for a in order[stage - 1] if a.computation_type == SEND_F and a.microbatch_index == m]
                if kind == BACKWARD_INPUT and stage < count - 1:  # e is the last stage's
                    needs += [a for a in order[count - 1] if a.computation_type == SEND_B and a.microbatch_index == m]
                if any(need not in waits for need in needs):
                    break
                waits[action] = set(needs).union(*(waits[need] for need in needs))
                done[stage] += 1
        assert done != before, "the stages wait for each other"
    return waits


@pytest.mark.parametrize(("count", "micro_batches"), [(2, 1), (2, 4), (3, 1), (3, 4), (5, 2), (8, 16)])
def test_no_backward_waits_for_another_stages_backward(count, micro_batches):
    waits = ancestors(count, micro_batches)
    backwards = [action for action in waits if action.computation_type == BACKWARD_WEIGHT]
    assert len(backwards) == count * micro_batches
    for action in backwards:
        others = {a for a in waits[action] if a.computation_type == BACKWARD_WEIGHT and a[0] != action[0]}
        assert not others
        if action[0] < count - 1:  # but for e, it waits for no more than forwards
            e = {a for a in waits[action] if a.computation_type == SEND_B and a[0] == count - 1}
            assert len(e) == action.microbatch_index + 1


def test_as_many_schedules_stay_as_are_kept():
    made = []
    kept = schedules.Schedules(lambda *key: made.append(key) or key)
    for shape in [*range(10), 9, 2, 0]:
        kept.get(shape, 2, "gpipe")
    assert [shape for shape, *_ in made] == [*range(10), 0]


def watched(folder: Path, slow: int, options: dict[str, Any]) -> list[tuple[str, int, float]]:
    """Train over three stages, of which one is slow in its backwards; say what was when, after a first step."""
    events: list[tuple[str, int, float]] = []

    class Slow(FeedbackStage):
        def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
            events.append(("F", fwd_chunk_id, time.monotonic()))
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

        def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
            if self.stage_index == slow:
                time.sleep(0.3)
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            events.append(("W", bwd_chunk_id, time.monotonic()))

    import grape_hf.pipeline.step as step

    usual, step.FeedbackStage = step.FeedbackStage, Slow
    try:
        usual_options = {"pipeline_stages": 3, "pipeline_microbatches": 2, "max_grad_norm": 0.0, "ddp_timeout": 30}
        options = usual_options | {"logging_steps": 100} | options  # a log puts the stages' losses together
        # torch's schedules make their connections in the first batch.
        begun = OnEvent("step_begin", lambda state, **_: events.clear() if state.global_step == 1 else None)
        make_trainer(stages.PROBLEMS["gpt2-untied"], folder, more={"callbacks": [begun]}, **options).train()
    finally:
        step.FeedbackStage = usual
    return events


METHODS = [{"method": "dfa"}, {"method": "grape", "feedback_rule": "local", "jvp_steps": 1}]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_stage_does_not_wait_for_a_slow_one_in_the_middle(method, processes, tmp_path):
    found = processes.run_on(3, watched, tmp_path, 1, method | {"max_steps": 2})
    first, middle, last = ([e for e in events if e[0] == "W"] for events in found)
    assert [number for _, number, _ in first] == [0, 1]
    assert max(when for *_, when in first + last) < max(when for *_, when in middle)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_stage_begins_a_batch_while_the_last_is_at_the_one_before(method, processes, tmp_path):
    """It hands the batch up and goes on."""
    first, _, last = processes.run_on(3, watched, tmp_path, 2, method | {"max_steps": 3})
    begun = [when for kind, number, when in first if kind == "F" and number == 0]
    ended = [when for kind, number, when in last if kind == "W" and number == 1]
    assert begun[1] < ended[0] - 0.2
