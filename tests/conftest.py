"""Every test starts from the same random state, and none waits for the Hub.

Random tests draw the same examples in every run; ``--hypothesis-profile=long`` draws many new ones (``test_fuzz.py``).
"""

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, which comes after this file

settings.register_profile("short", derandomize=True, database=None, deadline=None, max_examples=60)
settings.register_profile("long", derandomize=False, deadline=None, max_examples=3000, print_blob=True)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
