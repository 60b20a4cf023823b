"""Numbers on a GPU that start as 0, hundreds from a few launches: one for each would last as long as reducing a MiB.

A number is handed out once, on the stream that it was made on. That is the default stream, which no CUDA graph can
capture: one that is captured has to make its zeros again each time it is replayed. Each has memory of its own, as what
an operation returns must.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNT = 256
"""Of numbers made at once."""

DEFAULT_STREAM = 0

_SPARE: dict[torch.device, list[Tensor]] = {}


def at_hand(device: torch.device) -> bool:
    """Whether numbers can be taken for a kernel that is launched now."""
    return device.type == "cuda" and torch._C._cuda_getCurrentRawStream(device.index) == DEFAULT_STREAM


def take(device: torch.device) -> Tensor:
    """A float32 scalar, 0, that nobody else has. Backward passes take theirs on threads of their own."""
    spare = _SPARE.setdefault(device, [])
    while True:
        try:
            return spare.pop()
        except IndexError:
            spare.extend(_made(device))


def _made(device: torch.device) -> list[Tensor]:
    with torch.inference_mode(False):  # training may come after inference
        found = [torch.empty((), dtype=torch.float32, device=device) for _ in range(COUNT)]
        torch._foreach_zero_(found)
    return found
