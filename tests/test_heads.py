"""Several heads on one trunk: the error of every one of them reaches every block, or is refused."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import LEARNED, OnEvent, arguments, logged
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from grape_hf import GrapeArgumentsMixin, GrapeTrainer
from grape_hf.core.isolation import isolated
from grape_hf.core.jacobian import Noise, jacobian_terms
from grape_hf.engine.run import GrapeRun

STEP = dict(max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0, lr_scheduler_type="constant")
STEP |= dict(train_sampling_strategy="sequential", logging_strategy="no", label_names=["labels"])


class Trunk(nn.Module):
    def __init__(self, weights: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.classifier, self.regressor, self.weights = nn.Linear(8, 2), nn.Linear(8, 1), weights

    def forward(self, x: Tensor, labels: Tensor, value: Tensor, task: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)

        def first() -> Tensor:
            return F.cross_entropy(self.classifier(x), labels)

        def second() -> Tensor:
            return F.mse_loss(self.regressor(x)[:, 0], value)

        if task is None:
            return {"loss": self.weights[0] * first() + self.weights[1] * second()}
        return {"loss": second() if task.any() else first()}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(8, generator=generator), "labels": torch.tensor(i % 2), "value": torch.tensor(i / 16)}
        for i in range(16)
    ]


def moved(folder: Any, data: list[dict[str, Tensor]], weights: Any = (1.0, 1.0), **options: Any) -> tuple[Tensor, Any]:
    torch.manual_seed(0)
    model = Trunk(weights)
    before = model.blocks[0][0].weight.detach().clone()
    trainer = GrapeTrainer(model, arguments(folder, **STEP | options), train_dataset=data)
    trainer.train()
    return model.blocks[0][0].weight.detach() - before, trainer


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_auto_measures_where_both_heads_read(weights, tmp_path):
    auto, trainer = moved(tmp_path, rows(), weights)
    hidden, _ = moved(tmp_path, rows(), weights, feedback_space="hidden")
    assert trainer.feedback[0].shape == (8, 8)
    assert torch.equal(auto, hidden)
    assert auto.any()


def test_errors_of_two_heads_add_up(tmp_path):
    """In hidden space the step is linear in e, which is the sum of the heads'."""
    both, first, second = (moved(tmp_path, rows(), w, method="dfa")[0] for w in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)))
    torch.testing.assert_close(both, first + second)
    assert second.any()


def test_logits_of_one_of_two_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'the loss reads the output of the last block beside it.*"hidden"'):
        moved(tmp_path, rows(), feedback_space="logits")


