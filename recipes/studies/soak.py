r"""Is anything lost when a run is killed again and again? Twenty SIGKILLs at random moments, some within a save.

    OMP_NUM_THREADS=1 python recipes/studies/soak.py recipes/studies/soak.yaml      # 5 minutes on one core
    OMP_NUM_THREADS=1 python recipes/studies/soak.py recipes/studies/soak.yaml --kills 2 --max_steps 60

A tiny GPT-2 on a made-up text is trained twice: straight, and by processes that are killed one after the other, each of
which goes on from the last complete checkpoint. In the end both runs must have the same weights, optimiser state, B_l
and logged losses, bit for bit. Only one checkpoint is kept. A kill comes some steps after a process began to train, and
then up to 50 ms later, which is longer than a step and a save take.

Leaves ``table.md`` in the output folder; recipes/studies/soak/table.md is one of these. Fails if anything differs.
"""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.engine.checkpoints import faults, last_checkpoint
from grape_hf.recipes.parsing import parse_recipe

EVENTS, LOG = "events.txt", "log.txt"
MOMENT = 0.05  # seconds


@dataclass
class SoakArguments:
    """How often to kill."""

    kills: int = field(default=20, metadata={"help": "How many processes to kill before one may finish."})
    worker: bool = field(default=False, metadata={"help": "Train in this process (the script starts itself so)."})


@dataclass
class Kill:
    """What one killed process did: a row of the table."""

    began_at: int
    killed_after: int
    saved: int | None  # its last complete checkpoint
    interrupted: str  # what is missing in the checkpoint whose save was cut short; empty if none was


def main() -> None:
    """Train straight, train under fire, compare."""
    soak_args, training_args = parse_recipe(SoakArguments, GrapeTrainingArguments)
    if soak_args.worker:
        work(training_args)
        return
    output = Path(training_args.output_dir)
    shutil.rmtree(output, ignore_errors=True)
    straight, killed = output / "straight", output / "killed"
    started = time.time()
    finish(start(straight))
    chance = random.Random(training_args.seed)
    kills = []
    for _ in range(soak_args.kills):
        steps = chance.randint(1, 2 * training_args.max_steps // (soak_args.kills + 2))
        kills.append(kill_after(start(killed), killed, steps, training_args.max_steps, chance.uniform(0, MOMENT)))
        print(kills[-1])
    finish(start(killed))
    said = (killed / LOG).read_text().count("which is incomplete")
    differences = compare(straight, killed, training_args.max_steps)
    text = report(kills, said, differences, training_args, time.time() - started)
    (output / "table.md").write_text(text)
    print(text)
    if differences:
        raise SystemExit("The killed run is not the straight one.")


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that trains in ``folder``, from the last complete checkpoint there if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", "true", "--output_dir", str(folder)]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that nobody kills."""
    if process.wait():
        raise SystemExit(f"A process failed with status {process.returncode}; see {LOG} in its folder.")


def kill_after(process: subprocess.Popen[bytes], folder: Path, steps: int, last: int, moment: float) -> Kill:
    """Kill a process ``moment`` seconds after it has done ``steps`` steps; never in the last ones of the run."""
    first = seen = -1
    while first < 0 or seen < min(first + steps, last - 5):
        if process.poll() is not None:
            raise SystemExit(f"A process ended before it was killed, with status {process.returncode}; see {LOG}.")
        events = (folder / EVENTS).read_text().split("\n")[:-1] if (folder / EVENTS).exists() else []
        mine = [event.split()[1:] for event in events if event.startswith(f"{process.pid} ")]
        first = next((int(step) for event, step in mine if event == "began"), -1)
        seen = max((int(step) for _, step in mine), default=-1)
        time.sleep(0.002)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [e.split() for e in (folder / EVENTS).read_text().split("\n")[:-1]]
    killed_after = max(int(step) for pid, _, step in done if pid == str(process.pid))
    under_way = folder / f"checkpoint-{killed_after}"
    saved = last_checkpoint(folder)
    return Kill(
        began_at=first,
        killed_after=killed_after,
        saved=int(saved.rsplit("-", 1)[1]) if saved else None,
        interrupted="; ".join(faults(under_way)) if under_way.exists() else "",
    )


def work(args: GrapeTrainingArguments) -> None:
    """Train, or go on training, and write down each step."""
    logging.basicConfig(level=logging.INFO)
    set_seed(args.seed)
    config = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=31, n_positions=16, bos_token_id=0, eos_token_id=0)
    trainer = GrapeTrainer(model=GPT2LMHeadModel(config), args=args, train_dataset=made_up_text(256, args.seed))
    trainer.add_callback(Events(Path(args.output_dir) / EVENTS))
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))


class Events(TrainerCallback):
    """Write ``<process> began|did <step>`` lines, each at once."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", buffering=1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step that the process starts from."""
        self.file.write(f"{os.getpid()} began {state.global_step}\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a finished step."""
        self.file.write(f"{os.getpid()} did {state.global_step}\n")


def made_up_text(samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Walks in small steps through the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (samples, 16), generator=generator)
    ids = (torch.randint(31, (samples, 1), generator=generator) + steps.cumsum(1)) % 31
    return [{"input_ids": row, "labels": row} for row in ids]


def compare(straight: Path, killed: Path, step: int) -> list[str]:
    """Return what differs between the last checkpoints of two runs."""
    a, b = (folder / f"checkpoint-{step}" for folder in (straight, killed))
    differences = []
    for name in ("model.safetensors", "grape_feedback.safetensors"):
        mine, other = load_file(a / name), load_file(b / name)
        differences += [f"{name}: {key}" for key in mine if not torch.equal(mine[key], other[key])]
    moments = [torch.load(c / "optimizer.pt", weights_only=True)["state"] for c in (a, b)]
    for key, state in moments[0].items():
        differences += [f"optimizer: {key} {n}" for n, t in state.items() if not torch.equal(t, moments[1][key][n])]
    histories = [json.loads((c / "trainer_state.json").read_text())["log_history"] for c in (a, b)]
    for name in ("loss", "grad_norm", "learning_rate", "grape/calibration/steps", "grape/feedback/skipped"):
        logs = [[(entry["step"], entry[name]) for entry in history if name in entry] for history in histories]
        if logs[0] != logs[1] or len(logs[0]) != step:
            differences.append(f"the logged {name}")
    return differences


def report(kills: list[Kill], said: int, differences: list[str], args: GrapeTrainingArguments, seconds: float) -> str:
    """Write the table."""
    cut = sum(bool(kill.interrupted) for kill in kills)
    outcome = "differ in " + ", ".join(differences) if differences else "equal bit for bit"
    lines = [
        f"A run of {args.max_steps} steps, a checkpoint every {args.save_steps:g}, {args.save_total_limit} kept, "
        f"killed {len(kills)} times; {cut} kills fell within a save, and {said} times a process said that it skipped "
        "what was left of one. Weights, B_l, optimiser state and logged losses of this run and of one that nobody "
        f"killed: {outcome}. torch {torch.__version__}, {seconds / 60:.0f} minutes "
        "(`python recipes/studies/soak.py recipes/studies/soak.yaml`).",
        "",
        "| kill | began at step | killed after step | last complete checkpoint | steps to do again | save cut short |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, kill in enumerate(kills, 1):
        row = asdict(kill) | {"again": kill.killed_after - (kill.saved or 0)}
        cells = [row[name] for name in ("began_at", "killed_after", "saved", "again", "interrupted")]
        lines.append(f"| {number} | " + " | ".join("-" if c in (None, "") else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
