"""What a model card says of each method: three sentences, tags for the Hub, and whom to cite."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grape_hf.training_args import GrapeArgumentsMixin

_PAPER = "Scaling Direct Feedback Learning with Jacobian Alignment Guarantees"
_URL = "https://openreview.net/forum?id=kasbbmwk3s"
_STAR = (
    "the error at the output goes to all blocks of the network at once, through a feedback matrix B_l for each, and "
    "every block backpropagates it through itself only"
)


@dataclass(frozen=True)
class MethodText:
    """One method in the words of a card.

    Attributes:
        name: in running text.
        about: what it is, three sentences at most.
        reference: the paper it is from.
        tags: for the Hub.
        bibtex: an entry to copy, where there is one.
    """

    name: str
    about: str
    reference: str
    tags: tuple[str, ...]
    bibtex: str = ""


_LEARNED = "learns it from forward-mode derivatives on a part of the batch"
# The same where options say otherwise.
_BY_MAPS = "is the product of maps, one for each block above, that the block learns from its own backward"
_PATH = (
    " The error also takes the shortcut connections of those blocks, at the very samples of the batch; B_l stands for "
    "the rest."
)
_SWEEPS = (
    " Before the errors are used they are corrected {times}: each block sends its own back through itself, all at "
    "once, and that of the block below {goes} what came out."
)
_GOES = {"shortcut": "becomes", "matrix": "goes half way, and where that is exact all the way, to"}

# What the matrices of DFA are, by the start that they stay at; `auto` is one of the first two.
FIXED = {"identity": "fixed identity", "gaussian": "fixed random", "zero": "fixed zero", "auto": "fixed"}


def method_label(options: Mapping[str, Any]) -> str:
    """Name a method in a table: of DFA it matters what its matrices are ("DFA, fixed random").

    Args:
        options: of a run, as a recipe's file gives them.
    """
    method = str(options.get("method", "grape"))
    return f"DFA, {FIXED[options.get('feedback_init') or 'gaussian']}" if method == "dfa" else method


# Method "bp" has none: its card is the stock Trainer's.
METHOD_TEXTS = {
    "grape": MethodText(
        "GrAPE",
        f"With GrAPE, {_STAR}; no chain of backward passes orders the blocks' updates. B_l stands in for the "
        f"transposed Jacobian of all that lies above block l, and {_LEARNED}. Where the options ask for it, a few "
        "steps are ordinary backpropagation, to bring weights and feedback back into line (calibration).",
        f"*{_PAPER}*, ICLR 2026, {_URL}",
        ("grape", "direct-feedback-alignment"),
        f"@inproceedings{{grape2026,\n  title     = {{{_PAPER}}},\n"
        "  booktitle = {International Conference on Learning Representations},\n"
        f"  year      = {{2026}},\n  url       = {{{_URL}}}\n}}",
    ),
    "dfa": MethodText(
        "direct feedback alignment (DFA)",
        f"With DFA, {_STAR}; no chain of backward passes orders the blocks' updates. The matrices B_l stay as they "
        "were at the start: it is the weights that come into line with them. Where the options ask for it, a few steps "
        "are ordinary backpropagation (calibration).",
        "Nøkland, *Direct feedback alignment provides learning in deep neural networks*, NeurIPS 2016; calibration: "
        f"*{_PAPER}*, ICLR 2026, {_URL}",
        ("direct-feedback-alignment",),
    ),
    "fdfa": MethodText(
        "forward direct feedback alignment (FDFA)",
        f"With FDFA, {_STAR}. B_l is a moving average of Jacobians that are estimated with forward-mode derivatives at "
        "every step, and starts at zero.",
        "Bacho & Chu, *Low-variance forward gradients using direct feedback alignment and momentum*, Neural Networks "
        "2024",
        ("direct-feedback-alignment", "forward-gradient"),
    ),
    "dkp": MethodText(
        "direct Kolen-Pollack (DKP)",
        f"With DKP, {_STAR}. B_l learns as a forward weight from block l straight to the output would, with the same "
        "rate and decay.",
        "Webster, Choi & Ahn, *Learning the connections in direct feedback alignment*, 2021",
        ("direct-feedback-alignment",),
    ),
    "fa": MethodText(
        "feedback alignment (FA)",
        "With FA, errors travel back layer by layer through fixed random matrices, in place of the transposed weights "
        "that backpropagation uses.",
        "Lillicrap, Cownden, Tweed & Akerman, *Random synaptic feedback weights support error backpropagation for deep "
        "learning*, Nature Communications 2016",
        ("feedback-alignment",),
    ),
    "forward_gradient": MethodText(
        "forward gradients",
        "With forward gradients, weights follow random directions, each times the derivative of the loss along it, "
        "which forward-mode differentiation gives without a backward pass through the network.",
        "Baydin, Pearlmutter, Syme, Wood & Torr, *Gradients without backpropagation*, 2022; in activation space: Ren, "
        "Kornblith, Liao & Hinton, *Scaling forward gradient with local losses*, ICLR 2023",
        ("forward-gradient",),
    ),
    "pepita": MethodText(
        "PEPITA",
        "With PEPITA there is no backward pass: a second forward starts from an input that the error has moved, and "
        "weights learn from the difference between the two.",
        "Dellaferrera & Kreiman, *Error-driven input modulation: solving the credit assignment problem without a "
        "backward pass*, ICML 2022",
        ("pepita",),
    ),
}


def about(options: GrapeArgumentsMixin) -> str:
    """Say what a method is with these options: what learns B_l, and which way the error takes.

    Args:
        options: of a run, with values for its model.
    """
    text = METHOD_TEXTS[options.method].about
    if options.learns_by_maps:
        text = text.replace(_LEARNED, _BY_MAPS)
    if options.method in ("grape", "dfa"):
        text += _PATH if options.feedback_path == "shortcut" else ""
        goes = _GOES[str(options.feedback_path)]
        text += _SWEEPS.format(times=times(options.feedback_sweeps), goes=goes) if options.feedback_sweeps else ""
    return text


def times(number: int) -> str:
    """Say how often."""
    return "once" if number == 1 else f"{number} times"
