"""What the tests of the backend share: one cache of compiled code, one thread, a record of what kernels were given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inside import KernelCall
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._pytree import tree_map

from nvfp4c.codegen import cpu, cpu_compiler

CACHE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code compiled for one test is found by the next, and none of earlier runs, unless the caller has set a folder."""
    with pytest.MonkeyPatch.context() as patch:
        # Inductor sets the variable too, when it first looks for its default folder.
        if os.environ.get(CACHE) in (None, default_cache_dir()):
            patch.setenv(CACHE, str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On several threads, steps as small as these would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def eager_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU kernels run as they are written. Compiling them takes seconds each, and does not change a bit of what they
    give: test_training_step and test_cpu_kernels say so. What earlier tests compiled is forgotten, for Dynamo compiles
    one function only so many times."""
    torch._dynamo.reset()
    monkeypatch.setattr(cpu_compiler, "compile_kind", lambda function, kind: function)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[KernelCall]:
    """Every call of a CPU kernel, in order, with copies of its arguments and result: Inductor uses memory again."""
    calls: list[KernelCall] = []
    original = cpu._call

    def recorded(function: Callable[..., Any], x: Tensor, *others: Any) -> Any:
        before = tree_map(_copy, (x, others))
        result = original(function, x, *others)
        calls.append(KernelCall(function.__name__.strip("_"), *before, tree_map(_copy, result)))
        return result

    monkeypatch.setattr(cpu, "_call", recorded)
    return calls


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
