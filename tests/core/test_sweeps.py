"""Sweeps over the deltas: L - 1 of them are backpropagation, one is the formula in plain loops."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from problems import GPT2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel, T5Config

from grape_hf.core.block_maps import BlockMaps
from grape_hf.core.blocks import find_blocks
from grape_hf.core.boundaries import Boundaries
from grape_hf.core.broadcast import Refinement
from grape_hf.engine.probe import probe

WIDTH = 16
DOUBLE = {"dtype": torch.float64}


def learned_maps(number: int) -> BlockMaps:
    G = [torch.eye(WIDTH, **DOUBLE) + 0.1 * torch.randn(WIDTH, WIDTH, **DOUBLE) for _ in range(number)]
    return BlockMaps(G, [*range(1, number), None])


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_star(
    model: nn.Module, loss: Callable[[], Tensor], maps: BlockMaps | None, sweeps: int, by_readers: bool = False
) -> dict[str, Tensor]:
    blocks = list(find_blocks(model).values())
    boundaries = Boundaries(blocks, readers=[[block] for block in blocks[1:]] if by_readers else None)
    if by_readers:
        probe(model, boundaries, loss)  # as a run does
    B = ["identity"] * len(boundaries) if maps is None else maps.product()
    with boundaries.attached(), boundaries.broadcast(B, refinement=Refinement(maps, sweeps=sweeps)):
        return gradients(model, loss)


@pytest.mark.parametrize("coarse", ["identity", "maps"])
def test_as_many_sweeps_as_boundaries_are_backpropagation(coarse):
    model = GPT2.model(torch.float64)
    x = torch.randint(31, (3, 8))

    def loss() -> Tensor:
        return model(x, labels=x).loss

    expected = gradients(model, loss)
    maps = learned_maps(2) if coarse == "maps" else None
    got, more = in_star(model, loss, maps, 2), in_star(model, loss, maps, 5)
    too_few = in_star(model, loss, maps, 1)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-15)
        assert torch.equal(more[name], got[name])
    assert any(not torch.allclose(too_few[name], gradient, rtol=1e-6) for name, gradient in expected.items())


def test_sweeps_where_any_block_may_be_the_last():
    """A run cuts h_l where the next block reads it, and puts a node for y behind every block."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=6, n_head=2, bos_token_id=0, eos_token_id=0)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    model = GPT2LMHeadModel(config).double()
    x = torch.randint(31, (3, 8))

    def loss() -> Tensor:
        return model(x, labels=x).loss

    expected = gradients(model, loss)
    got = in_star(model, loss, None, 5, by_readers=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-13)
    # Each sweep brings every block nearer.
    weights = [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(6)]
    errors = [
        [float((found[name] - expected[name]).norm()) for name in weights]
        for found in (in_star(model, loss, None, sweeps, by_readers=True) for sweeps in range(4))
    ]
    for before, after in pairwise(errors):
        assert all(a <= b for a, b in zip(after, before, strict=True))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_sweep_is_the_formula_in_plain_loops(sweeps, path):
    """Five blocks; the deltas are read off the star by a hook at each block's output."""
    torch.manual_seed(1)
    blocks = [Residual() for _ in range(5)]
    model, maps = nn.Sequential(*blocks), learned_maps(4)
    x, weight = torch.randn(2, 3, WIDTH, **DOUBLE), torch.randn(2, 3, WIDTH, **DOUBLE)
    seen: dict[int, Tensor] = {}
    boundaries = Boundaries(blocks)

    def note(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.register_hook(lambda g: seen.update({index: g}))

        return hook

    handles = [block.register_forward_hook(note(i), prepend=True) for i, block in enumerate(blocks)]
    refinement = Refinement(maps, sweeps=sweeps, path=path)
    with boundaries.attached(), boundaries.broadcast(maps.product(), refinement=refinement):
        (model(x) * weight).sum().backward()
    for handle in handles:
        handle.remove()

    h = [x]
    for block in blocks:
        h.append(block(h[-1]).detach())

    def F(i: int, delta: Tensor) -> Tensor:  # transposed Jacobian of block i (from 0)
        at = h[i].clone().requires_grad_()
        return torch.autograd.grad(blocks[i](at), at, delta)[0]

    C = [g + torch.eye(WIDTH, **DOUBLE) if path else g for g in maps.G]  # the path of these blocks is the identity
    D = [weight]  # of h_1 .. h_5, e last
    for c in reversed(C):
        D.insert(0, D[0] @ c.mT)
    for number in range(sweeps):
        corrected = [*D[:-1], weight]
        for i in reversed(range(4)):
            corrected[i] = F(i + 1, D[i + 1]) + (corrected[i + 1] - D[i + 1]) @ C[i].mT
        exact = 3 - number  # of the four deltas below e the first sweep makes the highest exact, the second the next
        D = [
            new if path or i >= exact else (old + new) / 2
            for i, (old, new) in enumerate(zip(D, corrected, strict=True))
        ]
    assert len(seen) == 5
    for i, delta in enumerate(D):
        torch.testing.assert_close(seen[i], delta)


def test_maps_learn_from_the_deltas_that_they_made():
    """Not from the corrected ones, of which delta_l is not G_{l+1} delta_{l+1} any more."""
    model, maps = GPT2.model(torch.float64), learned_maps(2)
    x = torch.randint(31, (3, 8))
    boundaries = Boundaries(list(find_blocks(model).values()))
    refinement = Refinement(maps, learn=True, sweeps=2)
    with boundaries.attached():
        with boundaries.broadcast(maps.product(), refinement=refinement):
            model(x, labels=x).loss.backward()
        with boundaries.record() as forwards:
            model(x, labels=x).loss.backward()
    (forward,) = forwards
    e, block = forward.e, list(find_blocks(model).values())[1]
    h = forward.h[0].detach().requires_grad_()
    (pulled,) = torch.autograd.grad(block(h), h, e @ maps.G[1].mT)
    maps.gather()
    for i, d, v in ((0, e @ maps.G[1].mT, pulled), (1, e, forward.delta[1])):
        d, v = d.flatten(0, 1), v.flatten(0, 1)
        torch.testing.assert_close(maps.sums[i].residual, (v - d @ maps.G[i].mT).mT @ d)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=31, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    return AutoModelForSeq2SeqLM.from_config(config).double()


def test_an_encoder_under_a_decoder_is_swept_too():
    model = t5()
    x, labels = torch.randint(1, 31, (3, 8)), torch.randint(1, 31, (3, 5))

    def loss() -> Tensor:
        return model(input_ids=x, labels=labels).loss

    expected = gradients(model, loss)
    blocks = list(find_blocks(model).values())
    encoder, decoder = blocks[:2], blocks[2:]
    readers = [[encoder[1]], decoder, [decoder[1]]]
    boundaries = Boundaries(blocks, pooled={0, 1}, readers=readers)
    probe(model, boundaries, loss)  # notes where a decoder's block finds what the encoder made
    B = [torch.zeros(WIDTH, WIDTH, **DOUBLE)] * 3
    with boundaries.attached(), boundaries.broadcast(B, refinement=Refinement(sweeps=3)):
        got = gradients(model, loss)
    block = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    torch.testing.assert_close(got[block], expected[block], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_no_shortcut_leads_from_a_decoder_to_its_encoder(sweeps):
    """Also where source and target are as long: a source trains as the same with a padded position."""
    model = t5()
    x, labels = torch.randint(1, 31, (3, 5)), torch.randint(1, 31, (3, 5))
    mask = torch.ones(3, 5).long()
    blocks = list(find_blocks(model).values())
    encoder, decoder = blocks[:2], blocks[2:]
    found = []
    for pads in (0, 1):
        source, there = F.pad(x, (0, pads)), F.pad(mask, (0, pads))
        boundaries = Boundaries(blocks, pooled={0, 1}, readers=[[encoder[1]], decoder, [decoder[1]]])

        def loss(source: Tensor = source, there: Tensor = there) -> Tensor:
            return model(input_ids=source, attention_mask=there, labels=labels).loss

        probe(model, boundaries, loss)
        B = [torch.zeros(WIDTH, WIDTH, **DOUBLE)] * 3
        with boundaries.attached(), boundaries.broadcast(B, refinement=Refinement(sweeps=sweeps)):
            found.append(gradients(model, loss))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-14, msg=name)


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(4)]
    x = torch.randn(2, 3, WIDTH, **DOUBLE)
    boundaries, found = Boundaries(blocks), []
    for checkpointed in (False, True):
        model = nn.ModuleList(blocks)
        with boundaries.attached(), boundaries.broadcast(["identity"] * 3, refinement=Refinement(sweeps=2)):

            def loss(checkpointed: bool = checkpointed) -> Tensor:
                h = x
                for block in blocks:
                    h = checkpoint(block, h, use_reentrant=False) if checkpointed else block(h)
                return h.square().sum()

            found.append(gradients(model, loss))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient)


