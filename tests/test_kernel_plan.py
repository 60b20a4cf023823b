"""What `explain --kernels` says of products that took over a sum. Of regions: `test_cli.py`, and what is weighed:
`passes/test_absorb.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nvfp4c.kernel_plan import kernel_plan
from nvfp4c.options import parse
from nvfp4c.tasks import Task

pytest.importorskip("triton", reason="no triton for this system")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.fc(x))


@pytest.mark.parametrize(
    ("target", "operands", "width"),
    [("sm_90", ("bfloat16 [40, 32]", "bfloat16 [32, 32]"), 2), ("sm_100", ("uint8 [40, 16]", "uint8 [32, 16]"), 0.5)],
)
def test_a_sum_that_a_product_took_over(target: str, operands: tuple[str, str], width: float) -> None:
    model, x = Residual().bfloat16().requires_grad_(False), torch.randn(40, 32).bfloat16()
    rows = kernel_plan(Task("residual", model, args=(x,)), parse({"recipe": "nvfp4-all"}), target)
    (row,) = [row for row in rows if "residual" in row.computes]
    assert str(row) == f"product, and the sum of it and a residual; reads {', '.join((*operands, 'bfloat16 [40, 32]'))}"
    assert (row.graph, row.sites, row.decision) == ("forward", ("fc fprop",), "")
    # Two operands, of packed ones 512 scales each, which is what a tile of them takes; two amaxes, residual and result.
    scales = 2 * 512 if target == "sm_100" else 0
    assert row.bytes == (40 + 32) * 32 * width + scales + 2 * 4 + 2 * 40 * 32 * 2
