"""What a step would cost, reckoned without training, beside what steps of the Trainer are counted to cost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import POSITIONS, VOCABULARY, WIDTH, PlainLanguageModel, transformer
from test_cost import BATCH, DEEP, DEPTH, EAGER, FRACTION, LONG, peak_bytes, step_flops
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from grape_hf import GrapeArgumentsMixin
from grape_hf.cli import inspection
from grape_hf.cli.inspection import Inspection, inspect_model


def tokens(model: Callable[[], nn.Module], length: int = POSITIONS) -> Any:
    def make(device: str) -> tuple[nn.Module, dict[str, Tensor]]:
        with torch.device(device):
            ids = torch.ones(BATCH, length, dtype=torch.long)
            return model(), {"input_ids": ids, "labels": ids}

    return make


def look(model: Callable[[], nn.Module], length: int = POSITIONS, **options: Any) -> Inspection:
    return inspect_model(tokens(model, length), GrapeArgumentsMixin(**options), BATCH)


@pytest.mark.parametrize(
    "options",
    [
        {"feedback_rule": "lms"},
        {"jvp_fraction": FRACTION, "jvp_passes": "per_block"},
        {"jvp_mode": "finite_difference"},
        {"method": "dfa", "feedback_init": "gaussian"},
    ],
)
def test_operations_are_those_of_the_trainers_steps(tmp_path, options):
    found = look(EAGER.build, **options)
    assert found.counted_on == ("cpu" if options.get("method") == "dfa" else "meta")
    assert found.flops["bp"] == step_flops(tmp_path, method="bp")
    options = {"method": "grape"} | options
    due = step_flops(tmp_path, step=1, **options | {"jvp_steps": 1})  # every step, so the second has one too
    assert found.flops["star"] + found.flops["estimate"] == due
    share = 1 if options["method"] == "dfa" else 1 / 4  # recommended: every 4 steps
    assert found.step_cost == pytest.approx(
        (found.flops["star"] + share * (due - found.flops["star"])) / found.flops["bp"], rel=1e-12
    )


def test_without_numbers_it_counts_what_it_counts_with_them():
    options = GrapeArgumentsMixin()
    results = []
    for device in ("meta", "cpu"):
        model, batch = tokens(lambda: transformer("gpt2"))(device)
        results.append(inspection._inspect(model, batch, options, BATCH, device))
    meta, cpu = results
    assert (meta.flops, meta.boundaries) == (cpu.flops, cpu.boundaries)
    assert meta.memory == cpu.memory | {"activations": meta.memory["activations"]}
    assert meta.memory["activations"] == pytest.approx(cpu.memory["activations"], rel=0.05)  # masks of dropout


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 10, 10)),
        (nn.Conv2d(8, 16, 3, stride=2, groups=2), (2, 8, 10, 10)),
        (nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), (2, 8, 5, 5)),
        (nn.Conv1d(4, 4, 3), (2, 4, 9)),
    ],
)
def test_each_gradient_of_a_convolution_costs_its_forward_whatever_the_groups(convolution, shape):
    x = torch.randn(shape, requires_grad=True)
    y = convolution(x)
    places = (x if isinstance(convolution, nn.ConvTranspose2d) else y)[:, 0].numel()
    forward = 2 * places * convolution.weight.numel()
    assert inspection._flops(lambda: convolution(x)) == forward
    assert inspection._flops(lambda: convolution(x).sum().backward()) == 3 * forward
    assert inspection._flops(lambda: convolution(x.detach()).sum().backward()) == 2 * forward


def test_memory_is_near_what_the_trainers_tensors_take_at_most(tmp_path):
    found = look(DEEP.build, LONG, feedback_rule="lms")
    delta, matrices = 4 * BATCH * LONG * WIDTH, 4 * (DEPTH - 1) * WIDTH * WIDTH
    assert (found.memory["feedback"], found.memory["estimate"], found.memory["delta"]) == (matrices, matrices, delta)
    weights = 4 * sum(p.numel() for p in DEEP.model().parameters())
    assert [found.memory[k] for k in ("weights", "gradients", "optimiser")] == [weights, weights, 2 * weights]
    bp = sum(found.memory.values()) - 2 * matrices - delta
    # Gradients and activations are never all there at once, and temporary tensors are not counted.
    assert bp == pytest.approx(peak_bytes(tmp_path, method="bp"), rel=0.1)


def test_boundaries_have_names_shapes_and_matrices():
    found = look(lambda: transformer("gpt2"), feedback_rule="lms")
    assert [b.block for b in found.boundaries] == [f"transformer.h.{i}" for i in range(3)]
    assert {b.h for b in found.boundaries} == {(BATCH, POSITIONS, WIDTH)}
    assert [b.B for b in found.boundaries] == [(WIDTH, WIDTH), (WIDTH, WIDTH), None]
    assert (found.space, found.n_y, found.jvp_mode) == ("hidden", WIDTH, "dual")
    assert found.samples == (BATCH, 1)
    assert look(lambda: transformer("gpt2")).jvp_mode is None  # maps learn without
    logits = look(lambda: transformer("gpt2"), feedback_space="logits")
    assert (logits.space, logits.boundaries[0].B) == ("logits", (WIDTH, VOCABULARY))


class Reads(PlainLanguageModel):
    """Looks at a value on its way, as models do that choose experts; and returns logits without a loss."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        if input_ids.float().mean().item() > VOCABULARY:
            raise ValueError("no such token")
        return CausalLMOutput(logits=super().forward(input_ids)["logits"])


def test_a_model_that_looks_at_values_is_run_on_the_cpu(monkeypatch):
    found = look(Reads, jvp_fraction=1.0)
    assert found.counted_on == "cpu"
    meta = look(Silent, jvp_fraction=1.0)
    assert meta.counted_on == "meta"
    assert found.flops == meta.flops  # scaled up from 2 samples of 4
    assert found.boundaries == meta.boundaries
    monkeypatch.setattr(inspection, "LARGEST_ON_CPU", 10)
    with pytest.raises(RuntimeError, match="too large to be made here"):
        look(Reads)


class Silent(PlainLanguageModel):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return CausalLMOutput(logits=super().forward(input_ids)["logits"])


class NoForwardRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> Tensor:
        return e


class OneWay(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].norm.register_forward_hook(lambda m, a, h: NoForwardRule.apply(h))


def test_it_says_how_tangents_are_computed_and_why(caplog):
    assert look(OneWay, feedback_rule="lms").jvp_mode == "finite_difference"
    assert look(OneWay, feedback_rule="lms").jvp_reason == "an operator has no forward-mode rule"
    assert look(OneWay, jvp_mode="finite_difference").jvp_reason == 'jvp_mode="finite_difference"'
    assert look(Silent, method="dfa").jvp_mode is None


def test_what_has_no_feedback_is_refused():
    with pytest.raises(ValueError, match="method='bp' has no feedback points"):
        look(Silent, method="bp")
    with pytest.raises(ValueError, match="single block"):
        look(lambda: transformer("gpt2", num_hidden_layers=1))
