r"""How good can a map of a block be, and what would better it? Regressions on a network that backpropagation trained.

    python recipes/studies/best_maps.py            # about four minutes on a core; the data as for language_model.py

The model and the data are those of ``language_model.yaml``, trained by plain backpropagation. Then, on other batches of
its training split, v, the exact gradient at a block's input, is predicted from what a map might be given, by ridge
regression: from d, the exact gradient at the block's output, at the same position; with the next position's d; with the
mean of the later ones; with d over the size of h; with d as the block's own attention would bring it back; and with
products of d and some projections of h, which make the map depend on the token. The same from e, the
gradient at the last block's output, in the place of d: what B_l could be at best. Last, the deltas that the best plain
maps give, without a sweep, and with one and two.

All figures are cosines with v on batches that were not fitted. Writes a table into recipes/studies/novels.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script sees its own folder alone
from token_blocks import load

HERE = Path(__file__).parent
RIDGE = 1e-3  # of the mean eigenvalue
BATCH = 16


@dataclass(frozen=True)
class Seen:
    """One batch: h_1 .. h_L, the gradient at each, and the attention of every block, ``(batch, heads, to, from)``."""

    h: list[Tensor]
    delta: list[Tensor]
    attention: list[Tensor]


def main() -> None:
    """Train, collect, fit, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"steps": 2000, "batches": 120, "held_out": 12, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    setting = yaml.safe_load((HERE / "language_model.yaml").read_text())
    tokens = load(setting["data"], torch.device("cpu"))["train"].tokens
    shape = {"vocab_size": setting["data"]["vocab_size"], "n_positions": setting["data"]["context"]}
    config = AutoConfig.for_model(
        **shape, bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation="eager", **setting["model"]
    )
    model = AutoModelForCausalLM.from_config(config)
    train(model, tokens, options.steps)
    fitted, held = collect(model, tokens, options.batches), collect(model, tokens, options.held_out)
    last = len(fitted[0].h) - 1
    rows = {}
    for name, features in FEATURES.items():
        each = [cosine_of(fitted, held, features, i, i + 1) for i in range(last)]
        rows[name] = each + [cosine_of(fitted, held, features, i, last) for i in range(last)]
    maps = [fit(pairs(fitted, FEATURES["the same position"], i, i + 1)) for i in range(last)]
    swept = {number: deltas_of(model, held, maps, number) for number in range(3)}
    text = table(rows, swept, options)
    (HERE / "novels" / "best_maps.md").write_text(text)
    print(text)


def train(model: Any, tokens: Tensor, steps: int) -> None:
    """Train by backpropagation, as the study does."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, 3.6e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 3.6e-4)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, max(1, steps // 20))
    for _ in range(steps):
        ids = tokens[torch.randint(len(tokens), (BATCH,))].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
        warm.step()


def collect(model: Any, tokens: Tensor, batches: int) -> list[Seen]:
    """Run batches, each by ordinary backpropagation."""
    found, h = [], []

    def keep(module: Any, args: Any, output: Any) -> None:
        h.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in model.transformer.h]
    for _ in range(batches):
        h.clear()
        ids = tokens[torch.randint(len(tokens), (BATCH,))].long()
        output = model(ids, labels=ids, output_attentions=True)
        delta = torch.autograd.grad(output.loss, h)
        found.append(Seen([t.detach() for t in h], [1e3 * t for t in delta], [a.detach() for a in output.attentions]))
    for handle in handles:
        handle.remove()
    return found


def _shifted(d: Tensor) -> Tensor:
    return F.pad(d[:, 1:], (0, 0, 0, 1))


def _later(d: Tensor) -> Tensor:
    """Sum d at later positions t, over t + 1: what attention to all positions alike would bring back."""
    shared = d / torch.arange(1, d.shape[1] + 1)[:, None]
    return shared.flip(1).cumsum(1).flip(1) - shared


def _by_attention(d: Tensor, attention: Tensor) -> Tensor:
    """Bring d back along the attention of each head, ``(batch, positions, heads n)``."""
    return torch.einsum("bhts,btn->bshn", attention, d).flatten(2)


def _by_projections(d: Tensor, h: Tensor, number: int = 8) -> Tensor:
    """Multiply d by the values of the batch's normed h along fixed directions."""
    normed = F.layer_norm(h, h.shape[-1:])
    directions = torch.linalg.qr(torch.randn(h.shape[-1], number, generator=torch.Generator().manual_seed(0)))[0]
    values = normed @ directions
    return (d[..., None, :] * values[..., :, None]).flatten(2)


