"""Batches of any kind keep their type and reach the loss once; an estimate takes samples out of them where it can."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LEARNED, arguments, assert_same, logged, train, weights
from problems import GPT2
from torch import Tensor, nn
from transformers import BatchEncoding, Trainer

from grape_hf import GrapeMixin, GrapeTrainer
from grape_hf.core.calls import ModelCall
from grape_hf.engine.samples import Sampler


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


class Counting(Trainer):
    """A loss that takes batches of any kind and keeps figures, as trl's do."""

    kind: type | None = None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.losses = getattr(self, "losses", 0) + 1
        if isinstance(inputs, BatchEncoding):
            x, y = inputs.x, inputs.y
        elif isinstance(inputs, dict):
            x, y = inputs["x"], inputs["y"]
        elif isinstance(inputs[0], dict):
            x, y = (torch.stack([row[name] for row in inputs]) for name in "xy")
        else:
            x, y = inputs
        assert self.kind is None or type(inputs) is self.kind
        self.rows_seen = getattr(self, "rows_seen", 0) + len(x)
        return F.cross_entropy(model(x), y)

    def _prepare_inputs(self, inputs: Any) -> Any:
        self.prepared = getattr(self, "prepared", 0) + 1
        return super()._prepare_inputs(inputs)


class CountingGrape(GrapeMixin, Counting):
    pass


def stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name] for s in samples]) for name in "xy"}


KINDS = {
    "dict": (dict, stacked),
    "tuple": (tuple, lambda s: tuple(stacked(s).values())),
    "list": (list, lambda s: list(stacked(s).values())),
    "rows": (list, lambda s: s),
    "batch-encoding": (BatchEncoding, lambda s: BatchEncoding(stacked(s))),
}
EVERYTHING = LEARNED | dict(alignment_steps=1, calibration_strategy="steps", calibration_interval=3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [EVERYTHING, {"method": "dfa"}, {"method": "bp"}], ids=["grape", "dfa", "bp"])
def test_the_loss_sees_each_batch_once_and_as_it_is(name, options, tmp_path):
    """Token counters, metrics and generation in ``_prepare_inputs`` are the stock Trainer's."""
    data = [{"x": torch.randn(4), "y": torch.tensor(i % 2)} for i in range(16)]
    kind, collate = KINDS[name]
    made = {}
    for trainer_class in (Counting, CountingGrape):
        torch.manual_seed(0)
        more = options if trainer_class is CountingGrape else {}
        args = arguments(tmp_path, max_steps=6, remove_unused_columns=False, gradient_accumulation_steps=2, **more)
        trainer = trainer_class(Net(), args, data_collator=collate, train_dataset=data)
        trainer.kind = kind
        trainer.train()
        made[trainer_class] = trainer
    ours, stock = made[CountingGrape], made[Counting]
    assert ours.losses == stock.losses == 12
    assert ours.rows_seen == stock.rows_seen
    assert ours.prepared == stock.prepared
    if options["method"] == "bp":
        assert_same(dict(ours.model.named_parameters()), dict(stock.model.named_parameters()))


def test_rows_are_counted_by_rows(tmp_path):
    """A list of four rows of seven numbers is four samples."""
    data = [{"x": torch.randn(4), "y": torch.tensor(0), "pad": torch.zeros(7)} for _ in range(8)]
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=False, **LEARNED)
    trainer = CountingGrape(Net(), args, data_collator=lambda s: s, train_dataset=data)
    trainer.train()
    assert trainer._places(data[:4]) == range(4)
    assert trainer._places([[torch.zeros(9)], [torch.zeros(9)]]) == range(2)


# --- which samples an estimate takes ---------------------------------------------------------------------------------


class Patches(nn.Module):
    """Token 8 stands for a patch of an image, of which a text has any number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.patch, self.lm_head = nn.Embedding(9, 8), nn.Linear(2, 8), nn.Linear(8, 9)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.embed(input_ids)
        places = (input_ids == 8)[..., None].expand_as(h)
        assert int((input_ids == 8).sum()) == len(pixel_values)
        h = h.masked_scatter(places, self.patch(pixel_values))
        for block in self.blocks:
            h = block(h)
        return {"loss": F.cross_entropy(self.lm_head(h).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("patches", [1, 2])
def test_images_of_which_texts_have_any_number(patches, tmp_path):
    """The estimate is of the whole batch: the same as with a fraction of one. One a text looks like a batch, too."""

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.stack([row["tokens"] for row in rows])
        return {"input_ids": tokens, "labels": tokens, "pixel_values": torch.cat([row["pixels"] for row in rows])}

    data = [
        {"tokens": torch.tensor([8] * patches + [1, 2, i % 7]), "pixels": torch.randn(patches, 2)} for i in range(16)
    ]
    feedback = []
    for fraction in (0.25, 1.0):
        torch.manual_seed(0)
        options = LEARNED | {"jvp_fraction": fraction, "feedback_space": "hidden"}
        args = arguments(tmp_path, max_steps=3, remove_unused_columns=False, **options)
        trainer = GrapeTrainerOf(Patches(), args, data_collator=collate, train_dataset=data)
        trainer.train()
        feedback.append({f"B_{i}": b for i, b in enumerate(trainer.feedback)})
    assert_same(feedback[0], feedback[1])


class GrapeTrainerOf(GrapeMixin, Trainer):
    pass


class Rotary(nn.Module):
    """Positions of three kinds, ``(3, batch, positions)``, as in M-RoPE."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return x + position_ids[0, :, :, None] + 10 * position_ids[1, :, :, None] + 100 * position_ids[2, :, :, None]


