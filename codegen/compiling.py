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
from functools import lru_cache
from threading import Lock, Thread
from typing import Any

from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime import driver
from triton.runtime.cache import triton_key

from nvfp4c.codegen import compile_server
from nvfp4c.codegen.compile_server import DONE, LONGEST

SERVER = compile_server.__name__

ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
"""Variables of the environment that name them."""


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
    """Start the server, if none runs: it takes a moment, so before there is anything to compile."""
    with _lock, suppress(Exception):  # whoever needs it finds out
        _running()


def settle(device: int) -> None:
    """Decide on the assembler and the cache as Inductor will when it compiles kernels of its own for this GPU: what is
    compiled before would not be found after. For the thread that compiles graphs, as the environment changes."""
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))
    _set_triton_ptxas_path()
    _forget_version(*(os.environ.get(name) for name in ASSEMBLERS))


@lru_cache(maxsize=1)
def _forget_version(*_: str | None) -> None:
    """Once for each choice of assemblers, whoever made it: Triton may know the version of one that it asked before, and
    would look for kernels under that."""
    get_ptxas_version.cache_clear()


def compile_apart(jobs: Sequence[Job]) -> bool:
    """Compile for the current GPU in another process, and wait for it; `settle` comes before. False where it came to
    nothing, whatever the reason: compiling here shows it."""
    try:
        with _lock:
            key = triton_key()  # a hash of Triton's files, half a second's work: by one thread
        target = driver.active.get_current_target()
        asked = {
            "target": (target.backend, target.arch, target.warp_size),
            "environment": dict(os.environ),
            "triton_key": key,
            "jobs": [asdict(job) for job in jobs],
        }
        with connect() as connection:
            connection.settimeout(LONGEST)
            connection.sendall(json.dumps(asked).encode())
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(len(DONE)) == DONE
    except Exception:
        return False


def connect() -> socket.socket:
    """A connection to a child of the server, which is started where it does not run. Raises OSError where there can be
    none."""
    ours, theirs = socket.socketpair()
    with theirs, _lock:
        try:
            socket.send_fds(_running().control, [b"!"], [theirs.fileno()])
        except ConnectionError:  # it has just ended
            socket.send_fds(_started().control, [b"!"], [theirs.fileno()])
    return ours


@dataclass(frozen=True)
class Server:
    """The process, which takes connections over `control` and ends when that is closed, so with this process."""

    process: subprocess.Popen[bytes]
    control: socket.socket


_lock = Lock()
_servers: list[Server] = []
"""The one that was started last, if any."""


def _running() -> Server:
    return _servers[0] if _servers and _servers[0].process.poll() is None else _started()


def _started() -> Server:
    if not hasattr(os, "fork"):
        raise OSError("this system cannot fork")
    forget()
    paths = [path for path in sys.path if isinstance(path, str)]
    script = f"import sys; sys.path[:] = sys.argv[2:]; import {SERVER}; {SERVER}.main(sys.argv[1])"
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(theirs.fileno()), *paths],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    Thread(target=process.wait, daemon=True).start()  # or it would stay, ended, in the table of processes
    _servers.append(Server(process, ours))
    return _servers[0]


def forget() -> None:
    """Let go of the server: it ends, unless another process holds on to it too. For forked processes as well, which
    would keep their parent's."""
    while _servers:
        _servers.pop().control.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
