"""Which cells a comparison has: each method at each of its rates with one seed, then at the best of them with all.

Who chooses never sees the test split: the cells of the rates are judged by the validation split, and the figure on the
test split is read by cells of their own (``final``). What a cell does is the business of whoever runs it; how its
result is kept, that of ``cells.py``.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grape_hf.recipes.cells import Cells

TOP = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cell:
    """One run: a method at a rate with a seed, to choose the rate, or with the final figure on the test split."""

    method: str
    learning_rate: float
    seed: int
    final: bool = False

    @property
    def name(self) -> str:
        """Name of the cell's file."""
        return f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}{'-test' if self.final else ''}"


class Grid:
    """The cells of one comparison, and which of them are to be run.

    Args:
        cells: their results.
        methods: by name the options of each.
        rates: returns the learning rates of a method; none while they are not known.
        seeds: the first is the one that rates are compared with.
        score: says of a result how good it is on the validation split; higher is better.
        test: whether the best rate's cells are ``final`` ones. Without, the other seeds are run like the first.
        only: the methods to be run; all by default.
    """

    def __init__(
        self,
        cells: Cells,
        methods: Mapping[str, Any],
        rates: Callable[[str], Sequence[float]],
        seeds: Sequence[int],
        score: Callable[[dict[str, Any]], float],
        test: bool = True,
        only: Sequence[str] | None = None,
    ) -> None:
        self.cells, self.methods, self.rates = cells, methods, rates
        self.seeds, self.score, self.test = list(seeds), score, test
        self.only = list(methods) if only is None else list(only)

    def choices(self, method: str) -> list[Cell]:
        """Return the cells that a method's rate is chosen from."""
        return [Cell(method, float(rate), self.seeds[0]) for rate in self.rates(method)]

    def best(self, method: str) -> Cell | None:
        """Return the best of a method's choices; None before all have run, or failed, and if none is any good."""
        choices = self.choices(method)
        if not choices or not all(self.cells.settled(cell.name) for cell in choices):
            return None
        done = [(self.score(result), cell) for cell in choices if (result := self.cells.read(cell.name))]
        return max(done, key=lambda pair: pair[0])[1] if done else None

    def wanted(self) -> Iterator[Cell]:
        """Yield the cells that are to be run, method by method: its rates with the first seed, the best with all."""
        for method in self.only:
            yield from self.choices(method)
            if best := self.best(method):
                seeds = self.seeds if self.test else self.seeds[1:]
                yield from (Cell(method, best.learning_rate, seed, final=self.test) for seed in seeds)

    def stage(self, cell: Cell) -> int:
        """Return how soon a cell is worth its time: rates (0), the figure of the best (1), its other seeds (2)."""
        return 2 if cell.seed != self.seeds[0] else int(cell.final)

    def refuse_changed(self, options: Callable[[Cell], Mapping[str, Any]], ignored: Sequence[str] = ()) -> None:
        """Refuse to go on from cells that were run with other options than the comparison has now.

        Args:
            options: returns what a cell would be run with now.
            ignored: names of options that may differ.

        Raises:
            ValueError: with what differs.
        """
        for name, result in self.cells.all().items():
            if result["method"] not in self.methods:
                continue
            cell = Cell(result["method"], result["learning_rate"], result["seed"])
            was, now = (
                {key: value for key, value in found.items() if key not in ignored}
                for found in (result["options"], options(cell))
            )
            if differing := [f"{k}: {was.get(k)!r}, now {now.get(k)!r}" for k in was | now if was.get(k) != now.get(k)]:
                raise ValueError(
                    f"{self.cells.results / name}.json was run with other options: {'; '.join(differing)}. Give the "
                    "method another name, or delete the files of its cells."
                )


def fill(
    grids: Sequence[Grid],
    run: Callable[[Grid, Cell, int], None],
    by_stage: bool = False,
    deadline: float = float("inf"),
) -> None:
    """Run what is missing; wait for what others are doing only where something may follow from it.

    Args:
        grids: the comparisons, the first first.
        run: runs a cell and writes its result, or how it failed; the number is the lock's file descriptor.
        by_stage: take the earliest stage of all comparisons first, in place of one method after the other.
        deadline: when to begin no other cell, as ``time.time()`` counts.
    """
    while time.time() < deadline:
        missing = [(g, cell) for g in grids for cell in g.wanted() if not g.cells.settled(cell.name)]
        if by_stage:
            missing.sort(key=lambda pair: pair[0].stage(pair[1]))
        if not missing:
            return
        for grid, cell in missing:
            with grid.cells.claim(cell.name) as lock:
                if lock is not None:
                    run(grid, cell, lock)
                    break
        else:
            time.sleep(1)  # all of them are somebody else's


def commit() -> str:
    """Return the commit of the code as it is now; ``GRAPE_COMMIT`` where the repository is not at hand."""
    ask = ["git", "rev-parse", "HEAD"]
    return os.environ.get("GRAPE_COMMIT") or subprocess.run(ask, cwd=TOP, capture_output=True, text=True).stdout.strip()
