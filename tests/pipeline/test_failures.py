"""A stage that dies or hangs ends the others in time, with an error that names it and the step."""

import os
import signal
import time
from pathlib import Path

import pytest
import stages
from helpers import OnEvent
from processes import Processes

TIMEOUT = 4  # ddp_timeout, seconds


def train_until(folder: Path, event: str) -> None:
    """Train over three stages; the middle one ends itself, or stops, in its third step."""

    def act(state, **_):
        if state.global_step == 2 and os.environ["RANK"] == "1":
            (folder / "when").write_text(str(time.monotonic()))
            if event == "error":
                raise MemoryError("no memory left")
            os.kill(os.getpid(), getattr(signal, event))

    more = {"callbacks": [OnEvent("step_begin", act)]}
    options = {"method": "bp", "pipeline_stages": 3, "ddp_timeout": TIMEOUT, "eval_strategy": "no", "max_steps": 6}
    stages.train("gpt2-tied", folder / "run", more=more, **options)


@pytest.mark.parametrize("event", ["SIGKILL", "SIGSTOP", "error"])
def test_the_others_end_and_say_who_it_was(event, tmp_path):
    processes = Processes(3)
    with pytest.raises(RuntimeError) as caught:
        processes.run(train_until, tmp_path, event)
    took = time.monotonic() - float((tmp_path / "when").read_text())
    message = str(caught.value)
    for stage in (0, 2):
        assert f"pipeline stage {stage} (replica 0, rank {stage}), step 3: no answer from stage 1 (rank 1)." in message
    assert f"ddp_timeout={TIMEOUT} s" in message
    assert took < TIMEOUT + 12  # five of them are those that the test waits for the process that is no more
    if event == "error":
        assert "In pipeline stage 1 (replica 0, rank 1), step 3." in message