# d or e, h, the block's attention: what the regression is given.
FEATURES: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "the same position": lambda d, h, a: [d],
    "and the next": lambda d, h, a: [d, _shifted(d)],
    "and the mean of later ones": lambda d, h, a: [d, _later(d)],
    "and d over the size of h": lambda d, h, a: [d, d / h.square().mean(-1, keepdim=True).sqrt()],
    "and d along the block's attention": lambda d, h, a: [d, _by_attention(d, a)],
    "and d times 8 projections of h": lambda d, h, a: [d, _by_projections(d, h)],
}


def pairs(
    seen: list[Seen], features: Callable[[Tensor, Tensor, Tensor], list[Tensor]], index: int, source: int
) -> list[tuple[Tensor, Tensor]]:
    """Return features and v of each batch, a row a vector: v at h_{index + 1}, d at h_{source + 1}."""
    return [
        (
            torch.cat(features(s.delta[source], s.h[index], s.attention[index + 1]), -1).flatten(0, 1),
            s.delta[index].flatten(0, 1),
        )
        for s in seen
    ]


def fit(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the regression of v on the features, ``(features, n)``."""
    gram = sum(x.mT @ x for x, _ in rows)
    assert isinstance(gram, Tensor)
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, sum(x.mT @ v for x, v in rows))


def cosine_of(fitted: list[Seen], held: list[Seen], features: Any, index: int, source: int) -> float:
    """Fit, and return the cosine of what is predicted with v, over all held-out vectors together."""
    W = fit(pairs(fitted, features, index, source))
    x, v = (torch.cat(part) for part in zip(*pairs(held, features, index, source), strict=True))
    return _cosine(x @ W, v)


def deltas_of(model: Any, held: list[Seen], maps: list[Tensor], sweeps: int) -> list[float]:
    """Return the mean cosine with the exact delta at h_1 .. h_{L-1}, of a star with these maps, after sweeps."""
    blocks, found = model.transformer.h, []
    length = held[0].h[0].shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    for seen in held:
        d = [*maps, seen.delta[-1]]
        for i in reversed(range(len(maps))):
            d[i] = d[i + 1] @ maps[i]
        for _ in range(sweeps):
            inputs = [h.clone().requires_grad_() for h in seen.h[:-1]]
            made = [block(h, attention_mask=mask) for block, h in zip(blocks[1:], inputs, strict=True)]
            outputs = [m[0] if isinstance(m, tuple) else m for m in made]
            v = torch.autograd.grad(outputs, inputs, d[1:])
            corrected = list(d)
            for i in reversed(range(len(maps))):
                corrected[i] = v[i] + (corrected[i + 1] - d[i + 1]) @ maps[i]
            d = corrected
        found.append([_cosine(mine, exact) for mine, exact in zip(d[:-1], seen.delta[:-1], strict=True)])
    return torch.tensor(found).mean(0).tolist()


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def table(rows: dict[str, list[float]], swept: dict[int, list[float]], options: argparse.Namespace) -> str:
    """Write all in Markdown."""
    half = len(swept[0])
    places = " | ".join(f"h_{i + 1}" for i in range(half))
    lines = [
        f"GPT-2 of `language_model.yaml` after {options.steps} steps of backpropagation, seed {options.seed}; fitted "
        f"on {options.batches} batches, cosines on {options.held_out} others. The figure at h_l is of the map of the "
        "block behind it.",
        "",
    ]
    for title, start in (("from the gradient at the block's output", 0), ("from e", half)):
        lines += [f"| {title} | {places} |", "| --- |" + " --- |" * half]
        lines += [
            f"| {name} | {' | '.join(f'{c:.3f}' for c in each[start : start + half])} |" for name, each in rows.items()
        ]
        lines.append("")
    lines += [f"| deltas by the maps of the first row | {places} |", "| --- |" + " --- |" * half]
    for number, each in swept.items():
        lines.append(f"| {number} sweep{'s' * (number != 1)} | {' | '.join(f'{c:.3f}' for c in each)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
