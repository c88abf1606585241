"""Padding has no say: more of it changes neither a gradient nor what B_l learns, whatever a mask is called.

The oracle is the same run with less padding. Each model ignores its padding: that is checked by backpropagation first.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import arguments
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from grape_hf import GrapeTrainer
from grape_hf.core.padding import counts, fit

WIDTH = 16
Rows = list[dict[str, Tensor]]
BERT = dict(vocab_size=40, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
BERT |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64)


def ids(shape: tuple[int, ...], length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and a mask, of which the last dimension is ``length`` long; every second row is shorter by half."""
    tokens = torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))
    tokens[1::2, ..., shape[-1] // 2 :] = 0
    tokens = F.pad(tokens, (0, length - shape[-1]))
    return tokens, (tokens != 0).long()


def labelled(**columns: Tensor) -> Rows:
    number = len(next(iter(columns.values())))
    return [{n: c[i] for n, c in columns.items()} | {"labels": torch.tensor(i % 2)} for i in range(number)]


def choices(length: int) -> tuple[nn.Module, Rows]:
    tokens, mask = ids((8, 3, 6), length)
    return BertForMultipleChoice(BertConfig(**BERT)), labelled(input_ids=tokens, attention_mask=mask)


def text(length: int) -> tuple[nn.Module, Rows]:
    tokens, mask = ids((8, 6), length)
    return BertForSequenceClassification(BertConfig(**BERT)), labelled(input_ids=tokens, attention_mask=mask)


def prompted(config: Any) -> Callable[[int], tuple[nn.Module, Rows]]:
    def make(length: int) -> tuple[nn.Module, Rows]:
        model, rows = text(length)
        adapted = get_peft_model(model, config(task_type="SEQ_CLS", num_virtual_tokens=3))
        return adapted.requires_grad_(True), rows

    return make


def audio(length: int) -> tuple[nn.Module, Rows]:
    """The mask is of samples, h_l of frames."""
    config = Wav2Vec2Config(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=10,
        conv_dim=(8, 8), conv_stride=(4, 4), conv_kernel=(8, 8), feat_extract_norm="layer", classifier_proj_size=8,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        do_stable_layer_norm=True, apply_spec_augment=False,
    )  # fmt: skip
    sound = torch.randn(8, 320, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 320).long()
    mask[1::2, 160:] = 0
    sound, mask = F.pad(sound * mask, (0, 20 * (length - 6))), F.pad(mask, (0, 20 * (length - 6)))
    return Wav2Vec2ForSequenceClassification(config), labelled(input_values=sound, attention_mask=mask)


def windowed(length: int) -> tuple[nn.Module, Rows]:
    """Longformer pads to a multiple of its window inside."""
    config = LongformerConfig(**BERT, attention_window=4, pad_token_id=0)
    tokens, mask = ids((8, 6), length)
    return LongformerForSequenceClassification(config), labelled(input_ids=tokens, attention_mask=mask)


class Own(nn.Module):
    """A model of the user's own, whose mask has any name and either meaning, and which pools over what counts."""

    def __init__(self, name: str, padding: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.name, self.padding, self.batch_first = name, padding, batch_first
        self.embed, self.classifier = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, 2)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, labels: Tensor, **masks: Tensor) -> dict[str, Tensor]:
        mask = masks[self.name]
        ignored = mask.bool() if self.padding else ~mask.bool()
        h = self.embed(input_ids)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.encoder(h, src_key_padding_mask=ignored)
        h = h if self.batch_first else h.transpose(0, 1)
        pooled = (h * ~ignored[..., None]).sum(1) / (~ignored).sum(1, keepdim=True)
        logits = self.classifier(pooled)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Silent(nn.Module):
    """Never hears of padding: the loss pools over what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return h


class PoolingTrainer(GrapeTrainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        mask = inputs["attention_mask"][..., None]
        pooled = (model(inputs["input_ids"]) * mask).sum(1) / mask.sum(1)
        return F.cross_entropy(model.fc(pooled), inputs["labels"])


class Pooling(Silent):
    """Only its pooling heeds the mask, which no block sees: its meaning can be told by the gradient alone."""

    def __init__(self, padding: bool) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, input_ids: Tensor, labels: Tensor, padding_mask: Tensor) -> dict[str, Tensor]:
        counted = (padding_mask == 0 if self.padding else padding_mask != 0)[..., None]
        logits = self.fc((super().forward(input_ids) * counted).sum(1) / counted.sum(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def pooling(padding: bool) -> Callable[[int], tuple[nn.Module, Rows]]:
    def make(length: int) -> tuple[nn.Module, Rows]:
        tokens, mask = ids((8, 6), length)
        return Pooling(padding), labelled(input_ids=tokens, padding_mask=(mask == 0 if padding else mask).long())

    return make


def own(name: str, padding: bool, dtype: torch.dtype) -> Callable[[int], tuple[nn.Module, Rows]]:
    def make(length: int) -> tuple[nn.Module, Rows]:
        tokens, mask = ids((8, 6), length)
        return Own(name, padding), labelled(input_ids=tokens, **{name: (mask == 0 if padding else mask).to(dtype)})

    return make


MODELS: dict[str, Callable[[int], tuple[nn.Module, Rows]]] = {
    "text": text,
    "choices": choices,
    "prompt-tuning": prompted(PromptTuningConfig),
    "prefix-tuning": prompted(PrefixTuningConfig),
    "audio": audio,
    "longformer": windowed,
    "padding_mask-bool": own("padding_mask", True, torch.bool),
    "padding_mask-int": own("padding_mask", True, torch.long),
    "padding_mask-1-counts": own("padding_mask", False, torch.long),
    "attn_mask": own("attn_mask", False, torch.bool),
    "src_key_padding_mask": own("src_key_padding_mask", True, torch.bool),
    "decoder_attention_mask": own("decoder_attention_mask", False, torch.long),
    "pooling-alone": pooling(True),
    "pooling-alone-1-counts": pooling(False),
    "mask-of-floats": own("mask", False, torch.float32),
}


def run(
    make: Callable[[int], tuple[nn.Module, Rows]], length: int, folder: Any, kind: type = GrapeTrainer, **options: Any
) -> tuple[Tensor, Any]:
    """Block 1's gradient, and the Trainer."""
    torch.manual_seed(0)
    model, rows = make(length)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    one = dict(max_steps=1, per_device_train_batch_size=8, optim="sgd", learning_rate=1.0, max_grad_norm=0)
    one |= dict(lr_scheduler_type="constant", logging_strategy="no", remove_unused_columns=False)
    trainer = kind(model, arguments(folder, **one | options), train_dataset=rows)
    trainer.train()
    first = ("layer.0.", "layers.0.", "h.0.")
    found = [
        (p - before[n]).detach().flatten() for n, p in model.named_parameters() if any(part in n for part in first)
    ]
    return torch.cat(found), trainer


