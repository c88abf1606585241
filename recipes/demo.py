"""The main job in a few minutes, without a network: GrAPE and backpropagation side by side on the embedded sample.

    make demo                   # or: python recipes/demo.py [output folder, default outputs/demo]

Runs ``recipes/wikitext103.py`` with ``recipes/demo.yaml`` twice, from the same weights, on the same batches, for the
same number of steps; then prints a table, the path of a plot and what the model trained with GrAPE writes. The figures
are of a tiny model on a tiny text (Python's own documentation): they show that it runs and learns, not how well GrAPE
does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from grape_hf.cards import write_card
from grape_hf.plots import plot_runs, read_history

RECIPES = Path(__file__).resolve().parent
METHODS = {"bp": "backpropagation", "grape": "GrAPE"}


def main() -> None:
    """Train with each method, then compare."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo")
    for i, (method, name) in enumerate(METHODS.items(), start=1):
        print(f"\n=== {i} of {len(METHODS)}: training with {name}, about a minute on one core ===", flush=True)
        train(method, output / method)
    results = {method: read_results(output / method) for method in METHODS}
    plot = plot_runs({name: read_history(output / method) for method, name in METHODS.items()}, output / "demo.png")
    table = make_table(results)
    (output / "table.md").write_text(table, encoding="utf-8")
    write_card(output / "grape", bp_results=output / "bp")  # again, now that there is something to compare with
    print(f"\n=== Both trained on the {results['grape']['dataset']} ===\n\n{table}")
    print(f"Loss curves and alignment: {plot}")
    print(f"The model, for AutoModelForCausalLM.from_pretrained: {output / 'grape'}")
    print(f"\nWhat the model trained with GrAPE writes after the first words:\n\n{read_sample(output / 'grape')}")


def train(method: str, output: Path) -> None:
    """Run the main job in a process of its own, as a user would."""
    launch = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    job = [RECIPES / "wikitext103.py", RECIPES / "demo.yaml", "--method", method, "--output_dir", output]
    one_device = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ  # several in one process would mean nn.DataParallel
    subprocess.run([sys.executable, *launch.split(), *map(str, job)], check=True, env=one_device)


def read_results(run: Path) -> dict[str, Any]:
    """Read the metrics of a run, and reckon the time of a step; nothing but training falls into it."""
    results = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
    return results | {"seconds_per_step": 1 / results["train_steps_per_second"]}


def make_table(results: dict[str, dict[str, Any]]) -> str:
    """Write the results as a Markdown table, a row for each method."""
    lines = [
        "| trained with    | perplexity per token | perplexity per word | seconds a step |",
        "| --------------- | -------------------: | ------------------: | -------------: |",
    ]
    for method, result in results.items():
        token, word, seconds = (result[k] for k in ("eval_perplexity", "eval_word_perplexity", "seconds_per_step"))
        lines.append(f"| {METHODS[method]:15} | {token:20.1f} | {word:19.0f} | {seconds:14.3f} |")
    return "\n".join(lines) + "\n"


def read_sample(run: Path) -> str:
    """Read what the run wrote at its end."""
    return (run / "sample.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
