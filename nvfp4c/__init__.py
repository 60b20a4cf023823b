"""nvfp4c: a compiler that makes any PyTorch model train and run in 4-bit NVFP4.

    model = torch.compile(model, backend="nvfp4")

needs no import of this package. What is here serves those who want to see or steer its decisions. Names are imported
when they are first used, so that the command line starts without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvfp4c.explanation import Explanation, Row, explain
    from nvfp4c.numerics import NVFP4Tensor
    from nvfp4c.plan import PrecisionPlan
    from nvfp4c.recipe import RECIPES, Recipe
    from nvfp4c.schedule import set_plan
    from nvfp4c.weight_cache import clear_weight_cache, weight_cache_info

__version__ = "0.1.0"

_HOMES = {
    "RECIPES": "recipe",
    "Explanation": "explanation",
    "NVFP4Tensor": "numerics",
    "PrecisionPlan": "plan",
    "Recipe": "recipe",
    "Row": "explanation",
    "clear_weight_cache": "weight_cache",
    "explain": "explanation",
    "set_plan": "schedule",
    "weight_cache_info": "weight_cache",
}

__all__ = [
    "RECIPES",
    "Explanation",
    "NVFP4Tensor",
    "PrecisionPlan",
    "Recipe",
    "Row",
    "__version__",
    "clear_weight_cache",
    "explain",
    "set_plan",
    "weight_cache_info",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"nvfp4c.{_HOMES[name]}"), name)
    if name in ("numerics", "formats"):
        return import_module(f"nvfp4c.{name}")
    raise AttributeError(f"module 'nvfp4c' has no attribute {name!r}")
