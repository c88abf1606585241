r"""Does GrAPE learn a language model as well as backpropagation does? Each method at its best rate, three seeds.

    python recipes/studies/language_model.py                  # 30 cells of 3 to 4 minutes on one core
    python recipes/studies/language_model.py --report         # table and plots from the cells that are done

GPT-2 of 6 layers, d 128, context 64, batch 16, on English novels (`../shared/data/novels`), BPE of 4,096 tokens
trained on the training split; AdamW, cosine, no dropout, bf16 autocast. Every method runs at every rate with seed 0,
then at its best rate, by validation perplexity, with the other seeds. The figures are of whole held-out novels (the
validation split); the test split is not read.

Each finished cell is a JSON file in the output folder, which is committed. Start the script again to go on with the
missing ones, or start it several times to use several cores: a cell is taken by one process at a time (``cells.py``).
"""

import argparse
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import DatasetDict, load_dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.recipes.cells import Cells

TOP = Path(__file__).resolve().parents[2]

# Of the code that this process has loaded, whatever is committed while it runs.
COMMIT = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TOP, capture_output=True, text=True).stdout.strip()
EVAL_BLOCKS = 1024  # for the curves; the final figure is of the whole validation split


@dataclass(frozen=True)
class Cell:
    """One run: a method at a rate with a seed."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's file."""
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


def main() -> None:
    """Run the cells that are missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--report", action="store_true", help="only write table and plots")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    options = parser.parse_args()
    study = yaml.safe_load(options.config.read_text())
    folder = TOP / study["output_dir"]
    cells = Cells(folder / "cells", TOP / "outputs" / "studies" / options.config.stem / "locks")
    methods = options.methods or list(study["methods"])
    if not options.report:
        torch.set_num_threads(1)
        fill(study, methods, load_blocks(study), cells)
    report(study, cells, folder)


def wanted(study: dict[str, Any], methods: list[str], cells: Cells) -> Iterator[Cell]:
    """Yield the cells that are to be run, in order: all rates with the first seed, then the best with the others."""
    for method in methods:
        first, *others = study["seeds"]
        rates = [Cell(method, rate, first) for rate in study["learning_rates"]]
        yield from rates
        done = [result for cell in rates if (result := cells.read(cell.name))]
        if len(done) == len(rates):
            best = min(done, key=lambda r: r["perplexity"])
            yield from (Cell(method, best["learning_rate"], seed) for seed in others)


def fill(study: dict[str, Any], methods: list[str], blocks: DatasetDict, cells: Cells) -> None:
    """Run what is missing, as long as there is something that nobody else is doing."""
    while True:
        for cell in wanted(study, methods, cells):
            with cells.claim(cell.name) as lock:
                if lock is not None:
                    cells.finish(cell.name, run(study, cell, blocks))
                    break
        else:
            return


def load_blocks(study: dict[str, Any]) -> DatasetDict:
    """Tokenise and pack the novels: blocks of ``context`` tokens; `datasets` caches each stage."""
    texts = load_dataset("parquet", data_dir=str((TOP / study["data_dir"]).resolve()))
    texts.pop("test")
    path = Path(texts["train"].cache_files[0]["filename"]).parent / f"bpe-{study['vocab_size']}"
    if not (path / "vocab.json").exists():
        trained = ByteLevelBPETokenizer()
        rows = (batch["text"] for batch in texts["train"].iter(1000))
        trained.train_from_iterator(chain.from_iterable(rows), study["vocab_size"], special_tokens=["<|endoftext|>"])
        path.mkdir(exist_ok=True)
        trained.save_model(str(path))
    tokenizer = ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    context = study["context"]

    def pack(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        lines = tokenizer.encode_batch([text + "\n" for text in rows["text"]])
        tokens = list(chain.from_iterable(line.ids for line in lines))
        return {"input_ids": [tokens[i : i + context] for i in range(0, len(tokens) - context + 1, context)]}

    fingerprint = f"novels-{study['vocab_size']}-{context}"
    return DatasetDict(
        {
            name: split.map(
                pack,
                batched=True,
                batch_size=10_000,
                remove_columns=split.column_names,
                new_fingerprint=f"{fingerprint}-{name}",
            ).with_format("torch")
            for name, split in texts.items()
        }
    )


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack blocks; the labels are the inputs, which the model shifts."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def run(study: dict[str, Any], cell: Cell, blocks: DatasetDict) -> dict[str, Any]:
    """Train one cell and return its result."""
    set_seed(cell.seed)
    config = GPT2Config(
        vocab_size=study["vocab_size"],
        n_positions=study["context"],
        n_embd=study["width"],
        n_layer=study["layers"],
        n_head=study["heads"],
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        # Under bf16 on a CPU the fused kernel's backward is several times slower than plain matrix products.
        attn_implementation="eager",
    )
    arguments = GrapeTrainingArguments(
        output_dir="/tmp/grape_study",
        max_steps=study["steps"],
        per_device_train_batch_size=study["batch"],
        per_device_eval_batch_size=64,
        learning_rate=cell.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=study["steps"] // 20,
        adam_beta2=0.95,
        weight_decay=0.1,
        optim="adamw_torch_fused",
        seed=cell.seed,
        bf16=True,
        use_cpu=True,
        logging_steps=study["steps"] // 40,
        eval_strategy="steps",
        eval_steps=study["steps"] // 8,
        alignment_steps=study["steps"] // 8,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **study["methods"][cell.method],
    )
    trainer = GrapeTrainer(
        model=GPT2LMHeadModel(config),
        args=arguments,
        data_collator=collate,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"].select(range(EVAL_BLOCKS)),
    )
    started = time.time()
    seconds = trainer.train().metrics["train_runtime"]
    loss = per_token(trainer.evaluate(blocks["validation"])["eval_loss"], study["context"])
    result = {
        "method": cell.method,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "options": study["methods"][cell.method],
        "validation_loss": loss,
        "perplexity": math.exp(loss),
        "seconds": round(seconds),
        "commit": COMMIT,
        "finished": time.strftime("%Y-%m-%d %H:%M", time.gmtime(started + seconds)),
        "torch": torch.__version__,
        "log_history": trainer.state.log_history[:-1],
    }
    print(f"{cell.name}: perplexity {result['perplexity']:.2f} in {seconds:.0f} s", flush=True)
    return result


def per_token(loss: float, context: int) -> float:
    """Undo the Trainer's count: it divides GPT-2's loss by all ``context`` labels, of which the first is not predicted.

    (transformers 5.23 leaves it out only where the model's ``loss_type`` names the loss, and GPT-2's is None.)
    """
    return loss * context / (context - 1)


def report(study: dict[str, Any], finished: Cells, folder: Path) -> None:
    """Write table.md and curves.png from the finished cells."""
    results = list(finished.all().values())
    if not results:
        return
    best = {method: at_best_rate(results, method) for method in study["methods"]}
    best = {method: cells for method, cells in best.items() if cells}
    bp = mean(best.get("bp", []))
    rates = study["learning_rates"]
    lines = [
        f"Validation perplexity per token (BPE {study['vocab_size']:,}), whole held-out novels, {study['steps']:,} "
        f"steps. Mean and range over the seeds at the best rate; the rates are compared on seed {study['seeds'][0]}.",
        "",
        "| method | rate | seeds | perplexity | of BP's | per rate: " + ", ".join(f"{r:g}" for r in rates) + " | exact "
        "alignment at the end, h_1 .. h_5 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = study["labels"]
    for method, cells in best.items():
        values = [cell["perplexity"] for cell in cells]
        first = {r["learning_rate"]: r for r in results if r["method"] == method and r["seed"] == study["seeds"][0]}
        by_rate = ", ".join(f"{first[r]['perplexity']:.1f}" if r in first else "-" for r in rates)
        ratio = f"{mean(cells) / bp:.3f}" if bp else "-"
        lines.append(
            f"| {names.get(method, method)} | {cells[0]['learning_rate']:g} | {len(cells)} | {mean(cells):.1f} "
            f"({min(values):.1f}-{max(values):.1f}) | {ratio} | {by_rate} | {last_alignment(cells[0])} |"
        )
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot({names.get(method, method): cells for method, cells in best.items()}, study["context"], folder / "curves.png")


def at_best_rate(results: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Return the cells of a method at the rate whose first seed has the lowest perplexity, by seed."""
    of_method = [r for r in results if r["method"] == method]
    if not of_method:
        return []
    first = min(r["seed"] for r in of_method)
    rate = min((r for r in of_method if r["seed"] == first), key=lambda r: r["perplexity"])["learning_rate"]
    return sorted((r for r in of_method if r["learning_rate"] == rate), key=lambda r: r["seed"])


