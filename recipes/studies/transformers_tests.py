r"""Do the tests that transformers has of its ``Trainer`` pass with grape_hf's in its place?

    git clone https://github.com/huggingface/transformers ../transformers   # or any other checkout; nothing is copied
    pip install parameterized          # its tests do not start without; the table's had these too: optuna tensorboard
    # sentencepiece bitsandbytes schedulefree torch-optimi lomo-optim galore-torch apollo-torch grokadamw
    OMP_NUM_THREADS=1 python recipes/studies/transformers_tests.py ../transformers    # 15 minutes on one core
    OMP_NUM_THREADS=1 python recipes/studies/transformers_tests.py ../transformers --modes bp --only "resume or best"
    python recipes/studies/transformers_tests.py                    # only the table, of the outcomes that there are

Each file of ``tests/trainer`` that names a Trainer is run three times, by pytest in a process of its own: with the
stock Trainer (``stock``), which tells what can pass on this machine at all; with ``GrapeTrainer(method="bp")``
(``bp``); and with GrapeTrainer as it comes, the recommended preset (``recommended``). ``swap_trainer.py`` does the
swapping, and notes of each training whether its weights and figures end up as the stock Trainer's, bit for bit. No
network is used, slow tests are run too, and those that ask for an accelerator run on the CPU.

Leaves the outcomes in ``transformers_tests/<mode>.json`` and ``transformers_tests/table.md``, which names every test
whose outcome is not the stock Trainer's. The reasons are kept by hand in ``transformers_tests.yaml``; a difference that
has none there is marked as unexplained, and the command fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

FOLDER = Path(__file__).with_suffix("")
LOGS = Path("outputs") / FOLDER.name
MODES = ("stock", "bp", "recommended")
UNEXPLAINED = "**unexplained**"
Outcomes = dict[str, dict[str, Any]]  # by test
NOT_RUN: dict[str, Any] = {"outcome": "not run", "reason": "", "runs": []}


def main() -> None:
    """Run the tests, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, help="a transformers repository; without it, only the table")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--files", nargs="+", help="names of files in tests/trainer; all that name a Trainer by default"
    )
    parser.add_argument("--only", help="run the tests that this matches (pytest -k), and keep the other outcomes")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a test")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if options.checkout is not None:
        for file in options.files or files_to_run(options.checkout):
            for mode in options.modes:
                found = run(options.checkout / "tests" / "trainer" / file, mode, options.only, options.seconds)
                keep(mode, file, found, whole_file=options.only is None)
                print(f"{file}, {mode}: {dict(Counter(test['outcome'] for test in found.values()))}", flush=True)
    outcomes = {mode: read(mode) for mode in MODES}
    text = table(outcomes, yaml.safe_load(FOLDER.with_suffix(".yaml").read_text(encoding="utf-8")))
    (FOLDER / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if UNEXPLAINED in text:
        raise SystemExit(f"Outcomes differ for no known reason: look into them, then say why in {FOLDER.name}.yaml.")


def files_to_run(checkout: Path) -> list[str]:
    """The test files that can meet a swapped class."""
    files = sorted((checkout / "tests" / "trainer").glob("test_*.py"))
    if not files:
        raise SystemExit(f"{checkout} has no tests/trainer/test_*.py: expected a checkout of transformers.")
    return [file.name for file in files if re.search(r"(Trainer|TrainingArguments)\b", file.read_text("utf-8"))]


def run(file: Path, mode: str, only: str | None, seconds: int) -> Outcomes:
    """Run one file in one mode, in a folder to be thrown away."""
    here = Path(__file__).resolve().parent
    LOGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "outcomes.jsonl"
        environment = {
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "PYTEST_ADDOPTS": "-p swap_trainer -p no:cacheprovider",  # by this, tests in processes of their own have it
            "PYTHONDONTWRITEBYTECODE": "1",
            "SWAP_TRAINER_MODE": mode,
            "SWAP_TRAINER_OUTCOMES": str(lines),
            "SWAP_TRAINER_SECONDS": str(seconds),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": folder,
            "RUN_SLOW": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", str(file.resolve())]
        with (LOGS / f"{file.stem}.{mode}.txt").open("w") as log:
            status = subprocess.run(
                command + (["-k", only] if only else []),
                cwd=folder,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            ).returncode
        if status not in (0, 1, 5):  # 5: there is no test, or none that matches
            raise SystemExit(f"pytest ended with status {status} on {file}; see {log.name}.")
        written = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return {test.pop("test"): test for test in written}


def read(mode: str) -> Outcomes:
    """The outcomes that are there."""
    path = FOLDER / f"{mode}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(mode: str, file: str, found: Outcomes, whole_file: bool) -> None:
    """Put new outcomes in place of older ones of the same file."""
    older = {name: test for name, test in read(mode).items() if not (whole_file and f"/{file}::" in name)}
    text = json.dumps(dict(sorted((older | found).items())), indent=0)
    (FOLDER / f"{mode}.json").write_text(text + "\n", encoding="utf-8")


def table(outcomes: dict[str, Outcomes], reasons: dict[str, Any]) -> str:
    """Write the counts, every test that ended otherwise than with the stock Trainer, and what could not run."""
    stock = outcomes["stock"]
    can = [name for name, test in stock.items() if test["outcome"] == "passed"]
    counts = {mode: count(stock, outcomes[mode], can, reasons) for mode in MODES[1:]}
    lines = [
        f"The tests in `tests/trainer` of transformers ({reasons['checkout']}), under transformers "
        f"{transformers.__version__} and torch {torch.__version__} on a CPU without network "
        f"(`python recipes/studies/{FOLDER.name}.py CHECKOUT`). Of {len(stock)} tests {len(can)} pass with the stock "
        "Trainer. Of these,",
        "",
        '| | `method="bp"` | recommended |',
        "| --- | --- | --- |",
        *(f"| {row} | " + " | ".join(str(counts[mode][row]) for mode in MODES[1:]) + " |" for row in counts["bp"]),
    ]
    feedback = [name.rsplit("::", 1)[1] for name in can if trained_with_feedback(outcomes["recommended"], name)]
    lines += ["", "With direct feedback: " + ", ".join(f"`{name}`" for name in feedback) + "."]
    for mode, title in (("bp", 'With `method="bp"`'), ("recommended", "With the recommended preset")):
        lines += ["", f"## {title}, otherwise than with the stock Trainer", ""]
        lines += differences(stock, outcomes[mode], reasons, mode)
    lines += ["", "## Cannot run here: skipped, or failing with the stock Trainer too", "", "| tests | why |"]
    why = Counter(reason_for(name, test, reasons["stock"]) for name, test in stock.items() if name not in can)
    lines += ["| --- | --- |", *(f"| {number} | {reason} |" for reason, number in why.most_common())]
    return "\n".join(lines) + "\n"


def count(stock: Outcomes, found: Outcomes, can: list[str], reasons: dict[str, Any]) -> dict[str, Any]:
    """Count what became of the tests that can run here."""
    passed = [name for name in can if found.get(name, NOT_RUN)["outcome"] == "passed"]
    trained = [name for name in passed if any(training["ours"] for training in found[name]["runs"])]
    feedback = [name for name in trained if trained_with_feedback(found, name)]
    refused = [name for name in can if reasons["refused"] in found.get(name, NOT_RUN)["reason"]]
    pairs = [
        pair for name in stock for pair in zip(digests(stock[name]), digests(found.get(name, NOT_RUN)), strict=False)
    ]
    same = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
    return {
        "pass": len(passed),
        "... and call `train()`": len(trained),
        "... with direct feedback": len(feedback) or "-",
        "are refused, the model having no blocks": len(refused) or "-",
        "end otherwise": len(can) - len(passed) - len(refused),
        "calls of `train()` that end with the stock Trainer's weights and logs, bit for bit": "-" if feedback else same,
    }


def trained_with_feedback(found: Outcomes, name: str) -> bool:
    """Whether a test passed and took steps with direct feedback."""
    test = found.get(name, NOT_RUN)
    return test["outcome"] == "passed" and any(training["feedback_steps"] for training in test["runs"])


def digests(test: dict[str, Any]) -> list[str]:
    """Of the trainings of a test, without those that were refused before the first step."""
    return [training["digest"] for training in test["runs"] if training["steps"]]


def differences(stock: Outcomes, found: Outcomes, reasons: dict[str, Any], mode: str) -> list[str]:
    """Write a row for each reason, with the tests that it explains."""
    tests = defaultdict(list)
    for name, test in stock.items():
        mine, short = found.get(name, NOT_RUN), "`" + name.split("::", 1)[1].replace("::", ".") + "`"
        if mine["outcome"] != test["outcome"] and reasons["refused"] not in mine["reason"]:
            tests[reason_for(name, mine, reasons[mode])].append(f"{short}: {test['outcome']}, now {mine['outcome']}")
        elif mode == "bp" and digests(test) != digests(mine):
            tests[reason_for(name, mine, reasons["bits"])].append(f"{short}: other weights or logs")
    rows = [f"| {'; '.join(names)} | {reason} |" for reason, names in tests.items()]
    return ["| test | why |", "| --- | --- |", *rows] if rows else ["None."]


def reason_for(name: str, test: dict[str, Any], reasons: dict[str, Any]) -> str:
    """Look a reason up: of this test, else of the message that it ended with."""
    by_name = [reason for end, reason in reasons.get("tests", {}).items() if name.endswith(end)]
    by_message = [r for pattern, r in reasons.get("messages", {}).items() if re.search(pattern, test["reason"])]
    return next(iter(by_name + by_message), f"{UNEXPLAINED}: `{test['reason'][:150]!r}`".replace("|", r"\|"))


if __name__ == "__main__":
    main()
