r"""What does a step cost, in time and memory, beside a step of the stock ``transformers.Trainer``?

    python recipes/benchmarks/step_cost.py                                   # about 8 minutes on two free cores
    python recipes/benchmarks/step_cost.py --rounds 2 --width 64             # a look: one minute
    taskset -c 0 python recipes/benchmarks/step_cost.py --threads 1 --clock cpu    # on a busy machine
    python recipes/benchmarks/step_cost.py --device cuda                     # the same on a GPU
    python recipes/benchmarks/step_cost.py recipes/benchmarks/step_cost_images.yaml  # ResNet-20, 32 x 32, batch 128

GPT-2 of 6 layers, d 256, context 128, batch 8, vocabulary 8,192, random tokens, float32, no dropout, AdamW. The methods
take turns: in each round every one trains for a burst of steps through its Trainer's own ``train()``, and a step is
everything from one step's end to the next one's (data, forward, backward, clipping, optimiser, callbacks). A ratio is
taken within a round, so that a slow spell of the machine hits both sides; what is stated is the median over rounds and
the quartiles. Where a step's time goes is measured in bursts of their own, with a clock read at each seam.

For images, SGD with momentum and channels-last; any timm architecture.

Memory is the most that tensors occupy at once, weights and optimiser state included, each method in a process of its
own: on the CPU added up from torch's allocation events, on CUDA ``max_memory_allocated``. Every option of the YAML file
is an option of the command line. Writes a table (Markdown) and all figures (JSON).
"""

import argparse
import dataclasses
import gc
import json
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from grape_hf import GrapeTrainer, GrapeTrainingArguments
from grape_hf.engine.star_engine import StarEngine

TOP = Path(__file__).parents[2]
# transformers 5.23 calls it by its name, 5.17 does not know that name.
_NAMES = [option.name for option in dataclasses.fields(TrainingArguments)]
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _NAMES)
PARTS = ["forward", "backward", "estimate", "refinement", "optimiser", "rest"]


def main() -> None:
    """Measure memory, time and its parts, and write the table."""
    setting = read_setting()
    torch.set_num_threads(setting["threads"])
    transformers.logging.set_verbosity_error()
    memory = measure_memory(setting) if setting["memory"] else {}
    with tempfile.TemporaryDirectory() as scratch:
        times, parts = measure_times(setting, Path(scratch))
    result = {"setting": setting, "machine": machine(setting), "step_s": times, "parts_s": parts, "memory": memory}
    folder = TOP / setting["output_dir"]
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_cost_{setting['model']}_{setting['device']}_{'bf16' if setting['bf16'] else setting['threads']}"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (folder / f"{name}.md").write_text(text)
    print(text)


