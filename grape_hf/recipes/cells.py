"""Long comparisons in cells: a file for each run that is done, a lock for each that is under way.

A cell's result is a JSON file that appears whole or not at all, so whoever starts again goes on with what is missing,
and several processes may work on one list. The lock is the kernel's (``flock``): it goes with its holder, however that
ends. Nothing here knows what a cell is.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


class Cells:
    """The results of a comparison in a folder: ``<name>.json`` of what is done, ``<name>.error.txt`` of what failed.

    A cell that failed is tried once more by every process that starts later.

    Args:
        results: folder of the results, to be kept.
        locks: folder of the locks, on the same machine for all processes, to be thrown away.
    """

    def __init__(self, results: Path, locks: Path) -> None:
        self.results, self.locks = results, locks
        self._started, self._failed_here = time.time(), set[str]()
        for folder in (results, locks):
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what a finished cell wrote, None before."""
        path = self.results / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def failed(self, name: str) -> bool:
        """Whether the cell has failed since this process began."""
        path = self._error(name)
        return name in self._failed_here or (path.exists() and path.stat().st_mtime >= self._started)

    def settled(self, name: str) -> bool:
        """Whether the cell is done or has failed."""
        return self.read(name) is not None or self.failed(name)

    @contextmanager
    def claim(self, name: str) -> Iterator[int | None]:
        """Take a cell, for as long as the context lasts.

        Yields:
            A file descriptor that holds the lock, to be passed on to a process that does the work: then the cell stays
            taken until both are gone. None if the cell is settled, or somebody else's.
        """
        with (self.locks / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # Looked at under the lock: whoever had it may just have finished.
            yield None if self.settled(name) else lock.fileno()

    def finish(self, name: str, result: dict[str, Any]) -> None:
        """Write a cell's result."""
        self._write(self.results / f"{name}.json", json.dumps(result, indent=1, default=str) + "\n")
        self._error(name).unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Delete a cell's result, if there is one."""
        (self.results / f"{name}.json").unlink(missing_ok=True)

    def fail(self, name: str, report: str) -> None:
        """Write down how a cell failed."""
        self._failed_here.add(name)
        self._write(self._error(name), report.rstrip() + "\n")

    def all(self) -> dict[str, dict[str, Any]]:
        """Return the results of all finished cells by name."""
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.results.glob("*.json"))}

    def errors(self) -> dict[str, str]:
        """Return the last line of the report of each cell that failed and is not done."""
        paths = sorted(self.results.glob("*.error.txt"))
        return {p.name.removesuffix(".error.txt"): p.read_text(encoding="utf-8").splitlines()[-1] for p in paths}

    def _error(self, name: str) -> Path:
        return self.results / f"{name}.error.txt"

    def _write(self, path: Path, text: str) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def run_recipe(
    recipe: Path | str,
    options: Mapping[str, Any],
    folder: Path,
    lock: int,
    package: Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Run a recipe in a process of its own; ``options.yaml`` and ``output.txt`` in its folder tell of it.

    Args:
        recipe: a script, or the name of a module.
        options: its options.
        folder: of the run; made if need be.
        lock: the cell's: if this process is killed, the cell stays taken as long as the recipe runs.
        package: folder that holds grape_hf.
        cwd: where it runs (default: here).
        environment: what it sees, ``PYTHONPATH`` aside.

    Returns:
        Its exit status.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "options.yaml"
    settings.write_text(yaml.safe_dump(dict(options), sort_keys=False), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(package), environment.get("PYTHONPATH")]))
    start = ["-m", recipe] if isinstance(recipe, str) else [recipe]
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        return subprocess.run(
            [sys.executable, *start, settings],
            cwd=cwd,
            env={**environment, "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[lock],
        ).returncode


def end_of_output(folder: Path, lines: int) -> list[str]:
    """Return the last lines that ``run_recipe`` left in ``output.txt``."""
    return (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
