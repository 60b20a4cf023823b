"""What tests of regions share: any output, inputs that lie in any way, and when two results are the same."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK, signs_from_seed
from nvfp4c.region import Axis, Form, Layout, Output

LAYOUTS = ("rows", "columns", "strided", "repeated")

ANY_SIGNS = st.just(DEFAULT_SIGNS) | st.integers(0, 99).map(signs_from_seed)
OUTPUTS = st.one_of(
    st.builds(Output, st.just(Form.AMAX), st.sampled_from(Axis), signs=st.none() | ANY_SIGNS),
    st.builds(Output, st.just(Form.ROTATED), st.sampled_from(Axis), signs=ANY_SIGNS),
    st.builds(
        Output,
        st.sampled_from([Form.PACKED, Form.OPERAND]),
        st.sampled_from(Axis),
        st.sampled_from([ROW_BLOCK, TILE_BLOCK]),
        st.sampled_from(["nearest", "stochastic"]),
        st.none() | ANY_SIGNS,
        st.integers(0, 1),
        st.integers(0, 40),
        layout=st.sampled_from(Layout),
    ),
)


def laid_out(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """A tensor of x's values, or of its first row's, on the device and with other strides."""
    if layout == "columns":
        return x.transpose(-1, -2).contiguous().to(device).transpose(-1, -2)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 3::2] = x
        return wide.to(device)[..., 3::2]
    if layout == "repeated":
        return x[..., :1, :].to(device).expand(x.shape)
    return x.to(device)


def bits(x: Tensor) -> Tensor:
    """x's bits on the CPU, with one NaN for all: which NaN an operation makes is up to the processor."""
    x = x.cpu()
    if x.dtype in (torch.uint8, torch.float8_e4m3fn):
        return x.view(torch.uint8)
    x = torch.where(x.isnan(), torch.nan, x)
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def value_bits(x: Tensor) -> Tensor:
    """x's bits on the CPU; zeros without a sign."""
    x = x.cpu()
    if x.dtype in (torch.uint8, torch.float8_e4m3fn):
        return x.view(torch.uint8)
    return (x + 0.0).view({2: torch.int16, 4: torch.int32}[x.element_size()])


def same(output: Output, found: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of an output is the reference's, and contiguous. A zero of an operand may lack its sign."""
    if output.form is Form.OPERAND:
        found, expected = found + 0.0, expected + 0.0
    return found.is_contiguous() and torch.equal(bits(found), bits(expected))
