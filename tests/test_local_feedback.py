"""Maps of blocks, sweeps and paths through the Trainer: other models, split batches, guards, and what is refused."""

import pytest
import timm
import torch
from helpers import LEARNED, arguments, assert_same, differ, logged, make_trainer, train, weights
from problems import GPT2, NOISY, PLAIN, PlainLanguageModel, Problem
from test_trainer import CHECKPOINTING
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from grape_hf import GrapeTrainer

LOCAL = LEARNED | {"feedback_rule": "local"}
KINDS = {
    "local": LOCAL,
    "swept": LOCAL | {"feedback_sweeps": 1},
    "path": LOCAL | {"feedback_path": "shortcut"},
    "logits": LOCAL | {"feedback_space": "logits"},
    "block": LEARNED | {"jvp_scope": "block"},
    "identity-swept": {"method": "dfa", "feedback_init": "identity", "feedback_sweeps": 2},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_four_micro_batches_of_4_are_a_batch_of_16(options, tmp_path):
    run = {"dtype": torch.float64, "max_steps": 4, "samples": 64} | options
    whole = train(GPT2, tmp_path / "whole", per_device_train_batch_size=16, **run)
    split = train(GPT2, tmp_path / "split", gradient_accumulation_steps=4, **run)
    assert_same(weights(split), weights(whole), rtol=0, atol=1e-9)
    start = make_trainer(GPT2, tmp_path, dtype=torch.float64).model.state_dict()
    assert differ({name: p for name, p in whole.model.state_dict().items()}, start)


@pytest.mark.parametrize("name", ["local", "swept", "path"])
def test_activation_checkpointing_equals_none(name, tmp_path):
    options = KINDS[name] | {"dtype": torch.float64, "max_steps": 4}
    plain = train(GPT2, tmp_path / "plain", **options)
    assert_same(weights(train(GPT2, tmp_path / "kept", **options, **{CHECKPOINTING: True})), weights(plain))


def test_as_many_sweeps_as_points_are_backpropagation(tmp_path):
    """Through the Trainer, with dropout: the weights are those of backpropagation to rounding."""
    run = {"dtype": torch.float64, "max_steps": 6}
    bp = train(NOISY, tmp_path / "bp", method="bp", **run)
    swept = train(NOISY, tmp_path / "swept", feedback_sweeps=2, **run | LOCAL)
    trained = {name: p for name, p in weights(swept).items() if name in weights(bp)}
    assert_same(trained, weights(bp), rtol=0, atol=1e-8)
    assert (
        min(
            value
            for _, value in logged(
                train(GPT2, tmp_path / "m", feedback_sweeps=2, alignment_steps=1, **LOCAL), "grape/alignment/exact/mean"
            )
        )
        > 0.999
    )


class OneSingle(PlainLanguageModel):
    """Its blocks compute in float64, but for one."""

    def stem(self, input_ids: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda block, args: (args[0].to(block.up.weight.dtype),))
            block.to(torch.float32 if index == 1 else torch.float64)
        self.norm.register_forward_pre_hook(lambda norm, args: (args[0].double(),))
        return super().stem(input_ids)


@pytest.mark.parametrize("name", ["local", "swept", "path", "identity-swept"])
def test_blocks_may_compute_in_types_of_their_own(name, tmp_path):
    """Maps are of one type, the widest: B_l is their product, and a map meets what two blocks have made."""
    one_single = Problem("one-single", OneSingle, PLAIN.draw)
    run = {"dtype": torch.float64, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1} | KINDS[name]
    mixed, whole = train(one_single, tmp_path / "mixed", **run), train(PLAIN, tmp_path / "whole", **run)
    assert mixed.model.blocks[1].up.weight.dtype == torch.float32
    as_double = {name: t.double() for name, t in weights(mixed).items()}
    assert_same(as_double, weights(whole), rtol=0, atol=1e-5)


def test_calibration_and_fallback_go_on(tmp_path):
    options = {"calibration_strategy": "steps", "calibration_interval": 3, "fallback": "block"}
    run = train(GPT2, tmp_path, fallback_threshold=0.9999, fallback_patience=4, alignment_steps=1, **LOCAL | options)
    assert logged(run, "grape/calibration/steps")[-1][1] >= 1
    assert logged(run, "grape/fallback/blocks")[-1][1] >= 1


@pytest.mark.parametrize("more", [{"feedback_sweeps": 1}, {"feedback_path": "shortcut"}, {}], ids=str)
def test_a_calibration_step_measures_what_a_star_would_send(more, tmp_path):
    """It shows B_l e beside the exact deltas; of sweeps and paths it shows nothing, and the guards see nothing."""
    options = LOCAL | {"calibration_strategy": "steps", "calibration_interval": 2} | more
    found = logged(train(GPT2, tmp_path, max_steps=4, **options), "grape/alignment/exact/mean", at_all=not more)
    assert bool(found) == (not more)


def test_a_gradient_that_is_no_number_leaves_the_maps_as_they_were(tmp_path):
    class Breaking(GrapeTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    run = train(GPT2, tmp_path, Breaking, max_steps=3, **LOCAL)
    assert all(torch.isfinite(b).all() for b in run.feedback)
    assert run._run.read_metrics()["feedback/skipped"] == 1


def test_the_weight_gradients_that_an_update_sees_are_measured(tmp_path):
    run = train(GPT2, tmp_path, alignment_steps=1, **LOCAL)
    for name in ("cosine", "size"):
        values = [value for _, value in logged(run, f"grape/weight_gradient/{name}/h_1")]
        assert len(values) == 10
        assert all(0 < value < 1.5 for value in values)


def seq2seq() -> nn.Module:
    config = T5Config(
        vocab_size=31, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return AutoModelForSeq2SeqLM.from_config(config)


def pair(generator: torch.Generator) -> dict[str, Tensor]:
    draw = torch.randint(1, 31, (13,), generator=generator)
    return {"input_ids": draw[:8], "labels": draw[8:]}


def images(generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(3, 16, 16, generator=generator), "labels": torch.randint(4, (), generator=generator)}


class Images(nn.Module):
    """A network of timm that returns its loss."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.net = timm.create_model(name, num_classes=4, **options)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


T5 = Problem("t5", seq2seq, pair)
RESNET = Problem("resnet", lambda: Images("resnet10t", channels=(8, 8, 16, 16), stem_width=8), images)


@pytest.mark.parametrize(
    "options",
    [LOCAL, LOCAL | {"feedback_sweeps": 1}, {"method": "dfa", "feedback_sweeps": 1}],
    ids=["local", "swept", "random-swept"],
)
def test_an_encoder_under_a_decoder(options, tmp_path):
    run = train(T5, tmp_path, max_steps=8, alignment_steps=4, logging_steps=4, **options)
    first, last = (entry["loss"] for entry in run.state.log_history[:2])
    assert last < first
    assert all(torch.isfinite(b).all() for b in run.feedback)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dfa", "feedback_path": "shortcut"},
        {"method": "dfa", "feedback_path": "shortcut", "feedback_sweeps": 1},
        LOCAL | {"feedback_path": "shortcut", "feedback_sharing": "position"},
        LOCAL | {"feedback_sharing": "position"},
    ],
    ids=["path", "path-swept", "path-and-maps", "maps"],
)
def test_a_residual_network(options, tmp_path):
    run = train(RESNET, tmp_path, max_steps=4, feedback_points=0, alignment_steps=1, **options)
    cosines = [value for _, value in logged(run, "grape/alignment/exact/mean")]
    assert len(cosines) == 4
    if options.get("feedback_path") == "shortcut":
        assert min(cosines) > 0.15, "the path of the sample points along the gradient from the first step on"


REFUSED = {
    "path-of-lms": (
        LEARNED | {"feedback_path": "shortcut"},
        "expected feedback_rule=\"local\" or method=\"dfa\", got method='grape' and feedback_rule='lms'",
    ),
    "scope-of-cosine": (
        LEARNED | {"jvp_scope": "block", "feedback_rule": "cosine"},
        'expected method="grape" and feedback_rule="lms" or "ema"',
    ),
    "scope-per-block": (LEARNED | {"jvp_scope": "block", "jvp_passes": "per_block"}, 'expected jvp_passes="joint"'),
    "sweeps-of-bp": ({"method": "dkp", "feedback_sweeps": 1}, "feedback_sweeps=1: expected 0 with method='dkp'"),
    "refit": (
        LOCAL | {"calibration_refit": True, "calibration_strategy": "steps", "calibration_interval": 2},
        "Set calibration_refit=False",
    ),
    "rate": (LOCAL | {"feedback_lr": 1.5}, "expected at most 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_together(name, tmp_path):
    options, says = REFUSED[name]
    with pytest.raises(ValueError, match=".") as refusal:
        arguments(tmp_path, **options)
    assert says in str(refusal.value)


def test_what_the_model_does_not_allow_is_refused_before_training(tmp_path):
    plain = Problem("mlp", lambda: Plain(), lambda g: {"x": torch.randn(8, generator=g), "labels": torch.tensor(1)})
    with pytest.raises(ValueError, match="none leads to blocks.0, blocks.1"):
        train(plain, tmp_path, method="dfa", feedback_path="shortcut", blocks="blocks", feedback_space="hidden")
    with pytest.raises(ValueError, match="which must have the same positions: that is not so behind encoder"):
        train(T5, tmp_path, **LEARNED | {"jvp_scope": "block"})
    compiled = {"torch_compile": True, "feedback_sweeps": 1}
    with pytest.raises(ValueError, match="torch_compile with feedback_sweeps or feedback_path='shortcut'"):
        make_trainer(GPT2, tmp_path, **LOCAL | compiled)
    with pytest.raises(ValueError, match=r"more than feedback_size_limit=1e-06 allows"):
        train(GPT2, tmp_path, feedback_size_limit=1e-6, **LOCAL)


class Plain(nn.Module):
    """A chain of layers without shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_lms_matrices_are_no_start_for_maps(tmp_path):
    saved = train(GPT2, tmp_path / "lms", max_steps=2, save_strategy="steps", save_steps=2, **LEARNED)
    assert saved.feedback
    with pytest.raises(ValueError, match=r'without the maps of blocks .* feedback_rule="local": expected G_1 to G_2'):
        train(GPT2, tmp_path / "local", max_steps=4, resume=str(tmp_path / "lms" / "checkpoint-2"), **LOCAL)
