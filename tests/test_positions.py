"""Blocks that make as many positions as each other in one batch, and not in another: pruned, pooled, padded to chunks.

The oracles are the stock Trainer, where there are as many sweeps as points; the run that was not interrupted; and maps
that stand alone. Batches are of 4 samples, and the samples of a batch of one length.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, fitted, train, weights
from problems import Problem
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LEDConfig, LEDForConditionalGeneration, Trainer

from grape_hf import GrapeArgumentsMixin, GrapeTrainer
from grape_hf.core.block_jacobian import block_jacobian_terms
from grape_hf.core.block_maps import BlockMaps, chained
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.broadcast import Refinement
from grape_hf.core.jacobian import Noise
from grape_hf.engine.ranks import Ranks
from grape_hf.engine.run import GrapeRun
from grape_hf.engine.state import FEEDBACK_NAME

WIDTH = 8
SAID = "positions of a sample in this batch"
PLACE = {"pruned": 0, "chunks": 0, "pooled": 1, "maps": 1}  # of the map; h_2 is what the third block reads


class Block(nn.Module):
    """A residual block, which may first halve the positions of long samples, or all sides of large maps."""

    def __init__(self, pools: str = "", width: int = WIDTH) -> None:
        super().__init__()
        self.layer, self.pools = nn.Linear(WIDTH, width), pools
        self.narrow = nn.Linear(WIDTH, width, bias=False) if width < WIDTH else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        if self.pools == "tokens" and h.shape[1] > 4:
            h = F.avg_pool1d(h.mT, 2, ceil_mode=True).mT
        if self.pools == "maps" and h.shape[2] > 4:
            h = F.avg_pool2d(h, 2, ceil_mode=True)
        x = h.movedim(1, -1) if self.pools.startswith("maps") else h
        change = torch.tanh(self.layer(x))
        return self.narrow(h) + (change.movedim(-1, 1) if self.pools.startswith("maps") else change)


class Network(nn.Module):
    """Five blocks and a head on the mean over positions; more than 4 positions are fewer behind the second block.

    ``pruned`` and ``chunks`` (of 4, stripped) take them away between blocks, ``pooled`` and ``maps`` inside the third.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        pools = {"pooled": ["", "", "tokens", "", ""], "maps": ["maps only", "maps only", "maps"] + ["maps only"] * 2}
        last = 6 if kind == "narrow" else WIDTH
        of_blocks = zip(pools.get(kind, [""] * 5), [WIDTH] * 4 + [last], strict=True)
        self.stem, self.blocks = nn.Linear(3, WIDTH), nn.ModuleList(Block(*each) for each in of_blocks)
        self.classifier = nn.Linear(last, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h, length = self.stem(x), x.shape[1]
        if self.kind == "maps":
            h = h.movedim(-1, 1)
        if self.kind == "chunks":
            h = F.pad(h, (0, 0, 0, -length % 4))
        for index, block in enumerate(self.blocks):
            if index == 2 and self.kind in ("pruned", "narrow"):
                h = h[:, :4]
            if index == 2 and self.kind == "chunks":
                h = h[:, :length]
            h = block(h)
        logits = self.classifier(h.flatten(2).mean(2) if self.kind == "maps" else h.square().mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def problem(kind: str, lengths: list[int]) -> Problem:
    """Batches of these lengths."""
    count = iter(range(10**6))

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        number = next(count)
        length = lengths[number // 4 % len(lengths)]
        sides = (length, length) if kind == "maps" else (length,)
        return {"x": torch.randn(*sides, 3, generator=generator), "labels": torch.tensor(number % 3)}

    return Problem(kind, lambda: Network(kind), draw)


SEQUENTIAL = {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1, "blocks": "blocks"}
RUN = SEQUENTIAL | {"max_steps": 4, "samples": 16}
MAPS = {"feedback_rule": "local", "feedback_lr": 0.5, "feedback_sharing": "position", "feedback_space": "hidden"}


@pytest.mark.parametrize("path", ["matrix", "shortcut"])
@pytest.mark.parametrize("lengths", [[4, 7, 6, 4], [7, 4, 6, 4]], ids=["alike-first", "unlike-first"])
@pytest.mark.parametrize("kind", ["pruned", "chunks", "pooled", "maps"])
def test_as_many_sweeps_as_points_are_backpropagation(kind, lengths, path, tmp_path, caplog):
    options = RUN | MAPS | {"feedback_path": path}
    stock = train(problem(kind, lengths), tmp_path, Trainer, dtype=torch.float64, **RUN)
    swept = train(problem(kind, lengths), tmp_path, dtype=torch.float64, feedback_sweeps=4, **options)
    found = {name: p for name, p in weights(swept).items() if not name.startswith("B_")}
    assert_same(found, weights(stock), rtol=1e-9, atol=1e-11)
    assert caplog.text.count(SAID) == (1 if lengths[0] == 4 else 0)
    if lengths[0] == 4:
        assert f"blocks {PLACE[kind] + 1} and {PLACE[kind] + 2} make" in caplog.text


@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("kind", ["pruned", "chunks", "pooled", "maps"])
def test_the_map_between_learns_nothing_from_such_a_batch_and_the_others_do(kind, sweeps, tmp_path, caplog):
    def maps(steps: int) -> list[Tensor]:
        options = RUN | MAPS | {"max_steps": steps, "feedback_sweeps": sweeps}
        return train(problem(kind, [4, 7]), tmp_path, **options)._run.maps.G

    first, second = maps(1), maps(2)
    assert caplog.text.count(SAID) == 1
    assert not torch.equal(first[PLACE[kind]], torch.eye(WIDTH))
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [i == PLACE[kind] for i in range(4)]


def test_of_long_samples_equally_many_positions_may_be_looked_at(tmp_path, caplog):
    """One position in four: 17 of 67, and of 68."""
    train(problem("chunks", [68, 67]), tmp_path, **RUN | MAPS | {"max_steps": 2})
    assert caplog.text.count(SAID) == 1


@pytest.mark.parametrize("path", [False, True])
def test_in_a_sweep_and_on_a_path_the_map_between_is_as_if_it_were_not_there(path):
    model, x = Network("pruned").double(), torch.randn(2, 7, 3, dtype=torch.float64)
    labels, boundaries = torch.tensor([0, 2]), Boundaries(model.blocks, readers=[[block] for block in model.blocks[1:]])
    G = [torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)]
    B = chained(G).product()
    alone = BlockMaps(G, [None, 2, 3, None])

    def gradients(maps: BlockMaps, B: list[Tensor]) -> list[Tensor]:
        with boundaries.attached(), boundaries.broadcast(B, refinement=Refinement(maps, sweeps=1, path=path)):
            return list(torch.autograd.grad(model(x, labels)["loss"], list(model.parameters())))

    # On a path a map that takes e adds B_l e: nothing here.
    expected = gradients(alone, [torch.zeros_like(B[0]), *B[1:]] if path else B)
    for got, of_alone in zip(gradients(chained(G), B), expected, strict=True):
        torch.testing.assert_close(got, of_alone, rtol=0, atol=0)


@pytest.mark.parametrize("residual", [True, False])
def test_no_estimate_is_made_of_a_block_that_takes_positions_away(residual):
    """All others have theirs, which are the same without maps that could predict anything."""
    model, x = Network("pruned").double(), torch.randn(2, 7, 3, dtype=torch.float64)
    boundaries = Boundaries(model.blocks)
    maps = chained(torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4))
    with boundaries.attached():
        found = block_jacobian_terms(
            boundaries, lambda: model(x, torch.tensor([0, 2])), Noise(0, 0, range(2)), maps, residual=residual
        )
    assert [int(n) for n in found.counts] == [14, 0, 8, 8]
    assert [bool(t.any()) for t in found.sums] == [True, False, True, True]


LED = LEDConfig(
    d_model=16,
    encoder_layers=3,
    decoder_layers=3,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    vocab_size=32,
    max_encoder_position_embeddings=32,
    max_decoder_position_embeddings=32,
    attention_window=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    dropout=0.0,
    attention_dropout=0.0,
)


def led(lengths: list[int]) -> Problem:
    """Its encoder pads to a multiple of 4, and its decoder reads what it makes without that."""
    count = iter(range(10**6))

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        tokens = torch.randint(3, 32, (lengths[next(count) // 4 % len(lengths)],), generator=generator)
        labels = torch.randint(3, 32, (5,), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    return Problem("led", lambda: LEDForConditionalGeneration(LED), draw)


@pytest.mark.parametrize("lengths", [[8, 7, 7, 8], [7, 8, 7, 8]], ids=["alike-first", "unlike-first"])
def test_an_encoder_that_pads_to_its_window(lengths, tmp_path, caplog):
    """In float32: its masks overflow in float64."""
    options = RUN | {"blocks": None}
    stock = train(led(lengths), tmp_path, Trainer, **options)
    swept = train(led(lengths), tmp_path, feedback_sweeps=9, **options)
    found = {name: p for name, p in weights(swept).items() if not name.startswith("B_")}
    assert_same(found, weights(stock), rtol=1e-4, atol=1e-6)
    assert caplog.text.count(SAID) == (1 if lengths[0] == 8 else 0)


@dataclass
class Case:
    """Lengths of batches, and where maps come from in a run on them."""

    kind: str
    lengths: list[int]
    sources: list[int | None]


CASES = {
    "led-alike-first": Case("led", [8, 8, 7, 7], [1, 2, None, 4, None]),
    "led-unlike-first": Case("led", [7, 7, 8, 8], [1, None, None, 4, None]),
    "pruned-alike-first": Case("pruned", [4, 4, 7, 7], [1, 2, 3, None]),
    # Maps that take e are of another shape there.
    "narrow-alike-first": Case("narrow", [4, 4, 7, 7], [1, 2, 3, None]),
    "narrow-unlike-first": Case("narrow", [7, 7, 4, 4], [None, 2, 3, None]),
}


def interrupted(case: Case, folder: Path, resume: str | None = None) -> GrapeTrainer:
    given = led(case.lengths) if case.kind == "led" else problem(case.kind, case.lengths)
    saving = RUN | {"save_strategy": "steps", "save_steps": 2, "blocks": None if case.kind == "led" else "blocks"}
    rules = {} if case.kind == "led" else MAPS | {"feedback_init": "gaussian"}
    return train(given, folder, resume=resume, **saving | rules)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_whose_first_batch_is_another(name, tmp_path):
    case = CASES[name]
    straight = interrupted(case, tmp_path)
    resumed = interrupted(case, tmp_path, str(tmp_path / "checkpoint-2"))
    assert straight._run.maps.sources == resumed._run.maps.sources == case.sources
    assert_same(weights(resumed), weights(straight))
    for a, b in zip(resumed._run.maps.G, straight._run.maps.G, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_file_that_does_not_tell_is_read_as_before(tmp_path):
    """Maps come from where the first batch of the resumed run says."""
    interrupted(CASES["led-unlike-first"], tmp_path)
    path = tmp_path / "checkpoint-2" / FEEDBACK_NAME
    with safe_open(path, "pt") as file:
        told = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    assert json.loads(told["sources"]) == [1, None, None, 4, None]
    told["nothing"] = told.pop("sources")  # as long as it was
    save_file(tensors, path, metadata=told)
    resumed = interrupted(CASES["led-unlike-first"], tmp_path, str(tmp_path / "checkpoint-2"))
    assert resumed._run.maps.sources == [1, 2, None, 4, None]


def test_ranks_take_their_maps_from_where_the_first_rank_does():
    """Each rank looks at a batch of its own, and their maps learn from sums over ranks."""

    class Second(Ranks):
        """The second of two ranks; the first has had a batch without padding."""

        def first(self, tensors: Any) -> list[Tensor]:
            return [torch.full_like(t, 4) if t.dtype == torch.int64 and t.shape == (4,) else t for t in tensors]

    model = Network("pruned")
    run = GrapeRun(model, GrapeArgumentsMixin(blocks="blocks", **MAPS), ranks=Second(count=2))
    run._agreed = bool
    run.first_error.as_first_rank = lambda read_at, device: read_at
    run.start(lambda: model(torch.randn(2, 7, 3), torch.tensor([0, 2])))
    run.close()
    assert run.maps.sources == [1, 2, 3, None]


class Mixer(nn.Module):
    """A block that mixes positions, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.layer(self.norm(h) + h.mean(1, keepdim=True)))


class Masked(nn.Module):
    """A masked autoencoder: the encoder sees two of six positions, and the loss reads the others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.lower, self.upper = (nn.ModuleList(Mixer() for _ in range(2)) for _ in range(2))
        self.mask, self.places = (nn.Parameter(torch.randn(n, WIDTH)) for n in (1, 6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.embed(x[:, ::3])
        for block in self.lower:
            h = block(h)
        h = torch.stack([self.norm(h), *[self.mask.expand_as(h)] * 2], dim=2).flatten(1, 2) + self.places
        for block in self.upper:
            h = block(h)
        apart = (self.head(h) - x).square().unflatten(1, (2, 3))
        return {"loss": apart[:, :, 1:].mean()}


@pytest.mark.parametrize("options", [{}, {"method": "dfa"}, {"feedback_rule": "lms"}, {"feedback_sweeps": 3}], ids=str)
def test_errors_at_positions_that_are_not_made_of_a_block_reach_it(options, tmp_path):
    """In hidden space the errors stay at the masked positions, where mask tokens are read: all get the mean besides."""
    rows = [{"x": x} for x in torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0))]
    usual = dict(label_names=[], weight_decay=0.0)
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in Masked().named_parameters()}
    stock = fitted(Masked, rows, tmp_path, Trainer, **usual)
    ours = fitted(Masked, rows, tmp_path, blocks="lower,upper", **(usual | options))
    for name in ("lower.0.layer.weight", "lower.1.layer.weight", "norm.weight"):
        moved, expected = ours[name] - before[name], stock[name] - before[name]
        assert 0.1 * expected.norm() < moved.norm() < 10 * expected.norm(), name
    if "feedback_sweeps" in options:
        assert_same(ours, stock, rtol=1e-5, atol=1e-6)
