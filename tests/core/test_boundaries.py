"""The star. First half: gradients against oracles. Second half: hooks leave no trace, misuse is refused."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.modes import OutputReached


class Stack(nn.Module):
    """Stem, blocks, head; the blocks return tuples or lists if asked to."""

    def __init__(self, n_blocks: int, width: int = 5, linear: bool = True, kind: type | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks))
        self.head = nn.Linear(width, width)
        self.linear, self.kind = linear, kind
        if kind is not None:
            for block in self.blocks:
                block.register_forward_hook(lambda module, args, output: kind((output, "attention weights")))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h if self.linear else torch.tanh(h))
            if self.kind is not None:
                assert type(h) is self.kind
                h = h[0]
        return self.head(h)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected, "nothing to compare"
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", [None, tuple, list])
@pytest.mark.parametrize("n_blocks", [1, 2, 4])
def test_exact_feedback_is_backpropagation(n_blocks, kind):
    model = Stack(n_blocks, kind=kind).double()
    x, target = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    expected = gradients(model, F.mse_loss(model(x), target))
    exact, jacobian = [], torch.eye(5, dtype=torch.float64)
    for block in reversed(model.blocks[1:]):
        jacobian = jacobian @ block.weight.detach()
        exact.insert(0, jacobian.mT)  # B_l = J_l^T; h_L is y
    boundaries = Boundaries(model.blocks)
    with boundaries.attached(), boundaries.broadcast(exact):
        got = gradients(model, F.mse_loss(model(x), target))
    assert_same(got, expected)


def test_exact_feedback_in_logits_space_is_backpropagation():
    model = Stack(3).double()
    x, target = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    expected = gradients(model, F.mse_loss(model(x), target))
    w2, w3, w_head = (m.weight.detach() for m in (*model.blocks[1:], model.head))
    boundaries = Boundaries(model.blocks, output=model.head)
    with boundaries.attached(), boundaries.broadcast([(w_head @ w3 @ w2).mT, (w_head @ w3).mT]):
        got = gradients(model, F.mse_loss(model(x), target))
    assert_same(got, expected)


def test_zero_feedback_trains_the_last_block_and_the_head_only():
    model = Stack(3, linear=False).double()
    x, target = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    expected = gradients(model, F.mse_loss(model(x), target))
    boundaries = Boundaries(model.blocks)
    zeros = [torch.zeros(5, 5, dtype=torch.float64)] * 2
    with boundaries.attached(), boundaries.broadcast(zeros):
        got = gradients(model, F.mse_loss(model(x), target))
    exact = ("blocks.2", "head")
    assert_same(got, {name: g if name.startswith(exact) else torch.zeros_like(g) for name, g in expected.items()})


def test_each_boundary_gets_b_times_e():
    """By hand: delta_l = B_l e is the gradient of <stop(B_l e), h_l>, block by block, for any B."""
    model = Stack(4, linear=False).double()
    x, target = torch.randn(2, 2, 7, 5, dtype=torch.float64)
    B = torch.randn(3, 5, 5, dtype=torch.float64)
    boundaries = Boundaries(model.blocks)
    with boundaries.attached(), boundaries.broadcast(list(B)):
        got = gradients(model, F.mse_loss(model(x), target))

    h, inputs, outputs = model.stem(x), [], []
    for block in model.blocks:
        inputs.append(h)
        h = block(torch.tanh(h))
        outputs.append(h)
        h = h.detach().requires_grad_()
    loss = F.mse_loss(model.head(h), target)
    (e,) = torch.autograd.grad(loss, h, retain_graph=True)
    locally = sum((o * (e @ b.mT)).sum() for o, b in zip(outputs[:-1], B, strict=True)) + (outputs[-1] * e).sum()
    assert_same(got, gradients(model, locally + loss))


class Shift(nn.Module):
    """h + p: the gradient of p is delta_l itself, in float32 as a Transformer's residual stream under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(2, 7, 5))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.p


