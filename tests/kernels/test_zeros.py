"""Numbers that start as 0: each is handed out once, wherever a kernel is launched from."""

from __future__ import annotations

import pytest
import torch

from nvfp4c.codegen import operations, zeros
from nvfp4c.formats import DEFAULT_SIGNS
from nvfp4c.region import Axis, Form, Layout, Output, Region

FEW = 3
REDUCED = Region((Output(Form.AMAX), Output(Form.AMAX, Axis.COLUMNS, signs=DEFAULT_SIGNS))).to_json()


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run out after a few."""
    monkeypatch.setattr(zeros, "COUNT", FEW)
    monkeypatch.setattr(zeros, "_SPARE", {})


def test_each_is_zero_and_handed_out_once(device: torch.device) -> None:
    device = torch.empty(0, device=device).device
    with torch.inference_mode():
        found = [zeros.take(device) for _ in range(3 * FEW)]
    for number, each in enumerate(found, start=1):
        assert each.shape == () and each.dtype is torch.float32 and each.data_ptr() % 16 == 0
        assert not each.is_inference()
        assert each == 0
        each.fill_(number)
    assert [float(each) for each in found] == list(range(1, 3 * FEW + 1))
    assert len({each.untyped_storage().data_ptr() for each in found}) == len(found), "operations return no aliases"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_they_are_float32_whatever_is_made_by_default(default: torch.dtype, device: torch.device) -> None:
    torch.set_default_dtype(default)
    try:
        found = zeros.take(device)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32


def test_kernels_start_from_them(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amaxes are taken from there, and scales padded to whole tiles are zeroed all the same."""
    monkeypatch.setattr(zeros, "at_hand", lambda device: True)
    native = Output(Form.PACKED, layout=Layout.NATIVE)
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    for factor in range(1, 3 * FEW):
        scaled = (x * factor).to(device)
        amaxes = operations.region([scaled], [], None, REDUCED)
        expected = torch.ops.nvfp4.region([scaled.cpu()], [], None, REDUCED)
        assert [float(amax) for amax in amaxes] == [float(amax) for amax in expected]
        text = Region((native,)).to_json()
        packed = operations.region([scaled], amaxes[:1], None, text)
        wanted = torch.ops.nvfp4.region([scaled.cpu()], expected[:1], None, text)
        for one, other in zip(packed, wanted, strict=True):
            assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))


def on_default_stream(x: torch.Tensor) -> list[torch.Tensor]:
    return operations.REGION([x], [], None, REDUCED)


def on_another_stream(x: torch.Tensor) -> list[torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert not zeros.at_hand(x.device)
        found = operations.REGION([x], [], None, REDUCED)
    torch.cuda.current_stream().wait_stream(stream)
    return found


def in_a_graph_replayed_twice(x: torch.Tensor) -> list[torch.Tensor]:
    values, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = operations.REGION([values], [], None, REDUCED)
    for factor in (8, 1):  # what the first replay left must not be seen by the second
        values.copy_(factor * x)
        graph.replay()
    return found


@pytest.mark.gpu  # streams and CUDA graphs are a GPU's own
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("way", [on_default_stream, on_another_stream, in_a_graph_replayed_twice])
def test_amaxes_are_right_wherever_they_are_reduced(way, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    kept = []
    for scale in range(2 * FEW, 0, -1):
        x = (scale * torch.randn(48, 80, generator=generator)).to(torch.bfloat16)
        expected = torch.ops.nvfp4.region([x], [], None, REDUCED)
        kept += list(zip(way(x.to(device)), expected, strict=True))
    for found, expected in kept:
        assert torch.equal(found.cpu(), expected)
