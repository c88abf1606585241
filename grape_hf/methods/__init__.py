r"""The methods that GrAPE is compared with, one module each; its docstring says what the paper prescribes.

Two kinds. ``fdfa`` and ``dkp`` are GrAPE's star with other learning of B_l: a choice of options
(``presets.METHOD_OPTIONS``), and for ``dkp`` a rule of its own. ``fa``, ``forward_gradient`` and ``pepita``
have no feedback matrices that are learned; each is a class with one method, ``step``, a context manager around the
stock forward and backward of one micro-batch. Outside it the model is untouched, and there is nothing to save: all
draws are functions of the seed.

``fdfa``: forward direct feedback alignment, DFA whose matrices average forward-mode estimates.
Bacho & Chu, *Low-variance forward gradients using direct feedback alignment and momentum* (2022; Neural Networks
2024). Each training forward is a dual pass in which every hidden activation gets an independent perturbation
p_l ~ N(0, I); q is the tangent of the logits, and

.. math:: B_l \leftarrow (1 - \alpha) B_l + \alpha\, \overline{p_l q^\top}, \qquad \delta_l = B_l e,

e = dLoss/dlogits, the mean over the batch. Weights are not perturbed; there is no normalisation and no ordinary
backward. In our terms: ``logits`` space, the ``ema`` rule with alpha = ``feedback_lr``, joint dual passes on the whole
batch at every step. The authors' code (github.com/Florian-BACHO/FDFA) starts B_l at zero and hands the difference
B_l - mean to Adam with rate 1e-4; ours is the plain average of the equation, with alpha 1e-4: raise it in short runs.

Departures, shared with ``method="grape"``: the estimate is made by a pass of its own without dropout, before the step's
forward; p_l is scaled by rms(h_l) and the estimate divided by it, which leaves its mean as it is; feedback points are
the blocks' outputs, and a block backpropagates within itself. Option values that are given win over these, but for
``feedback_rule``: with another rule it is ``method="grape"``.
"""

from collections.abc import Callable

from torch import nn

from grape_hf.engine.ranks import Ranks
from grape_hf.engine.run import GrapeRun
from grape_hf.engine.star_engine import StarEngine
from grape_hf.engine.step import Engine
from grape_hf.methods.base import BaselineEngine
from grape_hf.methods.dkp import DirectKolenPollack
from grape_hf.methods.fa import FeedbackAlignment
from grape_hf.methods.forward_gradient import ForwardGradient
from grape_hf.methods.pepita import Pepita
from grape_hf.training_args import GrapeArgumentsMixin


def make_engine(
    model: nn.Module,
    options: GrapeArgumentsMixin,
    seed: int,
    ranks: Ranks,
    steps_per_epoch: int | None,
    started: Callable[[GrapeRun], object],
    restartable: bool = False,
) -> Engine | None:
    """Return what takes the training steps of ``options.method``; None if every step is the stock one.

    Args:
        model: the model.
        options: GrAPE's options, with values for this model.
        seed: of all draws.
        ranks: the processes that train the model together.
        steps_per_epoch: optimiser steps in an epoch, None where unknown.
        started: called with a star's run when it has started.
        restartable: as for ``GrapeRun``.

    Raises:
        ValueError: if the method cannot train this model.
    """
    if options.method == "bp":
        return None
    kinds: dict[str, type] = {"fa": FeedbackAlignment, "forward_gradient": ForwardGradient, "pepita": Pepita}
    if (kind := kinds.get(options.method)) is not None:
        return BaselineEngine(kind(model, options, seed))
    rule = DirectKolenPollack(options.feedback_lr or 0.0) if options.method == "dkp" else None
    return StarEngine(GrapeRun(model, options, seed, ranks, restartable, rule), steps_per_epoch, started)