def test_a_batch_of_three_with_positions_of_three_kinds_is_taken_whole():
    model = Rotary()
    for batch, whole in ((4, True), (3, True)):
        positions = torch.arange(3 * batch * 5).reshape(3, batch, 5)
        call = ModelCall(model, (torch.randn(batch, 5, 2),), {"position_ids": positions})
        share = Sampler().take(call, range(batch), [0], lambda c: c())
        assert (share.rows is None) is whole
    call = ModelCall(nn.Identity(), (torch.randn(3, 5, 2),), {})
    share = Sampler().take(call, range(3), [2], lambda c: c())
    assert share.rows == [2]
    assert torch.equal(share.call.args[0], call.args[0][2:])


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": torch.randn(7, 2), "edge_index": torch.zeros(2, 9).long()},  # joined graphs
        {"input_ids": torch.zeros(1, 12).long(), "cu_seq_lens_q": torch.tensor([0, 4, 12])},  # packed sequences
        {"x": torch.randn(4, 2), "cache": object()},
        {"x": torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)},
    ],
    ids=["graphs", "packed", "other-objects", "nested"],
)
def test_calls_whose_samples_cannot_be_told_apart(arguments):
    call = ModelCall(nn.Identity(), (), arguments)
    assert call.samples is None
    share = Sampler().take(call, range(4), [0], lambda c: c())
    assert share.rows is None
    assert share.call is call


def test_a_call_that_sees_each_sample_twice():
    """Chosen texts and behind them rejected ones: both of a sample are taken."""
    call = ModelCall(nn.Identity(), (torch.arange(8.0)[:, None],), {})
    share = Sampler().take(call, range(10, 14), [1], lambda c: c())
    assert share.rows == [1, 5]
    assert share.places[0] == 11
    assert share.places[1] > 2**40


class Graphs(nn.Module):
    """Joined graphs: h_l has a row for each node, the loss one for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x + torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]]))
        pooled = x.new_zeros(len(labels), 4).index_add(0, graph, x)
        return {"loss": F.cross_entropy(self.classifier(pooled), labels)}


@pytest.mark.parametrize("options", [EVERYTHING, {"method": "dfa"}], ids=["grape", "dfa"])
def test_joined_graphs_train(options, tmp_path):
    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        sizes = [len(row["x"]) for row in rows]
        starts = [sum(sizes[:i]) for i in range(len(rows))]
        edges = [row["edges"] + start for row, start in zip(rows, starts, strict=True)]
        return {
            "x": torch.cat([row["x"] for row in rows]),
            "edge_index": torch.cat(edges, dim=1),
            "graph": torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes)),
            "labels": torch.stack([row["labels"] for row in rows]),
        }

    data = [
        {"x": torch.randn(3 + i % 4, 4), "edges": torch.tensor([[0, 1], [1, 2]]), "labels": torch.tensor(i % 2)}
        for i in range(16)
    ]
    args = arguments(tmp_path, max_steps=6, remove_unused_columns=False, **options)
    trainer = GrapeTrainerOf(Graphs(), args, data_collator=collate, train_dataset=data)
    trainer.train()
    assert trainer.feedback[0].shape == (4, 4)  # measured where there is a row for each node, too


def test_a_mask_of_the_batch_that_has_no_samples_to_take(tmp_path):
    """Positions by positions, kept by the loss: of fewer rows than the samples that are taken."""

    class Masked(GrapeTrainerOf):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return (model(inputs["x"]) * inputs["attn_mask"].sum()).square().mean()

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"x": torch.stack([row["x"] for row in rows]), "attn_mask": torch.ones(2, 2)}

    options = LEARNED | {"jvp_fraction": 0.5, "per_device_train_batch_size": 8, "blocks": "blocks"}
    args = arguments(tmp_path, max_steps=2, remove_unused_columns=False, **options)
    trainer = Masked(Net(), args, data_collator=collate, train_dataset=[{"x": torch.randn(4)} for _ in range(16)])
    trainer.train()
    assert trainer.state.global_step == 2


class TwoViews(Trainer):
    """The batch twice in one call, as for R-Drop; the labels come once."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(input_ids=torch.cat([inputs["input_ids"]] * 2)).logits
        labels = torch.cat([inputs["labels"]] * 2)
        first, second = logits.chunk(2)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + F.mse_loss(first, second.detach())


class GrapeTwoViews(GrapeTrainer):
    compute_loss = TwoViews.compute_loss


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_batch_twice_in_one_call_with_labels_that_come_once(fraction, tmp_path):
    options = dict(dtype=torch.float64, max_steps=3, optim="sgd", max_grad_norm=0)
    stock = train(GPT2, tmp_path, TwoViews, **options)
    more = dict(feedback_rule="lms", jvp_fraction=fraction, jvp_steps=1, feedback_sweeps=9)
    grape = train(GPT2, tmp_path, GrapeTwoViews, **options, **more)
    assert_same({n: p.detach() for n, p in grape.model.named_parameters()}, weights(stock), rtol=1e-9, atol=1e-11)
    assert logged(grape, "grape/alignment/estimate/mean")
