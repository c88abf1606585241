r"""PEPITA: a second forward with an input moved by the error, in place of a backward.

Dellaferrera & Kreiman, *Error-driven input modulation: solving the credit assignment problem without a backward pass*
(ICML 2022). With h_0 = x, :math:`h_l = \sigma_l(W_l h_{l-1})` in the standard pass and :math:`h^{err}_l` in the
modulated pass, which starts from :math:`h^{err}_0 = x + F e`, the gradients handed to the optimiser are

.. math::
    \Delta W_l = (h_l - h^{err}_l)\, (h^{err}_{l-1})^\top \quad (l < L), \qquad \Delta W_L = e\, (h^{err}_{L-1})^\top,

averaged over the batch. e is the gradient of a sample's own loss at the last layer's output, softmax less target for
cross-entropy, and F, (input size x classes), is fixed: uniform on ±0.05 sqrt(6 / input size). Both passes have the same
dropout masks. A convolution's kernel gets that product at each place it is applied to, averaged over places.
:math:`h_l` is what the activation function behind the layer returns, before any pooling; :math:`h_{l-1}` is the
layer's input, after it. So it is in the authors' code (github.com/GiorgiaD/PEPITA), which however takes the modulated
pass's own error for the last of several linear layers; ours is e throughout. The paper has no biases; ours learn as
weights of an input that is always one.

It is defined for plain chains of linear and convolutional layers, with activations, pooling and dropout between. Others
are refused: norms and embeddings when the method is made, skips and gates at the first forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from grape_hf.core.hooks import Hook
from grape_hf.core.isolation import random_states, same_randomness
from grape_hf.engine.step import MicroBatch
from grape_hf.methods.base import layer_call, seeded
from grape_hf.training_args import GrapeArgumentsMixin

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# By name, as each has several functions: F.relu, torch.relu, Tensor.relu_.
_ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid", "softplus"),
    *("relu_", "leaky_relu_", "elu_", "selu_", "celu_", "tanh_", "sigmoid_", "hardtanh", "hardswish", "hardsigmoid"),
}
_JOINS = {
    *("add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "mul", "__mul__", "__rmul__", "mul_"),
    *("__imul__", "cat", "concat", "stack", "matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"),
}


class Pepita:
    """PEPITA on one model.

    Args:
        model: the model, a chain of layers that are registered in the order in which they run.
        options: GrAPE's options; none of them matters.
        seed: seed of F.

    Raises:
        ValueError: if a module other than a linear or convolutional layer has weights, or is a batch norm.
    """

    def __init__(self, model: nn.Module, options: GrapeArgumentsMixin, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        for name, module in model.named_modules():
            own = any(True for _ in module.parameters(recurse=False))
            if (own and type(module) not in _LAYERS) or isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f'method="pepita" is defined for plain chains of nn.Linear and nn.Conv layers; '
                    f"{name or 'the model'} is a {type(module).__name__}. Use a network without norms, embeddings and "
                    "attention, or another method."
                )
        self.layers = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, _LAYERS)}
        if len(self.layers) < 2:
            raise ValueError(f"expected a chain of at least two layers, found {list(self.layers.values())}.")
        self._F: Tensor | None = None

    @contextmanager
    def step(self, batch: MicroBatch) -> Iterator[None]:
        """Enclose the standard pass and the loss; at the end make the modulated pass and add to ``p.grad``."""
        calls: list[tuple[tuple, dict]] = []
        states: list[Callable[[], None]] = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if torch.is_grad_enabled():
                calls.append((args, kwargs))
                states.append(random_states(self.model))

        handle = self.model.register_forward_pre_hook(Hook(note), with_kwargs=True)
        try:
            with _Pass(self.layers) as standard:
                yield
        finally:
            handle.remove()
        if len(calls) != 1 or standard.y is None or standard.y.grad is None:
            raise RuntimeError(
                f'method="pepita" expects one forward and one backward in a step, saw {len(calls)} forward(s) and '
                f"{'no' if standard.y is None or standard.y.grad is None else 'a'} backward. Does the loss use the "
                "output of the last layer?"
            )
        e = standard.y.grad
        share = 1 / (len(e) * batch.parts)  # of a sample in the loss
        x = standard.records[0].x
        # What the standard pass drew (dropout) is drawn again.
        with same_randomness(self.model), _Pass(self.layers, x + self.modulation(e / share, x)) as modulated:
            states[0]()
            self.model(*calls[0][0], **calls[0][1])
        outputs, errors = [], []
        for first, second in zip(standard.records, modulated.records, strict=True):
            if second.z.requires_grad:
                places = prod(second.z.shape) / (len(e) * second.channels)
                outputs.append(second.z)
                errors.append(e if first.out is standard.y else (first.h - second.h) * (share / places))
        torch.autograd.backward(outputs, errors)  # each reaches its own layer's weights and nothing else

    def modulation(self, e: Tensor, x: Tensor) -> Tensor:
        """Return F e in the shape of x, for e ``(batch, classes)``."""
        if e.ndim != 2:
            raise ValueError(f'method="pepita" needs one error a sample, (batch, classes); got {tuple(e.shape)}.')
        size = prod(x.shape[1:])
        if self._F is None:
            uniform = torch.rand(size, e.shape[1], generator=seeded(self.seed, "F"), dtype=torch.float64)
            self._F = (0.05 * (6 / size) ** 0.5 * (2 * uniform - 1)).to(e)
        return (e @ self._F.mT).reshape(x.shape).to(x)


@dataclass
class _Record:
    x: Tensor  # input of the layer
    z: Tensor  # its output; in a modulated pass with the graph of this one layer
    out: Tensor  # what the model got for it
    h: Tensor  # what the activation function behind it returned
    channels: int


class _Pass(TorchFunctionMode):
    """Note every layer's input and activation in one forward, with no graph between layers.

    Args:
        layers: names by the ``id`` of the weight, in order.
        start: input of the first layer in the modulated pass; None in the standard pass, whose last layer's output
            becomes ``y``, a leaf at which the backward ends and leaves e.
    """

    def __init__(self, layers: dict[int, str], start: Tensor | None = None) -> None:
        super().__init__()
        self.layers, self.names, self.start = layers, list(layers.values()), start
        self.records: list[_Record] = []
        self.y: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        call = layer_call(func, args, kwargs)
        if call is not None and id(call.weight) in self.layers:
            if not torch.is_grad_enabled() and self.start is None:
                return func(*args, **kwargs)
            return self._layer(call.x, call.run, call.weight)
        name = getattr(func, "__name__", "")
        if name in _JOINS and 0 < len(self.records) < len(self.layers):
            self._refuse_join(name, (args, kwargs))
        result = func(*args, **kwargs)
        if self.records and name in _ACTIVATIONS and args and args[0] is self.records[-1].out:
            self.records[-1].h = result
        return result

    def _layer(self, x: Tensor, run: Any, weight: Tensor) -> Tensor:
        place, name = len(self.records), self.layers[id(weight)]
        if self.names[place : place + 1] != [name]:
            raise ValueError(
                f'method="pepita" is defined for plain chains of layers, each run once, in the order {self.names}; '
                f"{name} ran as number {place + 1}. Use another method for this model."
            )
        x = (self.start if self.start is not None and place == 0 else x).detach()
        with torch.set_grad_enabled(self.start is not None):
            z = run(x)
        out = z.detach()
        if self.start is None and place == len(self.names) - 1:
            self.y = out = out.requires_grad_()
        self.records.append(_Record(x, z, out, out, weight.shape[0]))
        return out

    def _refuse_join(self, name: str, operands: Any) -> None:
        maps = [t for t in tree_leaves(operands) if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1]
        if len(maps) > 1:
            raise ValueError(
                f'method="pepita" is defined for plain chains of layers; behind {self.names[len(self.records) - 1]} '
                f"two activations meet in {name}: a skip, a gate or attention. Use another method for this model."
            )
