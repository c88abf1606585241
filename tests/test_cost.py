"""What a step costs, counted: floating-point operations, passes, bytes. Seconds are recipes/benchmarks' business.

First the operations, against formulas that leave no room; then how often the blocks run; then what is alive at once.
L blocks, N = samples x positions, d = width = n_l = n_y.
"""

import dataclasses
import gc
import weakref
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from helpers import OnEvent, train
from problems import BLOCKS, GPT2, POSITIONS, VOCABULARY, WIDTH, Problem, text, transformer
from torch.autograd import profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import grape_hf.core.star

# transformers 5.23 calls activation checkpointing by its name, 5.17 does not know that name.
NAMES = [option.name for option in dataclasses.fields(TrainingArguments)]
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in NAMES)
BATCH, FRACTION = 4, 0.5
N = BATCH * POSITIONS
PRODUCT = 2 * WIDTH * WIDTH  # operations of one d x d matrix times a vector

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
# Attention in plain products, which are all counted; the fused kernels are counted by formulas of their own.
EAGER = Problem("gpt2-eager", lambda: transformer("gpt2", attn_implementation="eager", **NO_DROPOUT), text)

# Deep, with activations larger than matrices: what is kept for each boundary shows.
DEPTH, LONG = 12, 64


def deep(blocks: int) -> Problem:
    """Return a problem of so many blocks and long samples."""
    return Problem(
        "gpt2-deep",
        lambda: transformer("gpt2", num_hidden_layers=blocks, max_position_embeddings=LONG, **NO_DROPOUT),
        lambda generator: {k: v.repeat(LONG // POSITIONS) for k, v in text(generator).items()},
    )


DEEP = deep(DEPTH)


class KernelCounter(TorchDispatchMode):
    """Counts what computes: calls of operators that are no views of what there is."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        idle = ("aten::empty", "aten::detach", "aten::_unsafe_view", "aten::promote_types")
        self.number += not (func.is_view or func.name().startswith(idle))
        return func(*args, **(kwargs or {}))


class ProductCounter(TorchDispatchMode):
    """Counts matrix products by the type of their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.types: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.name().split("::")[1].split(".")[0] in ("mm", "bmm", "addmm", "baddbmm"):
            self.types[made.dtype] += 1
        return made


def step_flops(folder: Path, step: int = 1, **options: Any) -> int:
    """Operations of one optimiser step of the Trainer, by default the second: the first one probes the shapes."""
    counter = FlopCounterMode(display=False)
    count_in(counter, EAGER, folder, step, **options)
    return counter.get_total_flops()


def count_in(counter: Any, problem: Problem, folder: Path, step: int = 1, **options: Any) -> None:
    """Have a counter see one optimiser step."""

    def begin(state: Any, **_: Any) -> None:
        if state.global_step == step:
            counter.__enter__()

    def end(state: Any, **_: Any) -> None:
        if state.global_step == step + 1:  # counted up just before
            counter.__exit__(None, None, None)

    callbacks = {"callbacks": [OnEvent("step_begin", begin), OnEvent("step_end", end)]}
    train(problem, folder, more=callbacks, max_steps=step + 1, per_device_train_batch_size=BATCH, **options)


def linear_flops(samples: int) -> int:
    """One block's products with weights, forward: query, key and value; output; up and down by a factor of 4."""
    return samples * POSITIONS * (3 + 1 + 4 + 4) * PRODUCT


def attention_flops(samples: int) -> int:
    """One block's products of activations with each other: q k and (attention) v, whatever the number of heads."""
    return 2 * samples * 2 * POSITIONS * POSITIONS * WIDTH


# A frozen start that is no identity: a star with its products.
GAUSSIAN = {"method": "dfa", "feedback_space": "hidden", "feedback_init": "gaussian"}


def test_method_bp_computes_what_backpropagation_computes(tmp_path):
    head = N * 2 * WIDTH * VOCABULARY
    forward = BLOCKS * (linear_flops(BATCH) + attention_flops(BATCH)) + head
    stock = step_flops(tmp_path, trainer=Trainer)
    assert stock == 3 * forward
    assert step_flops(tmp_path, method="bp") == stock


def test_a_star_costs_backpropagation_and_one_product_with_each_feedback_matrix(tmp_path):
    feedback = (BLOCKS - 1) * N * PRODUCT
    assert step_flops(tmp_path, **GAUSSIAN) == step_flops(tmp_path, method="bp") + feedback


def test_a_frozen_identity_costs_backpropagation(tmp_path):
    assert step_flops(tmp_path, method="dfa", feedback_init="identity") == step_flops(tmp_path, method="bp")


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (GAUSSIAN, {torch.bfloat16: BLOCKS - 1}),
        # The backward of the blocks behind: four products with weights, four of attention.
        (GAUSSIAN | {"feedback_sweeps": 1}, {torch.bfloat16: (BLOCKS - 1) * (1 + 8)}),
        # C_l at all boundaries but the two highest. In this step the maps do not learn.
        (
            {"method": "grape", "feedback_rule": "local", "jvp_steps": 2, "feedback_sweeps": 1},
            {torch.bfloat16: (BLOCKS - 1) * (1 + 8) + BLOCKS - 2},
        ),
    ],
    ids=["star", "sweep", "maps"],
)
def test_under_autocast_products_with_matrices_are_computed_like_those_of_the_blocks(tmp_path, options, more):
    """In float32 they would take a GPU ten times as long, and be a tenth of a step."""

    def products(**options: Any) -> Counter[torch.dtype]:
        counter = ProductCounter()
        count_in(counter, EAGER, tmp_path, bf16=True, **options)
        return counter.types

    assert products(**options) - products(method="bp") == more


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"method": "dfa", "feedback_init": "identity"}, 0),
        # The product with B_l; v, the sum of what comes by two ways; delta_l and v at the positions that are looked at;
        # a map's numbers checked and taken; its product with the B above it.
        ({"method": "grape", "feedback_rule": "local"}, 7),
    ],
    ids=["identity", "local"],
)
def test_one_more_block_costs_few_kernels_beside_its_own(tmp_path, options, most):
    """On a GPU a small model waits for kernels to be launched; 50 a block were more than half of a step there."""

    def kernels(depth: int, **options: Any) -> int:
        counter = KernelCounter()
        count_in(counter, deep(depth), tmp_path, **options)
        return counter.number

    shallow, double = (kernels(depth, **options) - kernels(depth, method="bp") for depth in (4, 8))
    assert double - shallow <= 4 * most
    assert most == 0 or double - shallow > 4  # the counter sees the blocks' own work go by