def test_tasks_that_alternate_by_batch(tmp_path):
    """The second task comes in the third batch, and the first batch does not show its head."""
    data = [row | {"task": torch.tensor((i // 4) % 3 == 2)} for i, row in enumerate(rows())]
    auto, trainer = moved(tmp_path, data, max_steps=4, method="dfa")
    assert trainer.feedback[0].shape == (8, 8)
    assert torch.equal(auto, moved(tmp_path, data, max_steps=4, method="dfa", feedback_space="hidden")[0])


def late(act: Any) -> OnEvent:
    def at_the_third_step(state: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 2:
            act(model)

    return OnEvent("step_begin", at_the_third_step)


def more_classes(model: nn.Module) -> None:
    model.classifier = nn.Linear(32, 5)


def another_block(model: nn.Module) -> None:
    model.bert.encoder.layer[1] = copy.deepcopy(model.bert.encoder.layer[1])


def wider(model: nn.Module) -> None:
    grown = nn.Linear(32, 5)
    model.classifier.weight, model.classifier.bias = grown.weight, grown.bias


@pytest.mark.parametrize("options", [{}, {"calibration_strategy": "steps", "calibration_interval": 1}])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (more_classes, "a Linear was taken out of the model after the first step"),
        (another_block, "a BertLayer was taken out of the model after the first step"),
        (wider, r"output of the Linear .* vectors of 2 numbers as at the first step, got \(4, 5\)"),
    ],
)
def test_a_head_or_a_block_that_is_replaced_in_a_run_is_refused(change, says, options, tmp_path):
    """Its hooks stay on the old one: the blocks would get no error, without a word. A second run takes it as it is."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=16)
    model = BertForSequenceClassification(BertConfig(**sizes))
    data = [{"input_ids": torch.randint(0, 16, (8,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    args = arguments(tmp_path, max_steps=4, feedback_space="logits", **LEARNED | options)
    change_late = late(change)
    trainer = GrapeTrainer(model, args, train_dataset=data, callbacks=[change_late])
    with pytest.raises((RuntimeError, ValueError), match=says):
        trainer.train()
    assert trainer.state.global_step == 2
    trainer.remove_callback(change_late)
    model.num_labels = model.config.num_labels = model.classifier.out_features = len(model.classifier.weight)
    trainer.train()


def test_a_head_that_is_named_and_left_out_late_is_said_and_kills_nothing(tmp_path, caplog):
    data = [row | {"task": torch.tensor((i // 4) % 3 == 2)} for i, row in enumerate(rows())]
    _, trainer = moved(tmp_path, data, max_steps=4, feedback_space="logits", **LEARNED)
    assert trainer.state.global_step == 4
    assert "regressor, which did not run in the first batch" in caplog.text
    assert caplog.text.count("got no error from this batch") == 1


class Distilled(nn.Module):
    """Two heads in training, each on a token of its own, and their mean only in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=3
        )
        self.timm_model.set_distilled_training(True)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        own, distilled = self.timm_model(pixel_values)
        return {"loss": F.cross_entropy(own, labels) + F.cross_entropy(distilled, labels)}


IMAGES = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 3)} for i in range(4)]


def test_timms_distilled_heads(tmp_path):
    torch.manual_seed(0)
    trainer = GrapeTrainer(Distilled(), arguments(tmp_path, max_steps=1, **LEARNED), train_dataset=IMAGES)
    trainer.train()
    assert trainer.feedback[0].shape == (24, 24)


# --- one error a sample ----------------------------------------------------------------------------------------------


def deltas(model: nn.Module, block: nn.Module, data: Any, folder: Any, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """What arrives at h_1 in the first step, e, and the Trainer."""
    got: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        if h.requires_grad:
            h.register_hook(lambda g: got.append(g.clone()))

    handle = block.register_forward_hook(watch)
    trainer = GrapeTrainer(model, arguments(folder, **STEP | options), train_dataset=data)
    trainer.train()
    handle.remove()
    return got[-1], got[0], trainer


def vit(labels: int) -> tuple[nn.Module, nn.Module, Any]:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=labels,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    return model, block, [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % labels)} for i in range(4)]


def gpt2(labels: int) -> tuple[nn.Module, nn.Module, Any]:
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=30, n_positions=8, num_labels=labels, pad_token_id=0)
    model = GPT2ForSequenceClassification(config)
    data = [{"input_ids": torch.randint(1, 30, (6,)), "labels": torch.tensor(i % labels)} for i in range(4)]
    return model, model.transformer.h[0], data


@pytest.mark.parametrize("space", ["auto", "hidden"])
@pytest.mark.parametrize(("make", "read_at"), [(vit, "first"), (gpt2, "last")])
@pytest.mark.parametrize("labels", [3, 40])
def test_an_error_at_one_token_goes_to_every_position(make, read_at, labels, space, tmp_path):
    torch.manual_seed(0)
    model, block, data = make(labels)
    delta, _, trainer = deltas(model, block, data, tmp_path, method="dfa", feedback_init="auto", feedback_space=space)
    assert delta.any(-1).all()
    assert trainer._run.boundaries.read_at == read_at
    assert torch.equal(trainer.feedback[0], torch.eye(16))  # e_b on the shortcut path, which keeps its position
    positions, read = delta.shape[1], 0 if read_at == "first" else -1
    mean = delta[:, 1:2]
    expected = mean.repeat(1, positions, 1)
    expected[:, read] += positions * mean[:, 0]
    torch.testing.assert_close(delta, expected)


