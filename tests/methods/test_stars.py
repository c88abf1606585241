"""FDFA and DKP: GrAPE's star with other learning of B_l, against their formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from digits import DIGITS, batch, plain_net
from helpers import train
from problems import WIDTH, LayerBlock, Problem
from torch import Tensor, nn

from grape_hf import GrapeArgumentsMixin, GrapeTrainer
from grape_hf.core.feedback import initial_feedback
from grape_hf.core.jacobian import Noise
from grape_hf.core.layout import AUTO, Pairing
from grape_hf.core.modes import Forward
from grape_hf.engine.run import GrapeRun
from grape_hf.methods import dkp

SGD = dict(optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0)


def test_fdfa_averages_p_q():
    """B <- (1 - alpha) B + alpha mean(p q^T), q by one jvp a sample, everything perturbed at once, at every step."""
    model = plain_net(nn.Tanh).double()
    inputs = batch(6)
    run = GrapeRun(model, GrapeArgumentsMixin(method="fdfa", feedback_lr=0.25), seed=3)
    run.start(lambda: model(**inputs))
    assert all(b.abs().max() == 0 for b in run.feedback.B)
    start = [torch.randn_like(b) for b in run.feedback.B]
    run.feedback.B = [b.clone() for b in start]
    for step in range(2):
        run.begin_step(step)
        assert run.estimating
        run.estimate(lambda: model(**inputs), range(6))
        run.finish_step()
    run.close()

    first, second, last = model.blocks
    with torch.no_grad():
        h1 = first(inputs["pixel_values"])
        h2 = second(h1)
    for step in range(2):
        noise = Noise(3, step, range(6))
        means = [torch.zeros_like(b) for b in start]
        for i in range(6):
            p, s = [], []
            for k, h in enumerate((h1, h2)):
                p.append(noise.vectors(k, AUTO.vectors(h))[i].flatten())
                s.append(h[i].square().mean().sqrt())
            a, b = (h[i : i + 1].detach() for h in (h1, h2))

            def logits(da: Tensor, db: Tensor, a: Tensor = a) -> Tensor:
                return model.fc(last(second(a + da) + db))

            moved = (s[0] * p[0].reshape(a.shape), s[1] * p[1].reshape(b.shape))
            with torch.no_grad():
                _, q = torch.func.jvp(logits, (torch.zeros_like(a), torch.zeros_like(b)), moved)
            for k in range(2):
                means[k] += torch.outer(p[k] / s[k], q[0]) / 6
        start = [0.75 * b + 0.25 * m for b, m in zip(start, means, strict=True)]
    for got, expected in zip(run.feedback.B, start, strict=True):
        torch.testing.assert_close(got, expected)


def test_fdfa_through_the_trainer(tmp_path):
    """The first star has B = 0; later ones do not."""
    trainer = train(DIGITS, tmp_path, method="fdfa", max_steps=3)
    assert [b.shape for b in trainer.feedback] == [(128, 10), (64, 10)]
    assert all(b.norm() > 0 for b in trainer.feedback)
    single = train(DIGITS, tmp_path, method="fdfa", max_steps=1, **SGD | {"weight_decay": 0})
    before, after = dict(DIGITS.model().named_parameters()), dict(single.model.named_parameters())
    moved = {name.split(".")[0] + name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"blocks2", "fcweight", "fcbias"}


class Watched(GrapeTrainer):
    """Notes the micro-batches."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), dict(inputs)]
        return super().training_step(model, inputs, *args, **kwargs)


SPLITS = {
    "whole": {},
    "halves": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "at-a-calibration-step": {"calibration_strategy": "steps", "calibration_interval": 1},
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_dkp_is_the_formula(split, tmp_path):
    """B <- B - eta feedback_lr (sum_i h_i e_i^T + lambda B), e of the mean loss, however the batch is split."""
    options = SGD | split | {"method": "dkp", "feedback_lr": 0.5, "weight_decay": 0.01, "max_steps": 1}
    trainer = train(DIGITS, tmp_path, Watched, dtype=torch.float64, samples=4, **options)
    model = DIGITS.model(torch.float64)
    pixels, labels = (torch.cat([part[name] for part in trainer.seen]) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        h = [model.blocks[0](pixels)]
        h.append(model.blocks[1](h[0]))
        e = (model(pixels)["logits"].softmax(1) - F.one_hot(labels, 10)) / 4
    generator = torch.Generator().manual_seed(42)
    for h_l, got in zip(h, trainer.feedback, strict=True):
        B = initial_feedback("gaussian", h_l[0].numel(), 10, generator, torch.float64)
        product = sum(torch.outer(h_l[i].flatten(), e[i]) for i in range(4))
        torch.testing.assert_close(got, B - 0.1 * 0.5 * (product + 0.01 * B))


class TwoLayers(nn.Module):
    """y = W h_1 + c with one feedback point, h_1."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([LayerBlock(linear=True), LayerBlock(linear=True)])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.blocks[1](self.blocks[0](x))
        return {"logits": y} if labels is None else {"loss": F.mse_loss(y, labels), "logits": y}


def vector(generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(WIDTH, generator=generator)
    return {"x": x, "labels": x.roll(1)}


def test_dkp_finds_the_transpose_of_the_read_out(tmp_path):
    """Kolen-Pollack: same increments and same decay, so B - W^T shrinks by 1 - eta lambda, step after step."""
    problem = Problem("two-layers", TwoLayers, vector)
    options = SGD | {"method": "dkp", "feedback_space": "hidden", "weight_decay": 0.5, "max_steps": 40}
    trainer = train(problem, tmp_path, dtype=torch.float64, **options)
    W0 = problem.model(torch.float64).blocks[1].map.weight
    B0 = initial_feedback("gaussian", WIDTH, WIDTH, torch.Generator().manual_seed(42), torch.float64)
    (B,), W = trainer.feedback, trainer.model.blocks[1].map.weight
    torch.testing.assert_close(B - W.T, (B0 - W0.T) * (1 - 0.1 * 0.5) ** 40)
    assert not torch.equal(W, W0)


def test_dkp_with_positions_and_padding():
    """A sum over positions where y has them too; else a sample's e goes with each position that is not padding."""
    h, e = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    forwards = []
    for shape in ((2, 3, 5), (2, 5)):
        error = e if len(shape) == 3 else e[:, 0]
        forwards.append(Forward(h={0: h}, pairings={0: Pairing(padding=mask)}, errors={0: error}))
    places = [(i, s) for i in range(2) for s in range(3) if mask[i, s]]
    by_position = sum(torch.outer(h[i, s], e[i, s]) for i, s in places)
    by_sample = sum(torch.outer(h[i, s], e[i, 0]) for i, s in places)
    for chosen, expected in (([0], by_position), ([1], by_sample), ([0, 1], by_position + by_sample)):
        (got,) = dkp.products([forwards[k] for k in chosen], [torch.zeros(4, 5)])
        torch.testing.assert_close(got, expected)