def change(a: Tensor, b: Tensor) -> float:
    assert a.any()
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_more_padding_changes_nothing(name, tmp_path, caplog):
    make = MODELS[name]
    short, long = 6, 24
    plain, _ = run(make, short, tmp_path, method="bp")
    assert change(plain, run(make, long, tmp_path, method="bp")[0]) < 1e-4  # the model itself ignores it
    learned = {"method": "grape", "jvp_fraction": 1.0, "jvp_steps": 1, "feedback_lr": 1.0, "alignment_steps": 1}
    star, trainer = run(make, short, tmp_path, **learned)
    padded, other = run(make, long, tmp_path, **learned)
    assert change(star, padded) < 1e-4
    assert trainer.feedback
    for a, b in zip(trainer.feedback, other.feedback, strict=True):
        assert change(a, b) < 1e-3
    cosines = [t._run.metrics["alignment/exact/mean"] for t in (trainer, other)]
    torch.testing.assert_close(cosines[0], cosines[1], rtol=1e-3, atol=1e-4)
    assert "does not fit" not in caplog.text


@pytest.mark.parametrize("name", ["text", "choices", "padding_mask-int", "audio"])
def test_more_padding_changes_no_refit(name, tmp_path):
    options = {"method": "dfa", "calibration_strategy": "steps", "calibration_interval": 1, "calibration_refit": True}
    (_, short), (_, long) = (run(MODELS[name], length, tmp_path, **options) for length in (6, 24))
    for a, b in zip(short.feedback, long.feedback, strict=True):
        assert change(a, b) < 1e-3


