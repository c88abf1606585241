"""The methods that GrAPE is compared with, one module each; its docstring says what the paper prescribes.

Two kinds. ``fdfa`` and ``dkp`` are GrAPE's star with other learning of B_l: a choice of options (``OPTIONS`` in their
modules), and for ``dkp`` a rule of its own. ``fa``, ``forward_gradient`` and ``pepita`` have no feedback matrices that
are learned; each is a class with one method, ``step``, a context manager around the stock forward and backward of one
micro-batch. Outside it the model is untouched, and there is nothing to save: all draws are functions of the seed.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from grape_hf.baselines.base import Baseline
    from grape_hf.training_args import GrapeArgumentsMixin

# By their paths: the options (training_args.py) ask for the names, the modules behind them need the options.
BASELINES = {
    "fa": "grape_hf.baselines.fa:FeedbackAlignment",
    "forward_gradient": "grape_hf.baselines.forward_gradient:ForwardGradient",
    "pepita": "grape_hf.baselines.pepita:Pepita",
}


def make_baseline(model: nn.Module, options: "GrapeArgumentsMixin", seed: int) -> "Baseline | None":
    """Return the baseline that ``options.method`` names, None if it is a star or ordinary backpropagation.

    Raises:
        ValueError: if the method cannot train this model.
    """
    path = BASELINES.get(options.method)
    return None if path is None else resolve_name(path)(model, options, seed)
