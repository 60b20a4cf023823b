"""A BF16 product with its factor, bias and residual in the FP32 epilogue: `cublasLtMatmul`, called through ctypes.

torch takes a product's factor only as a number known on the host. Ours, amax_a * amax_b / 2688^2, is on the GPU;
applied after torch.mm it would cost a second rounding or an FP32 product in memory. cuBLASLt reads it from the device,
adds the residual and the bias, and rounds once. The library is the one that torch has loaded.
Source: cuBLAS documentation, "Using the cuBLASLt API".
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20
"""What torch gives cuBLAS on Hopper."""

PLANS_KEPT = 4096
"""Of how many problems the plan is remembered: sizes may be dynamic."""

VECTOR = 8
"""Elements of two bytes that are moved at once."""

LOCK = Lock()
"""A plan holds the address of a bias from one call to the next, and backward passes run on threads of their own."""

COMPUTE_32F = 68
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
POINTER_MODE, TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER = 2, 3, 4, 7, 8
POINTER_MODE_DEVICE = 1
EPILOGUE_BIAS = 4
LAYOUT_BATCH_COUNT, LAYOUT_BATCH_OFFSET = 5, 6
PREFERENCE_WORKSPACE, PREFERENCE_REDUCTIONS = 1, 3
REDUCED_IN_FP32 = 2
"""Partial sums of a product that is split along its contraction axis are added in FP32, not in the result's type."""

PREFERENCE_ALIGNMENTS = (5, 6, 7, 8)
ALIGNED = 256
"""Bytes: what torch aligns new tensors to, at least, and as much as cuBLAS asks about."""


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def library() -> ctypes.CDLL | None:
    """cuBLASLt, or None where torch has none."""
    if torch.version.cuda is None:
        return None
    try:
        found = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None
    found.cublasLtMatmul.argtypes = [ctypes.c_void_p] * 14 + [ctypes.c_size_t, ctypes.c_void_p]
    return found


@cache
def _handle(device: torch.device) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(_library().cublasLtCreate(ctypes.byref(handle)))
    return handle


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "callers ask first"
    return found


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt failed with status {status}")


@dataclass(frozen=True)
class Plan:
    """A problem as cuBLASLt describes it, and the algorithm it picked: host memory only, which is never given back.

    layouts: of its A, B, C and D.
    """

    handle: ctypes.c_void_p
    description: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    heuristic: Heuristic
    algorithm: int


@dataclass(frozen=True)
class Matrix:
    """How a matrix, or a batch of them, lies in memory, as cuBLAS sees it: by columns. flipped: it is the transpose
    of what is asked for."""

    rows: int
    columns: int
    leading: int
    count: int
    offset: int
    flipped: bool


Strides = tuple[int, ...]
Place = tuple[Strides, Strides, int]
"""Shape and strides of a tensor, and what its address is a multiple of."""


def _matrix(shape: Strides, stride: Strides) -> Matrix | None:
    """A [.., M, K] operand in memory; None if no axis is contiguous."""
    count, offset = (1, 0) if len(shape) == 2 else (shape[0], stride[0])
    rows, columns = shape[-2:]
    if stride[-1] == 1 and (stride[-2] >= columns or rows == 1):
        return Matrix(columns, rows, max(stride[-2], columns), count, offset, False)
    if stride[-2] == 1 and (stride[-1] >= rows or columns == 1):
        return Matrix(rows, columns, max(stride[-1], rows), count, offset, True)
    return None


def _set(setter: str, target: ctypes.c_void_p, attribute: int, value: Any) -> None:
    _check(getattr(_library(), setter)(target, attribute, ctypes.byref(value), ctypes.sizeof(value)))


def _layout(dtype: torch.dtype, matrix: Matrix) -> ctypes.c_void_p:
    layout = ctypes.c_void_p()
    sizes = ctypes.c_uint64(matrix.rows), ctypes.c_uint64(matrix.columns), ctypes.c_int64(matrix.leading)
    _check(_library().cublasLtMatrixLayoutCreate(ctypes.byref(layout), TYPES[dtype], *sizes))
    if matrix.count != 1:
        _set("cublasLtMatrixLayoutSetAttribute", layout, LAYOUT_BATCH_COUNT, ctypes.c_int32(matrix.count))
        _set("cublasLtMatrixLayoutSetAttribute", layout, LAYOUT_BATCH_OFFSET, ctypes.c_int64(matrix.offset))
    return layout


def _fuses(a: Place, b: Place, bias: Place | None, residual: Place | None) -> bool:
    """Whether what there is of bias and residual is added before the rounding.

    Where a size, or the distance of two rows, fills no whole 16 bytes cuBLASLt was seen to round first and to add then,
    with CUDA 13, a quarter to a third of the results differing. M counts where `a` lies by columns, or something has a
    row for each of M; with a bias alone, and `a` by rows, any M was right.
    """
    added = [x for x in (bias, residual) if x is not None]
    if not added:
        return True
    of_a, of_b = _matrix(*a[:2]), _matrix(*b[:2])
    if of_a is None or of_b is None:
        return False
    any_m = residual is None and not of_a.flipped
    sizes = [a[0][-1], b[0][-2], *(() if any_m else (a[0][-2],))]
    sizes += [step for matrix in (of_a, of_b) for step in (matrix.leading, matrix.offset)]
    whole = all(size % VECTOR == 0 for size in sizes)
    whole = whole and all(aligned % (2 * VECTOR) == 0 for _, _, aligned in (a, b, *added))
    return whole and (bias is None or bias[:2] == (b[0][-2:-1], (1,)))