def read_setting() -> dict[str, Any]:
    """Read the YAML file, and from the command line what is to differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = sys.argv[1:]
    config = Path(words.pop(0)) if words and words[0].endswith(".yaml") else Path(__file__).with_suffix(".yaml")
    setting: dict[str, Any] = yaml.safe_load(config.read_text())
    for name, value in setting.items():
        if not isinstance(value, dict):
            parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    return setting | vars(parser.parse_args(words))


class Clock(TrainerCallback):
    """Read the time at the end of each step; within steps, add up the time between seams, if ``in_parts``.

    Args:
        now: the time in seconds; unless told not to, it waits until the device has nothing left to do.
        in_parts: on CUDA the seams make the host wait for the device, so parts have bursts of their own.
        waits: the steps at whose end the host waits for the device, where it waits at no seam.
    """

    def __init__(self, now: Callable[[bool], float], in_parts: bool = False, waits: Sequence[int] = ()) -> None:
        self.now, self.in_parts, self.waits = now, in_parts, waits
        self.ends: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._optimiser = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is enclosed as one part of the step under way."""
        if not self.in_parts:
            yield
            return
        start = self.now(True)
        yield
        self.parts[-1][name] += self.now(True) - start

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Open the account of a step."""
        self.parts.append(defaultdict(float))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Start of the optimiser's part."""
        self._optimiser = self.now(True) if self.in_parts else 0.0

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """End of the optimiser's part."""
        self.parts[-1]["optimiser"] += self.now(True) - self._optimiser if self.in_parts else 0.0

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Read the clock."""
        self.ends.append(self.now(self.in_parts or state.global_step in self.waits))


def text(setting: dict[str, Any]) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Any]]:
    """Return a GPT-2, random tokens, and the options of its training."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=setting["vocab_size"],
            n_positions=setting["context"],
            n_embd=setting["width"],
            n_layer=setting["layers"],
            n_head=setting["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    tokens = torch.randint(setting["vocab_size"], (setting["batch"] * setting["steps"], setting["context"]))
    return model, [{"input_ids": t, "labels": t} for t in tokens], {}


def images(setting: dict[str, Any]) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Any]]:
    """Return a timm model, random images, and the options of its training."""
    from grape_hf.vision import image_classifier

    model = image_classifier(setting["model"], [str(k) for k in range(setting["classes"])])
    number = setting["batch"] * setting["steps"]
    pixels = torch.randn(number, 3, setting["side"], setting["side"]).to(memory_format=torch.channels_last)
    labels = torch.randint(setting["classes"], (number,)).tolist()
    samples = [{"pixel_values": x, "labels": label} for x, label in zip(pixels, labels, strict=True)]
    return model.to(memory_format=torch.channels_last), samples, {"optim": "sgd", "optim_args": "momentum=0.9"}


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch; maps stay channels-last."""
    first, *others = rows[0]
    values = torch.stack([row[first] for row in rows])
    if values.ndim == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    return {first: values, **{name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in others}}


def make_trainer(setting: dict[str, Any], options: dict[str, Any], clock: Clock, folder: Path) -> Trainer:
    """Make the stock Trainer, or ours if there are options, around a new model."""
    torch.manual_seed(0)
    model, samples, usual = (text if setting["model"] == "gpt2" else images)(setting)
    ours = bool(options.keys() - {CHECKPOINTING})
    kind, arguments = (GrapeTrainer, GrapeTrainingArguments) if ours else (Trainer, TrainingArguments)
    args = arguments(
        output_dir=str(folder),
        max_steps=setting["warmup"] + setting["steps"],
        per_device_train_batch_size=setting["batch"],
        lr_scheduler_type="constant",
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=setting["device"] == "cpu",
        bf16=bool(setting["bf16"]),
        dataloader_pin_memory=setting["device"] != "cpu",
        **usual,
        **options,
    )
    trainer = kind(model, args, data_collator=stack, train_dataset=samples, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    if clock.in_parts:
        put_seams(trainer, clock)
    return trainer


def put_seams(trainer: Trainer, clock: Clock) -> None:
    """Let the clock see the parts of a step: wrap, on this one Trainer, the methods they are done by."""

    def timed(owner: Any, method: str, part: str) -> None:
        plain = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with clock.part(part):
                return plain(*args, **kwargs)

        setattr(owner, method, wrapped)

    timed(trainer, "training_step", "whole")
    timed(trainer.accelerator, "backward", "backward")
    if isinstance(trainer, GrapeTrainer) and trainer.grape_options.method != "bp":
        new_engine = trainer._new_engine

        def with_seam() -> Any:  # each train() has an engine of its own
            engine = new_engine()
            if isinstance(engine, StarEngine):
                timed(engine, "look_again", "estimate")
                timed(engine.run, "finish_step", "refinement")
            return engine

        trainer._new_engine = with_seam  # type: ignore[method-assign]


def measure_times(setting: dict[str, Any], scratch: Path) -> tuple[dict[str, list[list[float]]], dict[str, Any]]:
    """Return the seconds of each step, by method and round, and each method's mean step in parts."""
    now = clock_of(setting)
    waits = (setting["warmup"], setting["warmup"] + setting["steps"])  # a burst's mean needs no others
    trainers, clocks = {}, {}
    for in_parts in (False, True):
        for name, options in setting["methods"].items():
            clocks[name, in_parts] = Clock(now, in_parts, waits)
            trainers[name, in_parts] = make_trainer(setting, options, clocks[name, in_parts], scratch)
    times: dict[str, list[list[float]]] = {name: [] for name in setting["methods"]}
    parts: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in setting["methods"]}
    for number in range(setting["rounds"]):
        for (name, in_parts), trainer in trainers.items():
            clock = clocks[name, in_parts]
            clock.ends, clock.parts = [], []
            gc.collect()
            trainer.train()
            steps = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][setting["warmup"] - 1 :]
            if not in_parts:
                times[name].append(steps)
                continue
            found = clock.parts[setting["warmup"] :]
            found = [
                {"forward": p["whole"] - sum(p[q] for q in ("backward", "estimate", "refinement"))} | p for p in found
            ]
            mean = {part: statistics.fmean(p.get(part, 0.0) for p in found) for part in PARTS}
            mean["rest"] = statistics.fmean(steps) - sum(mean.values())
            for part, seconds in mean.items():
                parts[name][part].append(seconds)
        print(f"round {number + 1} of {setting['rounds']}", flush=True)
    return times, {name: {part: statistics.median(s) for part, s in found.items()} for name, found in parts.items()}


