"""T5 and BART: the error goes to every block of both stacks, to an encoder's summed over target positions.

The reference runs each block by itself, on the inputs that it had in an ordinary forward, and backpropagates its own
delta_l; nothing of ``boundaries.py`` is in it.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_jacobians import ExactJacobians
from helpers import LEARNED, arguments, assert_same, count_hooks, fitted, logged
from tiny_models import MODELS, TinyModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers import Trainer as StockTrainer

from grape_hf import GrapeArgumentsMixin, GrapeMixin, GrapeTrainer
from grape_hf.core.alignment import delta_products
from grape_hf.core.blocks import find_blocks
from grape_hf.core.isolation import isolated
from grape_hf.core.jacobian import JacobianSum, Noise, jacobian_terms
from grape_hf.core.padding import Masks
from grape_hf.core.parts import find_encoder
from grape_hf.core.refit import exact_pair
from grape_hf.engine.points import FeedbackPoints
from grape_hf.engine.run import GrapeRun
from grape_hf.engine.samples import target_mask

T5, BART = (next(m for m in MODELS if m.name == f"encoder-decoder-{family}") for family in ("t5", "bart"))
ENCODER = 2  # blocks of the encoder, in front of three of the decoder


def batch_of(tiny: TinyModel, number: int = 3, targets: int | None = None) -> dict[str, Tensor]:
    samples = tiny.samples(number)
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 5:] = 0  # padding at the end of one source
    labels = batch["labels"] if targets is None else batch["input_ids"].roll(1, 1)[:, :targets]
    return batch | {"attention_mask": mask, "labels": labels}


def started(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> GrapeRun:
    run = GrapeRun(model, GrapeArgumentsMixin(**options))
    run.start(lambda: model(**{name: value[:1] for name, value in batch.items()}))
    return run


def reference(model: nn.Module, batch: dict[str, Tensor], B: list[Tensor]) -> dict[str, Tensor]:
    """Gradients by hand: of the head, then of each block with what its input is made of, up to the next h_l."""
    blocks = list(find_blocks(model).values())
    encoder, parameters = model.get_encoder(), dict(model.named_parameters())
    calls: list[tuple[tuple, dict]] = []
    top: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    def cut(module: nn.Module, args: tuple, output: tuple | Tensor) -> tuple | Tensor:
        y = output[0] if isinstance(output, tuple) else output
        top.append(y.detach().requires_grad_())
        return (top[0], *output[1:]) if isinstance(output, tuple) else top[0]

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(cut))
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def add(value: Tensor, gradient: Tensor | None) -> None:
        gradients = torch.autograd.grad(
            value, list(parameters.values()), gradient, retain_graph=True, materialize_grads=True
        )
        for name, g in zip(parameters, gradients, strict=True):
            sums[name] += g

    add(loss, None)
    e = torch.autograd.grad(loss, top[0], retain_graph=True)[0]  # (batch, targets, n_y)

    # The encoder's output as its decoder sees it: the encoder's last h, with the norm behind it if there is one, cut.
    args, kwargs = calls[ENCODER - 1]
    seen = blocks[ENCODER - 1](*args, **kwargs)
    seen = seen[0] if isinstance(seen, tuple) else seen
    seen = (encoder.final_layer_norm(seen) if hasattr(encoder, "final_layer_norm") else seen).detach()

    for index, block in enumerate(blocks):
        args, kwargs = calls[index]
        args = list(args)
        if index not in (0, ENCODER):  # the first block of a stack is one unit with the embeddings
            args[0] = args[0].detach()
        if index >= ENCODER:
            position = 3 if "T5" in type(block).__name__ else 2  # where the encoder's output is passed
            assert args[position].shape == seen.shape
            args[position] = seen
            kwargs = kwargs | {"past_key_values": None}  # else keys and values of the ordinary forward
        h = block(*args, **kwargs)
        h = h[0] if isinstance(h, tuple) else h
        if index == ENCODER - 1 and hasattr(encoder, "final_layer_norm"):
            h = encoder.final_layer_norm(h)  # h_l is what the decoder reads: the norm is of one unit with the block
        if index < ENCODER:
            pooled = e.sum(1)
            delta = torch.stack([torch.stack([B[index] @ pooled[b]] * h.shape[1]) for b in range(len(h))])
            delta = delta * batch["attention_mask"][..., None]
        elif index < len(blocks) - 1:
            delta = torch.stack([torch.stack([B[index] @ e[b, t] for t in range(h.shape[1])]) for b in range(len(h))])
        else:
            delta = e
        add(h, delta)
    return sums


@pytest.mark.parametrize("tiny", [T5, BART], ids=lambda tiny: tiny.family)
@pytest.mark.parametrize("targets", [None, 8], ids=["fewer-targets", "as-many-targets"])
def test_star_of_both_stacks(tiny, targets):
    model, batch = tiny.build().double(), batch_of(tiny, targets=targets)
    run = started(model, batch)
    B = [torch.randn_like(b) for b in run.feedback.B]
    expected = reference(model, batch, B)
    with run.boundaries.broadcast(B, batch["attention_mask"]):
        model(**batch).loss.backward()
    run.close()
    assert count_hooks(model) == 0
    for name, p in model.named_parameters():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    encoders = [g for name, g in expected.items() if "encoder" in name and "k_proj.bias" not in name]
    assert encoders
    assert all(g.any() for g in encoders)


def test_estimates_of_an_encoder_are_of_all_pairs_of_positions():
    model, batch = BART.build().double(), batch_of(BART, targets=8)  # as many as sources: the sizes do not tell
    del batch["attention_mask"]
    run, noise = started(model, batch), Noise(0, 0, range(3))
    assert run.boundaries.pooled == {0, 1}
    exact = ExactJacobians(model, run.boundaries, lambda: model(**batch))
    B = [torch.randn_like(b) for b in run.feedback.B]
    with isolated(model):
        plain = jacobian_terms(run.boundaries, lambda: model(**batch), noise)
        residual = jacobian_terms(run.boundaries, lambda: model(**batch), noise, B=B)
    run.close()
    assert [int(n) for n in residual.tangents] == [3, 3, 24, 24]  # samples, and samples times positions

    v = [noise.vectors(i, h) * h.square().mean(-1, keepdim=True).sqrt() for i, h in enumerate(exact.h)]
    a = [noise.vectors(i, h) / h.square().mean(-1, keepdim=True).sqrt() for i, h in enumerate(exact.h)]
    predicted = torch.zeros(3, 8, B[0].shape[1], dtype=torch.float64)
    for b in range(3):
        for t in range(8):
            for i in range(4):
                for s in range(8) if i < ENCODER else [t]:
                    predicted[b, t] += B[i].mT @ v[i][b, s]
    for i, expected in enumerate(exact.estimate(noise)):
        torch.testing.assert_close(plain.sums[i], expected)
        if i < ENCODER:
            taken = sum(torch.outer(predicted[b].mean(0), a[i][b, s]) for b in range(3) for s in range(8))
        else:
            taken = sum(torch.outer(predicted[b, t], a[i][b, t]) for b in range(3) for t in range(8))
        torch.testing.assert_close(residual.sums[i], expected - taken)


@pytest.mark.parametrize("mode", ["dual", "finite_difference"])
def test_estimates_in_weight_space_where_three_blocks_read_the_encoder(mode):
    """q = sum_l c_l (dy/dW_l) p_l, a_l = u_l / c_l, u_l = (dh_l/dW_l) p_l, by forward mode of the whole model alone."""
    model, batch = BART.build().double(), batch_of(BART)
    del batch["attention_mask"]
    run, noise = started(model, batch), Noise(0, 0, range(3))
    blocks = run.boundaries.blocks
    with isolated(model):
        spaces = ["weight"] * len(run.boundaries)
        found = jacobian_terms(run.boundaries, lambda: model(**batch), noise, mode=mode, spaces=spaces)
    run.close()
    assert run.boundaries.hidden
    assert len(blocks) == ENCODER + 3
    names = {id(p): name for name, p in model.named_parameters()}

    def outputs(weights: dict[str, Tensor], index: int) -> tuple[Tensor, ...]:
        """Return h_l and y, with other weights in one block."""
        seen: list[Any] = []
        handles = [m.register_forward_hook(lambda *call: seen.append(call[2])) for m in (blocks[index], blocks[-1])]
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward mode
            functional_call(model, {names[id(p)]: weights[n] for n, p in blocks[index].named_parameters()}, (), batch)
        for handle in handles:
            handle.remove()
        return tuple(h[0] if isinstance(h, tuple) else h for h in seen)

    q, a = torch.zeros(()), []
    for index, block in enumerate(blocks[:-1]):
        weights = {name: p.detach() for name, p in block.named_parameters()}
        with torch.no_grad():
            of_block = torch.func.jvp(partial(outputs, index=index), (weights,), (noise.weights(index, block),))
        (h, _), (u, y) = of_block
        c = (h.square().mean((1, 2), keepdim=True) / u.square().mean((1, 2), keepdim=True)).sqrt()
        q = q + c * y
        a.append(u / c)
    for index, terms in enumerate(found.sums):
        if index < ENCODER:  # the error of an encoder's blocks is the same at all positions
            expected = torch.einsum("bk,bn->kn", q.mean(1), a[index].sum(1))
        else:
            expected = torch.einsum("btk,btn->kn", q, a[index])
        # A difference has an error of its step, 1e-6, times the curvature.
        tolerance = {} if mode == "dual" else {"rtol": 0, "atol": 1e-4 * float(expected.abs().max())}
        torch.testing.assert_close(terms, expected, **tolerance, msg=lambda t, i=index: f"h_{i + 1}: {t}")


def test_padding_of_sources_is_no_padding_of_targets():
    model, batch = BART.build().double(), batch_of(BART, targets=8)
    mask = batch["attention_mask"]
    run, noise = started(model, batch), Noise(0, 0, range(3))
    with isolated(model):
        terms = jacobian_terms(run.boundaries, lambda: model(**batch), noise, mask=mask)
    run.close()
    assert [int(n) for n in terms.counts] == [21, 21, 24, 24]  # 3 of 24 positions are padding


@pytest.mark.parametrize("predicted", [False, True], ids=["estimate", "residual"])
@pytest.mark.parametrize("tiny", [T5, BART], ids=["t5", "bart"])
def test_padding_of_targets_has_no_say(tiny, predicted):
    """Targets of four lengths, padded to eight in one batch, or each by itself; the last sample has none at all."""
    model, batch = tiny.build().double(), batch_of(tiny, 4, targets=8)
    lengths = (8, 5, 3, 0)
    for row, length in zip(batch["labels"], lengths, strict=True):
        row[length:] = -100
    run = started(model, batch)
    B = [torch.randn_like(b) for b in run.feedback.B] if predicted else None
    apart = JacobianSum()
    with isolated(model):
        padded = jacobian_terms(
            run.boundaries,
            lambda: model(**batch),
            Noise(0, 0, range(4)),
            mask=batch["attention_mask"],
            targets=target_mask(batch),
            B=B,
        )
        for i, length in enumerate(lengths[:3]):
            one = {name: value[i : i + 1] for name, value in batch.items()}
            one["labels"] = one["labels"][:, :length]
            mask, noise = one["attention_mask"], Noise(0, 0, [i])
            apart.add(jacobian_terms(run.boundaries, lambda one=one: model(**one), noise, mask=mask, B=B))
    run.close()
    assert padded.counts == apart.counts
    for a, b in zip(padded.sums, apart.sums, strict=True):
        torch.testing.assert_close(a, b)


def test_what_says_where_targets_end():
    labels = torch.tensor([[-100, 5, -100, 6, -100, -100], [-100] * 6])
    ends = torch.tensor([[1, 1, 1, 1, 0, 0], [0] * 6])
    assert torch.equal(target_mask({"labels": labels}), ends.bool())
    assert target_mask({"labels": labels, "decoder_attention_mask": 1 - ends}) is not None
    assert torch.equal(target_mask({"labels": labels, "decoder_attention_mask": 1 - ends}), 1 - ends)
    for labels in (torch.tensor([1, 2]), torch.randn(2, 6), [1, 2]):
        assert target_mask({"labels": labels}) is None
    assert target_mask({}) is None


def test_exact_deltas_of_an_encoder_meet_the_summed_error():
    model, batch = BART.build().double(), batch_of(BART, targets=8)
    run = started(model, batch)
    with run.boundaries.record(batch["attention_mask"]) as forwards:
        model(**batch).loss.backward()
    run.close()
    e, delta = exact_pair(forwards[0], 0)
    torch.testing.assert_close(e, forwards[0].e.sum(1, keepdim=True))
    assert delta.shape == (3, 8, 16)
    B = [torch.randn_like(b) for b in run.feedback.B]
    products = delta_products(forwards, B)
    guess = (e @ B[0].mT).expand_as(delta) * batch["attention_mask"][..., None]
    expected = torch.stack([(guess * delta).sum(), guess.square().sum(), delta.square().sum()])
    torch.testing.assert_close(products[0], expected)
    e, _ = exact_pair(forwards[0], 3)
    assert e.shape == (3, 8, 16)


class Trainer(GrapeMixin, Seq2SeqTrainer):
    pass


class Arguments(GrapeArgumentsMixin, Seq2SeqTrainingArguments):
    pass


def trained(tiny: TinyModel, folder: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        model=tiny.build() if model is None else model,
        args=arguments(folder, Arguments, per_device_train_batch_size=8, **options),
        train_dataset=tiny.samples(8),
        eval_dataset=tiny.samples(4, seed=1),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


@pytest.mark.parametrize("tiny", [T5, BART], ids=lambda tiny: tiny.family)
def test_seq2seq_trainer(tiny, tmp_path):
    trainer = trained(
        tiny,
        tmp_path,
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=5,
        generation_max_length=5,
        **LEARNED,
    )
    losses = [value for _, value in logged(trainer, "loss")]
    assert losses[-1] < losses[0]
    assert len(trainer.feedback) == 4
    assert all(b.any() for b in trainer.feedback)  # an encoder's start from zero
    assert [step for step, _ in logged(trainer, "eval_loss")] == [5, 10]  # by generating, which leaves the hooks alone
    assert count_hooks(trainer.model) == 0


def test_starts(tmp_path):
    options = {"max_steps": 1, "learning_rate": 0.0, "feedback_init": "auto"}
    learned, frozen = (trained(T5, tmp_path, method=m, **options) for m in ("grape", "dfa"))
    zero, gaussian = learned.feedback[0], frozen.feedback[0]
    assert gaussian.std() == pytest.approx(1 / 4, rel=0.2)  # 1 / sqrt(n_l)
    assert zero.norm() < 0.1 * gaussian.norm()
    assert torch.equal(frozen.feedback[3], torch.eye(16))
    with pytest.raises(ValueError, match="none leads from encoder.block.0, a block of the encoder, to y"):
        trained(T5, tmp_path, feedback_init="identity")


def test_which_blocks():
    model, batch = T5.build(), batch_of(T5)
    assert list(find_blocks(model)) == [f"encoder.block.{i}" for i in range(2)] + [
        f"decoder.block.{i}" for i in range(3)
    ]
    assert find_encoder(model) is model.encoder
    run = started(model, batch, feedback_points=1)  # in each of the two, and one where they meet
    assert run.block_names == ["encoder.block.0", "encoder.block.1", "decoder.block.0"]
    assert run.boundaries.pooled == {0, 1}
    run.close()
    decoder = started(model, batch, blocks="decoder.block")
    assert decoder.block_names == ["decoder.block.0", "decoder.block.1"]
    assert not decoder.boundaries.pooled
    decoder.close()
    encoder = started(model, batch, blocks="encoder.block", feedback_space="hidden")
    assert not encoder.boundaries.pooled  # y is the encoder's output, at its own positions
    encoder.close()


class Torchs(nn.Module):
    """torch's own encoder and decoder, with a padded source; by themselves or in an ``nn.Transformer``."""

    def __init__(self, whole: bool, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = dict(d_model=16, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=batch_first)
        self.source, self.target, self.readout = nn.Embedding(20, 16), nn.Embedding(20, 16), nn.Linear(16, 20)
        if whole:
            self.both = nn.Transformer(num_encoder_layers=2, num_decoder_layers=3, **shape)
        else:  # the decoder is defined first
            self.upper = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape), 3)
            self.lower = nn.TransformerEncoder(nn.TransformerEncoderLayer(**shape), 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        padded = input_ids.eq(0)
        source, target = self.source(input_ids), self.target(labels)
        if hasattr(self, "both"):
            h = self.both(source, target, src_key_padding_mask=padded, memory_key_padding_mask=padded)
        else:
            memory = self.lower(source, src_key_padding_mask=padded)
            h = self.upper(target, memory, memory_key_padding_mask=padded)
        return {"loss": nn.functional.cross_entropy(self.readout(h).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("length", [4, 6], ids=["fewer-targets", "as-many-targets"])
@pytest.mark.parametrize("whole", [True, False], ids=["nn.Transformer", "two-stacks"])
def test_torch_s_encoders_and_decoders(whole, length, tmp_path):
    """With as many sweeps as points they are backpropagation; without sweeps every block learns."""
    kinds = ("both.encoder", "both.decoder") if whole else ("lower", "upper")
    names = [f"{kind}.layers.{i}" for kind, number in zip(kinds, (2, 3), strict=True) for i in range(number)]
    assert list(find_blocks(Torchs(whole))) == names
    rows = torch.randint(1, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    rows[::2, 4:] = 0
    data = [{"input_ids": row, "labels": row.flip(0).clamp(1)[:length]} for row in rows]
    every: list[dict[str, Any]] = [{"method": "bp"}, {"feedback_sweeps": 4}, {}, LEARNED]
    after = [fitted(lambda: Torchs(whole), data, tmp_path, **options) for options in every]
    assert_same(after[1], after[0], rtol=1e-5, atol=1e-6)
    for name, value in Torchs(whole).state_dict().items():
        assert not torch.equal(value, after[2][name])
        assert not torch.equal(value, after[3][name])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_of_torch_s_stacks_with_the_batch_second_the_larger_is_taken():
    assert list(find_blocks(Torchs(whole=True, batch_first=False))) == [f"both.decoder.layers.{i}" for i in range(3)]


class Encoded(nn.Module):
    """The encoder is frozen and runs by itself; its output is handed in."""

    def __init__(self, model: nn.Module, inside: bool) -> None:
        super().__init__()
        self.model, self.inside = model, inside
        model.get_encoder().requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.inside:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        with torch.no_grad():
            encoded = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        return self.model(encoder_outputs=encoded, attention_mask=attention_mask, labels=labels)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "handed-in"])
@pytest.mark.parametrize("tiny", [T5, BART], ids=lambda tiny: tiny.family)
def test_a_frozen_encoder_is_no_part_of_the_chain(tiny, inside, tmp_path):
    batch = batch_of(tiny, 4, targets=8)  # as many as sources, whose mask says nothing of them
    data = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    after = []
    options: dict[str, Any]
    for kind, options in ((StockTrainer, {"kind": TrainingArguments}), (GrapeTrainer, {"feedback_sweeps": 2})):
        model = Encoded(tiny.build(), inside)
        assert len(find_blocks(model)) == len(find_blocks(model.model)) == 3
        args = arguments(tmp_path, max_steps=3, learning_rate=0.1, optim="sgd", save_strategy="no", **options)
        trainer = kind(model, args, train_dataset=data)
        trainer.train()
        after.append({name: p.detach() for name, p in model.named_parameters()})
    assert_same(after[1], after[0], rtol=1e-5, atol=1e-6)


def test_a_frozen_encoder_stays_where_something_below_it_trains():
    model = T5.build()
    model.get_encoder().block.requires_grad_(False)
    model.get_encoder().final_layer_norm.requires_grad_(False)
    assert len(find_blocks(model)) == 5  # its embeddings are the decoder's too
    model.get_encoder().requires_grad_(False)
    assert len(find_blocks(model)) == 3
    model.prompt = nn.Embedding(2, 16)
    assert len(find_blocks(model)) == 5
    model.requires_grad_(False)
    assert len(find_blocks(model)) == 5


def test_a_mask_of_the_source_says_nothing_about_a_decoder_whose_encoder_is_frozen():
    model = T5.build()
    model.get_encoder().requires_grad_(False)
    points = FeedbackPoints(model, GrapeArgumentsMixin())
    masks = Masks(model, points.chain, points.encoder_blocks)
    h, source, target = torch.zeros(2, 4, 16), torch.tensor([[1, 1, 0, 0]] * 2), torch.tensor([[1, 1, 1, 0]] * 2)
    masks.note(model, (), {"attention_mask": source})
    assert masks.padding(points.chain[0], h) is None
    masks.forget()
    masks.note(model, (), {"attention_mask": source, "decoder_attention_mask": target})
    assert torch.equal(masks.padding(points.chain[0], h), target.bool())
    masks.forget()
    masks.note(model.get_decoder(), (), {"attention_mask": target})  # what the decoder itself is called with is its own
    assert torch.equal(masks.padding(points.chain[0], h), target.bool())


def test_a_mask_of_the_one_stack_says_nothing_about_the_other():
    """Of torch's, too, where source and target are of one length, and of a decoder alone."""
    both, decoder = nn.Transformer(8, 2, 2, 3, 8, batch_first=True), nn.TransformerDecoderLayer(8, 2, 8)
    source, target = (torch.arange(5) >= torch.tensor(lengths)[:, None] for lengths in ((5, 2, 1), (4, 3, 5)))
    h, of_source, of_target = (
        torch.zeros(3, 5, 8),
        {"memory_key_padding_mask": source},
        {"tgt_key_padding_mask": target},
    )
    for model in (both, nn.TransformerDecoder(decoder, 3)):
        points = FeedbackPoints(model, GrapeArgumentsMixin())
        masks = Masks(model, points.chain, points.encoder_blocks)
        called = model.decoder if model is both else model
        masks.note(called, (), of_source)
        assert masks.padding(points.chain[-1], h) is None
        masks.forget()
        masks.note(called, (), of_source | of_target)
        assert torch.equal(masks.padding(points.chain[-1], h), ~target)
        if model is both:
            masks.forget()
            masks.note(model, (), of_target)
            assert masks.padding(points.chain[0], h) is None
            assert torch.equal(masks.padding(points.chain[-1], h), ~target)
            masks.forget()
            masks.note(model, (), of_target | {"src_key_padding_mask": source})
            assert torch.equal(masks.padding(points.chain[0], h), ~source)
