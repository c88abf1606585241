"""Draw the picture at the top of README.md: the chain of backpropagation beside the star of GrAPE.

python recipes/pictures.py             # writes docs/chain_and_star.png; needs matplotlib (the extra `plot`)
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch
from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "docs" / "chain_and_star.png"
INK, GREY, FILL, RED, BLUE = "#222222", "#7d838c", "#eef1f5", "#c8442e", "#1f6fb2"
BLOCKS = 4
HALF = 0.3  # of a block's height; block k stands at the height k, and its output h_k half-way to the next
RIGHT = 1.9  # a block reaches from 0 to here
FORWARD, BACKWARD, BUS = 0.35, 1.55, 3.35  # where the two passes run, and where e goes down to the blocks


def main() -> None:
    """Draw both, and write the file."""
    figure, (chain, star) = plt.subplots(1, 2, figsize=(8, 5), dpi=200)
    for axes, color in ((chain, RED), (star, BLUE)):
        network(axes, color)
    backpropagation(chain)
    broadcast(star)
    legend = "Numbers: when the backward of a block can run.       Dashed line: the graph is cut, no gradient passes."
    figure.text(0.5, 0.025, legend, ha="center", color=INK, fontsize=9.5)
    figure.subplots_adjust(left=0.01, right=0.99, top=1, bottom=0.07, wspace=0.02)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(TARGET, optimize=True)  # a third of its size in full colour


def network(axes: Axes, color: str) -> None:
    """Draw what is the same in both: the blocks, the forward pass, the error, and what each block does with its own."""
    axes.set(xlim=(-0.65, 3.95), ylim=(-0.05, 6.45))
    axes.axis("off")
    for k in range(1, BLOCKS + 2):
        name, fill = (f"block {k}", FILL) if k <= BLOCKS else ("head, loss", "white")
        shape = FancyBboxPatch(
            (0, k - HALF), RIGHT, 2 * HALF, boxstyle="round,pad=0,rounding_size=0.08", fc=fill, ec=INK, lw=1.1
        )
        axes.add_patch(shape)
        axes.text((FORWARD + BACKWARD) / 2, k, name, ha="center", va="center", fontsize=11, color=INK)
        arrow(axes, (FORWARD, k - 1 + HALF), (FORWARD, k - HALF), GREY)
        if k > 1:
            activation = f"$h_{k - 1}$" if k <= BLOCKS else "$y$"
            axes.text(FORWARD - 0.13, k - 0.5, activation, ha="right", va="center", color=GREY, fontsize=11)
        if k <= BLOCKS:
            arrow(axes, (BACKWARD, k + HALF - 0.06), (BACKWARD, k - HALF + 0.06), color)
    axes.text(FORWARD, 0.2, "input", ha="center", va="top", color=GREY, fontsize=11)
    arrow(axes, (BACKWARD, BLOCKS + 1 - HALF), (BACKWARD, BLOCKS + HALF), color)
    axes.text(RIGHT + 0.12, BLOCKS + 0.72, "error $e$", va="center", color=color, fontsize=11)


def backpropagation(axes: Axes) -> None:
    """Draw a gradient that goes through one block after the other."""
    title(axes, "Backpropagation: a chain", "every block waits for the one above it", RED)
    for k in range(1, BLOCKS + 1):
        number(axes, k, BLOCKS + 1 - k, RED)
        if k < BLOCKS:
            arrow(axes, (BACKWARD, k + 1 - HALF), (BACKWARD, k + HALF), RED)
            text = rf"$\delta_{k}$, from block {k + 1}"
            axes.text(RIGHT + 0.12, k + 0.5, text, va="center", color=RED, fontsize=11)


def broadcast(axes: Axes) -> None:
    """Draw an error that goes to every block at once."""
    title(axes, "GrAPE: a star", "no block waits for another", BLUE)
    axes.plot([BACKWARD, BUS, BUS], [BLOCKS + 0.5, BLOCKS + 0.5, 1.5], color=BLUE, lw=1.8, solid_joinstyle="round")
    frame = {"boxstyle": "round,pad=0.3", "fc": "white", "ec": BLUE, "lw": 1.2}
    for k in range(1, BLOCKS + 1):
        number(axes, k, 1, BLUE)
        if k < BLOCKS:
            height = k + 0.5
            axes.plot([BUS, BACKWARD], [height, height], color=BLUE, lw=1.8, solid_capstyle="round")
            arrow(axes, (BACKWARD, height), (BACKWARD, k + HALF), BLUE)
            text = rf"$\delta_{k} = B_{k}\,e$"
            axes.text(2.55, height, text, ha="center", va="center", color=BLUE, fontsize=11, bbox=frame)
            axes.plot([0.6, 1.3], [height, height], color=INK, lw=1.3, ls=(0, (3, 2)))


def title(axes: Axes, name: str, says: str, color: str) -> None:
    """Write what this is."""
    axes.text(-0.55, 6.2, name, fontsize=14, fontweight="bold", color=color, va="center")
    axes.text(-0.55, 5.8, says, fontsize=11, color=INK, va="center")


def number(axes: Axes, k: int, when: int, color: str) -> None:
    """Say when the backward of block k can run."""
    circle = {"boxstyle": "circle,pad=0.25", "fc": color, "ec": "none"}
    axes.text(-0.35, k, str(when), ha="center", va="center", fontsize=11, color="white", fontweight="bold", bbox=circle)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    axes.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    main()