def test_errors_at_two_tokens_go_to_every_position(tmp_path):
    """As that of one does: the patches had got none."""
    torch.manual_seed(0)
    model = Distilled()
    delta, _, trainer = deltas(model, model.timm_model.blocks[0], IMAGES, tmp_path, method="dfa", feedback_init="auto")
    assert trainer._run.boundaries.read_at == "first"
    mean = delta[:, 2:3]
    torch.testing.assert_close(delta[:, 2:], mean.expand(-1, 4, -1))  # four patches
    torch.testing.assert_close(delta[:, :2].sum(1), 8 * mean[:, 0])  # e at both tokens, 6 means, and the mean twice
    assert mean.any(-1).all()


@pytest.mark.parametrize("options", [{"method": "dfa"}, {}, {"feedback_rule": "lms"}], ids=str)
def test_so_they_do_with_the_batch_in_the_second_dimension(options, tmp_path):
    """As in OpenAI's CLIP, whose blocks hand on (positions, batch, channels)."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
            layers = (nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0) for _ in range(3))
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            h = self.stem(x).transpose(0, 1)
            for layer in self.layers:
                h = layer(h)
            logits = self.head(h[0])
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model, data = Turned(), [{"x": torch.randn(6, 4), "labels": torch.tensor(i % 3)} for i in range(4)]
    delta, _, _ = deltas(model, model.layers[0], data, tmp_path, **(options | {"feedback_init": "auto"}))
    assert delta.shape == (6, 4, 16)
    torch.testing.assert_close(delta[0], 7 * delta[1])  # e, and the mean
    torch.testing.assert_close(delta[1:], delta[1:2].expand(5, -1, -1))
    assert delta.any(-1).all()


def test_what_is_learned_is_the_jacobian_of_the_token_that_is_read(tmp_path):
    """mean over b and s of dy_b/dh_{b,s}, y_b at the token that the classifier reads; by jacrev."""
    torch.manual_seed(0)
    model, _, data = vit(40)
    model = model.double()
    batch = {n: torch.stack([row[n].double() if n == "pixel_values" else row[n] for row in data]) for n in data[0]}
    often = {n: torch.cat([values] * 25) for n, values in batch.items()}  # each sample with 25 draws of its own
    run = GrapeRun(model.train(), GrapeArgumentsMixin(feedback_space="hidden", feedback_rule="ema"))
    run.start(lambda: model(**often))
    boundaries = run.boundaries
    assert boundaries.read_at == "first"
    total = 0
    for step in range(60):
        run.begin_step(0)
        run.current_step = step
        run.estimates.begin()
        run.estimate(lambda: model(**often), range(25 * len(data)))
        total = total + run.estimates.sums.mean()[1]
    estimate = total / 60
    seen: list[Tensor] = []
    with torch.no_grad(), boundaries.perturb(lambda i, h, *rest: seen.append(h) or h):
        model.eval()(**batch)

    def y_of(h: Tensor) -> Tensor:
        with boundaries.perturb(lambda i, other, *rest: h if i == 1 else other) as passed:
            model(**batch)
        return passed.y[:, 0].sum(0)

    jacobian = torch.autograd.functional.jacobian(y_of, seen[1])  # (n_y, batch, positions, n_l)
    run.close()
    expected = jacobian.mean((1, 2))
    # 60 x 25 draws x 4 samples x 5 positions of rank one, each with an error of about |J| sqrt(n_l): 0.1 |J|.
    assert (estimate - expected).norm() < 0.35 * expected.norm()
    assert (estimate - 5 * expected).norm() > expected.norm()


def test_a_sequence_with_one_label_a_sample_is_no_classifier(tmp_path):
    """A language model that is taught the last token alone: e stays at its position."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=30, n_positions=8))
    data = []
    for _ in range(4):
        ids = torch.randint(1, 30, (6,))
        data.append({"input_ids": ids, "labels": torch.cat([torch.full((5,), -100), ids[5:]])})
    trainer = GrapeTrainer(model, arguments(tmp_path, max_steps=1, method="dfa"), train_dataset=data)
    trainer.train()
    assert trainer._run.boundaries.read_at is None


