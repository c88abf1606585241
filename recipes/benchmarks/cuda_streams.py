r"""On one GPU, do blocks that go backward at once take less time than blocks that go one after the other?

    python recipes/benchmarks/cuda_streams.py                                        # one minute on a GPU
    python recipes/benchmarks/cuda_streams.py --layers 12 --width 512 --batch 16 --context 256
    python recipes/benchmarks/cuda_streams.py --layers 4 --rounds 2 --device cpu     # a look: no streams, no graphs

A step is the forward of a GPT-2 and the gradient of all its weights, without an optimiser. `backpropagation` is the
exact one. `star` cuts the chain in front of every block but the first, gives each block the output error times a
matrix, and each block's backward lies on a CUDA stream of its own (blocks take turns on the streams). A small model
with a batch of one leaves most of the GPU idle, so there is room for blocks beside each other.

`eager` launches each kernel from Python. `graph` has the whole step recorded as a CUDA graph, which the GPU replays
without Python. All ways take turns; stated are medians over rounds and quartiles. The gradients of all stars are
compared before anything is timed. Writes a table (Markdown) and all figures (JSON).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

Step = Callable[[], tuple[Tensor, ...]]
EAGER = "backpropagation, eager"


def main() -> None:
    """Build the steps, check their gradients, time them, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 48], help="how many the blocks are spread over")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="in each round, of every way")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Model(options.layers, options.width, options.batch, options.context, options.device)
    graphs = options.device == "cuda"
    steps: dict[str, Step] = {EAGER: model.backpropagation, "star, 1 stream, eager": model.star}
    stars = {"star, 1 stream": model.star}
    for count in options.streams if graphs else ():
        streams = [torch.cuda.Stream() for _ in range(count)]
        stars[f"star, {count} streams"] = lambda streams=streams: model.star(streams)
        steps[f"star, {count} streams, eager"] = stars[f"star, {count} streams"]
    errors: dict[str, float] = {}
    if graphs:
        steps["backpropagation, graph"] = graph_of(model.backpropagation)
        steps |= {f"{name}, graph": graph_of(star) for name, star in stars.items()}
    for kind, exact in (("backpropagation", model.backpropagation()), ("star", model.star())):
        errors |= {name: distance(step(), exact) for name, step in steps.items() if name.startswith(kind)}
    if wrong := {name: error for name, error in errors.items() if error > 1e-3}:
        raise SystemExit(f"gradients differ from those of the same law on one stream, eager: {wrong}")
    seconds = timed(steps, options.rounds, options.steps)
    device = torch.cuda.get_device_name() if graphs else options.device
    result = {
        "setting": {name: value for name, value in vars(options).items() if name != "out"},
        "machine": {"device": device, "torch": torch.__version__, "transformers": transformers.__version__},
        "gradient_error": errors,
        "seconds": seconds,
    }
    text = table(result)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"cuda_streams_{options.layers}x{options.width}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(text)


class Model:
    """A GPT-2 whose blocks are called one by one, with tokens, labels and the matrices B_l of the star.

    Args:
        layers: L.
        width: n.
        batch: of samples.
        context: positions of a sample.
        device: of all.
    """

    def __init__(self, layers: int, width: int, batch: int, context: int, device: str) -> None:
        shape = {"vocab_size": 4096, "n_positions": context, "n_embd": width, "n_layer": layers, "n_head": width // 64}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(**shape, **dropout, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa")
        self.whole = GPT2LMHeadModel(config).to(device).train()
        self.blocks: nn.ModuleList = self.whole.transformer.h
        self.weights = list(self.whole.parameters())
        self.tokens = torch.randint(4096, (batch, context), device=device)
        self.positions = torch.arange(context, device=device)
        self.B = torch.eye(width, device=device).repeat(layers - 1, 1, 1)  # (L - 1, n, n), of h_1 .. h_{L-1}
        self.B += 0.1 * torch.randn_like(self.B) / width**0.5

    def embedded(self) -> Tensor:
        """Return h_0, (batch, context, n)."""
        transformer = self.whole.transformer
        return transformer.wte(self.tokens) + transformer.wpe(self.positions)

    def loss(self, h: Tensor) -> Tensor:
        """Return the loss of what the last block returns."""
        logits = self.whole.lm_head(self.whole.transformer.ln_f(h))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten())

    def backpropagation(self) -> tuple[Tensor, ...]:
        """Return the exact gradient of every weight."""
        h = self.embedded()
        for block in self.blocks:
            h = output_of(block(h))
        return torch.autograd.grad(self.loss(h), self.weights)

    def star(self, streams: Sequence[torch.cuda.Stream] = ()) -> tuple[Tensor, ...]:
        """Return the star's gradient of every weight: block l goes backward from B_l e, the last one from e.

        Autograd runs a block's backward on the stream that its forward ran on.
        """
        inputs, outputs = [self.embedded()], []
        main = torch.cuda.current_stream() if streams else None
        last = main
        for number, block in enumerate(self.blocks):
            stream = streams[number % len(streams)] if streams else None
            if stream is not None and last is not None:
                stream.wait_stream(last)
            with torch.cuda.stream(stream):
                outputs.append(output_of(block(inputs[-1])))
            inputs.append(outputs[-1].detach().requires_grad_())
            last = stream
        if main is not None and last is not None:
            main.wait_stream(last)
        loss = self.loss(inputs[-1])
        behind = [self.whole.lm_head.weight, *self.whole.transformer.ln_f.parameters()]
        e, *of_head = torch.autograd.grad(loss, [inputs[-1], *behind])
        deltas = [*torch.matmul(e.unsqueeze(0), self.B.unsqueeze(1)), e]  # all B_l e in one product
        found = torch.autograd.grad(outputs, self.weights, deltas, allow_unused=True)
        if main is not None:
            for stream in streams:
                main.wait_stream(stream)
        also = {id(weight): g for weight, g in zip(behind, of_head, strict=True)}  # the head shares the embeddings
        both = [(g, also.get(id(weight))) for weight, g in zip(self.weights, found, strict=True)]
        return tuple(a if b is None else b if a is None else a + b for a, b in both)


def output_of(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return a block's h_l; some versions of transformers put it into a tuple."""
    return found[0] if isinstance(found, tuple) else found


def graph_of(step: Step) -> Step:
    """Record a step as a CUDA graph; return what replays it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # kernels are chosen and libraries opened before anything is recorded
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return found

    return replay


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error of a weight's gradient."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def timed(steps: dict[str, Step], rounds: int, number: int) -> dict[str, list[float]]:
    """Return each way's seconds a step, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            wait()
            start = time.perf_counter()
            for _ in range(number):
                step()
            wait()
            seconds[name].append((time.perf_counter() - start) / number)
    return seconds


def wait() -> None:
    """Wait until the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(result: dict) -> str:
    """Write the figures as Markdown."""
    setting, seconds = result["setting"], result["seconds"]
    shape = "{layers} layers of {width}, batch {batch}, context {context}".format(**setting)
    middle = statistics.median(seconds[EAGER])
    lines = [
        f"GPT-2, {shape}, float32; {result['machine']['device']}, torch {result['machine']['torch']}. Forward and all "
        f"gradients, {setting['rounds']} rounds of {setting['steps']} steps; ratios to {EAGER}.",
        "",
        "| | ms | quartiles | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in seconds.items():
        low, own, high = (1e3 * s for s in statistics.quantiles(found, n=4))
        lines.append(f"| {name} | {own:.2f} | {low:.2f} to {high:.2f} | {own / middle / 1e3:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
