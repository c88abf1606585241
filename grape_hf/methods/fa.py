r"""Feedback alignment: fixed random matrices in place of W^T, layer by layer.

Lillicrap, Cownden, Tweed & Akerman, *Random synaptic feedback weights support error backpropagation for deep learning*
(Nature Communications 2016). Where backpropagation sends :math:`\delta_{l-1} = W_l^\top \delta_l` back through layer l,
feedback alignment sends

.. math:: \delta_{l-1} = B_l^\top \delta_l, \qquad \Delta W_l \propto \delta_l h_{l-1}^\top,

with B_l of the shape of W_l, drawn once and never changed. The backward stays sequential. What lies between layers
(activations, pooling, norms, attention) is backpropagated as usual, and so are embeddings and the gains of norms. In a
convolution the transposed convolution uses B_l in place of the kernels (Nøkland 2016; biotorch).

Where the paper leaves it open: B_l is drawn by Glorot's uniform rule, which biotorch uses for W_l and B_l alike,
whatever the model's own start is. So it is a function of the seed, the parameter's name and its shape: a resumed run
has the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from grape_hf.engine.step import MicroBatch
from grape_hf.methods.base import LayerCall, layer_call, parameter_names, seeded
from grape_hf.training_args import GrapeArgumentsMixin

_UNSERVED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
# Products by a weight that are no layer calls; met with a parameter they would silently be backpropagation.
_OTHER_PRODUCTS = {
    *("matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "tensordot"),
    *("bilinear", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("_grouped_mm", "grouped_mm", "_scaled_mm"),
}
# What leaves a part of a parameter a part of it: rows of one matrix of many, another shape or type.
_PARTS: tuple[str, ...] = (
    "Select",
    "Slice",
    "Index",
    "Gather",
    "Unbind",
    "Split",
    "Transpose",
    "Permute",
    "TBackward",
    "View",
)
_PARTS += ("Reshape", "Unsafe", "Expand", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Alias")


class FeedbackAlignment:
    """Feedback alignment on one model.

    Args:
        model: the model.
        options: GrAPE's options.
        seed: seed of the matrices.

    Raises:
        ValueError: if the model has layers whose weights are used inside a fused operator.
    """

    def __init__(self, model: nn.Module, options: GrapeArgumentsMixin, seed: int = 0) -> None:
        for name, module in model.named_modules():
            if isinstance(module, _UNSERVED):
                raise ValueError(
                    f'method="fa" knows linear and convolutional layers; {name or "the model"} is a '
                    f"{type(module).__name__}, whose weights it cannot reach. Use a model without it, or another "
                    "method."
                )
        self.seed = seed
        self._names = parameter_names(model)
        self._B: dict[str, Tensor] = {}

    def feedback(self, weight: Tensor) -> Tensor | None:
        """Return the fixed matrix of a weight, in its shape; None if it is no parameter of the model."""
        name = self._names.get(id(weight))
        if name is None:
            return None
        if name not in self._B:
            B = torch.empty(weight.shape)
            nn.init.xavier_uniform_(B, generator=seeded(self.seed, name))
            self._B[name] = B.to(weight)
        return self._B[name]

    @contextmanager
    def step(self, batch: MicroBatch) -> Iterator[None]:
        """Route the layers of every forward inside through the fixed matrices."""
        with _Routing(self):
            yield

    def route(self, func: Any, call: LayerCall) -> Tensor | None:
        """Compute a layer so that its weight gets its gradient as usual and its input that of B_l.

        Returns None for a product that is no layer: of two activations.

        Raises:
            ValueError: if the weight is computed (weight norm, weight standardisation), so that it has no B_l.
        """
        B = self.feedback(call.weight)
        if B is None:
            if func is torch.addmm or not call.weight.requires_grad:
                return None
            if (name := self._part_of(call.weight)) is not None:
                self._refuse_product(func, name)
            raise ValueError(
                f'method="fa" met a call of {func.__name__} whose weight, {tuple(call.weight.shape)}, is computed and '
                "no parameter of the model, so there is no fixed matrix for it. Use layers without weight norm or "
                "weight standardisation."
            )
        return _ValueOfFirst.apply(call.run(call.x.detach()), call.product(call.x, B))

    def refuse_other_products(self, func: Any, operands: Any) -> None:
        """Raise ValueError if a parameter is multiplied with in a way that is not routed."""
        for t in tree_leaves(operands):
            if isinstance(t, Tensor) and (name := self._part_of(t)) is not None:
                self._refuse_product(func, name)

    def _part_of(self, t: Tensor) -> str | None:
        """Return the name of the parameter that ``t`` is, or is a part of; experts are parts of one."""
        if name := self._names.get(id(t)) or self._names.get(id(t._base)):
            return name
        node = t.grad_fn
        while node is not None and node.name().startswith(_PARTS):
            node = node.next_functions[0][0]
        return self._names.get(id(getattr(node, "variable", None)))

    @staticmethod
    def _refuse_product(func: Any, name: str) -> NoReturn:
        raise ValueError(
            f'method="fa" met {func.__name__} with the parameter {name}, or a part of it. It knows linear and '
            "convolutional layers (F.linear, F.conv2d, ...) with a weight of their own: write the product as one, or "
            "use another method."
        )


class _Routing(TorchFunctionMode):
    def __init__(self, fa: FeedbackAlignment) -> None:
        super().__init__()
        self.fa = fa

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            call = layer_call(func, args, kwargs)
            routed = self.fa.route(func, call) if call is not None and call.x.requires_grad else None
            if routed is not None:
                return routed
            if call is None and getattr(func, "__name__", "") in _OTHER_PRODUCTS:
                self.fa.refuse_other_products(func, (args, kwargs))
        return func(*args, **kwargs)


class _ValueOfFirst(torch.autograd.Function):
    """Return the first argument's value; backward hands its gradient to both.

    The first is the layer on a detached input, which gives weight and bias their gradients; the second is linear in the
    input, so that its backward multiplies by B_l^T, whatever stride, padding, dilation, groups or autocast do.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, feedback: Tensor) -> Tensor:
        return local.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        return delta, delta
