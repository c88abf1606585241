r"""How long does a batch take over pipeline stages: backpropagation on torch's schedules, delayed gradients, the star?

    python recipes/benchmarks/pipeline.py                    # two stages, two free cores, about half an hour
    python recipes/benchmarks/pipeline.py --quick            # a look: one minute
    python recipes/benchmarks/pipeline.py --stages 3         # on three cores
    python recipes/benchmarks/pipeline.py --stages 6 --asleep    # on any number of them

A GPT-2 of 8 layers, d 256, context 128, batch 8, vocabulary 2,048, random tokens, float32, AdamW, no clipping. Each
stage is a process pinned to a core. All methods take turns: in each round every one trains for a burst of batches, of
which the first K (two at least) are left out, as they fill the pipeline. A time is that of the slowest process; what is
stated is the median over rounds and the quartiles.

- ``trainer ...``: under GrapeTrainer; ``bare ...``: the same schedule in a loop without it. ``star``: e goes to
  all stages, B_l = I; ``star, local maps``: B_l is learned in every step.
- ``interleaved``, ``zero-bubble``: torch's schedules with two chunks of blocks a process, without the Trainer. They
  want as many micro-batches as stages, or more.
- ``delayed``: backpropagation whose lower stages use gradients of earlier batches and so wait for nothing. Activations
  and weights of a gradient are of different steps; only its time is of interest here.

With ``--asleep`` a small model sleeps where the large one would compute: a block 20 ms of a whole batch in its forward
and 40 ms in its backward, the head half as long. Processes, schedules and transfers are as ever. This shows who waits
for whom, over more stages than there are cores, and nothing about what computation costs.

Writes a table (Markdown, CSV), all figures (JSON), and a plot into recipes/benchmarks/results. The JSON has the times
of single blocks as well, for pipeline_simulator.py.
"""

import argparse
import csv
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import transformers
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.pipeline.cuts import even_cuts
from grape_hf.pipeline.step import Pipeline

RESULTS = Path(__file__).parent / "results"
KINDS: dict[str, dict[str, Any]] = {
    "gpipe": {"method": "bp", "pipeline_schedule": "gpipe"},
    "1f1b": {"method": "bp", "pipeline_schedule": "1f1b"},
    "star": {"method": "dfa", "feedback_init": "identity"},
    "star, local maps": {"method": "grape", "feedback_rule": "local", "jvp_steps": 1},
}
ASLEEP = {"layers": 12, "width": 16, "length": 16, "vocabulary": 64, "steps": 4, "rounds": 2}
NAP = 0.02  # seconds of a block's forward, for a whole batch
QUICK = {"layers": 4, "width": 64, "length": 32, "steps": 5, "rounds": 2, "micro_batches": [1, 2]}

Burst = Callable[[], float]  # trains for a burst, and returns the seconds of a batch


def main() -> None:
    """Measure, and write table and plot."""
    setting = read_setting()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        setting["port"] = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rank, setting, queue)) for rank in range(setting["stages"])]
    for worker in workers:
        worker.start()
    found = dict(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    result = found[0] | {"setting": setting, "machine": platform.processor() or platform.machine()}
    result["torch"] = torch.__version__
    RESULTS.mkdir(exist_ok=True)
    kind = "asleep" if setting["asleep"] else "cpu"
    name = f"pipeline_{kind}_{setting['stages']}{'_quick' if setting['quick'] else ''}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = rows_of(result)
    (RESULTS / f"{name}.md").write_text(table(rows, setting))
    if not setting["asleep"]:
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, RESULTS / f"{name}.png")
    print(table(rows, setting))


def read_setting() -> dict[str, Any]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"stages": 2, "layers": 8, "width": 256, "length": 128, "batch": 8, "vocabulary": 2048}
    for name, value in (sizes | {"steps": 12, "rounds": 9}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8], help="default: 1 2 4 8")
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds")
    parser.add_argument("--asleep", action="store_true", help="sleep in the place of computing")
    setting = vars(parser.parse_args())
    return setting | (ASLEEP if setting["asleep"] else {}) | (QUICK if setting["quick"] else {})


