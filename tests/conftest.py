"""Every test starts from the same random state, and none waits for the Hub.

Random tests draw the same examples in every run; ``--hypothesis-profile=long`` draws many new ones (``test_fuzz.py``).
"""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, which comes after this file

# They start processes, once for many tests.
FIRST = (
    "distributed",
    "pipeline",
    "test_checkpoints",
    "test_cli",
    "test_hub",
    "test_recipe_",
    "test_resume",
    "test_tables",
    "test_wheel",
)

settings.register_profile("short", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("long", derandomize=False, deadline=None, max_examples=3000, print_blob=True)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Keep the garbage collector away from the modules that are imported while tests are collected, then and later.

    The Trainer collects at the end of each training. Among the million objects of torch and transformers that took
    several times as long as a tiny training; none of them is garbage. What tests make is collected as ever.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what starts processes first: xdist hands on the last tests of a list when another process has none left.

    So no process is started twice for tests that share it, and it is short tests that fill up the end.
    """
    items.sort(key=lambda item: not any(name in item.nodeid.partition("::")[0] for name in FIRST))
