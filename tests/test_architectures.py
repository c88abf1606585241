"""GrAPE on tiny random models of many families: a third of what ``recipes/studies/architectures.py`` makes a table of.

The oracle is autograd: all of dy/dh_l, a backward for each number of y.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from exact_jacobians import ExactJacobians
from helpers import OnEvent, arguments, assert_same
from tiny_models import MODELS
from torch import Tensor

from grape_hf import GrapeTrainer
from grape_hf.core.boundaries import Boundaries

ROWS = {tiny.name: tiny for tiny in MODELS}
# One of each kind: fused and split projections, parallel residuals, norms before, after and on both sides, experts,
# recurrences, an operator without a forward-mode rule, shared blocks, paths outside the chain, stages, refusals.
THIRD = [
    "decoder-gpt2",
    "decoder-gptj",
    "decoder-opt",
    "decoder-bloom",
    "decoder-mpt",
    "decoder-falcon",
    "decoder-llama",
    "decoder-gemma3_text",
    "decoder-phi",
    "decoder-olmo2",
    "decoder-cohere",
    "decoder-granitemoe",
    "decoder-gpt_oss",
    "decoder-deepseek_v3",
    "decoder-mixtral-router-loss",
    "decoder-mamba",
    "decoder-recurrent_gemma",
    "decoder-gemma3n_text",
    "masked-albert",
    "masked-mpnet",
    "masked-modernbert",
    "classifier-bert",
    "classifier-gpt2",
    "encoder-decoder-t5",
    "encoder-decoder-mbart",
    "encoder-decoder-bart",
    "vision-vit",
    "vision-resnet-basic",
    "vision-convnextv2",
    "vision-swin",
    "timm-resnet10t",
    "timm-vit_tiny_patch16_224",
    "timm-cspresnet50",
    "timm-mobilenetv3_small_050",
    "timm-edgenext_xx_small",
]


@cache
def examine(name: str) -> dict[str, Any]:
    return architectures.examine(ROWS[name])


@pytest.mark.parametrize("name", THIRD)
def test_row(name, caplog):
    row = examine(name)
    refused = ROWS[name].refused
    assert row["result"].startswith("refused: ") if refused else row["result"] == "ok", row["result"]
    told = sum("finite differences in place of dual numbers" in message for message in caplog.messages)
    without_rule = name in ("decoder-bloom", "decoder-recurrent_gemma")
    assert told == (1 if without_rule else 0)  # in the look inside; the training's maps need no tangents


def gradients(name: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The gradients of one step of a model without dropout, in float64 where its operators have that."""
    tiny, found = ROWS[name], {}
    dtype = torch.float32 if tiny.jumps else torch.float64  # transformers' product of experts has no float64
    model = tiny.build().to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def keep(*args: Any, **kwargs: Any) -> None:
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    samples = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items()} for row in tiny.samples(8)]
    one_step = arguments(folder, max_steps=1, per_device_train_batch_size=8, max_grad_norm=0, **options)
    watch = OnEvent("pre_optimizer_step", keep)
    GrapeTrainer(model=model, args=one_step, train_dataset=samples, callbacks=[watch]).train()
    return found


# ALBERT has a single block, and a router's loss does not come through y (tests/test_hidden_losses.py).
NOT_SWEPT = {"masked-albert", "decoder-mixtral-router-loss"}


@pytest.mark.parametrize("name", [name for name in THIRD if not ROWS[name].refused and name not in NOT_SWEPT])
def test_enough_sweeps_are_backpropagation(name, tmp_path):
    """Whatever else a model has beside its chain: other paths, shared weights, several streams of inputs."""
    exact = gradients(name, tmp_path, method="bp")
    tolerance = 1e-3 if ROWS[name].jumps else 1e-9
    size = max(g.abs().max().item() for g in exact.values())
    for options in ({"feedback_rule": "local"}, {"feedback_path": "shortcut"}):
        star = gradients(name, tmp_path, method="grape", feedback_sweeps=0, **options)
        assert any(not torch.allclose(star[n], exact[n], rtol=1e-3, atol=0.0) for n in exact)
        swept = gradients(name, tmp_path, method="grape", feedback_sweeps=40, **options)
        assert_same(swept, exact, rtol=tolerance, atol=tolerance * size)


def test_a_third_is_a_third():
    assert len(set(THIRD)) >= len(MODELS) / 3
    assert {ROWS[name].kind for name in THIRD} == {tiny.kind for tiny in MODELS}


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("encoder-decoder-t5", {"*SelfAttention.relative_attention_bias.weight"}),
        ("encoder-decoder-bart", set()),  # norms behind the blocks: the encoder ends with its last block
        ("decoder-mixtral-router-loss", {"*self_attn.*", "*mlp.*", "*layernorm.weight"}),  # each block's own
        ("masked-mpnet", {"mpnet.encoder.relative_attention_bias.weight"}),
        ("decoder-llama", set()),
    ],
)
def test_what_learns_without_feedback_is_known(name, outside):
    found = architectures.shortened(examine(name)["outside"])
    for path in found:
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), path) for pattern in outside), path
    for pattern in outside:
        assert any(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), path) for path in found), pattern
    assert bool(found) == bool(outside)


def test_exact_jacobians_of_a_linear_chain():
    """The oracle itself: where samples and positions do not meet, J_l is a product of weights."""
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4))).double()
    boundaries = Boundaries(list(model[1:]))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    with boundaries.attached():
        exact = ExactJacobians(model, boundaries, lambda: model(x))
    w3, w4 = model[2].weight, model[3].weight
    for found, expected in zip(exact.feedback(), [(w4 @ w3).mT, w4.mT], strict=True):
        torch.testing.assert_close(found, expected)


def test_table_is_of_the_models_there_are():
    """Whoever adds a model runs the study again."""
    text = (Path(architectures.__file__).with_suffix("") / "table.md").read_text()
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[2:]]
    assert names == [tiny.name for tiny in MODELS]
    assert "wrong" not in text