def work(rank: int, setting: dict[str, Any], queue: Any) -> None:
    """Be one stage: measure everything, and hand out the figures of all."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting["stages"], "LOCAL_WORLD_SIZE": setting["stages"]}
    os.environ |= {name: str(value) for name, value in (places | {"MASTER_PORT": setting["port"]}).items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    bursts: dict[tuple[str, int], Burst] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for micro_batches in setting["micro_batches"]:
            for kind in KINDS:
                if kind == "1f1b" and micro_batches < setting["stages"]:
                    continue  # it is GPipe then
                trainer = make_trainer(setting, kind, micro_batches, scratch)
                bursts[f"trainer {kind}", micro_batches] = under_the_trainer(trainer, setting)
                if kind != "star, local maps":  # maps learn between batches
                    bursts[f"bare {kind}", micro_batches] = bare(trainer, setting)
            chunks = micro_batches % setting["stages"] == 0 and setting["layers"] >= 2 * setting["stages"]
            if chunks and not setting["asleep"]:  # torch's split backward does not bear a function of our own
                bursts["interleaved", micro_batches] = in_chunks(ScheduleInterleaved1F1B, setting, micro_batches)
                bursts["zero-bubble", micro_batches] = in_chunks(ScheduleInterleavedZeroBubble, setting, micro_batches)
            bursts["delayed", micro_batches] = delayed(setting, micro_batches)
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(setting["rounds"]):
            for (method, micro_batches), burst in bursts.items():
                dist.barrier()
                took = torch.tensor(burst(), dtype=torch.float64)
                dist.all_reduce(took, dist.ReduceOp.MAX)
                times[f"{method}/{micro_batches}"].append(float(took))
        dist.barrier()
    queue.put((rank, {"seconds": times, "parts": parts(setting)}))
    dist.barrier()
    dist.destroy_process_group()


def config_of(setting: dict[str, Any]) -> GPT2Config:
    """Return the model's configuration."""
    return GPT2Config(
        n_layer=setting["layers"],
        n_embd=setting["width"],
        n_head=4,
        n_positions=setting["length"],
        vocab_size=setting["vocabulary"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        tie_word_embeddings=False,
    )


def model_of(setting: dict[str, Any]) -> GPT2LMHeadModel:
    """Make the model, the same on every process."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config_of(setting))
    if setting["asleep"]:
        for block in model.transformer.h:
            block.register_forward_hook(partial(_nap, NAP / setting["batch"]))
        model.lm_head.register_forward_hook(partial(_nap, NAP / 2 / setting["batch"]))
    return model


class Nap(torch.autograd.Function):
    """Nothing, which takes its time: so many seconds, and twice as many in the backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, seconds: float) -> Tensor:
        """Sleep."""
        ctx.seconds = seconds
        time.sleep(seconds)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sleep twice as long."""
        time.sleep(2 * ctx.seconds)
        return gradient, None


def _nap(a_row: float, module: nn.Module, args: Any, output: Any) -> Any:
    h = output[0] if isinstance(output, tuple) else output
    slept = Nap.apply(h, a_row * len(h))
    return (slept, *output[1:]) if isinstance(output, tuple) else slept


def tokens(setting: dict[str, Any], rows: int) -> Tensor:
    """Draw random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(setting["vocabulary"], (rows, setting["length"]), generator=generator)


