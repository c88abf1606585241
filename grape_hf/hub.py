"""Whether the Hugging Face Hub is in reach, asked once and with an end to the waiting; what is told there of paths."""

import threading
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_OFFLINE


def why_out_of_reach(dataset: str, timeout: float) -> str | None:
    """Ask the Hub for a data set.

    Args:
        dataset: its name there.
        timeout: seconds to wait, in all.

    Returns:
        None if it answered in time, else the reason in one line.
    """
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problems: list[str] = [f"no answer within {timeout:g} s"]

    def ask() -> None:
        try:
            HfApi().dataset_info(dataset, timeout=timeout)
            problems.clear()
        except Exception as error:  # refused, no such host, a proxy's own answer: all of them mean out of reach
            problems[:] = [f"{type(error).__name__}: {error}".splitlines()[0]]

    # A thread, since the look-up of a host name knows no timeout; a daemon, so that it cannot hold up the exit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    return problems[0] if problems else None


def without_home(path: str) -> str:
    """Write the user's home as ``~`` at the beginning of a path, for names that go into cards and records."""
    try:
        inside = Path(path).relative_to(Path.home())
    except (ValueError, RuntimeError):  # outside of it, or there is none
        return path
    return (Path("~") / inside).as_posix()


def name_of(source: str, config: str | None) -> tuple[str, str | None]:
    """Return what to call a data set in cards and records, and its id on the Hub; None for a folder of the user's."""
    name = without_home(source)
    return f"{name} ({config})" if config else name, None if Path(source).is_dir() else source
