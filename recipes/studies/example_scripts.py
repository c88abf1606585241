r"""Do the stock example scripts of transformers train with GrAPE by one line more?

    git clone --depth 1 https://github.com/huggingface/transformers        # anywhere outside this project
    OMP_NUM_THREADS=1 python recipes/studies/example_scripts.py path/of/transformers  # 7 minutes, no network
    OMP_NUM_THREADS=1 python recipes/studies/example_scripts.py path/of/transformers --only run_clm --steps 20

Of each script a copy is made in the output folder, with one line after its imports: ``LINE``, and a second copy with
``LINE_WITH_OPTIONS``. Then, each in a process of its own and with the same arguments: the stock script; the copy; both
again from their checkpoint half way; the second copy with options of GrAPE on its command line; the copy with nothing
to train; and the stock script on the model that GrAPE left, which has to come to the same figures.

Scripts that draw at random while they load data (masks, crops) do not resume bit for bit with the stock Trainer either:
accelerate has the next batch ready before the random state is saved.

Texts are Python's own documentation, images stripes and checks, models are tiny and start from random weights:
the figures say that the scripts run and learn, not how well GrAPE does. The scripts ask the Hub for the metric
``accuracy``; they find ours, by the name of a folder where they are started.

Leaves ``table.md`` in the output folder. Fails if a script fails or a check does not hold.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from example_tasks import prepare_clm, prepare_glue, prepare_images, prepare_mlm
from safetensors.torch import load_file

from grape_hf.metrics import accuracy

LINE = "from grape_hf import GrapeTrainer as Trainer"
LINE_WITH_OPTIONS = LINE + ", GrapeTrainingArguments as TrainingArguments"
OPTIONS = "--jvp_steps 2 --alignment_steps 50 --calibration_strategy steps --calibration_interval 20"
COMMON = (
    "--per_device_train_batch_size 16 --per_device_eval_batch_size 64 --logging_steps 10 --seed 0 "
    "--report_to none --use_cpu True --dataloader_pin_memory False --disable_tqdm True"
)


@dataclass
class Example:
    """A script of transformers, and what it is started with."""

    path: str  # in examples/pytorch
    prepare: Callable[[Path], str]  # makes data and model in a folder, returns the arguments that name them
    metrics: tuple[str, ...]  # what of its evaluation stands in the table
    random_evaluation: bool = False  # masks at random, by a random state that training leaves its mark on


@dataclass
class Outcome:
    """What came out for one script: a row of the table."""

    script: str
    stock: dict[str, Any]
    grape: dict[str, Any]
    resumes: tuple[bool, bool]  # bit for bit: with GrAPE, with the stock Trainer
    checks: dict[str, bool]


def main() -> None:
    """Run every script, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkout", type=Path, help="A checkout of transformers.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/example_scripts"))
    parser.add_argument("--steps", type=int, default=300, help="Optimiser steps of each training; an even number.")
    parser.add_argument("--only", nargs="*", choices=list(EXAMPLES), default=list(EXAMPLES))
    args = parser.parse_args()
    started, output = time.time(), args.output_dir.resolve()
    outcomes = []
    for name in args.only:
        print(f"=== {name}", flush=True)
        shutil.rmtree(output / name, ignore_errors=True)
        outcomes.append(try_script(name, args.checkout.resolve(), output / name, args.steps))
        print(outcomes[-1])
    text = report(outcomes, args.steps, time.time() - started)
    (output / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if failed := failures(outcomes):
        raise SystemExit("These do not hold:\n" + "\n".join(failed))


def failures(outcomes: list[Outcome]) -> list[str]:
    """List what does not hold; where the stock Trainer does not resume bit for bit neither need we."""
    checks = [f"{o.script}: {check}" for o in outcomes for check, holds in o.checks.items() if not holds]
    return checks + [f"{o.script}: resumes" for o in outcomes if o.resumes == (False, True)]


def try_script(name: str, checkout: Path, folder: Path, steps: int) -> Outcome:
    """Run one script in all ways in a folder of its own, and look at what it left."""
    example = EXAMPLES[name]
    folder.mkdir(parents=True)
    # The scripts say evaluate.load("accuracy"): looked for here before the Hub is asked.
    (folder / "accuracy").mkdir()
    shutil.copy(str(accuracy.__file__), folder / "accuracy" / "accuracy.py")
    stock = checkout / "examples" / "pytorch" / example.path
    patched, with_options = (folder / kind / stock.name for kind in ("patched", "patched_with_options"))
    for copy, line in ((patched, LINE), (with_options, LINE_WITH_OPTIONS)):
        copy.parent.mkdir()
        copy.write_text(patch(stock.read_text(encoding="utf-8"), line), encoding="utf-8")
    model = example.prepare(folder)
    training = f"{model} {COMMON} --do_train --do_eval --max_steps {steps} --save_steps {steps // 2}"

    def run(script: Path, arguments: str, output: str) -> dict[str, Any]:
        start(script, f"{arguments} --output_dir {output}", folder)
        return json.loads((folder / output / "all_results.json").read_text(encoding="utf-8"))

    def resumed(script: Path, of: str) -> bool:
        again, checkpoint = f"{of}_resumed", f"checkpoint-{steps // 2}"
        shutil.copytree(folder / of / checkpoint, folder / again / checkpoint)
        run(script, f"{training} --resume_from_checkpoint {again}/{checkpoint}", again)
        return not differences(folder / of, folder / again, steps)

    results = {"stock": run(stock, training, "stock"), "grape": run(patched, training, "grape")}
    run(with_options, f"{training} {OPTIONS}", "options")
    evaluation = f"{use_model(model, 'grape')} {COMMON} --do_eval"
    opened = [run(script, evaluation, output) for script, output in ((stock, "opened"), (patched, "evaluated"))]
    compared = opened if example.random_evaluation else [*opened, results["grape"]]
    history, more = (read_history(folder / output) for output in ("grape", "options"))
    calibrated = max(entry.get("grape/calibration/steps", 0) for entry in more)
    checks = {
        "card": "with **GrAPE**" in card(folder / "grape") and "with **GrAPE**" in card(folder / "options"),
        "alignment in the logs": logged(history, "grape/alignment/estimate/mean")
        and logged(history, "grape/alignment/estimate/h_1"),
        "options": logged(more, "grape/alignment/exact/mean") and calibrated == steps // 20,
        "opened by the stock script": all(
            run[m] == compared[0][m] for run in compared for m in ("eval_loss", *example.metrics)
        ),
    }
    resumes = resumed(patched, "grape"), resumed(stock, "stock")
    return Outcome(name, results["stock"], results["grape"], resumes, checks)


def patch(source: str, line: str) -> str:
    """Put a line after the last import of something of transformers at the top level of a script."""
    lines = source.splitlines(keepends=True)
    imports = [
        node.end_lineno or 0
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers"
    ]
    return "".join([*lines[: max(imports)], line + "\n", *lines[max(imports) :]])


def start(script: Path, arguments: str, folder: Path) -> None:
    """Run a script as a user would, with no Hub and caches of its own; what it says goes into a file."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    output = arguments.split()[-1]
    print(f"{script.name} {output}", flush=True)
    with (folder / f"{output}.log").open("w") as log:
        command = [sys.executable, str(script), *arguments.split()]
        status = subprocess.run(command, cwd=folder, env=os.environ | quiet, stdout=log, stderr=log).returncode
    if status:
        raise SystemExit(f"{script} failed with status {status}; see {folder / output}.log")


def use_model(arguments: str, model: str) -> str:
    """Name another model in the arguments."""
    return arguments.replace("--model_name_or_path model", f"--model_name_or_path {model}")


def read_history(run: Path) -> list[dict[str, Any]]:
    """Read what a run logged."""
    return json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def logged(history: list[dict[str, Any]], name: str) -> bool:
    """Whether a cosine was logged under a name."""
    values = [entry[name] for entry in history if name in entry]
    return bool(values) and all(-1 <= value <= 1 for value in values)


def card(run: Path) -> str:
    """Read the model card of a run."""
    return (run / "README.md").read_text(encoding="utf-8")


def differences(a: Path, b: Path, step: int) -> list[str]:
    """Return what is not the same bit for bit at the end of two runs: weights, B_l, logged losses, evaluation."""
    last = f"checkpoint-{step}"
    found = []
    for name in ("model.safetensors", f"{last}/grape_feedback.safetensors"):
        if not (a / name).exists() and name != "model.safetensors":
            continue  # of the stock Trainer
        mine, other = load_file(a / name), load_file(b / name)
        found += [f"{name}: {key}" for key in mine if not torch.equal(mine[key], other[key])]
    histories = [read_history(run) for run in (a, b)]
    for name in ("loss", "eval_loss", "grape/alignment/estimate/mean"):
        values = [[(entry["step"], entry[name]) for entry in history if name in entry] for history in histories]
        if values[0] != values[1]:
            found.append(f"the logged {name}")
    return found


EXAMPLES = {
    "run_clm": Example("language-modeling/run_clm.py", prepare_clm, ("perplexity", "eval_accuracy")),
    "run_mlm": Example(
        "language-modeling/run_mlm.py", prepare_mlm, ("perplexity", "eval_accuracy"), random_evaluation=True
    ),
    "run_glue": Example("text-classification/run_glue.py", prepare_glue, ("eval_accuracy",)),
    "run_image_classification": Example(
        "image-classification/run_image_classification.py", prepare_images, ("eval_accuracy",)
    ),
}


def report(outcomes: list[Outcome], steps: int, seconds: float) -> str:
    """Write the table."""
    checks = list(outcomes[0].checks)
    lines = [
        f"The stock example scripts of transformers, with its own Trainer and that of grape_hf: {steps} steps each,"
        " the same arguments, tiny models, tiny data. The figures show that the scripts run and learn, not how well "
        f"GrAPE does. torch {torch.__version__}, transformers {transformers.__version__}, {seconds / 60:.0f} minutes "
        "(`python recipes/studies/example_scripts.py path/of/transformers`).",
        "",
        "The patch of each script, after its last import of transformers. `options`: the same with the longer line and "
        f"`{OPTIONS}` on the command line.",
        "",
        "```diff",
        f"+{LINE}",
        f"+{LINE_WITH_OPTIONS}",
        "```",
        "",
        "Perplexity is exp(eval_loss), as the scripts reckon it; for GPT-2 transformers divides that loss by all "
        "labels, of which the first of a block of 64 is never predicted.",
        "",
        "| script | figure | stock | GrAPE |",
        "| --- | --- | ---: | ---: |",
    ]
    for outcome in outcomes:
        for figure in ("train_loss", "eval_loss", *EXAMPLES[outcome.script].metrics):
            lines.append(f"| {outcome.script} | {figure} | {outcome.stock[figure]:.4g} | {outcome.grape[figure]:.4g} |")
    lines += [
        "",
        "To resume bit for bit is to have the weights, B_l, logged losses and evaluation of the run that nobody "
        "interrupted. Masks and crops that are drawn while data is loaded prevent it with either Trainer.",
        "",
        "| script | resumes bit for bit | stock resumes bit for bit | " + " | ".join(checks) + " |",
        "| --- | --- | --- |" + " --- |" * len(checks),
    ]
    for outcome in outcomes:
        cells = ["yes" if holds else "no" for holds in (*outcome.resumes, *outcome.checks.values())]
        lines.append(f"| {outcome.script} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
