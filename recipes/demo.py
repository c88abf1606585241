"""The main job in a few minutes, without a network: GrAPE and backpropagation side by side on the embedded sample.

    make demo                   # or: python recipes/demo.py [output folder, default outputs/demo]

Compares the two (``grape_hf/recipes/compare.py``) with the settings of ``recipes/demo.yaml``: from the same weights, on
the same batches, for the same number of steps; then prints the table, the path of the report and what the model trained
with GrAPE writes. The figures are of a tiny model on a tiny text (Python's own documentation): they show that it runs
and learns, not how well GrAPE does.
"""

import sys
from pathlib import Path

from grape_hf.recipes.compare import compare

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Train with each method, then compare."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/demo")
    print("Two runs, about a minute each on one core.", flush=True)
    compare(HERE / "demo.yaml", "grape_hf.recipes.wikitext103", output, methods=("bp", "grape"))
    print(f"The model, for AutoModelForCausalLM.from_pretrained: {output / 'grape'}")
    sample = (output / "grape" / "sample.txt").read_text(encoding="utf-8")
    print(f"\nWhat the model trained with GrAPE writes after the first words:\n\n{sample}")


if __name__ == "__main__":
    main()
