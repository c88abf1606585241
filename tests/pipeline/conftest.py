"""The four processes that the tests of this folder share; a test takes as many of them as it needs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "distributed"))  # for both: these processes find it there as well

from processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    running = Processes(4)
    yield running
    running.close()
