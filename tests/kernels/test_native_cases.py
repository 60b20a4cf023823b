"""`nvfp4c bench kernels` on a GPU with FP4 tensor cores: the products that it times there, with the FP4 instruction
emulated, are those of its own BF16 reference's operands, quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import needs_loops
from torch import Tensor
from torch.nn import functional as F

from nvfp4c import numerics
from nvfp4c.bench import kernel_cases
from nvfp4c.bench.kernel_cases import Case, Ceiling
from nvfp4c.codegen.targets import TARGETS
from nvfp4c.scale_layout import swizzled_shape, unswizzle

ROWS, COLUMNS = 130, 48
pytestmark = needs_loops


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: list[Tensor], _: Any, scale_b: list[Tensor], *others: Any, **how: Any
) -> Tensor:
    """torch's, of codes and swizzled scales, for a GPU that is not there; `test_native_product.py` checks the rest."""
    values = []
    for codes, (scales, _) in ((a.view(torch.uint8), scale_a), (b.t().view(torch.uint8), scale_b)):
        blocks = codes.shape[1] // 8
        linear = unswizzle(scales.view(swizzled_shape(len(codes), blocks)), len(codes), blocks)
        values.append(numerics.block_values(numerics.unpack(codes), linear))
    return (values[0] @ values[1].T * (scale_a[1] * scale_b[1])).to(how["output_dtype"])


def products(target: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """The products that are timed on a device, taken for one of this target."""
    monkeypatch.setattr(kernel_cases, "resolve", lambda name, device: TARGETS[target])
    monkeypatch.setitem(kernel_cases.INPUT_DTYPE, device.type, torch.bfloat16)
    torch.manual_seed(0)
    return {case.name: case for case in kernel_cases._products(device.type, ROWS, COLUMNS)}


@pytest.mark.parametrize("target", ["sm_100", "sm_103", "sm_120"])
def test_products_of_packed_operands(target: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    found = products(target, device, monkeypatch)
    torch.manual_seed(0)
    a, b = (torch.randn(count, COLUMNS, device=device).bfloat16() for count in (ROWS, COLUMNS))
    wanted = numerics.quantize(a).dequantize().double() @ numerics.quantize(b).dequantize().double().t()
    (reference,) = [case for case in found.values() if case.reference]
    assert torch.equal(reference.call(), a @ b.t())
    packed = [case for name, case in found.items() if name.startswith("FP4 product of packed operands: ")]
    assert [case.name.rpartition(": ")[2] for case in packed] == ["emitted kernel", "library"]
    for case in packed:
        assert (case.ceiling, case.amount, case.reference) == (Ceiling.PRODUCT, reference.amount, False)
        # One rounding to BF16, and FP32 sums, whose error is far less.
        assert ((case.call().double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_other_targets_have_none(target: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    found = products(target, device, monkeypatch)
    assert [case.reference for case in found.values()] == [True, False]
    assert list(found)[1] == "product of dequantised operands"
