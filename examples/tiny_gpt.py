"""Two tasks made of the quickstart's GPT: one that trains, and one that only runs.

nvfp4c explain examples/tiny_gpt.py:training
nvfp4c explain examples/tiny_gpt.py:inference --recipe nvfp4-inference
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nvfp4c.quickstart import data
from nvfp4c.quickstart.model import SIZES, Gpt
from nvfp4c.quickstart.train import Settings, build_model, loss_of, train_batches
from nvfp4c.tasks import Loss


def training() -> tuple[nn.Module, list[Any], Loss]:
    """Eight batches of the Python standard library's source."""
    settings = Settings(SIZES["small"], steps=8, seed=0, device="cpu")
    return build_model(settings), list(train_batches(data.load(), settings)), loss_of


def inference() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A model that is not trained, and what it is called with."""
    model = Gpt(SIZES["small"]).eval().requires_grad_(False)
    return model, (torch.zeros(4, 128, dtype=torch.int64),)