def test_a_mask_that_the_loss_keeps_to_itself(tmp_path):
    def make(length: int) -> tuple[nn.Module, Rows]:
        tokens, mask = ids((8, 6), length)
        return Silent(), labelled(input_ids=tokens, attention_mask=mask)

    learned = {"jvp_fraction": 0.5, "jvp_steps": 1, "feedback_lr": 1.0, "blocks": "layers"}
    (a, short), (b, long) = (run(make, length, tmp_path, PoolingTrainer, **learned) for length in (6, 24))
    assert change(a, b) < 1e-4
    for one, other in zip(short.feedback, long.feedback, strict=True):
        assert change(one, other) < 1e-3


def test_a_mask_that_cannot_be_matched_is_named_once(tmp_path, caplog):
    class Strange(Own):
        def forward(self, input_ids: Tensor, labels: Tensor, span_mask: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.classifier(self.encoder(self.embed(input_ids)).mean(1)), labels)}

    def make(length: int) -> tuple[nn.Module, Rows]:
        tokens, _ = ids((8, 6), length)
        return Strange("mask", False), labelled(input_ids=tokens, span_mask=torch.ones(8, 2, 5))

    run(make, 6, tmp_path, method="dfa", max_steps=3)
    said = [record.message for record in caplog.records if "does not fit" in record.message]
    assert len(said) == 1
    assert "span_mask (8, 2, 5)" in said[0]
    assert "(8, 6, 16)" in said[0]


def test_a_causal_mask_is_not_named(tmp_path, caplog):
    """As of torch's tutorials: positions in front of the batch, and a mask of positions by positions."""

    class Causal(Own):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            causal = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
            h = self.encoder(self.embed(input_ids).transpose(0, 1), mask=causal)
            return {"loss": F.cross_entropy(self.classifier(h.mean(0)), labels)}

    def make(length: int) -> tuple[nn.Module, Rows]:
        return Causal("mask", False, batch_first=False), labelled(input_ids=ids((8, 6), length)[0])

    run(make, 6, tmp_path, method="dfa", feedback_space="hidden")
    assert "does not fit" not in caplog.text


# --- one mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "meaning"),
    [
        (torch.tensor([[1, 1, 0], [1, 0, 0]]), "counts"),
        (torch.tensor([[0, 0, 1], [0, 1, 1]]), "padding"),
        (torch.tensor([[0.0, 0.0, -1e4], [0.0, -torch.inf, torch.finfo(torch.float32).min]]), "additive"),
        (torch.tensor([[0.0, 10000.0, -1e4], [0.0, -1e4, -1e4]]), "additive"),  # Longformer: global attention
    ],
)
def test_what_the_numbers_say(mask, meaning):
    assert counts(mask, meaning).tolist() == [[True, True, False], [True, False, False]]


def test_shapes_that_fit():
    keep = torch.tensor([[True, True, False], [True, False, False]])
    shape = keep.shape
    assert torch.equal(fit(keep, shape, True, False), keep)
    assert torch.equal(fit(keep.mT, shape, True, False), keep)  # positions before the batch
    assert torch.equal(fit(keep.reshape(1, 2, 3), shape, True, False), keep)  # choices
    assert torch.equal(fit(keep[:, None, None], shape, True, False), keep)  # heads and queries
    causal = torch.ones(3, 3).tril().bool() & keep[:, None, None]
    assert torch.equal(fit(causal, shape, True, False), keep)
    longer = torch.cat([torch.ones(2, 4).bool(), keep], dim=1)
    assert fit(longer, shape, False, False) is None
    assert torch.equal(fit(longer, shape, False, True), keep)  # a past in front of it
    assert torch.equal(fit(keep, torch.Size((2, 5)), False, False), F.pad(keep, (2, 0), value=True))  # prompt tokens
    assert fit(keep, torch.Size((2, 49)), False, False) is None  # samples and frames
    assert fit(keep, torch.Size((5, 3)), False, False) is None
    square, triangle = torch.Size((3, 3)), torch.ones(3, 3).tril().bool()  # of queries and keys, for three samples
    assert fit(triangle, square, True, False) is fit(~triangle, square, True, False) is None
    assert torch.equal(fit(F.pad(keep, (0, 0, 0, 1)), square, True, False), F.pad(keep, (0, 0, 0, 1)))
