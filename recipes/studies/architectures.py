r"""Does GrAPE do the right thing with this architecture? A row of checks for each of some ninety tiny random models.

    python recipes/studies/architectures.py                      # the rows that are missing: 5 minutes on one core
    python recipes/studies/architectures.py --only t5 mixtral    # these again, by a part of their names
    python recipes/studies/architectures.py --report             # only the table, from the rows that are there

The models are those of ``tiny_models.py``. Each is put through: blocks found with no help; the estimate, in the mode
that ``jvp_mode="auto"`` comes to, beside exact directional derivatives by autograd and beside finite differences
(cosine of the sums of rank-one terms, at the worst boundary); B_l set to the mean same-position Jacobian, exact by
autograd, and the cosine of B_l e with the exact delta_l, beside what one matrix can reach: a ridge fit to e and delta_l
of half of the samples, tried on the other half, and a fit to them all; which parameters learn through paths outside
the chain (they have a gradient though all B_l are zero); ten steps of ``GrapeTrainer`` with the recommended settings on
one batch; no hook left; saved, and opened again by transformers alone. A row is a JSON file in ``architectures/rows``;
``architectures/table.md`` is made of them.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from exact_jacobians import ExactJacobians
from tiny_models import MODELS, Batch, TinyModel
from torch import Tensor, nn
from transformers import PrinterCallback

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.core.alignment import frobenius_cosine
from grape_hf.core.blocks import ends, find_blocks
from grape_hf.core.isolation import isolated
from grape_hf.core.jacobian import Noise, jacobian_terms
from grape_hf.core.refit import exact_pair, refit
from grape_hf.engine.run import GrapeRun

FOLDER = Path(__file__).with_suffix("")
LEARNING_RATE = 3e-3
# Of maps as they are, an exact Jacobian would have a row for each of their numbers.
_OPTIONS: dict[str, Any] = {"grape_preset": "recommended", "feedback_sharing": "auto"}


def main() -> None:
    """Make the rows that are missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="make these rows again: parts of their names")
    parser.add_argument("--report", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    (FOLDER / "rows").mkdir(parents=True, exist_ok=True)
    for tiny in [] if options.report else MODELS:
        path = row_path(tiny)
        if any(part in tiny.name for part in options.only) if options.only else not path.exists():
            row = examine(tiny)
            path.write_text(json.dumps(row, indent=1) + "\n")
            print(f"{tiny.name}: {row['result']}", flush=True)
    rows = [json.loads(row_path(tiny).read_text()) for tiny in MODELS if row_path(tiny).exists()]
    (FOLDER / "table.md").write_text(table(rows))
    print(f"{FOLDER / 'table.md'}: {len(rows)} rows, {sum(row['result'] == 'ok' for row in rows)} of them ok")


def row_path(tiny: TinyModel) -> Path:
    """The file of a model's row."""
    return FOLDER / "rows" / f"{tiny.name}.json"


def examine(tiny: TinyModel) -> dict[str, Any]:
    """Put one model through everything: a row of figures, whose ``result`` is ``ok``, a refusal, or what is wrong."""
    started = time.time()
    samples, model = tiny.samples(tiny.enough), tiny.build()
    row: dict[str, Any] = {"name": tiny.name, "parameters": sum(p.numel() for p in model.parameters())}
    with torch.no_grad():
        model.eval()(
            **stack(samples)
        )  # transformers attaches hooks of its own in a first forward that returns router logits
    hooks = count_hooks(model)
    try:
        run = GrapeRun(model, GrapeTrainingArguments(**_OPTIONS, use_cpu=True, report_to=[]))
        row |= {"blocks": len(run.blocks), "first": next(iter(find_blocks(model)))}
        if not run.single_block:
            run.start(lambda: model(**stack(samples)))
    except (ValueError, RuntimeError) as error:
        row["result"] = f"refused: {error}"
        wrong = [] if tiny.refused and tiny.refused in str(error) else ["this refusal was not expected"]
    else:
        try:
            row |= {} if run.single_block else look_inside(model, run, samples)
        finally:
            run.close()
        row |= train(tiny, model, samples)
        wrong = list(complaints(row, tiny.jumps)) + (["a refusal was expected"] if tiny.refused else [])
        row["result"] = "ok"
    if count_hooks(model) != hooks:
        wrong.append("hooks are left")
    if wrong:
        row["result"] = f"wrong: {'; '.join(wrong)} ({row['result']})"
    return row | {"seconds": round(time.time() - started, 1)}


def complaints(row: dict[str, Any], jumps: bool) -> Iterable[str]:
    """Say what is not as it should be in a row that was not refused.

    Args:
        row: the figures.
        jumps: the model is not continuous, so that finite differences are no reference.
    """
    if "exact" in row:
        # By finite differences 0.93 in RepVGG, whose 21 blocks add up three norms each; else 0.99.
        if not row["exact"] > (0.9999 if row["mode"] == "dual" else 0.9):
            yield "the estimate is not what autograd gives"
        if not row["difference"] > 0.98 and not jumps:
            yield "the estimate is not what finite differences give"
        if not row["jacobian"] > 0.8 * row["fitted"]:
            yield "the exact Jacobian is far from the best matrix"
    if not row["loss_last"] < row["loss_first"]:
        yield "the loss does not fall"
    if not row["reloads"]:
        yield "the model that was opened again gives other outputs"


def look_inside(model: nn.Module, run: GrapeRun, samples: list[Batch]) -> dict[str, Any]:
    """Compare estimates and feedback with what is exact, at the weights as they are, which stay so."""
    batch, boundaries, noise = stack(samples), run.boundaries, Noise(seed=0, step=0, places=range(len(samples)))
    run.begin_step(0)
    run.estimate(lambda: model(**batch), range(len(samples)))  # finds out which mode works
    exact = ExactJacobians(model, boundaries, lambda: model(**batch))
    expected = exact.estimate(noise)
    estimates = {}
    for mode in {run.jvp_mode, "finite_difference"}:
        with isolated(model):
            estimates[mode] = jacobian_terms(boundaries, lambda: model(**batch), noise, mode=mode).sums
    with isolated(model), boundaries.record() as forwards:
        model(**batch).loss.backward()
    reached = [reach(*exact_pair(forwards[0], index), B) for index, B in enumerate(exact.feedback())]
    worst = min(range(len(reached)), key=lambda index: reached[index][0] - reached[index][1])
    model.zero_grad()
    return {
        "space": "hidden" if boundaries.output is run.blocks[-1] else "logits",
        "mode": run.jvp_mode,
        "exact": worst_cosine(estimates[run.jvp_mode], expected),
        "difference": worst_cosine(estimates[run.jvp_mode], estimates["finite_difference"]),
        "jacobian": reached[worst][0],
        "fitted": reached[worst][1],
        "best": reached[worst][2],
        "outside": learning_outside(model, run, batch),
    }


def reach(e: Tensor, delta: Tensor, B: Tensor) -> tuple[float, float, float]:
    """Return the cosines with the exact delta, ``(batch, positions, n_l)``, of three guesses from e.

    Those of ``B``, of a ridge fit to one half of the samples tried on the other half, and of a fit to all of them: of
    the best one matrix the second says too little and the third, where errors are few, too much.
    """

    def fitted(e: Tensor, delta: Tensor) -> Tensor:
        e, delta = (t.flatten(0, 1) for t in (e.expand(-1, delta.shape[1], -1), delta))
        return refit(delta.new_zeros(delta.shape[1], e.shape[1]), e.mT @ e, e.mT @ delta, ridge=0.1)

    def cosine(guess: Tensor) -> float:
        return float(frobenius_cosine(guess.expand_as(delta), delta))

    half = len(e) // 2
    crossed = e[:half] @ fitted(e[half:], delta[half:]).mT, e[half:] @ fitted(e[:half], delta[:half]).mT
    return cosine(e @ B.mT), cosine(torch.cat(crossed)), cosine(e @ fitted(e, delta).mT)


def learning_outside(model: nn.Module, run: GrapeRun, batch: Batch) -> list[str]:
    """Name the parameters before block L that have a gradient where all B_l are zero."""
    silent = [torch.zeros_like(b) for b in run.feedback.B]

    def learning(cut: bool) -> set[str]:
        def detach(module: nn.Module, args: Any, output: Any) -> Any:
            y = output if isinstance(output, Tensor) else output[0]
            leaf = y.detach().requires_grad_()
            return leaf if isinstance(output, Tensor) else type(output)((leaf, *output[1:]))

        handle = ends(run.blocks[-1])[1].register_forward_hook(detach) if cut else None
        try:
            with isolated(model), run.boundaries.broadcast(silent):
                model(**batch).loss.backward()
            return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        finally:
            model.zero_grad()
            if handle is not None:
                handle.remove()

    in_blocks, in_last = (
        {id(p) for block in some for p in block.parameters()} for some in (run.blocks, run.blocks[-1:])
    )
    learn, behind = learning(cut=False), learning(cut=True)
    return [
        name
        for name, p in model.named_parameters()
        if name in learn and id(p) not in in_last and (name not in behind or id(p) in in_blocks)
    ]


def train(tiny: TinyModel, model: nn.Module, samples: list[Batch]) -> dict[str, Any]:
    """Train for ten steps on one batch, save, and open what was saved with transformers alone."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = GrapeTrainingArguments(
            output_dir=folder,
            grape_preset="recommended",  # a point after every block, in convolutional networks too
            max_steps=10,
            per_device_train_batch_size=len(samples),
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = GrapeTrainer(model=model, args=arguments, train_dataset=samples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model(folder)
        opened = tiny.auto_class.from_pretrained(folder)
    batch = stack(samples)
    with torch.no_grad():
        outputs = [m.eval()(**batch).logits for m in (model, opened)]
    return {"loss_first": losses[0], "loss_last": losses[-1], "reloads": bool(torch.equal(*outputs))}


def stack(samples: list[Batch]) -> Batch:
    """Make a batch."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows in Markdown."""
    lines = [
        "| model | blocks | y | JVP | estimate: autograd | finite differences | B = exact J (best matrix) "
        "| loss, steps 1 and 10 | learns outside the chain | result |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        blocks = f"{row['blocks']}, from `{row['first']}`" if "blocks" in row else ""
        inside = ["", "", "", "", ""]
        if "mode" in row:
            dual = row["mode"] == "dual"
            inside = [
                row["space"],
                "dual" if dual else "differences",
                f"{row['exact']:.4f}",
                f"{row['difference']:.4f}" if dual else "",
                f"{row['jacobian']:.2f} ({row['fitted']:.2f}-{row['best']:.2f})",
            ]
        losses = f"{row['loss_first']:.2f} {row['loss_last']:.2f}" if "loss_last" in row else ""
        outside = ", ".join(f"`{name}`" for name in shortened(row.get("outside", [])))
        cells = [row["name"], blocks, *inside, losses, outside, row["result"].replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shortened(names: list[str]) -> list[str]:
    """Names with each number in them replaced, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def worst_cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """Cosine between the two at the boundary where it is smallest."""
    return min(float(frobenius_cosine(x, y)) for x, y in zip(a, b, strict=True))


def count_hooks(model: nn.Module) -> int:
    """Count forward hooks of both kinds."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


if __name__ == "__main__":
    main()