class Around(nn.Module):
    """Five blocks, of which the last reads what the first and the third have made, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = [x]
        for block in self.blocks[:4]:
            h.append(block(h[-1]))
        return self.blocks[4](h[4] + h[1].roll(1, 1) * h[3])


@pytest.mark.parametrize("learned", [False, True])
def test_a_path_to_the_last_block_is_in_every_sweep(learned):
    torch.manual_seed(3)
    model = Around()
    x, weight = torch.randn(2, 3, WIDTH, **DOUBLE), torch.randn(2, 3, WIDTH, **DOUBLE)

    def loss() -> Tensor:
        return (model(x) * weight).sum()

    expected, maps = gradients(model, loss), learned_maps(4) if learned else None
    for name, gradient in in_star(model, loss, maps, 4, by_readers=True).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("path", [False, True])
def test_a_second_backward_of_one_forward_is_swept_too(path):
    """Losses are weighed by the norms of their gradients (GradNorm), or their gradients are projected (PCGrad)."""
    torch.manual_seed(2)
    blocks = [Residual() for _ in range(4)]
    model, weights = nn.Sequential(*blocks), [p for block in blocks for p in block.parameters()]
    x = torch.randn(2, 3, WIDTH, **DOUBLE)

    def both() -> list[list[Tensor]]:
        y = model(x)
        return [
            list(torch.autograd.grad(loss, weights, retain_graph=True)) for loss in (y.square().sum(), y.exp().mean())
        ]

    expected, boundaries = both(), Boundaries(blocks)
    B: list = ["identity"] * 3
    with boundaries.attached(), boundaries.broadcast(B, refinement=Refinement(sweeps=3, path=path)):
        found = both()
    with boundaries.attached(), boundaries.broadcast(B):
        unswept = both()
    for of_loss, exact, direct in zip(found, expected, unswept, strict=True):
        torch.testing.assert_close(of_loss, exact, rtol=1e-9, atol=1e-13)
        assert not torch.allclose(direct[0], exact[0], rtol=1e-3)


@pytest.mark.parametrize("refinement", [Refinement(sweeps=1), Refinement(path=True)])
def test_a_backward_after_the_step_is_refused(refinement):
    blocks = [Residual() for _ in range(3)]
    boundaries = Boundaries(blocks)
    with boundaries.attached(), boundaries.broadcast(["identity"] * 2, refinement=refinement):
        y = nn.Sequential(*blocks)(torch.randn(2, 3, WIDTH, **DOUBLE))
    with pytest.raises(RuntimeError, match="after the end of the step"):
        y.sum().backward()
