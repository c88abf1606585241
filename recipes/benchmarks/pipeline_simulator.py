r"""How long would a batch take over 2 to 64 stages? Reckoned from the measured times of one block, and drawn.

    python recipes/benchmarks/pipeline_simulator.py                            # after pipeline.py; seconds
    python recipes/benchmarks/pipeline_simulator.py --blocks 64 --hop 0.001

It reads recipes/benchmarks/results/pipeline_cpu_K.json, where pipeline.py has put the times of a block, the head and a
transfer, and of whole batches, and pipeline_asleep_K.json, where stages slept in the place of computing. First it
reckons the batches that were measured, and states how far off it is. Then it gives every method's time over many
stages, in those of 1F1B, for one micro-batch and for more. All stages have equally many blocks, the head is left out,
and no stage waits for the others at the end of a batch.

One micro-batch and many stages are where the paper's "a third of backpropagation" holds: the star fills the pipeline
with forwards alone. With many more micro-batches than stages every schedule is near the work itself, and it is gone.

Writes a table (Markdown, CSV) and a plot beside what it reads.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from grape_hf.pipeline.timing import METHODS, Method, Stages, time_per_batch

RESULTS = Path(__file__).parent / "results"
COUNTS = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
MICRO_BATCHES = [1, 4, 16, 64]
# What was measured, by the name that it has here.
MEASURED: dict[str, Method] = {
    "bare gpipe": "gpipe",
    "bare 1f1b": "1f1b",
    "bare star": "star",
    "delayed": "delayed",
    "zero-bubble": "zero-bubble",
    "interleaved": "interleaved",
}


def main() -> None:
    """Check against what was measured; reckon, write and draw the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", help="default: all that pipeline.py has left")
    parser.add_argument("--blocks", type=int, default=0, help="of the model; default: one a stage")
    parser.add_argument("--hop", type=float, help="seconds of a transfer; default: as measured")
    options = parser.parse_args()
    found = options.results or [
        p for kind in ("cpu", "asleep") for p in sorted(RESULTS.glob(f"pipeline_{kind}_?.json"))
    ]
    if not found:
        raise SystemExit(f"nothing to reckon with in {RESULTS}: run recipes/benchmarks/pipeline.py first.")
    results = [json.loads(path.read_text()) for path in found]
    errors = [row for result in results for row in compared(result)]
    rows = reckoned(results[0], options.blocks, options.hop)
    text = report(errors, rows)
    (RESULTS / "pipeline_simulated.md").write_text(text)
    with (RESULTS / "pipeline_simulated.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, RESULTS / "pipeline_simulated.png")
    print(text)


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Reckon the batches that were measured."""
    setting, parts, rows = result["setting"], result["parts"], []
    count = setting["stages"]
    blocks = [(s + 1) * setting["layers"] // count - s * setting["layers"] // count for s in range(count)]
    for key, seconds in result["seconds"].items():
        name, number = key.split("/")
        if name not in MEASURED:
            continue
        forward = [n * parts["forward"][number] for n in blocks]
        backward = [n * parts["backward"][number] for n in blocks]
        forward[-1] += parts["head_forward"][number]
        backward[-1] += parts["head_backward"][number]
        stages = Stages(forward, backward, parts["head_backward"][number], parts["hop"][number])
        expected = time_per_batch(MEASURED[name], stages, int(number)) + parts["update"]
        measured = statistics.median(seconds)
        rows.append(
            {
                "stages": count,
                "asleep": setting.get("asleep", False),
                "method": name,
                "micro_batches": int(number),
                "measured": measured,
                "reckoned": expected,
                "error": expected / measured - 1,
            }
        )
    return rows


def reckoned(result: dict[str, Any], blocks: int, hop: float | None) -> list[dict[str, Any]]:
    """Reckon every method over many stages, for a micro-batch of the size that the most of them were measured with.

    Args:
        result: of pipeline.py.
        blocks: of the model; 0 for one a stage.
        hop: seconds of a transfer, None for what was measured.
    """
    parts, rows = result["parts"], []
    number = max(parts["forward"], key=int)
    for count in COUNTS:
        a_stage = blocks / count if blocks else 1.0
        forward, backward = ([a_stage * parts[way][number]] * count for way in ("forward", "backward"))
        stages = Stages(forward, backward, 0.0, parts["hop"][number] if hop is None else hop)
        for micro_batches in MICRO_BATCHES:
            base = time_per_batch("1f1b", stages, micro_batches)
            for method in METHODS:
                took = time_per_batch(method, stages, micro_batches)
                row = {"stages": count, "micro_batches": micro_batches, "method": method}
                rows.append(row | {"seconds": round(took, 6), "ratio": round(took / base, 3)})
    return rows


def report(errors: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Write both in Markdown."""
    lines = ["Measured, and reckoned from the times of single blocks:", ""]
    lines += ["| stages | method | micro-batches | measured, s | reckoned, s | error |"]
    lines += ["| ---: | --- | ---: | ---: | ---: | ---: |"]
    for row in errors:
        lines.append(
            f"| {row['stages']}{', asleep' * row['asleep']} | {row['method']} | {row['micro_batches']} | "
            f"{row['measured']:.4f} | {row['reckoned']:.4f} | {row['error']:+.1%} |"
        )
    for count, asleep in dict.fromkeys((row["stages"], row["asleep"]) for row in errors):
        sizes = [abs(row["error"]) for row in errors if (row["stages"], row["asleep"]) == (count, asleep)]
        lines += [
            "",
            f"Error over {count} stages{' that sleep' * asleep}, without its sign: median "
            f"{statistics.median(sizes):.1%}, largest {max(sizes):.1%}.",
        ]
    lines += [
        "",
        "Reckoned time of a batch, in those of 1F1B:",
        "",
    ]
    lines += [f"| stages | micro-batches | {' | '.join(METHODS)} |", "| ---: | ---: |" + " ---: |" * len(METHODS)]
    for count in COUNTS:
        for micro_batches in MICRO_BATCHES:
            own = {r["method"]: r for r in rows if (r["stages"], r["micro_batches"]) == (count, micro_batches)}
            ratios = " | ".join(format(own[method]["ratio"], ".2f") for method in METHODS)
            lines.append(f"| {count} | {micro_batches} | {ratios} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw ratios over the number of stages, a panel for each number of micro-batches."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(MICRO_BATCHES), figsize=(12, 3.4), sharey=True, layout="constrained")
    for micro_batches, axes in zip(MICRO_BATCHES, panels, strict=True):
        for method in METHODS:
            own = [row for row in rows if (row["micro_batches"], row["method"]) == (micro_batches, method)]
            axes.plot([row["stages"] for row in own], [row["ratio"] for row in own], label=method)
        axes.axhline(1 / 3, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}", xlabel="stages", xscale="log")
        axes.set_xticks([2, 4, 8, 16, 32, 64], [2, 4, 8, 16, 32, 64])
        axes.minorticks_off()
    panels[0].set_ylabel("time per batch / 1F1B")
    panels[0].set_ylim(0, 1.5)
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