def make_trainer(setting: dict[str, Any], kind: str, micro_batches: int, folder: str) -> GrapeTrainer:
    """Make a Trainer over the stages."""
    args = GrapeTrainingArguments(
        folder,
        **KINDS[kind],
        feedback_points=setting["stages"] - 1 if kind.startswith("star") else 0,
        pipeline_stages=setting["stages"],
        pipeline_microbatches=micro_batches,
        max_steps=setting["steps"] + left_out(setting),
        per_device_train_batch_size=setting["batch"],
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    ids = tokens(setting, setting["batch"] * (setting["steps"] + left_out(setting)))
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = GrapeTrainer(model=model_of(setting), args=args, train_dataset=data, callbacks=[Ends()])
    trainer.remove_callback(PrinterCallback)
    return trainer


class Ends(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin anew."""
        self.times = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def left_out(setting: dict[str, Any]) -> int:
    """Return how many batches at the beginning of a burst are not timed.

    Delayed gradients go down a stage a batch: the lowest stage waits for the first one in batch K, counted from one.
    """
    return max(2, int(setting["stages"]))


def seconds_of(ends: list[float], setting: dict[str, Any]) -> float:
    """Return the seconds of a batch, by the ends of all of a burst."""
    first = left_out(setting)
    return (ends[-1] - ends[first - 1]) / (len(ends) - first)


def under_the_trainer(trainer: GrapeTrainer, setting: dict[str, Any]) -> Burst:
    """Return a burst of the Trainer's own ``train``."""
    (ends,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Ends))

    def burst() -> float:
        trainer.train()
        return seconds_of(ends.times, setting)

    return burst


def looped(setting: dict[str, Any], batch: Callable[[int], None]) -> Burst:
    """Return a burst of a loop without the Trainer."""

    def burst() -> float:
        ends = []
        for number in range(setting["steps"] + left_out(setting)):
            batch(number)
            ends.append(time.perf_counter())
        return seconds_of(ends, setting)

    return burst


def bare(trainer: GrapeTrainer, setting: dict[str, Any]) -> Burst:
    """Return a burst of the Trainer's schedule, without the Trainer."""
    of_trainer = trainer._pipeline
    assert of_trainer is not None
    pipeline = Pipeline(of_trainer.places, of_trainer.options, 0, torch.device("cpu"))
    model = model_of(setting)
    pipeline.divide(model, nullcontext)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5)
    ids = tokens(setting, setting["batch"])
    model.train()

    def compute_loss(part: dict[str, Any], _: Any) -> tuple[Tensor, Any]:
        outputs = model(**part)
        return outputs.loss, outputs

    def batch(number: int) -> None:
        pipeline.run({"input_ids": ids, "labels": ids}, compute_loss, None, train=True, shifted=True)
        optimizer.step()
        optimizer.zero_grad()

    return looped(setting, batch)


class Chunk(nn.Module):
    """Some blocks of the model, with the embeddings before the first and the loss after the last."""

    def __init__(self, model: GPT2LMHeadModel, start: int, end: int) -> None:
        super().__init__()
        inner: Any = model.transformer
        blocks = model.config.n_layer
        self.stem: Any = nn.ModuleList([inner.wte, inner.wpe]) if start == 0 else None
        self.blocks: Any = inner.h[start:end]
        self.top: Any = nn.Sequential(inner.ln_f, model.lm_head) if end == blocks else None

    def forward(self, h: Tensor) -> Tensor:
        """Return hidden states, or the logits."""
        if self.stem is not None:
            h = self.stem[0](h) + self.stem[1](torch.arange(h.shape[1]))
        for block in self.blocks:
            made = block(h)
            h = made[0] if isinstance(made, tuple) else made
        return h if self.top is None else self.top(h)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def in_chunks(schedule_class: Any, setting: dict[str, Any], micro_batches: int) -> Burst:
    """Return a burst of one of torch's schedules with two chunks of blocks a process."""
    rank, count = dist.get_rank(), setting["stages"]
    cuts, model = even_cuts(setting["layers"], 2 * count), model_of(setting)
    mine = [Chunk(model, cuts[i], cuts[i + 1]) for i in (rank, rank + count)]
    numbers = (rank, rank + count)
    stages = [PipelineStage(c, i, 2 * count, torch.device("cpu")) for c, i in zip(mine, numbers, strict=True)]
    schedule = schedule_class(stages, micro_batches, loss_fn=loss_of)
    optimizer = torch.optim.AdamW([p for chunk in mine for p in chunk.parameters()], 5e-5)
    ids = tokens(setting, setting["batch"])

    def batch(number: int) -> None:
        schedule.step(
            *((ids,) if rank == 0 else ()), **({"target": ids} if rank == count - 1 else {}), return_outputs=False
        )
        optimizer.step()
        optimizer.zero_grad()

    return looped(setting, batch)


