r"""GrAPE as docs/how_it_works.md tells it, slowly: no hooks or batches; a sample, a boundary, a position at a time.

It knows nothing of ``grape_hf``. The model shows its parts: ``stem``, ``blocks`` f_1 .. f_L, ``readout`` (norm, head)
and ``loss``. An activation h_l of one sample is ``(positions, n_l)``; errors are measured in ``hidden`` space, y = h_L.
Matrices are named by their boundary, 1 .. L-1: ``B[l]`` is ``(n_l, n_y)``, ``J[l]`` is ``(n_y, n_l)``.
"""

# ruff: noqa: E741  l is the letter for a boundary
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# p_l of one sample, (positions, n_l), from: optimiser step, the sample's place in the global batch, boundary, shape.
Draw = Callable[[int, int, int, torch.Size], Tensor]
Matrices = dict[int, Tensor]


@dataclass(frozen=True)
class Settings:
    """The options that change a step; the names are those of ``GrapeTrainingArguments`` where there is one."""

    rule: str = "lms"
    feedback_lr: float = 0.02
    normalize: bool = False
    passes: str = "joint"
    every: int = 1  # optimiser steps
    one_in: int = 1  # the estimate is made on every so manieth sample
    calibrate_every: int | None = None
    refit: bool = False


def train(
    model: Any,
    global_batches: Sequence[dict[str, Tensor]],
    draw: Draw,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
) -> Matrices:
    """Train ``model`` in place, a step for each global batch; return the feedback matrices at the end."""
    boundaries = range(1, len(model.blocks))
    sample = {name: values[0] for name, values in global_batches[0].items()}
    width = model.stem(next(iter(sample.values()))).shape[-1]
    B = {l: torch.eye(width, dtype=next(model.parameters()).dtype) for l in boundaries}

    for step, batch in enumerate(global_batches):
        samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        optimizer.zero_grad()
        if settings.calibrate_every and (step + 1) % settings.calibrate_every == 0:
            exact = [backpropagate(model, sample, len(samples)) for sample in samples]
            refined = refit(B, exact) if settings.refit else B
        else:
            refined = B
            if step % settings.every == 0:
                places = range(0, len(samples), settings.one_in)
                chosen = {place: samples[place] for place in places}
                refined = refine(model, chosen, B, lambda *which, step=step: draw(step, *which), settings)
            for sample in samples:
                broadcast(model, sample, len(samples), B)
        optimizer.step()
        B = refined  # used from the next step on
    return B


