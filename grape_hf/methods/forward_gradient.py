r"""Forward gradients: an unbiased gradient from directional derivatives, with no backward chain.

``perturbation_space="weight"`` is Baydin, Pearlmutter, Syme, Wood & Torr, *Gradients without backpropagation* (2022):

.. math:: g = (\nabla L \cdot v)\, v, \qquad v \sim N(0, I)

over all weights at once, one draw for the whole optimiser step. The directional derivative of the loss comes from dual
numbers in the training forward itself, which builds no graph.

``perturbation_space="activation"`` is the activity-perturbed form of Ren, Kornblith, Liao & Hinton, *Scaling forward
gradient with local losses* (ICLR 2023), with the global loss: activations are perturbed instead, by a draw for each
sample, which has far less noise as it has fewer numbers:

.. math:: \delta_{l,i} = (\nabla L_i \cdot u_i)\, u_{l,i}, \qquad u_{l,i} \sim N(0, I)

for sample i, with all h_l perturbed at once; weights get :math:`(dh_l/dW)^\top \delta_l`. The loss of sample i depends
on the u's through y alone, so its directional derivative is :math:`e_i \cdot q_i`, with q the tangent that arrives at y
and e = dLoss/dy: the star of GrAPE (``boundaries.py``), with :math:`(e_i \cdot q_i)\, u_{l,i}` in place of B_l e. q
comes from a dual pass of its own, right before the forward, with the same dropout masks and batch statistics: in one
pass with a graph, torch's forward mode fails in attention and under autocast.

Departures: the paper perturbs the output of every layer; here, as for the other methods, the blocks' outputs h_1 ..
h_{L-1} are, a block backpropagates within itself, and the last block and head have their exact gradient. The paper's
local losses and architecture are not part of it. Batch norms couple the samples of a batch; the derivatives of other
samples' losses through the batch statistics are left out then, while in weight space they are all there.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.hooks import Hook
from grape_hf.core.isolation import isolated
from grape_hf.core.jacobian import Noise
from grape_hf.core.layout import AUTO
from grape_hf.core.modes import Mode
from grape_hf.core.tangents import ForwardModeError, dual_runner
from grape_hf.engine.points import FeedbackPoints
from grape_hf.engine.step import MicroBatch
from grape_hf.methods.base import seeded
from grape_hf.training_args import GrapeArgumentsMixin


class ForwardGradient:
    """Forward gradients on one model.

    Args:
        model: the model.
        options: GrAPE's options; ``perturbation_space`` chooses the form, ``blocks`` the points of the activation form.
        seed: seed of the draws.

    Raises:
        ValueError: in activation space, if no blocks are found, or a single one.
    """

    def __init__(self, model: nn.Module, options: GrapeArgumentsMixin, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.points: FeedbackPoints | None = None
        self.boundaries: Boundaries | None = None  # seen in the first forward
        if options.perturbation_space == "activation":
            options = copy.copy(options)
            options.feedback_space = "hidden"
            self.points = FeedbackPoints(model, options)
            if len(self.points.blocks) == 1:
                raise ValueError(
                    f'method="forward_gradient" perturbs what lies between blocks, and {type(model).__name__} has one '
                    'block. Name smaller ones with the option `blocks`, or use perturbation_space="weight".'
                )

    @contextmanager
    def step(self, batch: MicroBatch) -> Iterator[None]:
        """Make every backward inside a forward gradient.

        Raises:
            ForwardModeError: if an operator of the model has no forward-mode derivative.
            RuntimeError: in activation space, if the blocks do not run once each, in order, each on the output of the
                one before.
        """
        with _math_attention(), self._in_weights(batch) if self.points is None else self._in_activations(batch):
            yield

    @contextmanager
    def _in_weights(self, batch: MicroBatch) -> Iterator[None]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad(), forward_ad.dual_level(), _TangentBackward(list(trained.values())):
            for name, p in trained.items():
                v = torch.randn(p.shape, generator=seeded(self.seed, batch.step, name)).to(p)
                p.copy_(forward_ad.make_dual(p, v))  # the same values, with a tangent that ends with the dual level
            yield

    @contextmanager
    def _in_activations(self, batch: MicroBatch) -> Iterator[None]:
        noise, star = Noise(self.seed, batch.step, batch.places), _SlopeStar()

        def look_ahead(model: nn.Module, args: tuple, kwargs: dict) -> None:
            if not torch.is_grad_enabled() or star.ahead:  # generation, or this very pass
                return
            star.ahead = True
            try:
                q_of(model, args, kwargs)
            finally:
                star.ahead = False

        def q_of(model: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.boundaries is None:
                assert self.points is not None
                _, self.boundaries, _ = self.points.look(lambda: model(*args, **kwargs))
            boundaries = self.boundaries
            if boundaries._mode is not star:
                star.boundaries = boundaries
                hooks.enter_context(boundaries.attached())
                hooks.enter_context(boundaries._in_mode(star))
            star.u.clear()

            def perturb(index: int, h: Tensor, *_: Any) -> Tensor:
                star.u[index] = AUTO.restore(noise.vectors(index, AUTO.vectors(h)), h.shape)
                return star.u[index]

            with isolated(model, deterministic=False), torch.no_grad():
                star.q = dual_runner(boundaries, lambda: model(*args, **kwargs))(perturb)

        handle = self.model.register_forward_pre_hook(Hook(look_ahead), with_kwargs=True)
        with ExitStack() as hooks:
            hooks.callback(handle.remove)
            yield


@contextmanager
def _math_attention() -> Iterator[None]:
    """Attention with a forward-mode rule (``tangents.py``), and an error that says what to do where there is none."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "forward AD" in str(error) or "jvp" in str(error):
            raise ForwardModeError(
                f'{error} method="forward_gradient" needs forward-mode derivatives of every operator; use another '
                "method for this model."
            ) from error
        raise


