"""The process that compiles kernels for another: much of Triton's compiling is Python, which in the process that trains
would hold everything else up.

It forks a child for each request. The child leaves what it compiles in Triton's cache on disk, where whoever asked
finds it when it compiles the same. Neither a GPU nor PyTorch is needed, so this starts in a fraction of a second.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

PACKAGE = "nvfp4c"

DONE = b"1"
"""The answer to a request whose kernels are compiled. Whatever fails ends the connection without one."""

IDLE = 120
"""Seconds without a request after which the process ends."""

LONGEST = 300
"""Seconds that a child may take, and that its answer is waited for: far more than a kernel takes."""


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def serve(control: socket.socket) -> None:
    """Fork for every connection that comes over `control`, until that is closed or nothing comes for long."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; whoever asks decides
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system clears children away
    control.settimeout(IDLE)
    while True:
        try:
            _, connections, _, _ = socket.recv_fds(control, 1, 1)
        except TimeoutError:
            return
        if not connections:
            return
        if os.fork() == 0:
            control.close()
            answer(socket.socket(fileno=connections[0]))
        os.close(connections[0])


def answer(connection: socket.socket) -> None:
    """What a child does. It does not return."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the assembler is a child whose end matters
        signal.alarm(LONGEST)
        with connection.makefile("rb") as request:
            compile_all(json.loads(request.read()))
        connection.sendall(DONE)
    finally:
        os._exit(0)


def compile_all(asked: Mapping[str, Any]) -> None:
    """Compile what `compiling.compile_apart` describes. Tensors are taken to be aligned, as in `Launch.warm_up`."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    triton.runtime.cache.triton_key = lambda: asked["triton_key"]
    driver.set_active(AbsentGpu(GPUTarget(*asked["target"])))
    for job in asked["jobs"]:
        kernel = getattr(module_of(job["module"], job["path"]), job["name"])
        tensors = (None if dtype is None else MockTensor(dtype) for dtype in job["types"])
        kernel.warmup(*tensors, *job["numbers"], **job["constants"], **job["options"], grid=(1,))


def module_of(name: str, path: str) -> ModuleType:
    """The module of a kernel: by name where it is one of ours, else the emitted file at `path`."""
    if name.split(".")[0] == PACKAGE:
        return import_module(name)
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # where Triton looks up what the kernel's source names
    spec.loader.exec_module(module)
    return module


def leave_out_pytorch() -> None:
    """Triton 3.6 imports it, for the class of tensors. Nothing here is one."""
    absent = ModuleType("torch")
    absent.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
    sys.modules["torch"] = absent


def main(control: str) -> None:
    """control: the number of the file that connections come over."""
    leave_out_pytorch()
    import_module("nvfp4c.codegen.kernels")  # before the first fork, so that no child has to
    serve(socket.socket(fileno=int(control)))
