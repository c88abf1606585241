"""When a stage dies or hangs, every other ends with an error that says which stage it was, and in which step.

A process notices by itself: a transfer fails when the other side is gone, and after ``ddp_timeout`` seconds when it
does not answer. It then leaves a note in the store that all processes share, and looks who left none.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from grape_hf.pipeline.places import Places

# What gloo and NCCL say of a process that is gone or does not answer.
_SIGNS = ("connection", "timed out", "timeout", "closed by peer", "nccl", "socket", "broken pipe")
GRACE = 3.0  # seconds for the others to notice as well


@contextmanager
def named_failures(places: Places, state: Any, timeout: float) -> Iterator[None]:
    """Say of an error in which stage and step it came up, and of a transfer that failed, who did not answer.

    Args:
        places: of this process.
        state: the Trainer's, for the step.
        timeout: ``ddp_timeout``, for the message.

    Raises:
        RuntimeError: in place of one that a transfer ended with.
    """
    try:
        yield
    except Exception as error:
        step = state().global_step + 1
        where = f"pipeline stage {places.stage} (replica {places.replica}, rank {dist.get_rank()}), step {step}"
        if not _is_transfer(error):
            error.add_note(f"In {where}.")
            raise
        silent = _silent(places, step)
        raise RuntimeError(
            f"{where}: no answer from {silent}. That process died, ran out of memory, or hung for more than "
            f"ddp_timeout={timeout:g} s; its own log says which. The last complete checkpoint resumes."
        ) from error


def _is_transfer(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return False
    known = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS))


def _silent(places: Places, step: int) -> str:
    """Return the stages that left no note."""
    from torch.distributed.distributed_c10d import _get_default_store

    ranks = range(dist.get_world_size())
    noted = {dist.get_rank()}
    with suppress(Exception):  # the process that keeps the store may be the one that is gone
        store = _get_default_store()
        store.set_timeout(timedelta(seconds=GRACE))
        store.set(f"pipeline-lost/{dist.get_rank()}", str(step))
        deadline = time.monotonic() + GRACE
        while len(noted) < len(ranks) - 1 and time.monotonic() < deadline:
            noted |= {rank for rank in ranks if rank not in noted and store.check([f"pipeline-lost/{rank}"])}
            time.sleep(0.05)
    missing = [rank for rank in ranks if rank not in noted]
    if len(missing) == len(ranks) - 1 and len(missing) > 1:
        return "another stage"
    return " and ".join(f"stage {rank % places.stages} (rank {rank})" for rank in missing) or "another stage"