def delayed(setting: dict[str, Any], micro_batches: int) -> Burst:
    """Return a burst of backpropagation in which stage s uses gradients that are K - 1 - s batches old."""
    rank, count = dist.get_rank(), setting["stages"]
    cuts = even_cuts(setting["layers"], count)
    chunk = Chunk(model_of(setting), cuts[rank], cuts[rank + 1])
    optimizer = torch.optim.AdamW(chunk.parameters(), 5e-5)
    parts = tokens(setting, setting["batch"]).chunk(micro_batches)
    shape = (*parts[0].shape, setting["width"])
    late, last = count - 1 - rank, rank == count - 1
    waiting: list[list[tuple[Tensor, Tensor]]] = []  # by batch: what came in, and what went out
    asked: list[tuple[Any, Tensor]] = []
    sent: list[tuple[Any, Tensor]] = []

    def backward(made: list[tuple[Tensor, Tensor]]) -> None:
        for came, output in made:
            if last:
                output.backward()
            else:
                work, gradient = asked.pop(0)
                work.wait()
                output.backward(gradient)
            if rank:
                assert came.grad is not None
                sent.append((dist.isend(came.grad, rank - 1), came.grad))

    def batch(number: int) -> None:
        made = []
        for ids in parts:
            if rank:
                came = torch.empty(shape)
                dist.recv(came, rank - 1)
                came.requires_grad_()
            else:
                came = ids
            output = chunk(came)
            if last:
                output = loss_of(output, ids) / micro_batches
            else:
                sent.append((dist.isend(output.detach(), rank + 1), output.detach()))
                gradient = torch.empty(shape)
                asked.append((dist.irecv(gradient, rank + 1), gradient))
            made.append((came, output))
        waiting.append(made)
        if len(waiting) > late:
            backward(waiting.pop(0))
            # Weights change between a forward and its backward: that is what delayed gradients are.
            with torch.autograd._unsafe_preserve_version_counter(tuple(chunk.parameters())):
                optimizer.step()
            optimizer.zero_grad()
        while len(sent) > 4 * micro_batches:
            sent.pop(0)[0].wait()

    run = looped(setting, batch)

    def burst() -> float:
        took = run()
        while waiting:  # or the next burst's gradients would be taken for these
            backward(waiting.pop(0))
        return took

    return burst


