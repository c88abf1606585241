"""The two processes that the tests of this folder share."""

from collections.abc import Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    running = Processes()
    yield running
    running.close()
