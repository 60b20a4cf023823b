"""`nvfp4c doctor`: whether this machine has what nvfp4c needs, and what it would use."""

from __future__ import annotations

import json
import platform
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

MISSING = 1
"""Exit code when something needed is missing."""


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. problem: what is wrong and what to do about it, "" when all is well."""

    name: str
    found: str
    problem: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")] = False) -> None:
    """Show versions, devices and what would be used; fail when something needed is missing."""
    checks = examine()
    problems = [check for check in checks if check.problem]
    if as_json:
        print(json.dumps({"ok": not problems, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for check in checks:
            mark = "[red]missing[/]" if check.problem else "[green]ok[/]"
            table.add_row(mark, check.name, check.found)
        Console().print(table)
    for check in problems:
        Console(stderr=True).print(f"{check.name}: {check.problem}", style="red", highlight=False, soft_wrap=True)
    if problems:
        raise typer.Exit(MISSING)


def examine() -> list[Check]:
    """All checks; without PyTorch no more than the first two can be made."""
    checks = [Check("python", platform.python_version())]
    try:
        import torch
    except (ImportError, OSError) as error:
        return [*checks, Check("torch", "cannot be imported", f"{error}; install PyTorch 2.11 to 2.15")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks += [_torch(), _triton(device.type), _nvfp4c(), _entry_point()]
    checks += [_device(device.type), _target(device)]
    checks += [_compiler(), _python_headers(), _cache_folder()]
    return checks


def _torch() -> Check:
    import torch

    from nvfp4c.errors import TargetError
    from nvfp4c.options import check_torch

    try:
        check_torch()
    except TargetError as error:
        return Check("torch", str(torch.__version__), str(error))
    return Check("torch", f"{torch.__version__}, supported")


def _triton(device: str) -> Check:
    from nvfp4c.quickstart.environment import version_of

    version = version_of("triton")
    if version is None and device == "cuda":
        return Check("triton", "not installed", "the kernels for GPUs need it; pip install triton")
    return Check("triton", version or "not installed, and not needed on a CPU")


def _nvfp4c() -> Check:
    from nvfp4c.quickstart.environment import version_of

    version = version_of("nvfp4c")
    return Check("nvfp4c", version or "not installed", "" if version else "run pip install in its folder")


def _entry_point() -> Check:
    """PyTorch finds a backend by name through this entry point, without an import by the user."""
    found = [entry.value for entry in metadata.entry_points(group="torch_dynamo_backends", name="nvfp4")]
    if not found:
        return Check("backend", "not found", 'torch.compile(backend="nvfp4") cannot be found; install nvfp4c again')
    return Check("backend", f"nvfp4, from {found[0]}")


def _device(device: str) -> Check:
    from nvfp4c.quickstart.environment import device_name

    return Check("device", device_name(device))


def _target(device: torch.device) -> Check:
    from nvfp4c.codegen.targets import resolve
    from nvfp4c.errors import TargetError

    try:
        target = resolve("auto", device)
    except TargetError as error:
        return Check("target", "none", str(error))
    arithmetic = "native FP4" if target.native_fp4 else "exact emulation of FP4"
    return Check("target", f"{target.name}, {arithmetic}")


def _compiler() -> Check:
    """What Inductor would build its C++ with; on a GPU too, it builds host code."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return Check("C++ compiler", get_cpp_compiler())
    except InvalidCxxCompiler:
        return Check("C++ compiler", "not found", "Inductor needs one; install g++ or clang, or set CXX to its path")


def _python_headers() -> Check:
    """Code that Inductor and Triton generate includes Python.h."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return Check("Python headers", "not found", f"{header} is missing; install this Python's development files")
    return Check("Python headers", str(header.parent))


def _cache_folder() -> Check:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        folder = cache_dir()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return Check("cache folder", "not writable", f"{error}; set TORCHINDUCTOR_CACHE_DIR to a folder you can write")
    return Check("cache folder", folder)