@pytest.mark.parametrize("rule", ["lms", "ema"])
def test_an_estimate_costs_dual_numbers_up_to_y_on_the_share_of_the_batch(tmp_path, rule):
    samples = int(FRACTION * BATCH)
    linear, attention = linear_flops(samples), attention_flops(samples)
    # A tangent through a product with constant weights is one product more, through one of two activations two more.
    # Block 1 lies before the first tangent, the head behind y.
    passed = linear + attention + (BLOCKS - 1) * (2 * linear + 3 * attention)
    rank_one = (BLOCKS - 1) * samples * POSITIONS * PRODUCT  # q a^T at each boundary
    predicted = rank_one if rule == "lms" else 0  # B^T v
    star = step_flops(tmp_path, **GAUSSIAN)
    options = dict(method="grape", feedback_rule=rule, jvp_fraction=FRACTION, jvp_steps=1)
    assert step_flops(tmp_path, **options) == star + passed + rank_one + predicted


def test_a_step_on_which_no_estimate_is_due_costs_a_star(tmp_path):
    options = dict(method="grape", jvp_fraction=FRACTION, jvp_steps=2)
    star = step_flops(tmp_path, **GAUSSIAN)
    assert step_flops(tmp_path, step=1, **options) == star
    assert step_flops(tmp_path, step=2, **options) > star


def test_maps_of_blocks_cost_one_product_each_beside_the_star(tmp_path):
    """G d is the delta of the block below, which the star has made; (v - G d) d^T is a product. Then B is made anew."""
    options = dict(method="grape", feedback_rule="local")
    star = step_flops(tmp_path, **GAUSSIAN)
    product = (BLOCKS - 2) * WIDTH * PRODUCT  # G_l times the B above it
    # The bound on the largest eigenvalue takes the products of up to 256 vectors with each other; there are N.
    bound = (BLOCKS - 1) * 2 * N * N * WIDTH
    learned = (BLOCKS - 1) * N * PRODUCT
    assert step_flops(tmp_path, jvp_steps=1, **options) == star + learned + bound + product
    assert step_flops(tmp_path, jvp_steps=2, **options) == star


