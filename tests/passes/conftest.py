"""Settings of the passes' tests."""

from __future__ import annotations

import pytest
import torch

# These tests make thousands of tiny steps; waiting for other threads would take longer than the steps themselves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
