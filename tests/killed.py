"""Not a test: processes that are killed by SIGKILL while they save, for test_checkpoints.py and test_resume.py.

    python tests/killed.py runs FOLDER     < {"name": {option: value}, ...}
    python tests/killed.py moments FOLDER
    python tests/killed.py ranks FOLDER

``runs`` trains each run in a process of its own, in FOLDER/name, which is killed in the middle of its save at step 30.
``moments`` trains one run in FOLDER/whole up to its save at step 30. From there it branches into processes, each with
a copy of the folder, FOLDER/1, FOLDER/2 ...; the n-th is killed when, in its save, a file or folder is opened, renamed
or deleted for the n-th time; the last one is not killed. There is an older checkpoint-30 to be written over, a copy of
checkpoint-20. ``ranks`` trains on two ranks (DDP, gloo), of which the second is killed in the save at step 30, before
it has written its last file; then both resume; then comes a straight run. FOLDER/resumed-<rank>.pt and
FOLDER/straight-<rank>.pt hold weights, B_l and the log. Prints one exit status a line.
"""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import LEARNED, make_trainer, weights
from problems import DROPOUT

from grape_hf import GrapeTrainer

KILLED_AT = 30
RUN = dict(samples=24, max_steps=40, save_strategy="steps", save_steps=10)
_TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")


def run_killed(*words: str | Path, runs: dict[str, Any] | None = None) -> list[int]:
    """Run this file; return the exit statuses of the processes that it starts."""
    command = [sys.executable, __file__, *map(str, words)]
    # The same number of threads: a sum in other parts is another sum in its last digits.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, input=json.dumps(runs), capture_output=True, text=True, timeout=240, env=os.environ | threads
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def branch(act: Callable[[], None]) -> int:
    """Run in a new process; return its exit status, which is minus the number of the signal that killed it."""
    sys.stdout.flush()
    state = random.getstate()  # a fork seeds it anew
    if (pid := os.fork()) == 0:
        random.setstate(state)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class KilledInSave(GrapeTrainer):
    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == KILLED_AT:  # weights, optimizer and feedback are written
            kill()
        super()._save_rng_state(output_dir)


class KilledAtEachMoment(GrapeTrainer):
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < KILLED_AT:
            return super()._save_checkpoint(*args, **kwargs)
        whole = Path(self.args.output_dir)
        shutil.copytree(whole / "checkpoint-20", whole / "checkpoint-30")
        for moment in range(1, 1000):
            self.args.output_dir = str(whole.parent / str(moment))
            shutil.copytree(whole, self.args.output_dir)
            status = branch(lambda: self._killed(moment, *args))  # noqa: B023  it ends within this turn
            print(status)
            if status == 0:
                break
        sys.exit()

    def _killed(self, moment: int, *args: Any) -> None:
        touched = 0

        def count(event: str, details: tuple[Any, ...]) -> None:
            nonlocal touched
            if event in _TOUCHES and self.args.output_dir in str(details[0]):
                touched += 1
                if touched == moment:
                    kill()

        sys.addaudithook(count)
        super()._save_checkpoint(*args)


class KilledOnRankOne(GrapeTrainer):
    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == KILLED_AT and self.args.process_index == 1:
            time.sleep(1)  # time enough for the first rank to call the checkpoint complete, if it did not wait
            kill()
        super()._save_rng_state(output_dir)


def on_two_ranks(act: Callable[[], None]) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            act()
            torch.distributed.destroy_process_group()
            os._exit(0)
        processes.append(pid)
    for pid in reversed(processes):
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, flush=True)
        if status and pid == processes[1]:
            time.sleep(0.5)
            os.kill(processes[0], signal.SIGKILL)


def train_rank(folder: Path, name: str, kind: type[GrapeTrainer], resume: bool | None = None) -> None:
    options = RUN | LEARNED | {"per_device_train_batch_size": 2, "save_total_limit": 1}
    trainer = make_trainer(DROPOUT, folder, kind, **options)
    trainer.train(resume_from_checkpoint=resume)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save([weights(trainer), history], folder.parent / f"{name}-{trainer.args.process_index}.pt")


def main(mode: str, folder: Path) -> None:
    gc.collect()
    gc.freeze()  # as in conftest.py
    if mode == "runs":
        for name, options in json.load(sys.stdin).items():
            trainer = make_trainer(DROPOUT, folder / name, KilledInSave, **RUN | options)
            print(branch(trainer.train))
    elif mode == "ranks":
        on_two_ranks(lambda: train_rank(folder / "run", "killed", KilledOnRankOne))
        on_two_ranks(lambda: train_rank(folder / "run", "resumed", GrapeTrainer, resume=True))
        on_two_ranks(lambda: train_rank(folder / "straight", "straight", GrapeTrainer))
    else:
        make_trainer(DROPOUT, folder / "whole", KilledAtEachMoment, save_total_limit=1, **RUN | LEARNED).train()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
