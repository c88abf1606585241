r"""How near to the exact delta_l any one matrix comes: a ceiling for feedback, on a trained image classifier.

    python recipes/studies/feedback_ceiling.py outputs/cifar100_resnet20 --data_dir ../shared/data/cifar100

For every block but the last, the mean cosine of B_l e with the exact delta_l over images that B_l was not fitted to:

- ``fitted``: the B_l that predicts delta_l from e best, by ridge regression;
- ``grid`` and ``position``: the same where positions of the map share a matrix (``feedback_sharing``);
- ``mean_jacobian``: B_l = E[J_l^T], which is what forward-mode estimates converge to.

The last falls short of the first because an image's Jacobian and its error depend on the same things, its class above
all: E[J^T e] is not E[J^T] e. Batch norms use the statistics of the batch, as in training. Nothing is trained.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification

import grape_hf.vision  # noqa: F401  timm finds our networks
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.layout import Layout
from grape_hf.core.parts import find_head
from grape_hf.core.refit import exact_pair, refit
from grape_hf.vision.data import Images, mean_and_std
from grape_hf.vision.sources import Split, load_images

BATCH = 128
FLAT = Layout("none")


def main() -> None:
    """Measure, print the table, and write it to the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained image classifier")
    parser.add_argument("--data_dir", help="as of recipes/image_classification.py, like the next")
    parser.add_argument("--train_subset", type=float, default=0.2)
    parser.add_argument("--images", type=int, default=4096, help="a quarter of them is measured on")
    parser.add_argument("--jacobian_images", type=int, default=1024, help="for the mean Jacobian: n_y backwards each")
    options = parser.parse_args()
    model = AutoModelForImageClassification.from_pretrained(options.model).train()
    split = load_images(options.data_dir, train_subset=options.train_subset).train
    blocks = find_blocks(model)
    boundaries = Boundaries(list(blocks.values()), find_head(model), FLAT)
    e, deltas, shapes = exact_deltas(model, boundaries, split, options.images)
    means = mean_jacobians(model, boundaries, split, options.jacobian_images)
    rows = []
    for name, delta, shape, mean in zip(blocks, deltas, shapes, means, strict=False):
        B = fitted(e, delta)
        kinds = {
            "fitted": B,
            "grid": shared(B, shape, Layout("grid")),
            "position": shared(B, shape, Layout("position")),
            "mean_jacobian": mean,
        }
        rows.append([name, *(f"{cosine(e, delta, matrix):.3f}" for matrix in kinds.values())])
    head = ["point", *kinds]
    text = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
    print(text)
    (options.model / "feedback_ceiling.md").write_text(text + "\n", encoding="utf-8")


def batches(split: Split, images: int) -> DataLoader:
    """Load the first images in whole batches, without augmentation."""
    chosen = Images(split.pixels[:images], split.labels[:images], *mean_and_std(split.pixels))
    return DataLoader(chosen, BATCH, drop_last=True, collate_fn=Images.collate)  # type: ignore[arg-type]


def exact_deltas(
    model: nn.Module, boundaries: Boundaries, split: Split, images: int
) -> tuple[Tensor, list[Tensor], list[torch.Size]]:
    """Return e, ``(N, n_y)``, delta_l, ``(N, n_l)``, by ordinary backpropagation, and the shapes of one image's h_l."""
    pairs: list[list[tuple[Tensor, Tensor]]] = []
    for batch in batches(split, images):
        with boundaries.attached(), boundaries.record() as forwards:
            model(**batch).loss.backward()
        (forward,) = forwards
        indices = range(len(boundaries.blocks) - 1)
        pairs.append([exact_pair(forward, index) for index in indices])
        shapes = [forward.h[index].shape[1:] for index in indices]
        model.zero_grad()
    e = torch.cat([batch[0][0].squeeze(1) for batch in pairs])
    return e, [torch.cat([delta.squeeze(1) for _, delta in point]) for point in zip(*pairs, strict=True)], shapes


def mean_jacobians(model: nn.Module, boundaries: Boundaries, split: Split, images: int) -> list[Tensor]:
    """Return E[J_l^T], ``(n_l, n_y)``, over images, with what one does to others through batch norms."""
    sums: list[Tensor] = []
    total = 0
    for batch in batches(split, images):
        with boundaries.attached(), boundaries.record() as forwards:
            y = model(pixel_values=batch["pixel_values"]).logits.sum(0)
        h = [forwards[0].h[index] for index in range(len(boundaries.blocks) - 1)]
        columns = [torch.autograd.grad(number, h, retain_graph=True) for number in y]
        found = [torch.stack([FLAT.vectors(g).sum((0, 1)) for g in point], 1) for point in zip(*columns, strict=True)]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        total += len(batch["labels"])
    return [s / total for s in sums]


def fitted(e: Tensor, delta: Tensor) -> Tensor:
    """Fit B_l, ``(n_l, n_y)``, to three quarters of the images."""
    train = slice(0, len(e) * 3 // 4)
    return refit(delta.new_zeros(delta.shape[1], e.shape[1]), e[train].T @ e[train], e[train].T @ delta[train], 0.01)


def shared(B: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """Average B_l over the positions that share it: the best shared matrix, as all of them get the same e."""
    maps = B.T.reshape(-1, *shape)
    vectors = layout.vectors(maps)
    return layout.restore(vectors.mean(1, keepdim=True).expand_as(vectors), maps.shape).flatten(1).T


def cosine(e: Tensor, delta: Tensor, B: Tensor) -> float:
    """Mean cosine of B_l e with delta_l over the quarter that nothing was fitted to."""
    test = slice(len(e) * 3 // 4, None)
    return F.cosine_similarity(e[test] @ B.T, delta[test]).mean().item()


if __name__ == "__main__":
    main()
