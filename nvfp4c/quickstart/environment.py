"""What a measurement ran on: versions, commit, device and platform."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("nvfp4c", "torch", "triton")


def version_of(package: str) -> str | None:
    """The installed version, or None when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of what a result depends on."""
    found = {package: version_of(package) or "not installed" for package in PACKAGES}
    return {"python": platform.python_version(), **found}


def device_name(device: str) -> str:
    """The processor's or GPU's name, with what bounds its speed."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"


def describe(device: str) -> dict[str, str]:
    """Everything above as labelled lines, for a report."""
    return {"device": device_name(device), "system": f"{platform.system()} {platform.machine()}", **versions()}


def commit() -> str:
    """The commit of the checkout that this file is tracked in, marked when files differ from it."""
    here = Path(__file__)
    # Asked first: an installed copy may lie inside the checkout of another project.
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    found = tracked and _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return found or "not in a git checkout"


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, "" when it fails or is not installed."""
    try:
        found = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _processor() -> str:
    """The CPU's name as Linux tells it, or what Python knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