def parts(sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    (name,) = set(sample) - {"labels"}
    return sample[name], sample["labels"]


def sample_loss(model: Any, y: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Return one sample's share of the mean loss of a global batch."""
    logits = model.readout(y)
    return model.loss(logits.reshape(1, *logits.shape), labels.reshape(1, *labels.shape)) / batch_size


def positions(h: Tensor) -> Tensor:
    """View h as (positions, n): a single vector has one position."""
    return h.reshape(-1, h.shape[-1])


# --- 1. dual forward -------------------------------------------------------------------------------------------------


def refine(
    model: Any,
    chosen: dict[int, dict[str, Tensor]],
    B: Matrices,
    draw: Callable[[int, int, torch.Size], Tensor],
    settings: Settings,
) -> Matrices:
    """Estimate the Jacobians on the chosen samples, which come with their places, and refine B by them."""
    total = {l: torch.zeros_like(B[l].mT) for l in B}
    count = 0
    for place, sample in chosen.items():
        inputs, _ = parts(sample)
        h = activations(model, inputs)
        p = {l: draw(place, l, positions(h[l]).shape) for l in B}
        scale = {l: positions(h[l]).square().mean(-1, keepdim=True).sqrt() for l in B}  # (positions, 1)
        for group in [list(B)] if settings.passes == "joint" else [[l] for l in B]:
            v = {l: scale[l] * p[l] for l in group}
            q = positions(tangent_of_output(model, h, v))
            if settings.rule == "lms":
                for k in group:
                    for s in range(len(q)):
                        q[s] -= B[k].mT @ v[k][s]
            for l in group:
                for s in range(len(q)):
                    total[l] += torch.outer(q[s], p[l][s] / scale[l][s])
        count += len(positions(h[1]))
    J = {l: total[l] / count for l in B}
    return {l: learn(B[l], J[l], sum(b.shape[0] for b in B.values()) / count, settings) for l in B}


@torch.no_grad()
def activations(model: Any, inputs: Tensor) -> dict[int, Tensor]:
    """h_1 .. h_L of one sample."""
    h = {}
    last = model.stem(inputs)
    for l, block in enumerate(model.blocks, 1):
        last = h[l] = block(last)
    return h


def tangent_of_output(model: Any, h: dict[int, Tensor], v: dict[int, Tensor]) -> Tensor:
    """q, the tangent of y when v_l is injected at each boundary l of ``v``."""
    tangent = torch.zeros_like(h[1])
    for l in range(1, len(model.blocks)):
        if l in v:
            tangent = tangent + v[l].reshape(tangent.shape)
        following = model.blocks[l]  # f_{l+1}, which maps h_l to h_{l+1}
        with torch.no_grad():
            _, tangent = torch.func.jvp(following, (h[l],), (tangent,))
    return tangent.clone()


# --- 2. feedback refinement ------------------------------------------------------------------------------------------


def learn(B: Tensor, J: Tensor, width_by_samples: float, settings: Settings) -> Tensor:
    """Refine one matrix; for ``lms`` J is the estimate of J - B^T."""
    eta = settings.feedback_lr
    if settings.rule == "lms":
        B = B + eta / max(1.0, width_by_samples) * J.mT
    elif settings.rule == "ema":
        B = (1 - eta) * B + eta * J.mT
    else:
        variable = B.clone().requires_grad_()
        cosines = [torch.cosine_similarity(variable[:, k], J[k], dim=0) for k in range(B.shape[1])]
        loss = sum(1 - c for c in cosines)
        B = B - eta * torch.autograd.grad(loss, variable)[0]
    if settings.normalize:
        B = torch.stack([B[:, k] / B[:, k].norm() for k in range(B.shape[1])], dim=1)
    return B


# --- 3. parallel update ----------------------------------------------------------------------------------------------


def broadcast(model: Any, sample: dict[str, Tensor], batch_size: int, B: Matrices) -> None:
    """Add the gradients of one sample: each block's own, from delta_l = B_l e at its output."""
    inputs, labels = parts(sample)
    h: dict[int, Tensor] = {}
    for l, block in enumerate(model.blocks, 1):
        h[l] = block(model.stem(inputs) if l == 1 else h[l - 1].detach())
    y = h[len(model.blocks)].detach().requires_grad_()
    sample_loss(model, y, labels, batch_size).backward()  # the head's gradient is exact
    e = y.grad
    for l in range(1, len(model.blocks)):
        delta = torch.stack([B[l] @ error for error in positions(e)])
        h[l].backward(delta.reshape(h[l].shape))
    h[len(model.blocks)].backward(e)  # block L's as well


# --- 4. calibration --------------------------------------------------------------------------------------------------


def backpropagate(model: Any, sample: dict[str, Tensor], batch_size: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Add the exact gradients of one sample; return e and the exact delta_l."""
    inputs, labels = parts(sample)
    h = {}
    last = model.stem(inputs)
    for l, block in enumerate(model.blocks, 1):
        last = h[l] = block(last)
        last.retain_grad()
    sample_loss(model, last, labels, batch_size).backward()
    return positions(last.grad), {l: positions(h[l].grad) for l in range(1, len(model.blocks))}


def refit(B: Matrices, exact: Sequence[tuple[Tensor, dict[int, Tensor]]], ridge: float = 0.1) -> Matrices:
    """Minimise sum |delta_l - B_l e|^2 + ridge * mean_k(sum e_k^2) |B_l - present B_l|^2, the normal equations."""
    refitted = {}
    for l, b in B.items():
        pairs = [(e[s], delta[l][s]) for e, delta in exact for s in range(len(e))]
        ee = sum(torch.outer(e, e) for e, _ in pairs)
        de = sum(torch.outer(delta, e) for e, delta in pairs)
        weight = ridge * ee.diagonal().mean() * torch.eye(len(ee), dtype=ee.dtype)
        refitted[l] = (de + b @ weight) @ torch.linalg.inv(ee + weight)
    return refitted