class _TangentBackward(TorchFunctionMode):
    """In place of ``loss.backward()`` add (dL . v) v to the ``grad`` of the weights, whose tangents are v.

    What is done to the loss on the way (label smoothing, division by the micro-batches, loss scaling) is linear and so
    done to its tangent too.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.backward:
            return func(*args, **(kwargs or {}))
        slope = forward_ad.unpack_dual(args[0]).tangent
        if slope is None:
            raise ForwardModeError("the tangent got lost between the weights and the loss.")
        for p in self.weights:
            v = forward_ad.unpack_dual(p).tangent
            assert v is not None, "set by ForwardGradient for this dual level"
            g = slope.to(v) * v
            p.grad = g if p.grad is None else p.grad + g
        return None


class _SlopeStar(Mode):
    """Cut the graph at each h_l, and give each block its delta in the backward.

    Attributes:
        u: what was injected at each boundary in the dual pass before the forward under way.
        q: the tangent that it caused at y.
        h: the boundary activations of the forward under way.
        ahead: whether a dual pass is under way.
        boundaries: what has put it on the model.
    """

    def __init__(self) -> None:
        self.u: dict[int, Tensor] = {}
        self.q: Tensor | None = None
        self.h: dict[int, Tensor] = {}
        self.ahead = False
        self.boundaries: Boundaries | None = None

    def at_boundary(self, index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        if not torch.is_grad_enabled():
            return h
        if index != len(self.h) or index not in self.u:
            raise RuntimeError(
                f"block {index + 1} ({type(block).__name__}) ran when block {len(self.h) + 1} was expected: forward "
                "gradients in activation space need blocks that run once each, in order, in each call of the model. "
                'Name others with the option `blocks`, or use perturbation_space="weight".'
            )
        self.h[index] = h
        assert self.boundaries is not None
        return h.detach().clone() if index in self.boundaries.copied else h.detach()

    def at_output(self, y: Tensor, site: int) -> Tensor:
        assert self.boundaries is not None
        if not self.h or not torch.is_grad_enabled() or site < len(self.boundaries):
            return y
        assert self.q is not None
        if any(len(u) != len(y) for u in self.u.values()):
            raise RuntimeError(
                "expected as many samples in the output of every block as in y, found "
                f"{[len(u) for u in self.u.values()]} and {len(y)}. Name blocks that do not fold positions into the "
                "batch, with the option `blocks`."
            )
        reached = [index for index, h in self.h.items() if h.requires_grad]
        y = _Slopes.apply(self.q, [self.u[i] for i in reached], y, *(self.h[i] for i in reached))
        self.h = {}
        return y


class _Slopes(torch.autograd.Function):
    """Identity on y; backward hands e to y's own graph and (e_i . q_i) u_l,i to each h_l."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, u: list[Tensor], y: Tensor, *h: Tensor) -> Tensor:
        ctx.q, ctx.u, ctx.dtypes = q, u, [t.dtype for t in h]
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.promote_types(e.dtype, torch.float32)
        slopes = (e.to(wide) * ctx.q.to(wide)).flatten(1).sum(1)  # one a sample
        deltas = [slopes.view(-1, *[1] * (u.ndim - 1)).to(u.device) * u for u in ctx.u]
        return (None, None, e, *(d.to(dtype) for d, dtype in zip(deltas, ctx.dtypes, strict=True)))