def clock_of(setting: dict[str, Any]) -> Callable[[bool], float]:
    """Return the clock that the setting asks for."""
    read = time.perf_counter if setting["clock"] == "wall" else time.process_time

    def now(wait: bool) -> float:
        if wait and setting["device"] == "cuda":
            torch.cuda.synchronize()
        return read()

    return now


def measure_memory(setting: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """Return each method's peak, without and with activation checkpointing, each from a process of its own."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    context = multiprocessing.get_context("spawn")
    for checkpointing in (False, True) if setting["model"] == "gpt2" else (False,):
        label = "checkpointing" if checkpointing else "plain"
        for name, options in setting["methods"].items():
            with context.Pool(1) as pool:
                more = {CHECKPOINTING: True} if checkpointing else {}
                found.setdefault(name, {})[label] = pool.apply(peak_memory, (setting, options | more))
            print(f"memory, {label}, {name}: {found[name][label]}", flush=True)
    return found


def peak_memory(setting: dict[str, Any], options: dict[str, Any]) -> dict[str, int]:
    """Train for a burst in this process; return the peak of bytes in tensors, and the growth of resident memory."""
    torch.set_num_threads(setting["threads"])
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        if setting["device"] == "cuda":
            train_once(setting, options, Path(scratch))
            return {"tensors": torch.cuda.max_memory_allocated()}
        # The system's figure first: the profiler takes memory of its own.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        train_once(setting, options, Path(scratch))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        gc.collect()
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            train_once(setting, options, Path(scratch))
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return {"tensors": max(accumulate(event.nbytes() for event in changes)), "process": grown}


def train_once(setting: dict[str, Any], options: dict[str, Any], folder: Path) -> None:
    """Train one Trainer for one burst."""
    make_trainer(setting, options, Clock(lambda wait: time.perf_counter()), folder).train()


def machine(setting: dict[str, Any]) -> dict[str, str]:
    """Say what the figures were measured on."""
    cpu = next((row.split(":")[1].strip() for row in _lines("/proc/cpuinfo") if row.startswith("model name")), "")
    device = torch.cuda.get_device_name() if setting["device"] == "cuda" else cpu or platform.processor()
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(result: dict[str, Any]) -> str:
    """Write the figures as Markdown."""
    setting, times, parts, memory = (result[key] for key in ("setting", "step_s", "parts_s", "memory"))
    first = next(iter(setting["methods"]))
    usual = [statistics.fmean(burst) for burst in times[first]]
    shape = "GPT-2, {layers} layers, d={width}, context {context}, batch {batch}, vocabulary {vocab_size}"
    shape = (shape if setting["model"] == "gpt2" else "{model}, {side} x {side}, batch {batch}").format(**setting)
    number = "bf16" if setting["bf16"] else "float32"
    where = f"{setting['threads']} thread(s), " if setting["device"] == "cpu" else ""
    memory_names = " memory | with activation checkpointing | target |"
    lines = [
        f"{shape}; {number}, {where}{result['machine']['device']}, torch {result['machine']['torch']}, "
        f"transformers {result['machine']['transformers']}. Ratios to the {first}, whose step takes "
        f"{1e3 * statistics.median(usual):.0f} ms ({setting['clock']} clock): median of {setting['rounds']} rounds of "
        f"{setting['steps']} steps, and their quartiles. {'Memory: peak of all tensors.' if memory else ''}".strip(),
        "",
        "| method | step | quartiles | target |" + memory_names * bool(memory),
        "| --- | --- | --- | --- |" + " --- | --- | --- |" * bool(memory),
    ]
    for name, bursts in times.items():
        ratios = [statistics.fmean(burst) / u for burst, u in zip(bursts, usual, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        target = setting["targets"].get(name, {})
        lines.append(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} | {target.get('time', '')} |")
        if memory:
            ratio = {kind: peak["tensors"] / memory[first][kind]["tensors"] for kind, peak in memory[name].items()}
            checkpointing = ratio.get("checkpointing", math.nan)
            lines[-1] += f" {ratio['plain']:.3f} | {checkpointing:.3f} | {target.get('memory', '')} |"
    lines += [
        "",
        f"Where a step's time goes, in percent of a step of the {first} (estimate and refinement spread over all "
        "steps; `rest` is data, clipping, callbacks and whatever lies between).",
        "",
        f"| method | {' | '.join(PARTS)} |",
        f"| --- |{' --- |' * len(PARTS)}",
    ]
    whole = sum(parts[first].values())
    for name, found in parts.items():
        lines.append(f"| {name} | {' | '.join(f'{100 * found[part] / whole:.1f}' for part in PARTS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
