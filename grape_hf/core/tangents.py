"""Run a forward with tangents injected at the boundaries, and return the tangent of y: dual numbers or differences."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from grape_hf.core.boundaries import Boundaries
from grape_hf.core.isolation import full_precision

JvpMode = Literal["dual", "finite_difference"]
Inject = Callable[..., Tensor | None]  # (index, h, block, args, kwargs, whether the block ran in half precision)
Arrive = Callable[[int, Tensor], None]  # (index, tangent of h_l), where tangents end at the next boundary

# Step of a finite difference, in units of rms(h_l). In float32, 1e-4 agrees with dual numbers to a cosine of 0.98 or
# better on seven timm models, 1e-3 does not; float64 affords a smaller truncation error.
STEP = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF = (torch.bfloat16, torch.float16)


class ForwardModeError(RuntimeError):
    """An operator of the model has no forward-mode derivative, or dropped the tangent: use finite differences."""


_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
# Functions that are linear, but for a bias, in each of their arguments: the place of the bias, and the bare product.
_LINEAR: dict[Callable[..., Any], tuple[int | None, Callable[..., Any]]] = {
    F.linear: (2, lambda x, weight, bias=None: F.linear(x, weight)),
    torch.addmm: (0, lambda bias, x, weight: torch.mm(x, weight)),
    **{product: (None, product) for product in _PRODUCTS},
    # The experts of a mixture. torch has no forward-mode rule for it, and finite differences are poor where a router
    # chooses: a token that goes to another expert makes a jump, which is then divided by 1e-4.
    torch._grouped_mm: (
        3,
        lambda x, weight, offs=None, bias=None, out_dtype=None: _grouped(x, weight, offs, out_dtype),
    ),
}


def _grouped(x: Tensor, weight: Tensor, offs: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    return torch._grouped_mm(x, weight, offs=offs, out_dtype=out_dtype)


# Of a half-precision input and float32 weights (autocast) torch's rules make a tangent in another dtype than the value,
# which the next convolution refuses.
_NORMS = (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm)


class _ConstantFactors(TorchFunctionMode):
    """Compute (x W + b, v W) for a dual number x and constant W, b, as it stands.

    Left to itself torch also multiplies x with the weights' tangent, a matrix of zeros: three products for two, and a
    dual pass of a Transformer then takes a fifth longer. Norms get their tangent in the dtype of their value.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            normed = func(*args, **kwargs)
            value, tangent = forward_ad.unpack_dual(normed)
            if tangent is None or tangent.dtype == value.dtype:
                return normed
            return forward_ad.make_dual(value, tangent.to(value.dtype))
        if func not in _LINEAR or (kwargs and func is not torch._grouped_mm):
            return func(*args, **kwargs)
        unpacked = {i: forward_ad.unpack_dual(a) for i, a in enumerate(args) if isinstance(a, Tensor)}
        dual = [i for i, pair in unpacked.items() if pair.tangent is not None]
        bias, product = _LINEAR[func]
        if len(dual) != 1 or dual == [bias]:
            return func(*args, **kwargs)
        (i,) = dual
        value, tangent = ((*args[:i], part, *args[i + 1 :]) for part in unpacked[i])
        return forward_ad.make_dual(func(*value, **kwargs), product(*tangent, **kwargs))


def dual_runner(boundaries: Boundaries, forward: Callable[[], object]) -> Callable[..., Tensor]:
    """Return what runs ``forward`` once with dual numbers and returns the tangent of y.

    It takes ``inject``, and ``arrive`` if no tangent is to cross a boundary: then the tangent of each h_l is handed to
    that and taken off. It raises ForwardModeError if an operator has no forward-mode rule, or the tangent got lost.
    """

    def run(inject: Inject, arrive: Arrive | None = None) -> Tensor:
        def perturb(index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
            torch.set_grad_enabled(False)
            primal, tangent = forward_ad.unpack_dual(h)
            primal = primal.detach()
            if arrive is not None:
                if tangent is not None:
                    arrive(index, tangent)
                tangent = None
            v = inject(index, primal, block, args, kwargs)
            if v is None:
                return primal if tangent is None else h
            # A copy: a block that begins in place would change v, from which lms predicts.
            return forward_ad.make_dual(primal, v.clone() if tangent is None else tangent + v)

        # Of the fused attention kernels none has a forward-mode rule (pytorch#128971, #98164), the math backend does.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _ConstantFactors():
            try:
                # With gradients up to h_1, so that forwards without them (generation) can be told from this one.
                with torch.enable_grad(), boundaries.perturb(perturb) as passed:
                    forward()
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, NotImplementedError) or "forward AD" in str(error) or "jvp" in str(error):
                    raise ForwardModeError(str(error).partition("\n")[0]) from error
                raise
            assert passed.y is not None
            q = forward_ad.unpack_dual(passed.y).tangent
        if q is None:
            raise ForwardModeError("the tangent got lost between the boundaries and the output y.")
        return q

    return run


def difference_runner(boundaries: Boundaries, forward: Callable[[], object]) -> Callable[..., Tensor]:
    """Return the same by the difference of a perturbed and a clean forward, of which the clean one is run once.

    That raises ValueError if the activations are in half precision.
    """
    device_type = next(boundaries.blocks[0].parameters()).device.type
    device_type = "cpu" if device_type == "meta" else device_type  # which has no autocast

    at_boundaries: dict[int, Tensor] = {}  # of the clean forward, kept where tangents end at the next boundary

    def output(inject: Inject | None, arrive: Arrive | None = None) -> Tensor:
        def perturb(index: int, h: Tensor, block: nn.Module, args: tuple, kwargs: dict) -> Tensor:
            torch.set_grad_enabled(False)
            h = h.detach()
            rounded = torch.is_autocast_enabled(device_type)
            if rounded:
                # A difference of 1e-4 is below bf16's resolution. The model enters its own autocast (accelerate puts
                # it into `forward`), so it can only be left from within; the context below puts the state back.
                torch.set_autocast_enabled(device_type, False)
                h = h.float()
            if h.dtype not in STEP:
                raise ValueError(
                    f"finite differences need activations in float32 or float64, got {h.dtype}. "
                    'Use jvp_mode="dual", or load the model in float32 and train with bf16=True.'
                )
            if arrive is not None:
                if inject is None:
                    at_boundaries[index] = h
                else:
                    before = at_boundaries[index]
                    arrive(index, (h - before) / STEP[h.dtype])
                    h = before
            v = None if inject is None else inject(index, h, block, args, kwargs, rounded)
            return h if v is None else h + STEP[h.dtype] * v

        with (
            torch.enable_grad(),  # as in a dual pass
            torch.autocast(device_type, enabled=torch.is_autocast_enabled(device_type)),
            full_precision(device_type),
            boundaries.perturb(perturb) as passed,
        ):
            forward()
        assert passed.y is not None
        return passed.y

    clean = None

    def run(inject: Inject, arrive: Arrive | None = None) -> Tensor:
        nonlocal clean
        clean = output(None, arrive) if clean is None else clean  # once for all passes
        return (output(inject, arrive) - clean) / STEP[clean.dtype]

    return run


RUNNERS = {"dual": dual_runner, "finite_difference": difference_runner}