def test_heads_in_a_run_that_goes_on(tmp_path):
    """Estimates, measurements and a checkpoint, with the classifier's one error a sample."""
    torch.manual_seed(0)
    model, _, data = vit(40)
    options = LEARNED | dict(max_steps=4, alignment_steps=2, label_names=["labels"])
    trainer = GrapeTrainer(model, arguments(tmp_path, **options), train_dataset=data)
    trainer.train()
    assert all(-1 <= value <= 1 for _, value in logged(trainer, "grape/alignment/exact/mean"))


def test_many_labels_a_sample_are_no_labels_of_tokens(tmp_path):
    """Multi-label: as many labels as positions."""
    torch.manual_seed(0)
    model, _, data = vit(5)
    model.config.problem_type = "multi_label_classification"
    data = [row | {"labels": torch.randint(2, (5,)).float()} for row in data]
    trainer = GrapeTrainer(
        model, arguments(tmp_path, **STEP | {"method": "dfa", "feedback_space": "hidden"}), train_dataset=data
    )
    trainer.train()
    assert trainer._run.boundaries.read_at == "first"


class OwnHead(GrapeTrainer):
    """The head is the loss's, so that the model returns hidden states and no loss."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        states = model(input_ids=inputs["input_ids"]).last_hidden_state
        return F.cross_entropy(self.head(states[:, 0]), inputs["labels"])


def headless() -> tuple[BertModel, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    data = [{"input_ids": torch.randint(1, 30, (6,)), "labels": torch.tensor(i % 2)} for i in range(8)]
    return BertModel(config, add_pooling_layer=False), data


@pytest.mark.parametrize("ignored", ["one sample", "all samples of the first batch"])
def test_samples_without_an_error_say_nothing_of_where_the_loss_reads(ignored, tmp_path):
    """The next batch says it; until then nothing has been learned."""
    model, data = headless()
    for row in data[: 1 if ignored == "one sample" else 4]:
        row["labels"] = torch.tensor(-100)

    class Summed(OwnHead):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            states = model(input_ids=inputs["input_ids"]).last_hidden_state
            return F.cross_entropy(self.head(states[:, 0]), inputs["labels"], reduction="sum")

    options = {"method": "dfa", "feedback_init": "identity", "remove_unused_columns": False, "max_steps": 2}
    options |= {"train_sampling_strategy": "sequential"}
    trainer = Summed(model, arguments(tmp_path, **options), train_dataset=data)
    trainer.head = nn.Linear(16, 2)
    trainer.train()
    assert trainer._run.boundaries.read_at == "first"
    assert torch.equal(trainer.feedback[0], torch.eye(16))


@pytest.mark.parametrize("rule", ["lms", "ema"])
def test_an_identity_to_learn_from_estimates_is_shared_by_positions_that_are_no_padding(rule, tmp_path):
    """These are of the sum over positions: each has its share of it on the shortcut path."""

    class Masked(GrapeTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            return F.cross_entropy(self.head(states[:, 0]), inputs["labels"])

    model, data = headless()
    data = [row | {"attention_mask": (torch.arange(6) < 2 + i % 2).long()} for i, row in enumerate(data)]
    options = {"feedback_rule": rule, "feedback_lr": 0.0, "remove_unused_columns": False, "max_steps": 1}
    trainer = Masked(model, arguments(tmp_path, per_device_train_batch_size=8, **options), train_dataset=data)
    trainer.head = nn.Linear(16, 2)
    trainer.train()
    torch.testing.assert_close(trainer.feedback[0], torch.eye(16) / 2.5)


@pytest.mark.parametrize("scope", ["network", "block"])
def test_so_it_is_where_the_model_returns_its_loss(scope, tmp_path):
    model, _, data = vit(40)
    options = {"feedback_rule": "lms", "jvp_scope": scope, "feedback_lr": 0.0, "max_steps": 1}
    trainer = GrapeTrainer(model, arguments(tmp_path, **STEP | options), train_dataset=data)
    trainer.train()
    assert trainer._run.boundaries.read_at == "first"
    for b in trainer.feedback:
        torch.testing.assert_close(b, torch.eye(16) / 5)


@pytest.mark.parametrize("sweeps", [0, 1])
def test_what_a_map_saw_of_the_first_error_is_not_learned(sweeps, tmp_path):
    """It was paired with e of its own position, where all positions get the mean besides from now on."""
    model, data = headless()
    options = {"max_steps": 1, "remove_unused_columns": False, "feedback_lr": 0.5, "feedback_sweeps": sweeps}
    trainer = OwnHead(model, arguments(tmp_path, **options), train_dataset=data)
    trainer.head = nn.Linear(16, 2)
    trainer.train()
    below, last = trainer._run.maps.G
    assert torch.equal(last, torch.eye(16))
    assert not torch.equal(below, torch.eye(16))


def test_a_head_outside_the_model_is_seen_by_the_first_error(tmp_path):
    model, data = headless()
    got: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        if h.requires_grad:
            h.register_hook(lambda g: got.append(g.clone()))

    model.encoder.layer[0].register_forward_hook(watch)
    args = arguments(tmp_path, max_steps=3, method="dfa", feedback_init="identity", remove_unused_columns=False)
    trainer = OwnHead(model, args, train_dataset=data)
    trainer.head = nn.Linear(16, 2)
    trainer.train()
    assert trainer._run.boundaries.read_at == "first"
    assert torch.equal(trainer.feedback[0], torch.eye(16))
    mean = got[-1][:, 1:]
    assert mean.any(-1).all()
    torch.testing.assert_close(mean, mean[:, :1].expand_as(mean))
    torch.testing.assert_close(got[-1][:, 0], 7 * mean[:, 0])


class Marked(nn.Module):
    """Reads y at the token with the highest number, as CLIP's text tower does: neither the first nor the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.projection = nn.Embedding(30, 8), nn.Linear(8, 40)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        pooled = h[torch.arange(len(h)), input_ids.argmax(1)]
        return {"loss": F.cross_entropy(self.projection(pooled), labels)}


