"""Pictures of training, from the Trainer's ``log_history``: curves of several runs, alignment block by step.

Needs the extra ``plot`` (matplotlib). Each ``draw_*`` fills axes that it is given, each ``plot_*`` writes a file.
Colour-blind readers can tell the colours apart, and lines differ in style as well.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, ScalarFormatter
except ImportError as error:
    raise ImportError("Plots need matplotlib: pip install '.[plot]' in a checkout of grape_hf.") from error

from grape_hf.engine.pushes import in_one_piece
from grape_hf.reports.log_names import PREFIX

History = Sequence[Mapping[str, Any]]
Kind = Literal["estimate", "exact", "weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
_STYLES = ("-", "--", "-.", ":")
_LABELS = {
    "loss": "training loss (nats)",
    "eval_loss": "validation loss (nats)",
    "eval_accuracy": "validation accuracy",
    "eval_perplexity": "validation perplexity per token",
    "eval_word_perplexity": "validation perplexity per word",
    "estimate": "cosine with what the feedback learns from",
    "weights": "cos of weight gradients with the exact ones",
    "exact": "cos(B e, exact delta)",
}
_MEANS = "/mean"
_SEED = ", seed "
# What gets a panel. Perplexity is the loss again, on another scale.
_CURVES = ("loss", "eval_loss", "eval_perplexity", "eval_accuracy")


def read_history(run: str | Path) -> list[dict[str, Any]]:
    """Read the log history of a run folder, or of a ``trainer_state.json``.

    Raises:
        FileNotFoundError: if there is no ``trainer_state.json``.
        ValueError: if it cannot be read.
    """
    path = Path(run)
    path = path / "trainer_state.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the trainer_state.json that Trainer.save_state() writes, found none."
        )
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["log_history"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, it may be cut off: {error}") from error


def alignment_table(history: History, kind: Kind = "estimate") -> tuple[list[int], list[str], np.ndarray]:
    """Collect the alignment of every boundary at every step at which it was logged.

    Args:
        history: log entries; those without alignment are passed over.
        kind: ``estimate`` for cos(B, J_hat), ``exact`` for cos(B e, delta), ``weights`` for the gradients of
            the block's weights.

    Returns:
        The n steps, the m names of boundaries from bottom to top of the model, and the cosines, ``(m, n)``, NaN where
        a step lacks one. All empty if nothing was logged.
    """
    prefix = _prefix(kind)
    entries = [entry for entry in history if any(key.startswith(prefix) for key in entry)]
    keys = dict.fromkeys(key for entry in entries for key in entry if key.startswith(prefix))  # in order, each once
    keys.pop(prefix.removesuffix("/") + _MEANS, None)
    values = np.array([[entry.get(key, np.nan) for entry in entries] for key in keys], dtype=float)
    names = [key.removeprefix(prefix) for key in keys]
    return [int(entry["step"]) for entry in entries], names, values.reshape(len(keys), len(entries))


def values_to_draw(runs: Mapping[str, History]) -> list[str]:
    """Return what is worth a curve: those of the usual values that some run logged more than once."""
    found = [v for v in _CURVES if any(sum(v in entry for entry in history) > 1 for history in runs.values())]
    return [v for v in found if not (v == "eval_loss" and "eval_perplexity" in found)]


def calibration_steps(history: History) -> list[int]:
    """Find the steps at which a calibration was first seen in the log: it took place there or since the last entry."""
    steps, before = [], 0
    for entry in history:
        if entry.get("grape/calibration/steps", before) > before:
            steps.append(int(entry["step"]))
            before = entry["grape/calibration/steps"]
    return steps


def draw_curves(axes: Axes, runs: Mapping[str, History], value: str = "loss") -> None:
    """Draw one logged value of several runs over the steps, with a triangle where a run was calibrated.

    Args:
        axes: where to draw.
        runs: log history of each run, by the name for the legend. Names that differ in what follows ", seed " are
            of one method: one colour, one entry in the legend.
        value: key of the log entries, e.g. ``loss`` or ``eval_perplexity``; perplexities get a logarithmic axis.

    Raises:
        ValueError: if no run has the value in its log.
    """
    if not any(value in entry for history in runs.values() for entry in history):
        keys = sorted({key for history in runs.values() for entry in history for key in entry} - {"step", "epoch"})
        raise ValueError(f"No log entry has {value!r} to draw; logged were: {', '.join(keys) or 'nothing'}.")
    methods = [name.partition(_SEED)[0] for name in runs]
    order = list(dict.fromkeys(methods))
    for i, (method, history) in enumerate(zip(methods, runs.values(), strict=True)):
        points = [(entry["step"], entry[value]) for entry in history if value in entry]
        if not points:
            continue
        steps, heights = np.array(points, dtype=float).T
        place = order.index(method)
        colour, style = _COLOURS[place % len(_COLOURS)], _STYLES[place % len(_STYLES)]
        marker = "o" if len(points) < 3 else None
        label = None if method in methods[:i] else list(runs)[i] if methods.count(method) == 1 else method
        width = 1.4 + 0.9 * min(3, len(order) - 1 - place)  # what lies below shows at the sides of what covers it
        axes.plot(steps, heights, label=label, linewidth=width, color=colour, linestyle=style, marker=marker)
        if calibrated := calibration_steps(history):
            _mark_calibrations(axes, calibrated, colour, None if label is None else f"{label}: calibration")
    _label_steps(axes)
    axes.set_ylabel(_LABELS.get(value, value))
    if "perplexity" in value:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_alignment(axes: Axes, history: History, kind: Kind = "estimate") -> None:
    """Draw the alignment as a heat map, boundary by step; the colours reach from 0, or the lowest cosine, to 1.

    Args:
        axes: where to draw; its figure gets the colour bar.
        history: log entries of one run.
        kind: which cosine, as in ``alignment_table``.

    Raises:
        ValueError: if the history holds none.
    """
    steps, names, values = alignment_table(history, kind)
    if not names:
        raise ValueError(f"No log entry has {_prefix(kind)}... to draw: the run made no feedback, or never logged it.")
    lowest = min(0.0, float(np.nanmin(values))) if np.isfinite(values).any() else 0.0
    axes.set_facecolor("white")  # undefined cosines: no colour of the map is white
    rows = np.arange(len(names) + 1) - 0.5
    picture = axes.pcolormesh(_edges(steps), rows, np.ma.masked_invalid(values), cmap="cividis", vmin=lowest, vmax=1.0)
    shown = range(0, len(names), max(1, len(names) // 12))  # as many labels as can be read
    axes.set_yticks(list(shown), [names[i] for i in shown])
    _label_steps(axes)
    axes.set_ylabel("boundary (top: nearest the loss)")
    if calibrated := calibration_steps(history):
        _mark_calibrations(axes, calibrated, _COLOURS[1])
        axes.set_xlabel(f"{axes.get_xlabel()} (▲ calibration)")
    assert axes.figure is not None
    axes.figure.colorbar(picture, ax=axes, label=_LABELS[kind])


def plot_curves(runs: Mapping[str, History], path: str | Path, values: Sequence[str] = ("loss",)) -> Path:
    """Write curves of several runs to an image file, a panel for each value; see ``draw_curves``."""
    figure, panels = _figure(len(values))
    for axes, value in zip(panels, values, strict=True):
        draw_curves(axes, runs, value)
    return _save(figure, path)


def plot_alignment(history: History, path: str | Path, kind: Kind = "estimate") -> Path:
    """Write the alignment of one run to an image file; see ``draw_alignment``."""
    figure, (axes,) = _figure(1)
    draw_alignment(axes, history, kind)
    return _save(figure, path)


def plot_alignments(runs: Mapping[str, History], path: str | Path) -> Path | None:
    """Write a heat map for each run and kind of alignment to an image file; None if no run logged any."""
    maps = _maps(runs)
    if not maps:
        return None
    figure, panels = _figure(len(maps))
    _draw_maps(panels, maps)
    return _save(figure, path)


def plot_runs(runs: Mapping[str, History], path: str | Path) -> Path:
    """Write one picture of everything that was logged: curves of all runs, alignment of each run that has one.

    Args:
        runs: log history of each run, by its name.
        path: image file; its ending says which kind.

    Returns:
        The path.

    Raises:
        ValueError: if there is nothing to draw.
    """
    values, maps = values_to_draw(runs), _maps(runs)
    figure, panels = _figure(max(1, len(values) + len(maps)))
    for axes, value in zip(panels, values or ["loss"], strict=False):
        draw_curves(axes, runs, value)
    _draw_maps(panels[len(values) :], maps)
    return _save(figure, path)


Map = tuple[str, History, Kind]


def _maps(runs: Mapping[str, History]) -> list[Map]:
    return [(name, history, kind) for name, history in runs.items() for kind in KINDS if _aligned(history, kind)]


def _draw_maps(panels: Sequence[Axes], maps: Sequence[Map]) -> None:
    for axes, (name, history, kind) in zip(panels, maps, strict=True):
        draw_alignment(axes, history, kind)
        axes.set_title(name)


def _prefix(kind: Kind) -> str:
    return f"{PREFIX}weight_gradient/cosine/" if kind == "weights" else f"{PREFIX}alignment/{kind}/"


def _aligned(history: History, kind: Kind) -> bool:
    return bool(alignment_table(history, kind)[1])


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _mark_calibrations(axes: Axes, steps: Sequence[int], colour: str, label: str | None = None) -> None:
    """Put a triangle on the lower border at each step."""
    if not steps:
        return  # a line without points has no extent, and ruins the layout
    at_border = axes.get_xaxis_transform()  # x in steps, y in parts of the height
    (triangles,) = axes.plot(steps, [0.0] * len(steps), color=colour, label=label, transform=at_border)
    triangles.set(marker="^", markersize=7, linestyle="", clip_on=False, zorder=3)


def _edges(steps: Iterable[int]) -> np.ndarray:
    """Put the borders between logged steps half-way, so that cells are as wide as the log is sparse."""
    centres = np.array(list(steps), dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[:-1] + centres[1:]) / 2
    return np.concatenate([[max(0.0, 2 * centres[0] - middle[0])], middle, [2 * centres[-1] - middle[-1]]])


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    columns = panels if panels <= 3 else 2
    rows = -(-panels // columns)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in grid[panels:]:
        spare.remove()
    return figure, grid[:panels]


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with in_one_piece(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:] or "png")
    return path