def test_under_autocast_b_times_e_is_rounded_and_e_itself_is_not():
    blocks, (x, target), B = nn.ModuleList(Shift() for _ in range(3)), torch.randn(2, 2, 7, 5), torch.randn(5, 5)
    boundaries = Boundaries(blocks)
    with boundaries.attached(), boundaries.broadcast([B, "identity"]):
        with torch.autocast("cpu", torch.bfloat16):
            y = nn.Sequential(*blocks)(x)
        F.mse_loss(y, target, reduction="sum").backward()
    e = 2 * (y.detach() - target)
    assert torch.equal(blocks[2].p.grad, e)
    assert torch.equal(blocks[1].p.grad, e)
    assert torch.equal(blocks[0].p.grad, (e.bfloat16() @ B.mT.bfloat16()).float())


def test_under_autocast_a_second_backward_has_an_error_of_its_own():
    blocks, x, B = nn.ModuleList(Shift() for _ in range(2)), torch.randn(2, 7, 5), torch.randn(5, 5)
    boundaries = Boundaries(blocks)
    with boundaries.attached(), boundaries.broadcast([B]):
        with torch.autocast("cpu", torch.bfloat16):
            y = nn.Sequential(*blocks)(x)
        (first,) = torch.autograd.grad(y.sum(), blocks[0].p, retain_graph=True)
        (second,) = torch.autograd.grad(-2 * y.sum(), blocks[0].p)
    assert torch.equal(second, -2 * first)


def test_identities_need_no_product():
    model, x, seen = Stack(3).double(), torch.randn(2, 7, 5, dtype=torch.float64), []
    for B in ([torch.eye(5, dtype=torch.float64)] * 2, ["identity"] * 2):
        boundaries = Boundaries(model.blocks)
        with boundaries.attached(), boundaries.broadcast(B):
            seen.append(gradients(model, model(x).square().sum()))
    assert all(torch.equal(gradient, seen[1][name]) for name, gradient in seen[0].items())


def test_an_error_per_sample_goes_to_every_unpadded_position():
    """A classifier on the mean token: h (batch, 6, 5), y (batch, 5); with J_l known the same B_l e serves all."""

    class Classifier(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
            return self.head((h * mask[..., None]).sum(1))

    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    model = Classifier(3).double()
    x, target = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    expected = gradients(model, F.mse_loss(model(x), target))
    w2, w3, w_head = (m.weight.detach() for m in (*model.blocks[1:], model.head))
    boundaries = Boundaries(model.blocks, output=model.head)
    with boundaries.attached(), boundaries.broadcast([(w_head @ w3 @ w2).mT, (w_head @ w3).mT], mask):
        got = gradients(model, F.mse_loss(model(x), target))
    assert_same(got, expected)


def test_maps_are_flattened():
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)), nn.Flatten(), nn.Linear(32, 3)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    target = torch.randn(2, 3, dtype=torch.float64)
    expected = gradients(model, F.mse_loss(model(x), target))
    exact = []
    for first in (1, 2):  # the network is affine, its Jacobian the same everywhere
        rest = model[first:]
        jacobian = torch.func.jacrev(lambda h, rest=rest: rest(h.view(1, 2, 4, 4)))(torch.zeros(32, dtype=x.dtype))
        exact.append(jacobian[0].mT)  # (C*H*W, n_y)
    boundaries = Boundaries(model[:3], output=model[-1])
    with boundaries.attached(), boundaries.broadcast(exact):
        got = gradients(model, F.mse_loss(model(x), target))
    assert_same(got, expected)


