"""Two environment variables for looking inside: NVFP4C_DEBUG=0..4 (how much to say) and NVFP4C_DUMP=folder.

1: one line a graph. 2: every decision and its reason. 3: how each pass changed the graph. 4: the graph after each pass.
With NVFP4C_DUMP each graph gets a folder with one numbered text file a pass, so that neighbours can be compared with
diff.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import fx

from nvfp4c.dialect import Stage, assignment_of, matmul_of
from nvfp4c.errors import OptionError
from nvfp4c.files import write_text


def level() -> int:
    """The level asked for. Raises OptionError when NVFP4C_DEBUG is not 0 to 4."""
    text = os.environ.get("NVFP4C_DEBUG") or "0"
    if text not in ("0", "1", "2", "3", "4"):
        raise OptionError(f"NVFP4C_DEBUG must be 0, 1, 2, 3 or 4, got {text!r}")
    return int(text)


def dump_folder() -> Path | None:
    """Where to write graphs, or None."""
    folder = os.environ.get("NVFP4C_DUMP")
    return Path(folder) if folder else None


def wanted() -> bool:
    """Whether anybody wants to see passes run; then they must run, and no cache may take their place."""
    return level() > 0 or dump_folder() is not None


def readable(graph: fx.Graph) -> str:
    """A graph as text, one node a line: name, shape, call, and what passes wrote on it."""
    lines = []
    for node in graph.nodes:
        found, decided = matmul_of(node), assignment_of(node)
        note = f"  # {found.site} {found.role.value}" if found else ""
        note += f" {decided.precision} {decided.reason}".rstrip() if decided else ""
        lines.append(f"{node.format_node() or node.name}{_shape(node)}{note}")
    return "\n".join(lines) + "\n"


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"  {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""


class GraphLog:
    """Follows one graph through the passes, as the environment variables ask."""

    def __init__(self, title: str) -> None:
        self._level = level()
        self._folder = dump_folder()
        if self._folder is not None:
            number = len(list(self._folder.glob(f"*-{title}"))) if self._folder.exists() else 0
            self._folder = self._folder / f"{number:03d}-{title}"
        self._title = title
        self._step = 0
        self._before: Counter[str] = Counter()

    def after(self, name: str, stage: Stage, graph: fx.Graph) -> None:
        """Note that a pass has run."""
        if self._folder is not None:
            write_text(self._folder / f"{self._step:02d}-{name}.txt", readable(graph))
        if self._level >= 2 and stage is Stage.ASSIGNED:
            for node in graph.nodes:
                found, decided = matmul_of(node), assignment_of(node)
                if found and decided:
                    self._say(f"{found.site} {found.role.value}: {decided.precision} {decided.reason}".rstrip())
        if self._level >= 3:
            now = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
            changes = {key: now[key] - self._before[key] for key in now | self._before if now[key] != self._before[key]}
            if self._step:
                self._say(f"{name}: " + (", ".join(f"{n:+d} {key}" for key, n in changes.items()) or "metadata only"))
            self._before = now
        if self._level >= 4:
            self._say(f"after {name}:\n{readable(graph)}")
        self._step += 1

    def done(self, graph: fx.Graph) -> None:
        """Note that the last pass has run."""
        if self._level >= 1:
            self._say(f"{len(graph.nodes)} nodes")

    def _say(self, text: str) -> None:
        print(f"nvfp4c {self._title}: {text}", file=sys.stderr)