def mean(cells: list[dict[str, Any]]) -> float:
    """Mean perplexity; NaN of none."""
    return sum(cell["perplexity"] for cell in cells) / len(cells) if cells else math.nan


def last_alignment(cell: dict[str, Any]) -> str:
    """The last exact alignment of each boundary that was logged."""
    logged = [entry for entry in cell["log_history"] if "grape/alignment/exact/mean" in entry]
    if not logged:
        return "-"
    names = [name for name in logged[-1] if name.startswith("grape/alignment/exact/h_")]
    return " ".join(f"{logged[-1][name]:.2f}" for name in names)


def plot(best: dict[str, list[dict[str, Any]]], context: int, path: Path) -> None:
    """Draw validation perplexity over steps, a line a method at its best rate, its seeds as a band."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=plt.colormaps["tab10"].colors)
    for (method, cells), style in zip(best.items(), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), strict=False):
        curves = [
            [(e["step"], math.exp(per_token(e["eval_loss"], context))) for e in c["log_history"] if "eval_loss" in e]
            for c in cells
        ]
        steps = [step for step, _ in curves[0][:-1]]  # the last entry is of the whole split
        values = list(zip(*([value for _, value in curve[:-1]] for curve in curves), strict=False))
        label = f"{method}, rate {cells[0]['learning_rate']:g}, {len(cells)} seeds"
        axes.plot(steps, [sum(v) / len(v) for v in values], linestyle=style, label=label)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    axes.set(xlabel="optimiser step", ylabel="validation perplexity per token", yscale="log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper center", ncols=2)  # within the axes it would hide a curve
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
