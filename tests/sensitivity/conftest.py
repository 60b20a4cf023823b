"""Quantising without compiling it: the CPU's own operations take seconds to compile, and are tested elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nvfp4c.codegen import cpu_compiler


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU target's operations as they are written; Dynamo forgets everything before and after."""
    monkeypatch.setattr(cpu_compiler, "compile_kind", lambda function, kind: function)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
