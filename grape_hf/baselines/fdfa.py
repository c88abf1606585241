r"""Forward direct feedback alignment: DFA whose matrices average forward-mode estimates. A choice of options.

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

from typing import Any

OPTIONS: dict[str, Any] = {
    "feedback_space": "logits",
    "feedback_init": "zero",
    "feedback_rule": "ema",
    "feedback_lr": 1e-4,
    "feedback_normalize": False,
    "jvp_mode": "dual",
    "jvp_passes": "joint",
    "jvp_fraction": 1.0,
    "jvp_every": 1,
    "perturbation_space": "activation",
    "calibration_strategy": "no",
}
