"""Asking a process of its own to compile kernels: see `compile_server`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from threading import Lock
from typing import Any

from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime import driver
from triton.runtime.cache import triton_key

from nvfp4c.codegen import compile_server
from nvfp4c.codegen.compile_server import DONE

LONGEST = 300
"""Seconds that an answer is waited for: far more than a kernel takes."""


@dataclass(frozen=True)
class Job:
    """A kernel and what it is compiled for.

    module, path: where the kernel is, see `compile_server.module_of`. types: of tensors, as PyTorch writes them; None
    where there is none. The rest is as in `launching.Launch`.
    """

    module: str
    path: str
    name: str
    types: tuple[str | None, ...]
    numbers: tuple[int, ...]
    constants: Mapping[str, int]
    options: Mapping[str, Any]


def start() -> None:
    """Start the server, if that has not been done: it takes a moment, so before there is anything to compile."""
    with _lock, suppress(OSError):  # whoever needs it finds out
        _server()


def compile_apart(jobs: Sequence[Job], device: int = 0) -> bool:
    """Compile for the current GPU, number `device`, in another process, and wait for it. False where it came to
    nothing, whatever the reason: compiling here shows it."""
    with _lock:
        settle(device)
    target = driver.active.get_current_target()
    asked = {
        "target": (target.backend, target.arch, target.warp_size),
        "environment": dict(os.environ),
        "triton_key": triton_key(),
        "jobs": [asdict(job) for job in jobs],
    }
    try:
        with connect() as connection:
            connection.settimeout(LONGEST)
            connection.sendall(json.dumps(asked).encode())
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(len(DONE)) == DONE
    except OSError:
        return False


@cache
def settle(device: int) -> None:
    """Decide on the assembler and the cache as Inductor will when it compiles kernels of its own: what is compiled
    before would not be found after."""
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))
    _set_triton_ptxas_path()
    get_ptxas_version.cache_clear()  # it may know another's, which Triton would keep to
    triton_key()  # a hash of Triton's files, half a second's work: once


def connect() -> socket.socket:
    """A connection to a child of the server, which is started where it does not run. Raises OSError where there can be
    none."""
    ours, theirs = socket.socketpair()
    with theirs, _lock:
        try:
            socket.send_fds(_server().control, [b"!"], [theirs.fileno()])
        except ConnectionError:  # it has ended
            _server.cache_clear()
            socket.send_fds(_server().control, [b"!"], [theirs.fileno()])
    return ours


_lock = Lock()


@dataclass(frozen=True)
class Server:
    """The process, which takes connections over `control` and ends when that is closed, so with this process."""

    process: subprocess.Popen[bytes]
    control: socket.socket


@cache
def _server() -> Server:
    if not hasattr(os, "fork"):
        raise OSError("this system cannot fork")
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", compile_server.__name__, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    return Server(process, ours)
