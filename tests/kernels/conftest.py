"""Where these tests run: in Triton's interpreter under TRITON_INTERPRET=1 (see ../test_kernels.py), else on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import patch_once_a_kernel

    patch_once_a_kernel()
    DEVICES = [pytest.param("cpu")]
elif torch.cuda.is_available():
    DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
else:
    DEVICES = []

collect_ignore_glob = [] if DEVICES else ["test_*.py"]


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