def test_several_forwards_for_one_loss_are_a_star_each():
    model = Stack(3, linear=False).double()
    a, b = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    B = list(torch.randn(2, 5, 5, dtype=torch.float64))
    boundaries = Boundaries(model.blocks)

    def star(x: Tensor, y_grad: Tensor) -> dict[str, Tensor]:
        with boundaries.attached(), boundaries.broadcast(B):
            return gradients(model, (model(x) * y_grad).sum())

    with torch.no_grad():
        ya, yb = model(a), model(b)
    # The loss <y(a), y(b)> has gradient y(b) at y(a) and the other way round.
    expected = {name: star(a, yb)[name] + star(b, ya)[name] for name in dict(model.named_parameters())}
    with boundaries.attached(), boundaries.broadcast(B):
        got = gradients(model, (model(a) * model(b)).sum())
    assert_same(got, expected)


def test_a_forward_without_gradients_is_left_alone():
    model = Stack(3)
    boundaries = Boundaries(model.blocks)
    x = torch.randn(2, 7, 5)
    with boundaries.attached(), boundaries.broadcast([torch.eye(5)] * 2):
        with torch.no_grad():
            torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
        got = gradients(model, model(x).square().sum())
    with boundaries.attached(), boundaries.broadcast([torch.eye(5)] * 2):
        assert_same(got, gradients(model, model(x).square().sum()))


@pytest.mark.parametrize("frozen", ["stem blocks.0", "stem blocks.0 blocks.1", "blocks.2 head", "stem blocks.1 head"])
def test_frozen_parts_change_no_other_gradient(frozen):
    model = Stack(3, linear=False)
    boundaries = Boundaries(model.blocks)
    B = list(torch.randn(2, 5, 5))
    x = torch.randn(2, 7, 5)
    with boundaries.attached(), boundaries.broadcast(B):
        model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(not name.startswith(tuple(frozen.split())))
    with boundaries.attached(), boundaries.broadcast(B):
        model(x).square().sum().backward()
    assert_same(
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
        {name: expected[name] for name, p in model.named_parameters() if p.requires_grad},
    )


def test_an_in_place_operation_may_follow_a_boundary_and_the_output():
    class InPlace(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
                h += 1
            return self.head(h)

    model = InPlace(3).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = gradients(model, model(x).square().sum())
    w2, w3 = (block.weight.detach() for block in model.blocks[1:])
    boundaries = Boundaries(model.blocks)
    with boundaries.attached(), boundaries.broadcast([(w3 @ w2).mT, w3.mT]):
        assert_same(gradients(model, model(x).square().sum()), expected)


def test_one_delta_at_a_time_is_in_memory():
    """Each delta_l is made when block l's turn comes: when block l-1 receives its own, the one before is gone."""
    model = Stack(6)
    boundaries = Boundaries(model.blocks)
    alive: list[weakref.ref] = []
    most = 0

    def watch(grad: Tensor) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(grad))

    for block in model.blocks[:-1]:
        block.register_forward_hook(lambda module, args, output: output.register_hook(watch) and None)
    with boundaries.attached(), boundaries.broadcast([torch.eye(5)] * 5):
        model(torch.randn(2, 7, 5)).square().sum().backward()
    assert len(alive) == 5
    assert most <= 1


# --- no trace, and what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["broadcast", "record", "perturb"])
@pytest.mark.parametrize("fails", [False, True])
def test_unhooked_model_is_as_before(mode, fails):
    model = Stack(3)
    x = torch.randn(2, 7, 5)
    keys, output = list(model.state_dict()), model(x)
    boundaries = Boundaries(model.blocks)
    modes = {
        "broadcast": lambda: boundaries.broadcast([torch.eye(5)] * 2),
        "record": boundaries.record,
        "perturb": lambda: boundaries.perturb(lambda index, h, *rest: h + 1),
    }

    class OwnError(Exception):
        pass

    def fail(*args: object) -> None:
        raise OwnError

    handle = model.blocks[1].register_forward_hook(fail) if fails else None
    with pytest.raises(OwnError) if fails else nullcontext(), boundaries.attached(), modes[mode]():
        model(x)
    if handle:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), output, rtol=0, atol=0)