def test_a_token_anywhere_is_read_where_the_error_arose(tmp_path):
    """The estimate of a step is that of the same numbers with the token's place told."""
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(1, 30, (6,)), "labels": torch.tensor(i)} for i in range(8)]
    places = torch.stack([row["input_ids"] for row in data]).argmax(1)
    assert len(set(places.tolist()) - {0, 5}) > 0
    options = dict(jvp_steps=1, jvp_fraction=0.5, feedback_lr=1.0, train_sampling_strategy="sequential")
    options |= dict(max_steps=1, per_device_train_batch_size=8, learning_rate=0.0, feedback_rule="ema", optim="sgd")
    trainer = GrapeTrainer(Marked(), arguments(tmp_path, **options), train_dataset=data)
    trainer.train()
    boundaries, model = trainer._run.boundaries, trainer.model
    assert boundaries.read_at == "last"
    batch = {name: torch.stack([row[name] for row in data])[::2] for name in data[0]}
    for read, same in ((places[::2], True), (torch.full((4,), 5), False)):
        boundaries.read = torch.arange(6) == read[:, None]
        with isolated(model), boundaries.attached():
            terms = jacobian_terms(boundaries, lambda: model(**batch), Noise(42, 0, range(0, 8, 2)))
        found = [torch.allclose(b, j.mT, atol=1e-5) for b, j in zip(trainer.feedback, terms.mean(), strict=True)]
        assert found == [same, same]


