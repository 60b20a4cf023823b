"""Types of the tensors that NVFP4 can be made of."""

from __future__ import annotations

import torch

QUANTIZABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
