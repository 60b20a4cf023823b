"""A trained GPT as one file: its weights, rounded to FP16, and its size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

from nvfp4c.errors import DataError
from nvfp4c.files import write_bytes
from nvfp4c.quickstart.model import Gpt, Size


def save(model: Gpt, size: Size, path: Path) -> None:
    """Write the weights as safetensors, whole or not at all. FP16 halves the file and keeps 11 bits of a weight."""
    weights = {name: weight.detach().to("cpu", torch.float16) for name, weight in model.state_dict().items()}
    write_bytes(path, _safetensors().torch.save(weights, metadata={"size": json.dumps(asdict(size))}))


def load(path: Path) -> tuple[Gpt, Size]:
    """The model that `save` wrote, in FP32 on the CPU, and its size; nothing in the file is executed.

    Raises DataError for a file that is none of it.
    """
    safetensors = _safetensors()
    if not path.is_file():
        raise DataError(f"there is no file {path}; examples/train_gpt.py writes one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            size = Size(**json.loads(file.metadata()["size"]))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        model = Gpt(size)
        model.load_state_dict(weights)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(f"{path} holds no GPT that examples/train_gpt.py wrote: {reason}") from error
    return model, size


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise DataError('a trained GPT needs safetensors, which is not installed; pip install "nvfp4c[hf]"') from error
    return safetensors
