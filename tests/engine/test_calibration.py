"""When the schedule says yes."""

import pytest
import torch

from grape_hf.engine.calibration import CalibrationSchedule


def days(schedule: CalibrationSchedule, steps: int) -> list[int]:
    return [step for step in range(steps) if schedule.due(step)]


@pytest.mark.parametrize("seed", range(5))
def test_one_step_in_every_epoch(seed):
    taken = days(CalibrationSchedule("epoch", 1.0, seed=seed, steps_per_epoch=7), 70)
    assert [step // 7 for step in taken] == list(range(10))


def test_the_step_in_an_epoch_is_random_and_seeded():
    def of(seed: int) -> list[int]:
        return days(CalibrationSchedule("epoch", 1.0, seed=seed, steps_per_epoch=50), 1000)

    assert of(0) == of(0)
    assert of(0) != of(1)
    assert len({step % 50 for step in of(0)}) > 10  # of 20 draws from 50 places


def test_every_step_of_an_epoch_can_be_it():
    chosen = {
        s % 4 for seed in range(20) for s in days(CalibrationSchedule("epoch", 1, seed=seed, steps_per_epoch=4), 8)
    }
    assert chosen == {0, 1, 2, 3}


@pytest.mark.parametrize(("interval", "steps_per_epoch", "window"), [(0.25, 8, 2), (2, 5, 10), (0.1, 30, 3)])
def test_fractions_and_multiples_of_an_epoch(interval, steps_per_epoch, window):
    schedule = CalibrationSchedule("epoch", interval, steps_per_epoch=steps_per_epoch)
    assert [step // window for step in days(schedule, 20 * window)] == list(range(20))


def test_windows_that_are_not_whole_steps():
    taken = days(CalibrationSchedule("epoch", 0.5, steps_per_epoch=5), 50)
    assert len(taken) == 20  # 2.5 steps a window


def test_every_n_steps():
    assert days(CalibrationSchedule("steps", 4), 13) == [3, 7, 11]


def test_never():
    assert not days(CalibrationSchedule("no"), 100)


def test_adaptive_waits_for_the_threshold_and_the_cooldown():
    schedule = CalibrationSchedule("adaptive", threshold=0.5, cooldown=10)
    assert not schedule.due(0)  # nothing known yet
    schedule.observe(torch.tensor(0.9))
    assert not schedule.due(1)
    observed = 0
    while not schedule.due(5):
        schedule.observe(torch.tensor(0.0))
        observed += 1
    assert 2 <= observed <= 10  # smoothed: a single low estimate is not enough
    schedule.taken(5)
    assert not schedule.due(14)
    assert schedule.due(15)
    for _ in range(50):
        schedule.observe(torch.tensor(0.9))
    assert not schedule.due(15)


def test_adaptive_ignores_what_is_undefined():
    schedule = CalibrationSchedule("adaptive", threshold=0.5)
    schedule.observe(torch.tensor(0.1))
    schedule.observe(torch.tensor(float("nan")))
    assert schedule.due(0)


def test_state_survives():
    schedule = CalibrationSchedule("adaptive", threshold=0.5, cooldown=10)
    schedule.observe(torch.tensor(0.1))
    schedule.taken(3)
    resumed = CalibrationSchedule("adaptive", threshold=0.5, cooldown=10)
    resumed.load_state_dict(schedule.state_dict())
    assert [resumed.due(step) for step in range(20)] == [schedule.due(step) for step in range(20)]
    assert resumed.count == 1


def test_an_unknown_or_too_short_epoch_is_refused():
    with pytest.raises(ValueError, match='streaming.*calibration_strategy="steps"'):
        CalibrationSchedule("epoch", 1.0)
    with pytest.raises(ValueError, match="less than one optimiser step: an epoch has 5"):
        CalibrationSchedule("epoch", 0.1, steps_per_epoch=5)
