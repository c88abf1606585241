r"""Train ResNet-20 with the feedback that fits the exact deltas best: what would good feedback be worth?

    python recipes/studies/regressed_feedback.py --data_dir ../shared/data/cifar100 --every 1
    python recipes/studies/regressed_feedback.py --data_dir ../shared/data/cifar100 --every 0   # no feedback at all

A plain PyTorch loop on grape_hf's modules, no method to use: every ``--every`` steps ordinary backpropagation on the
side gives the exact delta_l, and B_l is the ridge regression of delta_l on e over the last batches, with weights that
fall by ``--decay`` a batch. No weight ever learns from it. With ``--every 0`` B_l is zero, and the blocks before
the last feedback point keep their random weights. Settings are those of ``images/resnet20.yaml``; accuracies are of the
validation split. Writes a file for each run to ``images/regressed_feedback``.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup, set_seed

from grape_hf.core.alignment import delta_alignment, delta_products
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.isolation import isolated
from grape_hf.core.parts import find_head
from grape_hf.core.refit import refit, refit_moments
from grape_hf.engine.points import feedback_blocks
from grape_hf.vision import image_classifier
from grape_hf.vision.data import Images, mean_and_std
from grape_hf.vision.sources import load_images

RESULTS = Path(__file__).parent / "images" / "regressed_feedback"
BATCH, EPOCHS, RIDGE = 128, 15, 0.03


def main() -> None:
    """Train, and write accuracy and alignment by epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="as of recipes/image_classification.py")
    parser.add_argument("--points", type=int, default=1, help="feedback points; 0: one after every block but the last")
    parser.add_argument("--every", type=int, default=1, help="steps from one look at the exact deltas to the next")
    parser.add_argument("--decay", type=float, default=0.98, help="weight of the past at each look")
    parser.add_argument("--learning_rate", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    regression, history = train(
        options.data_dir,
        options.seed,
        options.learning_rate,
        lambda model: Regression(model, options.points, options.every, options.decay),
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"points{options.points}-every{options.every}-lr{options.learning_rate:g}-seed{options.seed}.json"
    record = {"options": vars(options), "points": regression.points, "history": history}
    (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


class Step(Protocol):
    """One training step but for the optimiser's."""

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Fill the gradients of all weights for one batch."""

    def measured(self) -> dict[str, Any]:
        """Return what was measured since the last call, for the record of an epoch."""


AnyStep = TypeVar("AnyStep", bound=Step)


def train(
    data_dir: str | None, seed: int, learning_rate: float, make_step: Callable[[nn.Module], AnyStep]
) -> tuple[AnyStep, list[dict[str, Any]]]:
    """Train, and return the step made for the model, and accuracy and what the step measured by epoch."""
    set_seed(seed)
    data = load_images(data_dir, train_subset=0.2)
    mean, std = mean_and_std(data.train.pixels)
    images = Images(
        data.train.pixels, data.train.labels, mean, std, padding=4, flip=True, seed=seed, channels_last=True
    )
    validation = Images(data.validation.pixels, data.validation.labels, mean, std)
    loader = batches(images, BATCH, shuffle=True)
    model = image_classifier("resnet20_cifar", data.label_names).to(memory_format=torch.channels_last)
    step = make_step(model)
    optimizer = sgd(model, learning_rate)
    steps = EPOCHS * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.03 * steps), steps)
    history = []
    for epoch in range(EPOCHS):
        images.set_epoch(epoch)
        for batch in loader:
            step(batch)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        history.append({"epoch": epoch + 1, "accuracy": accuracy(model, validation), **step.measured()})
        print(history[-1], flush=True)
    return step, history


class Regression:
    """A star whose B_l are regressions of exact deltas on errors.

    Args:
        model: the model.
        points: number of feedback points; 0: one after every block but the last.
        every: steps between two looks at exact deltas; 0: never, B_l stays zero.
        decay: weight of the past at each look.
    """

    def __init__(self, model: nn.Module, points: int, every: int, decay: float) -> None:
        self.model, self.every, self.decay = model, every, decay
        blocks = feedback_blocks(find_blocks(model), points)
        self.points = list(blocks)[:-1]
        self.boundaries = Boundaries(list(blocks.values()), find_head(model))
        self.count = 0
        self.B: list[Tensor] = []
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.products: list[Tensor] = []

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Fill the gradients of all weights for one batch."""
        with self.boundaries.attached():
            if not self.B or (self.every and self.count % self.every == 0):
                self._look(batch)
            with self.boundaries.broadcast(self.B):
                self._loss(batch).backward()
        self.count += 1

    def measured(self) -> dict[str, list[float]]:
        """Return the mean cosine of B_l e with the exact delta_l since the last call, at each point."""
        products, self.products = self.products, []
        cosines = delta_alignment(torch.stack(products).sum(0)).tolist() if products else []
        return {"cosines": [round(c, 3) for c in cosines]}

    def _look(self, batch: dict[str, Tensor]) -> None:
        with isolated(self.model, deterministic=False), torch.enable_grad(), self.boundaries.record() as forwards:
            loss = self._loss(batch)
            (forward,) = forwards
            assert forward.y is not None
            h = [forward.h[index] for index in range(len(self.boundaries.blocks) - 1)]
            torch.autograd.backward(loss, inputs=[forward.y, *h])
        if not self.every:
            self.B = [t.new_zeros(t[0].numel(), forward.y.shape[-1], dtype=torch.float32) for t in h]
            return
        if self.B:  # on a batch that B has not seen
            self.products.append(delta_products(forwards, self.B))
        new = refit_moments(forwards, len(h))
        past = self.moments or new
        self.moments = [
            (self.decay * ee + more_ee, self.decay * ed + more_ed)
            for (ee, ed), (more_ee, more_ed) in zip(past, new, strict=True)
        ]
        self.B = [refit(torch.zeros_like(ed.mT), ee, ed, RIDGE) for ee, ed in self.moments]

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(self.model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"])


def batches(images: Images, size: int, shuffle: bool = False) -> DataLoader:
    """Load images in whole batches."""
    return DataLoader(images, size, shuffle=shuffle, collate_fn=Images.collate)  # type: ignore[arg-type]


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum; weight decay on weights, not on biases and norms."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of images that are classified right."""
    model.eval()
    right = [
        (model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum().item()
        for batch in batches(images, 500)
    ]
    model.train()
    return sum(right) / len(images)


if __name__ == "__main__":
    main()