def masked_tokens(*counts: int) -> list[dict[str, Tensor]]:
    """Sentences with so many tokens to predict each."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in counts:
        tokens, labels = torch.randint(4, 20, (10,), generator=generator), torch.full((10,), -100)
        labels[:count] = tokens[:count]
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def sparse(activation: str = "gelu") -> ModernBertForMaskedLM:
    """A model whose head runs on the masked tokens alone."""
    torch.manual_seed(0)
    config = ModernBertConfig(vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=3)
    config.num_attention_heads, config.sparse_prediction, config.max_position_embeddings = 2, True, 32
    config.classifier_activation, config.pad_token_id = activation, 0
    return ModernBertForMaskedLM(config)


@pytest.mark.parametrize("first", [[0, 2, 0, 2], [1, 1, 1, 1]], ids=["at once", "later"])
def test_a_head_on_chosen_tokens_whose_rows_are_as_many_as_samples(first, tmp_path):
    """Row i of y is of another sample than sample i: its error would have gone to that one."""
    data = masked_tokens(*first, *[0, 2, 0, 2] * 3)
    run = STEP | dict(max_steps=4, per_device_train_batch_size=4)
    with pytest.raises(RuntimeError, match=r'row 0 of the head.*feedback_space="hidden"'):
        GrapeTrainer(sparse(), arguments(tmp_path, feedback_space="logits", **run), train_dataset=data).train()
    GrapeTrainer(sparse(), arguments(tmp_path, feedback_space="hidden", **run), train_dataset=data).train()


def test_a_head_that_sends_a_sample_nothing_is_of_the_samples(tmp_path):
    """No unit of its ReLU is on."""
    model = sparse("relu")
    with torch.no_grad():
        model.head.dense.weight.zero_()
    options = STEP | dict(max_steps=2, per_device_train_batch_size=4, feedback_space="logits")
    trainer = GrapeTrainer(model, arguments(tmp_path, **options), train_dataset=masked_tokens(*[1] * 8))
    with torch.no_grad():
        model.head.dense.weight.zero_()
    trainer.train()
    assert trainer.state.global_step == 2


class MeanPooled(GrapeTrainer):
    """Sentence embeddings: a loss between the means of hidden states."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        z = F.normalize(model(input_ids=inputs["input_ids"]).last_hidden_state.mean(1), dim=-1)
        alike = inputs["labels"][:, None] == inputs["labels"]
        return (z @ z.T - alike.to(z)).pow(2).mean()


@pytest.mark.parametrize("pooler", [True, False])
def test_a_pooled_output_that_the_loss_does_not_use_says_nothing(pooler, tmp_path, caplog):
    model, data = headless()
    model = BertModel(model.config, add_pooling_layer=pooler)
    options = dict(max_steps=4, alignment_steps=1, logging_steps=1, remove_unused_columns=False)
    trainer = MeanPooled(model, arguments(tmp_path, **options), train_dataset=data)
    trainer.train()
    assert trainer._run.boundaries.read_at is None
    assert "several positions" not in caplog.text
    assert all(size > 0.8 for _, size in logged(trainer, "grape/weight_gradient/size/mean"))


def test_maps_that_have_learned_are_whole_again_when_all_positions_are_read(tmp_path):
    """They start as a share of the identity where one position is read, and then another loss reads them all."""

    class ByTurns(OwnHead):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            if self.state.global_step < 2:
                return super().compute_loss(model, inputs)
            return MeanPooled.compute_loss(self, model, inputs)

    model, data = headless()
    options = dict(max_steps=4, alignment_steps=1, logging_steps=1, remove_unused_columns=False, learning_rate=1e-3)
    trainer = ByTurns(model, arguments(tmp_path, **options), train_dataset=data)
    trainer.head = nn.Linear(16, 2)
    trainer.train()
    assert trainer._run.boundaries.read_at is None
    assert 0.8 < logged(trainer, "grape/weight_gradient/size/mean")[-1][1] < 1.25