def test_a_sweep_costs_one_backward_without_weight_gradients(tmp_path):
    """Of the blocks behind a boundary, as those above it; the second sweep leaves out the last block."""
    options = dict(method="dfa", feedback_init="identity")
    star = step_flops(tmp_path, **options)
    inputs = linear_flops(BATCH) + 2 * attention_flops(BATCH)  # of one block: a product each, two for two activations
    assert step_flops(tmp_path, feedback_sweeps=1, **options) == star + (BLOCKS - 1) * inputs
    assert step_flops(tmp_path, feedback_sweeps=2, **options) == star + (2 * BLOCKS - 3) * inputs


def test_the_shortcut_path_of_a_transformer_costs_nothing(tmp_path):
    assert step_flops(tmp_path, method="dfa", feedback_path="shortcut") == step_flops(tmp_path, method="bp")


@pytest.mark.parametrize(
    ("mode", "passes", "extra"),
    [
        ("dual", "joint", 1),
        ("dual", "per_block", BLOCKS - 1),
        ("finite_difference", "joint", 2),  # a clean one and a perturbed one
        ("finite_difference", "per_block", 1 + BLOCKS - 1),  # a clean one serves all
    ],
)
def test_passes_of_an_estimate(tmp_path, mode, passes, extra):
    ran = SimpleQueue[None]()  # what a hook puts into a list is put back behind passes on the side
    calls = []

    def count(state: Any, model: Any, **_: Any) -> None:
        model.transformer.h[0].register_forward_hook(lambda *_: ran.put(None))

    callbacks = [OnEvent("train_begin", count), OnEvent("step_end", lambda *_, **__: calls.append(ran.qsize()))]
    options = dict(method="grape", jvp_mode=mode, jvp_passes=passes, jvp_steps=3, max_steps=7)
    train(GPT2, tmp_path, more={"callbacks": callbacks}, **options)
    each = [after - before for before, after in pairwise(calls)]  # without the first step, which probes the shapes
    assert each == [1, 1, 1 + extra, 1, 1, 1 + extra]


def test_one_delta_is_alive_at_a_time(tmp_path, monkeypatch):
    project_error, born, alive = grape_hf.core.star.project_error, [], []

    def watched(*args: Any) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in born) + 1)
        delta = project_error(*args)
        # The storage outlives the Tensor's Python object exactly as long as autograd holds it.
        born.append(weakref.ref(delta.untyped_storage()))
        return delta

    monkeypatch.setattr(grape_hf.core.star, "project_error", watched)
    train(GPT2, tmp_path, **GAUSSIAN, max_steps=2)
    assert alive == [1] * 2 * (BLOCKS - 1)
    assert not any(ref() is not None for ref in born)


def peak_bytes(folder: Path, **options: Any) -> int:
    """Most bytes in tensors at once, weights and optimiser state included, over two steps of the Trainer."""
    gc.collect()  # what an earlier training has left would be counted when it goes
    with profiler.profile(profile_memory=True) as profile:
        train(DEEP, folder, max_steps=2, per_device_train_batch_size=BATCH, **options)
    changes = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in changes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_star_keeps_nothing_but_its_feedback_matrices_and_one_delta(tmp_path, checkpointing):
    delta, matrices = 4 * BATCH * LONG * WIDTH, 4 * (DEPTH - 1) * WIDTH * WIDTH
    options = {CHECKPOINTING: checkpointing}
    usual = peak_bytes(tmp_path, method="bp", **options)
    star = peak_bytes(tmp_path, method="dfa", feedback_init="identity", **options)
    assert usual < star <= usual + matrices + delta
    # An estimate is over before the step's own forward; its sums, of the matrices' size, wait for the step's end.
    grape = peak_bytes(tmp_path, method="grape", jvp_steps=1, jvp_fraction=0.25, **options)
    assert star < grape <= usual + 2 * matrices + delta