def parts(setting: dict[str, Any]) -> dict[str, Any]:
    """Time a block and the head by themselves, and a transfer, in seconds, for each number of micro-batches."""
    model = model_of(setting)
    block, head, width = model.transformer.h[0], Chunk(model, setting["layers"], setting["layers"]), setting["width"]
    found: dict[str, Any] = {"forward": {}, "backward": {}, "head_forward": {}, "head_backward": {}, "hop": {}}
    for number in setting["micro_batches"]:
        ids = tokens(setting, max(setting["batch"] // number, 1))
        h = torch.randn(*ids.shape, width)
        of_block = timed(partial(_through_block, block, h.requires_grad_()))
        of_head = timed(partial(_through_head, head, h, ids))
        found["forward"][number], found["backward"][number] = of_block
        found["head_forward"][number], found["head_backward"][number] = of_head
        found["hop"][number] = hop(h.detach())
    return found | {"update": update(setting)}


def update(setting: dict[str, Any], times: int = 15) -> float:
    """Return the median seconds of an optimiser's step on one stage."""
    chunk = Chunk(model_of(setting), *even_cuts(setting["layers"], setting["stages"])[:2])
    optimizer, took = torch.optim.AdamW(chunk.parameters(), 5e-5), []
    for parameter in chunk.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(times):
        start = time.perf_counter()
        optimizer.step()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def _through_block(block: nn.Module, h: Tensor) -> Tensor:
    made = block(h)
    return (made[0] if isinstance(made, tuple) else made).sum()


def _through_head(head: nn.Module, h: Tensor, ids: Tensor) -> Tensor:
    return loss_of(head(h), ids)


def timed(act: Callable[[], Tensor], times: int = 15) -> tuple[float, float]:
    """Return the median seconds of a forward and of its backward."""
    forwards, backwards = [], []
    for _ in range(times):
        start = time.perf_counter()
        made = act()
        middle = time.perf_counter()
        made.backward()
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    return statistics.median(forwards), statistics.median(backwards)


def hop(h: Tensor, times: int = 15) -> float:
    """Return the median seconds of one transfer: half of there and back, between the first two stages."""
    rank, took = dist.get_rank(), []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                dist.send(h, 1 - rank)
            elif rank < 2:
                dist.recv(h, 1 - rank)
        took.append((time.perf_counter() - start) / 2)
    return statistics.median(took)


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Make a row for each method and number of micro-batches."""
    setting, rows = result["setting"], []
    activation = setting["batch"] * setting["length"] * setting["width"] * 4 / 2**20
    for key, seconds in result["seconds"].items():
        method, number = key.split("/")
        chain = [
            result["seconds"][k] for k in (f"bare 1f1b/{number}", f"bare gpipe/{number}") if k in result["seconds"]
        ]
        # Within a round, so that a slow spell of the machine hits both; of the two chains the faster.
        ratios = [s / min(c[i] for c in chain) for i, s in enumerate(seconds)]
        borders = 2 * setting["stages"] - 1 if method in ("interleaved", "zero-bubble") else setting["stages"] - 1
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        rows.append(
            {
                "method": method,
                "micro_batches": int(number),
                "seconds": round(statistics.median(seconds), 4),
                "low_quartile": round(low, 4),
                "high_quartile": round(high, 4),
                "ratio_to_backpropagation": round(statistics.median(ratios), 3),
                "mebibytes_sent": round(2 * borders * activation, 2),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], setting: dict[str, Any]) -> str:
    """Write the rows in Markdown."""
    each = "asleep in the place of computing" if setting["asleep"] else "a core each"
    lines = [
        f"GPT-2, {setting['layers']} layers, d {setting['width']}, context {setting['length']}, batch "
        f"{setting['batch']}, {setting['stages']} stages, {each}; {setting['rounds']} rounds of "
        f"{setting['steps']} batches. Ratio: to the faster of bare GPipe and 1F1B, in the same round.",
        "",
        "| method | micro-batches | s per batch | quartiles | ratio | MiB sent |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        quartiles = f"{row['low_quartile']:.4f} - {row['high_quartile']:.4f}"
        lines.append(
            f"| {row['method']} | {row['micro_batches']} | {row['seconds']:.4f} | {quartiles} | "
            f"{row['ratio_to_backpropagation']:.3f} | {row['mebibytes_sent']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds over micro-batches, a line a method, with quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        middle = [row["seconds"] for row in own]
        spread = [
            [row["seconds"] - row["low_quartile"] for row in own],
            [row["high_quartile"] - row["seconds"] for row in own],
        ]
        style = "--" if method.startswith("trainer") else "-"
        axes.errorbar([row["micro_batches"] for row in own], middle, spread, fmt=f"o{style}", capsize=2, label=method)
    axes.set(xlabel="micro-batches", ylabel="seconds per batch", xscale="log")
    axes.set_xticks(sorted({row["micro_batches"] for row in rows}), sorted({row["micro_batches"] for row in rows}))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
