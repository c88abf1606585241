"""Real processes on the CPU, two of them unless told otherwise, joined by gloo, that run one function after the other.

They are started once and import everything once; a test then costs what it computes. What they run must be a function
at the top level of a module, and what goes in and out must be picklable. Each call starts as in a new process: the
singletons of accelerate are forgotten, the seed is the same.
"""

import gc
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

WORLD = 2
TIMEOUT = 60  # seconds, for one call: a rank that waits for ever is an error


class Processes:
    """The processes. ``run`` them a function; ``close`` them at the end, or after an error, to be started anew.

    Args:
        world: how many there are.
    """

    def __init__(self, world: int = WORLD) -> None:
        self.world = world
        self._ranks: list[tuple[Any, Connection]] = []
        self._joined = 0  # how many were joined to each other last

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function`` in each process, and return the results by rank."""
        return self.run_on(self.world, function, *args, **kwargs)

    def run_on(self, world: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function`` in the first ``world`` processes, which then are all that there are."""
        if not self._ranks:
            self._start()
        port = None if world == self._joined else _free_port()
        self._joined = world
        taking_part = self._ranks[:world]
        for _, connection in taking_part:
            connection.send((function, args, kwargs, world, port))
        results, errors = [], []
        for rank, (_, connection) in enumerate(taking_part):
            if not connection.poll(TIMEOUT if not errors else 5):
                errors.append(f"rank {rank} gave no answer in {TIMEOUT} s")
                continue
            try:
                result, error = connection.recv()
            except EOFError:
                result, error = None, "the process died"
            results.append(result)
            if error:
                errors.append(f"rank {rank}:\n{error}")
        if errors:
            self.close()  # the other rank may wait for one that failed
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()  # one that is stopped does not hear anything else
            process.join()
        self._ranks, self._joined = [], 0

    def _start(self) -> None:
        # One process imports everything and then becomes each of them.
        spawning = multiprocessing.get_context("forkserver")
        spawning.set_forkserver_preload(["torch", "accelerate", "transformers", "helpers"])
        for rank in range(self.world):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(target=_serve, args=(theirs, rank, self.world, _free_port()), daemon=True)
            process.start()
            self._ranks.append((process, ours))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank: int, port: int, world: int = WORLD) -> dict[str, str]:
    """What ``accelerate launch`` and torchrun would set for the process."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return {name: str(value) for name, value in places.items()} | fixed


def _serve(connection: Connection, rank: int, world: int, port: int) -> None:
    os.environ |= environment(rank, port, world)
    gc.disable()  # until everything is imported, as in conftest.py in the folder above
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # by torch 2.14; accelerate gives it
    torch.set_num_threads(1)
    kept = dict(os.environ)
    while True:
        try:
            function, args, kwargs, world, port = connection.recv()
        except EOFError:
            return
        if port is not None:
            if dist.is_initialized():
                dist.destroy_process_group()
            kept |= environment(rank, port, world)
        os.environ.clear()
        os.environ |= kept
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState(cpu=True, backend="gloo")
        torch.manual_seed(0)
        gc.collect()
        gc.freeze()
        gc.enable()
        try:
            connection.send((function(*args, **kwargs), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
