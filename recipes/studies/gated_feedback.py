r"""Train ResNet-20 with feedback that heeds the image: what would it be worth?

    python recipes/studies/gated_feedback.py --data_dir ../shared/data/cifar100 --feedback gated

One feedback point, in the middle, h_4 of 9 blocks; a plain PyTorch loop, no method to use. Above the point there is
ordinary backpropagation, which leaves the exact delta there to learn from; below it, blocks get what ``--feedback``
says. ``gated``: a small convolutional net of h_4 and e, the synthetic gradient of Jaderberg et al. 2017 with the error
in the place of the label, fitted to exact deltas batch by batch with AdamW. ``matrix``: B_l e, with the regression of
``regressed_feedback.py``. ``none``: the blocks below keep their random weights. ``exact``: backpropagation. ``--scale``
multiplies what goes below, as a learning rate of its own would. Settings are those of ``images/resnet20.yaml``, in
float32; accuracies are of the validation split. Writes a file for each run to ``images/gated_feedback``.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from regressed_feedback import RIDGE, train
from torch import Tensor, nn

from grape_hf.core.blocks import find_blocks
from grape_hf.core.refit import refit

RESULTS = Path(__file__).parent / "images" / "gated_feedback"
BELOW, SHAPE, N_Y = 4, (32, 16, 16), 100  # blocks below the point, its h_l for one image, and e
DECAY = 0.98  # weight of the past at each batch, for the regression


class Gated(nn.Module):
    """delta of h_l and e: channels of h_l gated by the error, beside a term of the place in the map and the error.

    Args:
        width: channels inside.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.e = nn.Linear(N_Y, width, bias=False)
        self.conv = nn.Conv2d(SHAPE[0], width, 3, padding=1)
        self.out = nn.Conv2d(width, SHAPE[0], 3, padding=1, bias=False)
        self.e_place = nn.Linear(N_Y, width, bias=False)
        self.place = nn.Parameter(torch.zeros(width, *SHAPE[1:]))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Return delta, ``(batch, C, H, W)``, of h and e, ``(batch, n_y)``."""
        gated = F.relu(self.conv(h)) * self.e(e)[:, :, None, None]
        return self.out(gated + self.place * self.e_place(e)[:, :, None, None])


def main() -> None:
    """Train, and write accuracy and alignment by epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="as of recipes/image_classification.py")
    parser.add_argument("--feedback", choices=["gated", "matrix", "none", "exact"], default="gated")
    parser.add_argument("--scale", type=float, default=1.0, help="of what goes below the point")
    parser.add_argument("--learning_rate", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    step, history = train(
        options.data_dir,
        options.seed,
        options.learning_rate,
        lambda model: Foretold(model, options.feedback, options.scale),
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{options.feedback}-scale{options.scale:g}-lr{options.learning_rate:g}-seed{options.seed}.json"
    record = {"options": vars(options), "point": step.point, "history": history}
    (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


class Foretold:
    """One training step without the optimiser's; keeps the cosines and sizes of the feedback since ``measured``."""

    def __init__(self, model: nn.Module, feedback: str, scale: float) -> None:
        self.net: Any = model.timm_model
        self.feedback, self.scale = feedback, scale
        blocks = find_blocks(model)
        self.point = list(blocks)[BELOW - 1]
        self.below, self.above = list(blocks.values())[:BELOW], list(blocks.values())[BELOW:]
        self.gated = Gated()  # in any case, as it draws random numbers: whatever the feedback, batches are the same
        self.fit = torch.optim.AdamW(self.gated.parameters(), 3e-3, weight_decay=1e-3)
        self.B = torch.zeros(math.prod(SHAPE), N_Y)
        self.moments = torch.zeros(N_Y, N_Y), torch.zeros(N_Y, math.prod(SHAPE))  # of e with e, and with delta
        self.seen: list[tuple[float, float]] = []

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """Fill the gradients of all weights."""
        h = self.net.act1(self.net.bn1(self.net.conv1(batch["pixel_values"])))
        for block in self.below:
            h = block(h)
        cut = h.detach().requires_grad_(True)
        top: Tensor = cut
        for block in self.above:
            top = block(top)
        y = self.net.forward_head(top)
        y.retain_grad()
        F.cross_entropy(y, batch["labels"]).backward()
        assert cut.grad is not None
        assert y.grad is not None
        if self.feedback == "none":
            return
        n = len(y)  # the loss is a mean: of one image's own loss from here
        delta = self._delta(cut.detach(), n * y.grad, n * cut.grad)
        h.backward(delta * (self.scale / n))

    def measured(self) -> dict[str, float]:
        """Return the mean cosine with the exact delta, and the mean ratio of sizes, since the last call."""
        seen, self.seen = self.seen, []
        return {
            name: round(sum(values) / len(seen), 3)
            for name, values in zip(("cosine", "size"), zip(*seen, strict=True), strict=False)
        }

    def _delta(self, h: Tensor, e: Tensor, exact: Tensor) -> Tensor:
        """Predict this batch's delta, and only then learn from it."""
        if self.feedback == "exact":
            return exact
        delta = self.gated(h, e) if self.feedback == "gated" else (e @ self.B.T).view_as(h)
        cosine = F.cosine_similarity(delta.flatten(1), exact.flatten(1)).mean().item()
        self.seen.append((cosine, (delta.norm() / exact.norm()).item()))
        if self.feedback == "gated":
            self.fit.zero_grad()
            ((delta - exact).square().mean() / exact.square().mean()).backward()
            self.fit.step()
        else:
            for moment, new in zip(self.moments, (e, exact.flatten(1)), strict=True):
                moment.mul_(DECAY).addmm_(e.T, new)
            self.B = refit(torch.zeros_like(self.B), *self.moments, RIDGE)
        return delta.detach()


if __name__ == "__main__":
    main()
