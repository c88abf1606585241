"""Plots: the data that goes into them, and pixels where a mistake would show."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps, figure

from grape_hf.reports.plots import (
    alignment_table,
    calibration_steps,
    draw_alignment,
    draw_curves,
    plot_alignment,
    plot_curves,
    plot_runs,
    read_history,
    values_to_draw,
)

HISTORY = [
    {"step": 10, "loss": 5.0, "grape/alignment/estimate/mean": 0.3, "grape/alignment/estimate/h_1": 0.2},
    {"step": 10, "eval_loss": 4.9, "eval_perplexity": 134.0},
    {
        "step": 20,
        "loss": 4.0,
        "grape/calibration/steps": 1,
        "grape/alignment/estimate/h_1": 0.4,
        "grape/alignment/estimate/h_2": 0.6,
    },
    {"step": 30, "loss": 3.0, "grape/calibration/steps": 1, "grape/alignment/exact/h_1": 0.9},
    {
        "step": 40,
        "loss": 2.5,
        "grape/calibration/steps": 3,
        "grape/alignment/estimate/h_1": -0.5,
        "grape/alignment/estimate/h_2": 0.7,
    },
    {"step": 40, "eval_loss": 2.9, "eval_perplexity": 18.0},
]
PLAIN = [{"step": 10, "loss": 4.0}, {"step": 40, "loss": 3.0}]


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_alignment_table():
    steps, names, values = alignment_table(HISTORY)
    assert steps == [10, 20, 40]
    assert names == ["h_1", "h_2"]
    np.testing.assert_array_equal(values, [[0.2, 0.4, -0.5], [np.nan, 0.6, 0.7]])
    assert alignment_table(HISTORY, "exact")[:2] == ([30], ["h_1"])
    assert alignment_table(PLAIN) == ([], [], pytest.approx(np.empty((0, 0))))


def test_calibration_steps():
    assert calibration_steps(HISTORY) == [20, 40]
    assert calibration_steps(PLAIN) == []


def test_curves_show_every_run_and_its_calibrations():
    axes = figure.Figure().subplots()
    draw_curves(axes, {"GrAPE": HISTORY, "BP": PLAIN})
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["GrAPE"] == [[10, 5], [20, 4], [30, 3], [40, 2.5]]
    assert lines["BP"] == [[10, 4], [40, 3]]
    assert [x for x, _ in lines["GrAPE: calibration"]] == [20, 40]
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.lines if "calibration" not in line.get_label()}
    assert len({c for c, _ in styles}) == len({s for _, s in styles}) == 2  # told apart by either


def test_seeds_of_a_method_look_alike_and_methods_do_not():
    axes = figure.Figure().subplots()
    draw_curves(axes, {"bp, seed 0": PLAIN, "bp, seed 1": PLAIN, "grape, seed 0": HISTORY, "grape, seed 1": PLAIN})
    curves = [line for line in axes.lines if line.get_marker() != "^"]
    looks = [(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in curves]
    assert looks[0] == looks[1] != looks[2] == looks[3]
    assert looks[0][2] > looks[2][2]  # a curve below another shows at its sides
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["bp", "grape", "grape: calibration"]


def test_what_is_drawn_was_logged_more_than_once():
    assert values_to_draw({"a": HISTORY, "b": PLAIN}) == ["loss", "eval_perplexity"]  # which is the loss again
    losses = [{key: value for key, value in entry.items() if key != "eval_perplexity"} for entry in HISTORY]
    assert values_to_draw({"a": losses}) == ["loss", "eval_loss"]
    assert values_to_draw({"a": HISTORY[:2], "b": PLAIN[:1]}) == []


def test_perplexity_is_on_a_logarithmic_axis():
    axes = figure.Figure().subplots()
    draw_curves(axes, {"GrAPE": HISTORY, "BP": PLAIN}, "eval_perplexity")
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "validation perplexity per token"


def test_heat_map_has_a_cell_for_each_boundary_and_step():
    axes = figure.Figure().subplots()
    draw_alignment(axes, HISTORY)
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_array().filled(np.nan), alignment_table(HISTORY)[2])
    assert mesh.get_clim() == (-0.5, 1.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["h_1", "h_2"]
    corners = mesh.get_coordinates()
    assert corners[0, :, 0].tolist() == [5, 15, 30, 50]  # half-way between the steps logged
    assert corners[:, 0, 1].tolist() == [-0.5, 0.5, 1.5]


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_axes_fill_the_figure(calibrated: bool):
    history = [{**entry, "grape/calibration/steps": 0} for entry in HISTORY] if not calibrated else HISTORY
    picture = figure.Figure(layout="constrained")
    left, right = picture.subplots(1, 2)
    draw_curves(left, {"GrAPE": history})
    draw_alignment(right, history)
    picture.savefig(io.BytesIO())  # lays it out
    assert min(axes.get_position().width for axes in (left, right)) > 0.2


def test_colours_differ_in_lightness_too():
    """What is told apart by lightness alone is told apart by everyone: the map's lightness rises all the way."""
    red, green, blue, _ = colormaps["cividis"](np.linspace(0, 1, 20)).T
    lightness = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(lightness) > 0).all()
    axes = figure.Figure().subplots()
    draw_alignment(axes, HISTORY)
    assert axes.collections[0].get_cmap().name == "cividis"


def test_files(tmp_path: Path):
    assert is_picture(plot_curves({"a": HISTORY}, tmp_path / "new" / "loss.png", ("loss", "eval_perplexity")))
    assert is_picture(plot_alignment(HISTORY, tmp_path / "alignment.png"))
    assert is_picture(plot_runs({"GrAPE": HISTORY, "BP": PLAIN}, tmp_path / "runs.png"))
    assert is_picture(plot_runs({"BP": PLAIN}, tmp_path / "bp.png"))


def test_a_single_step_is_drawn(tmp_path: Path):
    assert is_picture(plot_alignment(HISTORY[:1], tmp_path / "one.png"))


def test_nothing_to_draw():
    axes = figure.Figure().subplots()
    with pytest.raises(ValueError, match="'accuracy' to draw; logged were: .*eval_loss.* loss"):
        draw_curves(axes, {"a": HISTORY}, "accuracy")
    with pytest.raises(ValueError, match="grape/alignment/estimate"):
        draw_alignment(axes, PLAIN)


def test_history_from_a_run_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        read_history(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    assert read_history(tmp_path) == read_history(tmp_path / "trainer_state.json") == HISTORY
