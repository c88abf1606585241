"""The Trainer arrives at the weights of ``reference.py``: GrAPE in plain loops, without hooks or batches."""

import pytest
import reference
import torch
from helpers import assert_same, batches, make_trainer, weights
from problems import LINEAR, MLP, PLAIN, Problem
from reference import Settings

from grape_hf.core.jacobian import Noise

STEPS, BATCH, SEED = 10, 8, 5

# The option of GrapeTrainingArguments that says what a setting says.
OPTIONS = {
    "rule": "feedback_rule",
    "feedback_lr": "feedback_lr",
    "normalize": "feedback_normalize",
    "passes": "jvp_passes",
    "every": "jvp_steps",
    "refit": "calibration_refit",
}


def draw(step: int, place: int, boundary: int, shape: torch.Size) -> torch.Tensor:
    """The draws themselves are not reproduced here; test_jacobian.py looks at them."""
    return Noise(SEED, step, [place]).vectors(boundary - 1, torch.zeros(1, *shape, dtype=torch.float64))[0]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    ("problem", "settings", "optim"),
    [
        pytest.param(PLAIN, Settings(feedback_lr=0.5, one_in=4, every=4), "adamw_torch", id="recommended"),
        pytest.param(PLAIN, Settings("ema", 0.1), "adamw_torch", id="ema"),
        pytest.param(PLAIN, Settings("cosine", 0.1, normalize=True, passes="per_block"), "sgd", id="cosine-per_block"),
        pytest.param(PLAIN, Settings(feedback_lr=0.5, passes="per_block", one_in=2), "sgd", id="lms-per_block"),
        pytest.param(MLP, Settings("lms", 0.5), "adamw_torch", id="mlp-lms"),
        pytest.param(MLP, Settings("cosine", 0.1), "adamw_torch", id="mlp-cosine"),
        pytest.param(LINEAR, Settings("ema", 0.1, every=2), "sgd", id="linear-ema"),
        pytest.param(PLAIN, Settings(feedback_lr=0.5, calibrate_every=4), "adamw_torch", id="calibration"),
        pytest.param(PLAIN, Settings("ema", 0.1, calibrate_every=3, refit=True), "adamw_torch", id="calibration-refit"),
    ],
)
def test_the_weights_of_a_slow_reference(problem: Problem, settings: Settings, optim: str, micro_batches, tmp_path):
    model, samples = problem.model(torch.float64), problem.samples(STEPS * BATCH, torch.float64)
    optimizer = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    rest = {} if optim == "sgd" else {"weight_decay": 0.0}
    B = reference.train(
        model,
        batches(samples, range(len(samples)), BATCH),
        draw,
        optimizer(model.parameters(), lr=0.02, **rest),
        settings,
    )
    trainer = make_trainer(
        problem,
        tmp_path,
        dtype=torch.float64,
        samples=len(samples),
        per_device_train_batch_size=BATCH // micro_batches,
        gradient_accumulation_steps=micro_batches,
        train_sampling_strategy="sequential",
        optim=optim,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        seed=SEED,
        jvp_fraction=1 / settings.one_in,
        calibration_strategy="steps" if settings.calibrate_every else "no",
        calibration_interval=settings.calibrate_every or 1,
        **{option: getattr(settings, setting) for setting, option in OPTIONS.items()},
    )
    trainer.train()
    expected = dict(model.named_parameters()) | {f"B_{i}": b for i, b in B.items()}
    assert_same(weights(trainer), expected, rtol=1e-6, atol=1e-8)


def test_the_reference_learns_and_its_settings_matter():
    """A reference in which a setting did nothing would hold the Trainer to nothing."""
    samples = PLAIN.samples(STEPS * BATCH, torch.float64)
    arrived = {}
    for settings in [
        Settings(feedback_lr=0.5),
        Settings("ema", 0.5),
        Settings("cosine", 0.5),
        Settings(feedback_lr=0.5, normalize=True),
        Settings(feedback_lr=0.5, passes="per_block"),
        Settings(feedback_lr=0.5, every=2),
        Settings(feedback_lr=0.5, one_in=2),
        Settings(feedback_lr=0.5, calibrate_every=2),
        Settings(feedback_lr=0.5, calibrate_every=2, refit=True),
    ]:
        model = PLAIN.model(torch.float64)
        before = model.blocks[0].up.weight.detach().clone()
        reference.train(
            model,
            batches(samples, range(len(samples)), BATCH),
            draw,
            torch.optim.SGD(model.parameters(), lr=0.1),
            settings,
        )
        arrived[settings] = model.blocks[0].up.weight.detach()
        assert not torch.equal(before, arrived[settings])
    values = list(arrived.values())
    for i, a in enumerate(values):
        for b in values[:i]:
            assert (a - b).abs().max() > 1e-6
