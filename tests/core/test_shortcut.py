"""The start from the shortcut path alone, against Jacobians of networks whose branches are taken away by hand.

Residual networks of convolutions are in ``test_convolutions.py``.
"""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers import arguments
from torch import Tensor, nn
from torch.func import jacrev
from transformers import GPT2Config, GPT2ForSequenceClassification

from grape_hf import GrapeTrainer
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.layout import Layout
from grape_hf.core.shortcut import shortcut_feedback

DOUBLE = {"dtype": torch.float64}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def without_branches(blocks: list[nn.Module]) -> None:
    with torch.no_grad():
        for block in blocks:
            for p in block.parameters():
                p.zero_()


@pytest.mark.parametrize("points", [(0, 1, 2, 3), (1, 3), (2,)], ids=str)
def test_blocks_between_two_points_have_no_branch_either(points: tuple[int, ...]):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(5)), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5, 4, **DOUBLE)
    chain = list(model[:5])
    boundaries = Boundaries([*(chain[i] for i in points), chain[-1]], output=model[-1])
    before = deepcopy(model.state_dict())
    B = shortcut_feedback(model, boundaries, lambda: model(x), [""] * len(points), chain)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        h = model[: points[0] + 1](x).flatten(0, 1)  # what is in front of the first point is as it always is
    rows = torch.stack([jacrev(model[5:])(vector) for vector in h])
    for b in B:
        torch.testing.assert_close(b, rows.mean(0).mT)


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_reads_one_position(padded: bool, tmp_path: Path):
    """GPT-2's classifier: the logits of the last token alone count, and its error goes to all that are no padding."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3, n_embd=8, n_head=2, vocab_size=20, n_positions=8, num_labels=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).double()
    lengths = [6 - i % 3 if padded else 6 for i in range(4)]
    ids = torch.stack([torch.cat([torch.randint(3, 20, (n,)), torch.zeros(6 - n).long()]) for n in lengths])
    masks = ids.ne(0).long()
    data = [{"input_ids": i, "attention_mask": m, "labels": torch.tensor(0)} for i, m in zip(ids, masks, strict=True)]
    alone = deepcopy(model).eval()
    options = {"method": "dfa", "feedback_init": "identity", "feedback_space": "logits", "learning_rate": 0.0}
    trainer = GrapeTrainer(model, arguments(tmp_path, max_steps=1, **options), train_dataset=data)
    trainer.train()

    without_branches(list(alone.transformer.h)[1:])
    h: list[Tensor] = []
    alone.transformer.h[0].register_forward_hook(lambda m, a, o: h.append(o if isinstance(o, Tensor) else o[0]))
    logits = alone(input_ids=ids, attention_mask=masks).logits
    rows = [torch.autograd.grad(logits[:, k].sum(), h[0], retain_graph=True)[0] for k in range(3)]
    expected = torch.stack([row[masks.bool()].mean(0) for row in rows], dim=1)
    for b in trainer.feedback:
        torch.testing.assert_close(b, expected)


class Strided(nn.Module):
    """A ResNet's block whose shortcut is a convolution with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.downsample = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.branch(x) + self.downsample(x))


def test_batch_norms_on_the_path_have_constant_statistics():
    """Through those of the batch the gradient of a sum over the batch is zero."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model = nn.Sequential(*(Strided() for _ in range(3)), *head).double()
    x = 2 * torch.randn(6, 3, 4, 4, **DOUBLE) + 1
    layout = Layout("position")
    before = deepcopy(model.state_dict())
    boundaries = Boundaries(list(model[:3]), model[-1], layout)
    B = shortcut_feedback(model, boundaries, lambda: model(x), ["", ""])
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training and norm.momentum == 0.1 for norm in norms)

    without_branches([block.branch for block in model[1:3]])
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(x)
    model.eval()
    h = x
    for index, b in enumerate(B):
        h, rest = model[index](h).detach(), model[index + 1 :]
        rows = torch.stack([jacrev(lambda s, rest=rest: rest(s[None])[0])(sample) for sample in h])
        expected = torch.stack([layout.vectors(rows[:, k]).mean((0, 1)) for k in range(2)], dim=1)
        assert expected.norm() > 1e-3
        torch.testing.assert_close(b, expected)
