"""What cuBLASLt is told, as far as a machine without a GPU can tell: a stand-in reads it as the documentation says.

It multiplies matrices by columns, in place of the library: alpha op(A) op(B) + beta C + bias, in FP32, rounded once.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4c import dialect
from nvfp4c.codegen import cublas

DTYPES = {number: dtype for dtype, number in cublas.TYPES.items()}
FACTORS = torch.tensor([0.5, 0.0, 1.0])
"""A power of two rounds nothing, so it does not matter when sums are exact."""

AMAXES = torch.tensor(2688.0), torch.tensor(1344.0)
"""Their factor is the same."""


@dataclass
class StandIn:
    """The functions that are called. objects: what was made, by its number; asked: the alignments of each problem."""

    objects: dict[int, dict[Any, Any]] = field(default_factory=dict)
    asked: list[dict[Any, Any]] = field(default_factory=list)

    def _made(self, pointer: Any, **contents: Any) -> int:
        pointer._obj.value = len(self.objects) + 1
        self.objects[pointer._obj.value] = dict(contents)
        return 0

    def _set(self, target: Any, attribute: int, value: Any, size: int) -> int:
        assert size == ctypes.sizeof(value._obj)
        self.objects[target.value][attribute] = value._obj.value
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatrixLayoutSetAttribute = cublasLtMatmulPreferenceSetAttribute = _set

    def cublasLtMatmulDescCreate(self, pointer: Any, compute: int, scale: int) -> int:
        assert compute == cublas.COMPUTE_32F and DTYPES[scale] is torch.float32
        return self._made(pointer)

    def cublasLtMatrixLayoutCreate(self, pointer: Any, dtype: int, rows: Any, columns: Any, leading: Any) -> int:
        assert leading.value >= rows.value > 0 and columns.value > 0
        return self._made(pointer, dtype=DTYPES[dtype], shape=(rows.value, columns.value), leading=leading.value)

    def cublasLtMatmulPreferenceCreate(self, pointer: Any) -> int:
        return self._made(pointer)

    def cublasLtMatmulPreferenceDestroy(self, preference: Any) -> int:
        self.asked.append(self.objects[preference.value])
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *given: Any) -> int:
        given[-1]._obj.value = 1
        return 0

    def cublasLtMatmul(self, handle: Any, description: Any, *given: Any) -> int:
        how = self.objects[description.value]
        assert how[cublas.POINTER_MODE] == cublas.POINTER_MODE_DEVICE
        alpha, a, layout_a, b, layout_b, beta, c, layout_c, d, layout_d, *_ = given
        left, right, added, out = (
            self._matrix(*one) for one in ((a, layout_a), (b, layout_b), (c, layout_c), (d, layout_d))
        )
        assert added.dtype is out.dtype and added.shape == out.shape
        left = left.mT if how[cublas.TRANSPOSE_A] else left
        right = right.mT if how[cublas.TRANSPOSE_B] else right
        found = memory(alpha, 1, torch.float32) * (left.float() @ right.float())
        factor = memory(beta, 1, torch.float32)
        found = found + factor * added.float() if factor else found  # what is multiplied by 0 may be anything
        if how.get(cublas.EPILOGUE) == cublas.EPILOGUE_BIAS:
            found = found + memory(how[cublas.BIAS_POINTER], out.shape[-2], out.dtype).float()[:, None]
        out.copy_(found)
        return 0

    def _matrix(self, address: int, layout: Any) -> Tensor:
        """[batch, rows, columns], by columns."""
        one = self.objects[layout.value]
        (rows, columns), leading = one["shape"], one["leading"]
        count, offset = one.get(cublas.LAYOUT_BATCH_COUNT, 1), one.get(cublas.LAYOUT_BATCH_OFFSET, 0)
        elements = (count - 1) * offset + (columns - 1) * leading + rows
        return memory(address, elements, one["dtype"]).as_strided((count, rows, columns), (offset, 1, leading))


def memory(address: int, elements: int, dtype: torch.dtype) -> Tensor:
    buffer = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    found = StandIn()
    monkeypatch.setattr(cublas, "library", lambda: found)
    monkeypatch.setattr(cublas, "_handle", lambda device: ctypes.c_void_p())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    cublas._plan.cache_clear()
    yield found
    cublas._plan.cache_clear()


def aligned(x: Tensor, dtype: torch.dtype, apart: int = 0, shift: int = 0) -> Tensor:
    """x in memory that starts at a multiple of 256 bytes and so many elements, its rows so many elements apart."""
    *lead, columns = x.shape
    count = x.numel() // columns * (columns + apart)
    buffer = torch.empty(count + shift + 256 // dtype.itemsize, dtype=dtype)
    start = -buffer.data_ptr() % 256 // dtype.itemsize + shift
    return buffer[start : start + count].view(*lead, columns + apart)[..., :columns].copy_(x)


def numbers(*shape: int, most: int, parts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator) / parts


def operands(batch: tuple[int, ...], m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Numbers whose products have exact sums in FP32."""
    a = aligned(numbers(*batch, m, k, most=12, parts=4, seed=0), torch.bfloat16)
    return a, aligned(numbers(*batch, n, k, most=12, parts=4, seed=1), torch.bfloat16)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("apart", [None, 0, 8], ids=["no residual", "residual", "rows apart"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_every_term_is_told(
    library: StandIn, biased: bool, apart: int | None, batch: tuple[int, ...], out_dtype: torch.dtype
) -> None:
    """Either operand by rows or columns; nothing else is read, and only the result written."""
    a, b = operands(batch, 24, 40, 16)
    bias = aligned(numbers(1, 40, most=200, parts=8, seed=2)[0], out_dtype) if biased else None
    values = numbers(*batch, 24, 40, most=200, parts=8, seed=3)
    residual = None if apart is None else aligned(values, out_dtype, apart)
    expected = dialect.PRODUCT(a, b, *AMAXES, bias, residual, out_dtype)
    for left, right in itertools.product((a, aligned(a.mT, a.dtype).mT), (b, aligned(b.mT, b.dtype).mT)):
        found = cublas.product(left, right, FACTORS, bias, residual, out_dtype)
        assert found is not None and torch.equal(found, expected)
    assert residual is None or torch.equal(residual, values.to(out_dtype))
    assert {place: asked[place] for asked in library.asked for place in cublas.PREFERENCE_ALIGNMENTS} == dict.fromkeys(
        cublas.PREFERENCE_ALIGNMENTS, 256
    )


COPIED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart by no whole vector": lambda x: aligned(x, x.dtype, apart=3),
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
    "one matrix for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", COPIED.values(), ids=COPIED)
def test_other_residuals_are_copied(library: StandIn, layout: Callable[[Tensor], Tensor]) -> None:
    a, b = operands((3,), 24, 40, 16)
    residual = layout(aligned(numbers(3, 24, 40, most=200, parts=8, seed=3), torch.bfloat16))
    expected = dialect.PRODUCT(a, b, *AMAXES, None, residual, torch.bfloat16)
    found = cublas.product(a, b, FACTORS, None, residual, torch.bfloat16)
    assert found is not None and torch.equal(found, expected)


def test_one_problem_with_residuals_that_lie_in_other_ways(library: StandIn) -> None:
    """Each has a plan of its own, and gets that again."""
    a, b = operands((), 24, 40, 16)
    values = numbers(24, 40, most=200, parts=8, seed=3)
    places = [aligned(values, torch.bfloat16), aligned(values, torch.bfloat16, apart=16), None]
    places.append(aligned(values, torch.bfloat16, shift=8))
    for _ in range(2):
        for residual in places:
            expected = dialect.PRODUCT(a, b, *AMAXES, None, residual, torch.bfloat16)
            found = cublas.product(a, b, FACTORS, None, residual, torch.bfloat16)
            assert found is not None and torch.equal(found, expected)
    assert [asked[cublas.PREFERENCE_ALIGNMENTS[2]] for asked in library.asked] == [256, 256, 256, 16]


REFUSED: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "rows": lambda a, b, x: (a[:23], b, x[:23]),
    "columns": lambda a, b, x: (a, b[:39], x[:, :39]),
    "terms": lambda a, b, x: (a[:, :15], b[:, :15], x),
    "address": lambda a, b, x: (a, b, aligned(x, x.dtype, shift=1)),
    "type": lambda a, b, x: (a, b, x.float()),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_might_be_rounded_twice_is_left_to_others(library: StandIn, change: Callable[..., Any]) -> None:
    """The same problem without a residual is taken."""
    a, b = operands((), 24, 40, 16)
    a, b, residual = change(a, b, aligned(numbers(24, 40, most=200, parts=8, seed=3), torch.bfloat16))
    assert cublas.product(a, b, FACTORS, None, residual, torch.bfloat16) is None
    assert cublas.product(a, b, FACTORS, None, None, torch.bfloat16) is not None


@pytest.mark.parametrize(
    ("a", "b", "biased", "summed"),
    [
        (torch.zeros(33, 256), torch.zeros(128, 256), True, False),
        (torch.zeros(256, 40).mT, torch.zeros(256, 128).mT, True, True),
        (torch.zeros(40, 272)[:, :256], torch.zeros(128, 256), True, True),
        (torch.zeros(2, 40, 256), torch.zeros(2, 128, 256), False, True),
    ],
)
def test_a_sum_in_whole_vectors_is_cublas_own(a: Tensor, b: Tensor, biased: bool, summed: bool) -> None:
    assert _fuses(a, b, biased, summed)


@pytest.mark.parametrize(
    ("a", "b", "biased", "summed"),
    [
        (torch.zeros(33, 256), torch.zeros(128, 256), False, True),
        (torch.zeros(256, 33).mT, torch.zeros(128, 256), True, False),
        (torch.zeros(40, 260)[:, :256], torch.zeros(128, 256), True, False),
        (torch.zeros(40, 256), torch.zeros(256, 132).mT[:128], True, False),
        (torch.zeros(40, 77), torch.zeros(128, 77), True, False),
        (torch.zeros(40, 256), torch.zeros(77, 256), True, False),
        (torch.zeros(2, 41 * 256 + 4)[:, : 40 * 256].unflatten(1, (40, 256)), torch.zeros(2, 128, 256), False, True),
    ],
)
def test_a_sum_in_parts_of_vectors_is_not(a: Tensor, b: Tensor, biased: bool, summed: bool) -> None:
    """It would be added after the rounding."""
    assert not _fuses(a, b, biased, summed)


def _fuses(a: Tensor, b: Tensor, biased: bool, summed: bool) -> bool:
    bias, residual = torch.zeros(b.shape[-2]), torch.zeros(*a.shape[:-1], b.shape[-2])
    terms = bias if biased else None, residual if summed else None
    return cublas._fuses(*(None if x is None else cublas._place(x) for x in (a, b, *terms)))
