"""How long a cold compile takes: a process of its own with empty caches, for what one compile leaves helps the next.

python -m nvfp4c.bench.compile_time VARIANT SIZE DEVICE    prints one JSON object
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from nvfp4c.bench.llama import size_named
from nvfp4c.bench.variants import build_steps, variants
from nvfp4c.errors import TargetError

Result = TypeVar("Result")


@dataclass(frozen=True)
class CompileTime:
    """Seconds of the first forward and backward pass less those of the second, which compiles nothing.

    startup: of what a process needs once whatever it compiles: a compile of one small product, with its imports.
    """

    forward: float
    backward: float
    startup: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def measure(variant: str, size: str, device: str) -> CompileTime:
    """Compile one variant's step in a new process. Raises TargetError with its last words when that fails."""
    with tempfile.TemporaryDirectory(prefix="nvfp4c-bench-") as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
        }
        found = subprocess.run(
            [sys.executable, "-m", __name__, variant, size, device],
            env={**os.environ, **caches},
            capture_output=True,
            text=True,
            check=False,
        )
    if found.returncode != 0:
        words = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        raise TargetError(
            f"The compile time of variant {variant!r} at size {size!r} could not be measured: {words[-1]}; "
            "pass --compiles 0 to leave it out"
        )
    return CompileTime(**json.loads(found.stdout.splitlines()[-1]))


def compile_here(variant: str, size: str, device: str) -> CompileTime:
    """The same in this process, whose caches have to be empty."""
    (chosen,) = (known for known in variants(device, [variant]) if known.name == variant)
    startup, _ = _timed(lambda: _small_compile(device), device)
    step = build_steps([chosen], size_named(size), device)[variant]
    passes = []
    for _ in range(2):
        step.prepare()
        forward, output = _timed(step.forward, device)
        backward, _ = _timed(partial(step.backward, output), device)
        passes.append((forward, backward))
    (first_forward, first_backward), (forward, backward) = passes
    return CompileTime(first_forward - forward, first_backward - backward, startup)


def _small_compile(device: str) -> None:
    x = torch.ones(16, 16, device=device, requires_grad=True)
    torch.compile(lambda x: (x @ x).relu())(x).sum().backward()


def _timed(call: Callable[[], Result], device: str) -> tuple[float, Result]:
    """Seconds until the device is done, and the result."""
    began = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    print(json.dumps(asdict(compile_here(*sys.argv[1:4]))))
