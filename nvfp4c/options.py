"""What a user can ask of the backend, checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nvfp4c import plan as plans
from nvfp4c import recipe as recipes
from nvfp4c.errors import OptionError, TargetError, nearest
from nvfp4c.plan import EMPTY_PLAN, PrecisionPlan
from nvfp4c.recipe import DEFAULT_RECIPE, Recipe

OPTIONS = ("recipe", "plan", "target", "product", "mode", "weight_cache")
PRODUCTS = ("auto", "triton", "library")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WEIGHT_CACHES = ("off", "training", "always")
OLDEST_TORCH, NEXT_TORCH = (2, 11), (2, 16)


@dataclass(frozen=True)
class Options:
    """recipe: what to do. plan: where. target: "auto" or a target's name. mode: what it means for Inductor.

    product: what multiplies packed operands on targets with FP4 tensor cores: "triton", the kernel that nvfp4c emits
    (also for "auto"), or "library", torch's `scaled_mm`. weight_cache: in which graphs a weight that stays the same is
    quantised only once; on GPUs that multiply dequantised operands.
    """

    recipe: Recipe = recipes.RECIPES[DEFAULT_RECIPE]
    plan: PrecisionPlan = EMPTY_PLAN
    target: str = "auto"
    product: str = "auto"
    mode: str = "default"
    weight_cache: str = "training"

    @property
    def changes_nothing(self) -> bool:
        """Whether no matmul can run in NVFP4 under these options."""
        return not self.recipe.roles and not self.plan.rules


def parse(options: Mapping[str, object] | None = None, mode: str | None = None) -> Options:
    """Options from what `torch.compile` hands on. Raises OptionError or PlanError saying what is wrong.

    `torch.compile` takes either options or a mode, so a mode may be among the options too.
    """
    given = dict(options or {})
    chosen = mode or given.get("mode", "default")
    for name in given:
        if name not in OPTIONS:
            raise OptionError(f"unknown option {name!r}; {nearest(str(name), OPTIONS)} (options: {', '.join(OPTIONS)})")
    if chosen not in MODES:
        raise OptionError(f"unknown mode {chosen!r}; {nearest(str(chosen), MODES)} (modes: {', '.join(MODES)})")
    target = given.get("target", "auto")
    if not isinstance(target, str):
        raise OptionError(f"target must be a name such as 'auto' or 'sm_90', got {type(target).__name__}")
    product = given.get("product", "auto")
    if product not in PRODUCTS:
        hint = nearest(str(product), PRODUCTS)
        raise OptionError(f"unknown product {product!r}; {hint} (valid: {', '.join(PRODUCTS)})")
    kept = given.get("weight_cache", True)
    if isinstance(kept, bool):
        kept = "training" if kept else "off"
    if kept not in WEIGHT_CACHES:
        valid = ", ".join(WEIGHT_CACHES)
        raise OptionError(f"weight_cache must be True, False, or one of {valid}; got {kept!r}")
    return Options(
        recipe=recipes.get(given.get("recipe", DEFAULT_RECIPE)),  # type: ignore[arg-type]
        plan=plans.get(given.get("plan")),
        target=target,
        product=str(product),
        mode=str(chosen),
        weight_cache=str(kept),
    )


def check_torch(version: str = torch.__version__) -> None:
    """Raise TargetError unless this version of PyTorch is one that the backend was built for."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if not OLDEST_TORCH <= numbers < NEXT_TORCH:
        oldest, newest = "2.11", "2.15"
        raise TargetError(f"PyTorch {version} is not supported; install torch {oldest} to {newest}")
