"""Measure a model on batches with a loss: one forward and backward pass a batch, in high precision.

    probe ── part of each batch, on disk where a folder is given ── merged measurements
A run that was interrupted goes on where it stopped: parts that are there are not measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import math
import pickle
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nvfp4c
from nvfp4c import recipe as recipes
from nvfp4c.errors import DataError
from nvfp4c.recipe import Recipe
from nvfp4c.sensitivity import measurements
from nvfp4c.sensitivity.intercepted import observed, uncompiled
from nvfp4c.sensitivity.measurements import Measurements, merged
from nvfp4c.sensitivity.probe import Probe
from nvfp4c.sensitivity.state import as_it_was, draw_from
from nvfp4c.watch import Watch, unwatched

TORCH = Path(torch.__file__).parent


def everywhere(recipe: str | Recipe) -> Recipe:
    """A recipe without its own choice of layers: what every site would be quantised as."""
    return dataclasses.replace(
        recipes.get(recipe), keep_head=False, bf16_names=(), bf16_last_share=0.0, bf16_first_blocks=0
    )


def measure(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Tensor],
    recipe: str | Recipe = recipes.DEFAULT_RECIPE,
    seed: int = 0,
    folder: Path | None = None,
    watch: Watch = unwatched,
) -> Measurements:
    """Measure what FP4 costs at every site and role. The model, its buffers and gradients, and torch's generators, are
    afterwards what they were.

    seed: of stochastic rounding and of whatever the model draws itself, anew for each batch. folder: where the parts of
    batches are kept, and found again. Raises DataError for batches that cannot be used, a
    loss that is not finite or needs no gradient, and a model without a matmul that can run in FP4.
    """
    check_batches(batches)
    model = uncompiled(model)
    chosen = everywhere(recipe)
    provenance = {**provenance_of(model, batches, chosen, seed), "code_hash": code_hash(model, loss)}
    probe = Probe(seed)
    watched = observed(model, chosen, probe)
    parts = []
    with as_it_was(model, batches):
        for number, batch in enumerate(batches):
            watch("measuring", number, len(batches))
            path = None if folder is None else folder / f"part-{number:04d}.json"
            part = None if path is None else _kept(path, provenance)
            if part is None:
                part = measure_batch(model, watched, batch, loss, probe, number, provenance)
                if path is not None:
                    part.save(path)
            parts.append(part)
    watch("measuring", len(batches), len(batches))
    found = merged(parts)
    check_sites(found)
    return found


def measure_batch(
    model: nn.Module,
    watched: Callable[..., Any],
    batch: Any,
    loss: Callable[[Any, Any], Tensor],
    probe: Probe,
    number: int,
    provenance: dict[str, Any],
) -> Measurements:
    """One pass of a probe. watched: the model as `observed` compiled it for that probe. number: of the batch. Gradients
    of the parameters are afterwards those of this pass. Raises DataError for a loss that is no finite scalar or needs
    no gradient."""
    model.zero_grad(set_to_none=True)
    probe.begin(number)
    draw_from(probe.seed + number, model)
    value = loss(watched, batch)
    check_loss(value, number)
    if not value.requires_grad:
        raise DataError(
            "the loss needs no gradient; let the model's parameters require gradients, "
            "and compute the loss from what the model returns, not under torch.no_grad()"
        )
    value.backward()
    return Measurements(probe.take(), value.item(), 1, provenance)


def check_sites(found: Measurements) -> None:
    """Raise DataError where there was nothing to measure."""
    if not found.sites:
        raise DataError("the model has no matmul with a weight that can run in FP4, so there is nothing to measure")
    if all(site.obstacle for site in found.sites):
        raise DataError(
            "no gradient reaches any matmul with a weight; let the model's parameters require gradients, "
            "and compute the loss from what the model returns"
        )


def check_batches(batches: Sequence[Any]) -> None:
    """Raise DataError for no batches, and for batches that are not all built alike."""
    if not batches:
        raise DataError("there are no batches; at least one is needed")
    first = pytree.tree_structure(batches[0])
    for number, batch in enumerate(batches):
        if pytree.tree_structure(batch) != first:
            raise DataError(
                f"batch {number} is built differently from batch 0: {pytree.tree_structure(batch)} against {first}; "
                "give every batch the same structure"
            )


def check_loss(value: Tensor, number: int) -> None:
    """Raise DataError for a loss that is no finite scalar."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"the loss of batch {number} is no scalar tensor but {shape}; return a mean over the batch")
    check_finite(value.item(), f"batch {number}")


def check_finite(loss: float, batch: str) -> None:
    """Raise DataError for a loss in high precision that is not. batch: the words for it."""
    if not math.isfinite(loss):
        raise DataError(
            f"the loss of {batch} is {loss}; it must be finite in high precision, so look at that batch and at the "
            "model's weights"
        )


def provenance_of(model: nn.Module, batches: Sequence[Any], recipe: Recipe, seed: int) -> dict[str, Any]:
    """What is needed to measure the same again."""
    parameters = list(model.named_parameters())
    held = [*parameters, *model.named_buffers()]
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for _, parameter in parameters),
        "weights_hash": digest([tensor for _, tensor in held]),
        "modes_hash": digest([module.training for module in model.modules()]),
        **provenance_of_data(batches),
        "recipe": json.loads(json.dumps(recipe.to_dict())),
        "seed": seed,
        "device": next((str(parameter.device) for _, parameter in parameters), "cpu"),
        "versions": {
            "nvfp4c": nvfp4c.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def provenance_of_data(batches: Sequence[Any]) -> dict[str, Any]:
    """The part of it that says which batches."""
    return {"data_hash": digest(pytree.tree_leaves(list(batches))), "batches": len(batches)}


def code_hash(model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> str:
    """A hash of the files that the modules of a model and its loss are written in, but for torch's own: parts
    of a measurement are not used again once they are changed. What those files import is not looked at."""
    called = loss.func if isinstance(loss, partial) else loss
    written = {type(module).forward for module in model.modules()}
    found = set()
    for one in (*written, called if inspect.isroutine(called) else type(called).__call__):
        with suppress(TypeError):  # written in C
            found.add(inspect.getfile(inspect.unwrap(one)))
    files = sorted(path for path in map(Path, found) if path.is_file() and not path.is_relative_to(TORCH))
    return digest([path.read_bytes() for path in files])


def digest(values: Sequence[Any]) -> str:
    """A hash of tensors by type, shape and contents, and of anything else as it is pickled, for its text may leave out
    most of it; by its text where it cannot be pickled."""
    found = hashlib.sha256()
    for value in values:
        content = io.BytesIO()
        try:
            _Contents(content).dump(value)
        except (pickle.PicklingError, AttributeError, TypeError):
            content = io.BytesIO(repr(value).encode())
        found.update(content.getbuffer())
    return found.hexdigest()[:16]


class _Contents(pickle.Pickler):
    """Has tensors by what they hold: pickled, they differ by how they lie in memory."""

    def persistent_id(self, value: Any) -> tuple[str, str] | None:
        if not isinstance(value, Tensor):
            return None
        flat = value.detach().cpu().contiguous()
        contents = hashlib.sha256(flat.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        return f"{flat.dtype}{tuple(flat.shape)}", contents


def _kept(path: Path, provenance: dict[str, Any]) -> Measurements | None:
    """A part that an earlier run left, if it can be read and is of the very same measurement."""
    try:
        part = measurements.load(path)
    except DataError:
        return None
    return part if part.provenance == provenance else None
