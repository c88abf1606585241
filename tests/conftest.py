"""Every test starts from the same random state, and none waits for the Hub."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, which comes after this file


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
