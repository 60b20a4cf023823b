"""Kernels compile in the background, each once at a time; a first launch waits for its own, and failure is its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import pytest
import torch

pytest.importorskip("triton", reason="no triton for this system")

from nvfp4c.codegen import launching
from nvfp4c.codegen.compiling import Job
from nvfp4c.codegen.launching import Launch, compile_ahead

DEVICE = torch.device("cuda", 0)


class Kernel:
    """Stands for a jit function: takes down what is asked of it."""

    def __init__(self, gate: threading.Event | None = None, broken: bool = False) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.busy = 0
        self.most_at_once = 0
        self._gate = gate
        self._broken = broken
        self.fn = launch_of

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> Any:
        self.busy += 1
        self.most_at_once = max(self.most_at_once, self.busy)
        if self._gate is not None:
            assert self._gate.wait(30)
        self.busy -= 1
        self.calls.append(("compiled", arguments))
        if self._broken:
            raise ValueError("does not compile")
        self.run = None
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.calls.append(("launched", arguments)) or Compiled(self)


class Compiled:
    """What a launch gives back: launches again."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self._kernel.calls.append(("again", arguments))


def launch_of(kernel: Kernel, *numbers: int) -> Launch:
    return Launch(kernel, programs=1, types=(torch.float32,), numbers=numbers, constants={}, warps=4)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_under_way", {})
    monkeypatch.setattr(launching, "_met", WeakSet())
    monkeypatch.setattr(launching.compiling, "settle", lambda device: None)
    monkeypatch.setattr(launching, "get_compile_threads", lambda: 2)
    launching._pool.cache_clear()


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What another process was asked to compile."""
    asked: list[Job] = []

    def compile_apart(jobs: Sequence[Job]) -> bool:
        asked.extend(jobs)
        return True

    monkeypatch.setattr(launching, "compile_apart", compile_apart)
    return asked


def kinds(kernel: Kernel) -> list[str]:
    return [kind for kind, _ in kernel.calls]


def test_a_launch_waits_for_its_kernel() -> None:
    gate = threading.Event()
    kernel = Kernel(gate)
    launch = launch_of(kernel, 16)
    compile_ahead([launch], DEVICE)
    assert kernel.calls == []
    threading.Timer(0.05, gate.set).start()
    x = torch.ones(4)
    launch((x,))
    launch((x,))
    assert kinds(kernel) == ["compiled", "launched", "again"]
    assert kernel.calls[0][1] == (torch.float32, 16)


def test_another_kernel_is_not_waited_for() -> None:
    gate = threading.Event()
    slow, quick = Kernel(gate), Kernel()
    compile_ahead([launch_of(slow)], DEVICE)
    launch_of(quick)((torch.ones(4),))
    assert kinds(quick) == ["launched"] and kinds(slow) == []
    gate.set()


def test_forms_of_one_kernel_compile_in_turn_and_kernels_side_by_side() -> None:
    """Most forms of a kernel are alike, so the first one compiled serves the others."""
    gate = threading.Event()
    kernels = [Kernel(gate), Kernel(gate)]
    compile_ahead([launch_of(kernel, number) for number in range(3) for kernel in kernels], DEVICE)
    gate.set()
    for kernel in kernels:
        launch_of(kernel, 0)((torch.ones(4),))
        assert kinds(kernel) == ["compiled"] * 3 + ["launched"] and kernel.most_at_once == 1
        assert [arguments[-1] for _, arguments in kernel.calls[:3]] == [0, 1, 2]


def test_what_does_not_compile_fails_where_it_is_launched() -> None:
    """The launch compiles it once more, and so says why itself."""
    kernel = Kernel(broken=True)
    compile_ahead([launch_of(kernel)], DEVICE)
    launch_of(kernel)((torch.ones(4),))
    assert kinds(kernel) == ["compiled", "launched"]


def test_nothing_is_kept_of_what_was_waited_for() -> None:
    kernel = Kernel()
    compile_ahead([launch_of(kernel)], DEVICE)
    launch_of(kernel)((torch.ones(4),))
    assert kernel not in launching._under_way


def test_only_kernels_that_are_new_compile_apart(apart: list[Job]) -> None:
    kernel, other = Kernel(), Kernel()
    for launches in ([launch_of(kernel, 1), launch_of(kernel, 2)], [launch_of(kernel, 3), launch_of(other, 4)]):
        compile_ahead(launches, DEVICE)
        for launch in launches:
            launch((torch.ones(4),))
    assert sorted(job.numbers for job in apart) == [(1,), (2,), (4,)]
    assert {job.types for job in apart} == {("torch.float32",)}
    assert {job.module for job in apart} == {__name__} and {job.path for job in apart} == {__file__}
    assert apart[0].options == {"num_warps": 4, "enable_fp_fusion": False}


def test_with_one_thread_all_compile_here(apart: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "get_compile_threads", lambda: 1)
    kernel = Kernel()
    compile_ahead([launch_of(kernel)], DEVICE)
    launch_of(kernel)((torch.ones(4),))
    assert kinds(kernel) == ["compiled", "launched"] and apart == []