@lru_cache(maxsize=PLANS_KEPT)
def _plan(
    device: torch.device,
    a: Place,
    b: Place,
    bias: Place | None,
    residual: Place | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Plan | None:
    """None where the library cannot do it."""
    left, right = _matrix(*b[:2]), _matrix(*a[:2])
    able = library() is not None and out_dtype in TYPES and 0 not in (*a[0], *b[0]) and _fuses(a, b, bias, residual)
    if left is None or right is None or not able:
        return None
    cublas = _library()
    description = ctypes.c_void_p()
    _check(cublas.cublasLtMatmulDescCreate(ctypes.byref(description), COMPUTE_32F, TYPES[torch.float32]))
    setter = "cublasLtMatmulDescSetAttribute"
    _set(setter, description, POINTER_MODE, ctypes.c_int32(POINTER_MODE_DEVICE))
    # By columns a contiguous [N, K] is [K, N]: cuBLAS's A is asked for as [N, K], its B as [K, M], and D is [N, M].
    _set(setter, description, TRANSPOSE_A, ctypes.c_int32(not left.flipped))
    _set(setter, description, TRANSPOSE_B, ctypes.c_int32(right.flipped))
    if bias is not None:
        _set(setter, description, EPILOGUE, ctypes.c_int32(EPILOGUE_BIAS))
    m, n = a[0][-2], b[0][-2]
    out = Matrix(n, m, n, left.count, m * n, False)
    added = None if residual is None else _matrix(*residual[:2])
    assert added is None or not added.flipped, "callers give it by rows"
    layouts = _layout(dtype, left), _layout(dtype, right), _layout(out_dtype, added or out), _layout(out_dtype, out)
    preference = ctypes.c_void_p()
    _check(cublas.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
    setter = "cublasLtMatmulPreferenceSetAttribute"
    _set(setter, preference, PREFERENCE_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))
    _set(setter, preference, PREFERENCE_REDUCTIONS, ctypes.c_uint32(REDUCED_IN_FP32))
    alignments = (b[2], a[2], ALIGNED if residual is None else residual[2], ALIGNED)
    for attribute, alignment in zip(PREFERENCE_ALIGNMENTS, alignments, strict=True):
        _set(setter, preference, attribute, ctypes.c_uint32(alignment))
    heuristic, found = Heuristic(), ctypes.c_int()
    problem = _handle(device), description, *layouts, preference
    status = cublas.cublasLtMatmulAlgoGetHeuristic(*problem, 1, ctypes.byref(heuristic), ctypes.byref(found))
    cublas.cublasLtMatmulPreferenceDestroy(preference)
    if status or not found.value:
        return None
    return Plan(_handle(device), description, layouts, heuristic, ctypes.addressof(heuristic))


def _place(x: Tensor) -> Place:
    address = x.data_ptr()
    return x.shape, x.stride(), min(address & -address, ALIGNED)


def _by_rows(x: Tensor) -> Tensor:
    """A residual, or a copy of it, whose rows lie without gaps within, and each in whole vectors."""
    *steps, within = x.stride()
    by_rows = within == 1 and steps[-1] >= x.shape[-1] and all(step > 0 and step % VECTOR == 0 for step in steps)
    return x if by_rows else x.contiguous()


def product(
    a: Tensor, b: Tensor, factors: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor | None:
    """(a @ b^T) * factors[0] + residual + bias, rounded once: [.., M, N] in `out_dtype`.

    a: [.., M, K], b: [.., N, K], bfloat16, either axis contiguous; factors: float32 [3] on the GPU, the second 0, the
    third 1: what cuBLASLt multiplies a residual by that is not there, and one that is; bias: [N] in `out_dtype`;
    residual: [.., M, N] in `out_dtype`, only read. None where cuBLASLt cannot do it: the caller has another way.
    """
    if any(term is not None and term.dtype != out_dtype for term in (bias, residual)):
        return None
    added = None if residual is None else _by_rows(residual)
    terms = (None if term is None else _place(term) for term in (bias, added))
    plan = _plan(a.device, _place(a), _place(b), *terms, a.dtype, out_dtype)
    if plan is None:
        return None
    out = a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=out_dtype)
    workspace = a.new_empty(plan.heuristic.workspace_bytes, dtype=torch.uint8)
    layout_a, layout_b, layout_c, layout_out = plan.layouts
    beta = factors.data_ptr() + (1 if added is None else 2) * factors.element_size()
    with LOCK:
        if bias is not None:
            _set("cublasLtMatmulDescSetAttribute", plan.description, BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        status = _library().cublasLtMatmul(
            plan.handle,
            plan.description,
            factors.data_ptr(),
            b.data_ptr(),
            layout_a,
            a.data_ptr(),
            layout_b,
            beta,
            (out if added is None else added).data_ptr(),
            layout_c,
            out.data_ptr(),
            layout_out,
            plan.algorithm,
            workspace.data_ptr(),
            plan.heuristic.workspace_bytes,
            torch.cuda.current_stream(a.device).cuda_stream,
        )
    _check(status)
    return out
