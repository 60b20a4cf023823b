"""Compiles one small model under several variations, and prints for each what Inductor's caches said, as JSON.

Run by test_caching in processes of its own: python cached_compile.py NAME VARIATION...
NAME makes the recipe, and with it everything that is cached, different from that of other runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from inside import Mlp
from torch._dynamo.utils import counters

from nvfp4c import backend
from nvfp4c.codegen import cpu_compiler
from nvfp4c.formats import signs_from_seed
from nvfp4c.recipe import RECIPES, Recipe

COUNTERS = (
    ("inductor", "fxgraph_cache_hit"),
    ("inductor", "fxgraph_cache_miss"),
    ("aot_autograd", "autograd_cache_hit"),
    ("aot_autograd", "autograd_cache_miss"),
)


def options(variation: str, recipe: Recipe) -> dict[str, Any]:
    """What differs from the first compile, by name."""
    if variation == "recipe":
        return {"recipe": replace(recipe, gradient_rounding="nearest")}
    if variation == "signs":
        return {"recipe": replace(recipe, signs=signs_from_seed(1))}
    if variation == "plan":
        return {"recipe": recipe, "plan": {"up": {"wgrad": "bf16"}}}
    return {"recipe": recipe}


def count(train: bool, given: dict[str, Any]) -> dict[str, int]:
    """Counters of one step, or of one inference, compiled anew in this process."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model: Callable[..., torch.Tensor] = torch.compile(Mlp(), backend="nvfp4", options=given)
    with torch.set_grad_enabled(train):
        output = model(torch.randn(48, 32))
        if train:
            output.square().mean().backward()
    return {name: counters[group][name] for group, name in COUNTERS}


def main(name: str, *variations: str) -> None:
    # The kernels are compiled and cached like any function; here only the model's own graphs are to be counted.
    cpu_compiler.compile_kind = lambda function, kind: function  # type: ignore[assignment]
    recipe = replace(RECIPES["nvfp4-all"], name=name)
    sources = backend.source_hash
    found = {}
    for variation in variations:
        backend.source_hash = (lambda: "other sources") if variation == "sources" else sources  # type: ignore[assignment]
        found[variation] = {
            "training": count(True, options(variation, recipe)),
            "inference": count(False, options(variation, recipe)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
