"""Cells on a machine that is lent for minutes: many processes at once, a time after which all stop, few files to bring.

The processes are the study's own command, started again; they share the cells by their locks (``cells.py``). What has
been finished is written to ``cells-<n>.jsonl`` every few seconds, a line a cell, so that a machine that is taken away
takes no finished cell with it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_FILE_BYTES = 12 * 2**20  # such machines bring back few files of limited size
_MARGIN = 20.0  # seconds for a step, or an evaluation, that is under way when time is up


def run_workers(number: int, deadline: float, studies: Mapping[str, Path], out: Path | None) -> None:
    """Run the cells of studies in so many processes; return when nothing is left to do or time is up.

    Args:
        number: of processes.
        deadline: when they stop, as ``time.time()`` counts.
        studies: by the YAML file the folder of the results.
        out: folder for what they have done since now; nothing is written without.
    """
    before = {path: path.stat().st_mtime_ns for path in _files(studies)}
    logs = (out or Path("outputs/studies")) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # One thread each: the models are too small for more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (logs / "workers.txt").open("w", encoding="utf-8") as log:
        workers = []
        for _ in range(number):
            seconds = min(deadline - time.time(), 10**9)
            command = [sys.executable, *sys.orig_argv[1:], "--workers", "0", "--seconds", f"{seconds:.0f}"]
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        while any(worker.poll() is None for worker in workers) and time.time() < deadline + _MARGIN:
            time.sleep(1)
            if out is not None and int(time.time()) % 10 == 0:
                pack(studies, out, before)
        for worker in workers:
            worker.kill()  # of those that have ended nothing is left to kill
            worker.wait()
    if out is not None:
        pack(studies, out, before)
    print((logs / "workers.txt").read_text(encoding="utf-8", errors="replace")[-8000:])


def pack(studies: Mapping[str, Path], out: Path, before: Mapping[Path, int] | None = None) -> None:
    """Write the results that are new or have changed since ``before`` (all by default) into ``cells-<n>.jsonl``."""
    lines: list[list[str]] = [[]]
    size = 0
    for path, (study, kind) in _files(studies).items():
        if before is not None and before.get(path) == path.stat().st_mtime_ns:
            continue
        content = path.read_text(encoding="utf-8")
        result = json.loads(content) if path.suffix == ".json" else content
        line = json.dumps({"study": study, "kind": kind, "file": path.name, "result": result})
        if lines[-1] and size + len(line) > _FILE_BYTES:
            lines.append([])
            size = 0
        lines[-1].append(line)
        size += len(line) + 1
    for number, of_file in enumerate(lines):
        part = out / f"cells-{number}.jsonl.part"
        part.write_text("".join(line + "\n" for line in of_file), encoding="utf-8")
        part.replace(out / f"cells-{number}.jsonl")


def unpack(file: Path, studies: Mapping[str, Path]) -> None:
    """Put the results of a ``cells-<n>.jsonl`` into the folders of their studies.

    Raises:
        ValueError: if it holds cells of a study that was not named.
    """
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["study"] not in studies:
            raise ValueError(f"{file} holds cells of {entry['study']}; name that study too, got {', '.join(studies)}.")
        folder = studies[entry["study"]] / entry["kind"]
        folder.mkdir(parents=True, exist_ok=True)
        result = entry["result"]
        (folder / entry["file"]).write_text(
            result if isinstance(result, str) else json.dumps(result, indent=1) + "\n", encoding="utf-8"
        )


def _files(studies: Mapping[str, Path]) -> dict[Path, tuple[str, str]]:
    """Find what cells have left, finished, partial or failed, with the study and the kind of each."""
    return {
        path: (study, kind)
        for study, folder in studies.items()
        for kind in ("cells", "partial")
        for pattern in ("*.json", "*.error.txt")
        for path in sorted((folder / kind).glob(pattern))
    }