def test_hooks_do_nothing_outside_a_mode():
    model = Stack(3)
    x = torch.randn(2, 7, 5)
    expected = gradients(model, model(x).square().sum())
    with Boundaries(model.blocks).attached():
        assert_same(gradients(model, model(x).square().sum()), expected)


def test_no_activation_outlives_the_step():
    model = Stack(3)
    boundaries = Boundaries(model.blocks)
    refs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: refs.append(weakref.ref(output)))
    with boundaries.attached():
        for mode in (lambda: boundaries.broadcast([torch.eye(5)] * 2), boundaries.record):
            with mode():
                loss = model(torch.randn(2, 7, 5)).square().sum()
                loss.backward()
            del loss
        gc.collect()
        assert len(refs) == 6
        assert not [ref for ref in refs if ref() is not None]


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.head(x)


def test_a_chain_that_runs_twice_in_hidden_space_is_refused():
    model = Twice(3)
    boundaries = Boundaries(model.blocks)  # y, the last block's output, is reached in between
    with (
        boundaries.attached(),
        pytest.raises(RuntimeError, match="ran again on what the last block had made"),
        boundaries.broadcast([torch.eye(5)] * 2),
    ):
        model(torch.randn(2, 7, 5))


def test_blocks_that_run_twice_before_the_output_are_refused():
    model = Twice(3)
    boundaries = Boundaries(model.blocks, output=model.head)
    with (
        boundaries.attached(),
        pytest.raises(RuntimeError, match="block 1 .* ran again on what the last block had made"),
        boundaries.broadcast([torch.eye(5)] * 2),
    ):
        model(torch.randn(2, 7, 5))


def test_an_output_that_is_never_reached_is_said_once_and_kills_nothing(caplog):
    """Block 3 and what is behind it have their exact gradient, the others have none."""
    model = Stack(3).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = gradients(model, model(x).square().sum())
    boundaries = Boundaries(model.blocks, output=nn.Linear(5, 5))
    for _ in range(2):
        with boundaries.attached(), boundaries.broadcast([torch.eye(5, dtype=torch.float64)] * 2):
            got = gradients(model, model(x).square().sum())
        exact = ("blocks.2", "head")
        assert_same(got, {name: g if name.startswith(exact) else None for name, g in expected.items()})
    assert [record.message.startswith("GrAPE: the blocks ran") for record in caplog.records] == [True]
    assert 'feedback_space="hidden"' in caplog.text


def test_reentrant_checkpointing_is_refused():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = block(h)
            return self.head(h)

    model = Checkpointed(3)
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda h, inner=inner: checkpoint(inner, h, use_reentrant=True)
    boundaries = Boundaries(model.blocks)
    with (
        boundaries.attached(),
        pytest.raises(RuntimeError, match="use_reentrant"),
        pytest.warns(UserWarning, match="None of the inputs"),
        boundaries.broadcast([torch.eye(5)] * 2),
    ):
        model(torch.randn(2, 7, 5))


def test_hooks_inside_a_reentrant_checkpoint_are_refused_in_the_backward():
    """The forward has no gradients there, so nothing was cut; before transformers 5.23 its models were like that."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = checkpoint(block, h, use_reentrant=True)
            return self.head(h)

    model = Checkpointed(3)
    boundaries = Boundaries(model.blocks)
    with boundaries.attached(), boundaries.broadcast([torch.eye(5)] * 2):
        loss = model(torch.randn(2, 7, 5)).square().sum()
        with pytest.raises(RuntimeError, match="had no graph in the forward.*use_reentrant"):
            loss.backward()


def test_perturb_ends_the_forward_at_the_output():
    model = Stack(3)
    boundaries = Boundaries(model.blocks)
    ran = []
    model.head.register_forward_hook(lambda *args: ran.append(args))
    with boundaries.attached(), boundaries.perturb(lambda index, h, *rest: h) as passed:
        model(torch.randn(2, 7, 5))
    assert passed.y is not None
    assert not ran
    assert issubclass(OutputReached, Exception)


def test_no_block_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        Boundaries([])
