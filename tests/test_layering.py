"""Who may import whom, read from the import statements; and other rules on the shape of the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nvfp4c"
LONGEST_FILE = 500

NUMERICS = {"nvfp4c.dtypes", "nvfp4c.formats", "nvfp4c.errors"}
REGION = {"nvfp4c.formats", "nvfp4c.numerics", "nvfp4c.philox", "nvfp4c.scale_layout", "nvfp4c.errors"}
DIALECT = REGION | {"nvfp4c.prologue", "nvfp4c.region"}
MAY_IMPORT = {
    "nvfp4c.errors": set(),
    "nvfp4c.dtypes": {"torch"},
    "nvfp4c.formats": {"torch"},
    "nvfp4c.numerics": {"torch"} | NUMERICS,
    "nvfp4c.philox": {"torch"} | NUMERICS,
    "nvfp4c.scale_layout": {"torch", "nvfp4c.formats"},
    "nvfp4c.prologue": {"torch"},
    "nvfp4c.region": {"torch", "nvfp4c.prologue"} | REGION,
    "nvfp4c.cost": {"torch", "sympy", "nvfp4c.prologue", "nvfp4c.region"},
    "nvfp4c.dialect": {"torch"} | DIALECT,
    "nvfp4c.verify": {
        "torch",
        "nvfp4c.dialect",
        "nvfp4c.region",
        "nvfp4c.scale_layout",
        "nvfp4c.formats",
        "nvfp4c.errors",
    },
    "nvfp4c.files": set(),
    "nvfp4c.weight_cache": {"torch"},
    "nvfp4c.recipe": {"nvfp4c.formats", "nvfp4c.errors", "nvfp4c.files"},
    "nvfp4c.plan": {"nvfp4c.formats", "nvfp4c.errors", "nvfp4c.files", "nvfp4c.recipe"},
    "nvfp4c.passes": {
        "torch",
        "networkx",
        "sympy",
        "nvfp4c.passes",
        "nvfp4c.cost",
        "nvfp4c.dialect",
        "nvfp4c.dtypes",
        "nvfp4c.prologue",
        "nvfp4c.region",
        "nvfp4c.formats",
        "nvfp4c.errors",
        "nvfp4c.recipe",
        "nvfp4c.plan",
        "nvfp4c.sites",
        "nvfp4c.verify",
    },
    "nvfp4c.codegen": {
        "torch",
        "triton",
        "sympy",
        "nvfp4c.codegen",
        "nvfp4c.dialect",
        "nvfp4c.prologue",
        "nvfp4c.region",
        "nvfp4c.formats",
        "nvfp4c.philox",
        "nvfp4c.numerics",
        "nvfp4c.scale_layout",
        "nvfp4c.weight_cache",
        "nvfp4c.errors",
    },
}
"""What a module, or a module of a package, may import besides the standard library."""

FACES = ("nvfp4c.cli", "nvfp4c.quickstart", "nvfp4c.bench")
"""What stands above everything else: nothing else imports them."""

MAY_PRINT = ("nvfp4c.cli", "nvfp4c.bench", "nvfp4c.debug")


def modules() -> dict[str, Path]:
    """Every module of the package by its name; `passes` and `codegen` are links inside it."""
    found = {}
    for folder in (PACKAGE, *(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())):
        for path in folder.glob("*.py"):
            parts = [*folder.relative_to(ROOT).parts, *([] if path.stem == "__init__" else [path.stem])]
            found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """What a module imports, anywhere in it, as full names; `from nvfp4c import x` is `nvfp4c.x`."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def within(name: str, rooms: object) -> bool:
    """Whether a name is one of the rooms, or lies in one: `torch.fx` lies in `torch`."""
    parts = name.split(".")
    return any(".".join(parts[: length + 1]) in rooms for length in range(len(parts)))  # type: ignore[operator]


def room_of(name: str) -> str:
    """`nvfp4c.passes` for `nvfp4c.passes.share`, else the module itself."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_what_they_may(room: str) -> None:
    inside = [name for name in MODULES if room_of(name) == room]
    assert inside, f"there is no {room}"
    foreign = {
        f"{name} imports {imported}"
        for name in inside
        for imported in imports(name)
        if imported.split(".")[0] not in sys.stdlib_module_names and not within(imported, MAY_IMPORT[room])
    }
    assert not foreign


def test_nothing_imports_the_faces() -> None:
    found = {
        f"{name} imports {imported}"
        for name in MODULES
        if not within(name, FACES)
        for imported in imports(name)
        if within(imported, FACES)
    }
    assert not found


def test_no_cycles() -> None:
    """Modules can be read from the bottom up. An import inside a function counts: it would only hide a cycle."""
    graph = nx.DiGraph((name, imported) for name in MODULES for imported in imports(name) if imported in MODULES)
    # The package's own __init__ imports its public names for type checkers only.
    graph.remove_node("nvfp4c")
    assert list(nx.simple_cycles(graph)) == []


def test_only_the_faces_print() -> None:
    found = {
        f"{name}, line {node.lineno}"
        for name, path in MODULES.items()
        if not within(name, MAY_PRINT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id in ("print", "Console")
    }
    assert not found


def test_files_are_short() -> None:
    files = [
        path
        for folder in ("nvfp4c", "passes", "codegen", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > len(MODULES)
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_a_bare_import_is_refused(name: str) -> None:
    """It would make a second copy of the package, with other classes of the same names."""
    found = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode != 0
    assert f"Use 'import nvfp4c.{name}' instead" in found.stderr


def test_every_package_is_installed() -> None:
    """A folder that pyproject does not list would be missing from the wheel."""
    listed = re.search(
        r"^packages = (\[\s*\"nvfp4c\"[^\]]*\"nvfp4c\.[^\]]*\])", (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert listed is not None
    found = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(ast.literal_eval(listed[1])) == found
    nested = {path.parent for path in PACKAGE.rglob("__init__.py")} - {MODULES[name].parent for name in found}
    assert not nested
