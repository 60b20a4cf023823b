"""The passes in their order, and the runner that takes a graph through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from nvfp4c import cost
from nvfp4c.debug import GraphLog
from nvfp4c.dialect import KernelTable, Stage
from nvfp4c.passes.absorb import Absorb
from nvfp4c.passes.assign import Assign
from nvfp4c.passes.cache_weights import MarkWeights, cache_weights
from nvfp4c.passes.classify import Classify
from nvfp4c.passes.fold_hadamard import fold_hadamard
from nvfp4c.passes.fold_residual import fold_residual
from nvfp4c.passes.fuse import fuse
from nvfp4c.passes.insert_hadamard import insert_hadamard
from nvfp4c.passes.insert_scaling import insert_scaling
from nvfp4c.passes.lower import Lower
from nvfp4c.passes.native import native
from nvfp4c.passes.place import place
from nvfp4c.passes.save_sums import save_sums
from nvfp4c.passes.share import share
from nvfp4c.plan import PrecisionPlan
from nvfp4c.recipe import Recipe
from nvfp4c.sites import ModelNames

Pass = Callable[[fx.Graph], fx.Graph]
Observer = Callable[[str, Stage, fx.Graph], None]


@dataclass(frozen=True)
class Step:
    """One pass, its name, and the stage that a graph is in after it."""

    name: str
    run: Pass
    stage: Stage


def decide(recipe: Recipe, plan: PrecisionPlan, names: ModelNames) -> tuple[Step, ...]:
    """Find out what every matmul is and what becomes of it; only metadata changes."""
    return (
        Step("classify", Classify(names), Stage.CLASSIFIED),
        Step("assign", Assign(recipe, plan, names.weights), Stage.ASSIGNED),
    )


def rewrite(packed: bool = False) -> tuple[Step, ...]:
    """Turn decisions into operations of the dialect, on the joint graph. packed: whether the target's products read
    packed operands, as `KernelTable.native` says."""
    return (
        Step("insert_hadamard", insert_hadamard, Stage.ROTATED),
        Step("insert_scaling", insert_scaling, Stage.SCALED),
        Step("share", share, Stage.SCALED),
        Step("fold_hadamard", fold_hadamard, Stage.SCALED),
        *((Step("native", native, Stage.SCALED),) if packed else ()),
        Step("place", place, Stage.SCALED),
        Step("save_sums", save_sums, Stage.SCALED),
    )


def remember(names: ModelNames, weight_cache: str) -> tuple[Step, ...]:
    """Let weights be quantised once a version, on the joint graph; where, as in `Options`."""
    mark = Step("mark_weights", MarkWeights(names, inference=weight_cache == "always"), Stage.SCALED)
    return () if weight_cache == "off" else (mark,)


def joint(recipe: Recipe, plan: PrecisionPlan, names: ModelNames, packed: bool, weight_cache: str) -> tuple[Step, ...]:
    """All that runs on the joint graph; packed and weight_cache as for `rewrite` and `remember`."""
    return (*decide(recipe, plan, names), *rewrite(packed), *remember(names, weight_cache))


def lowering(table: KernelTable) -> tuple[Step, ...]:
    """Turn the dialect into what a target runs, on the forward and the backward graph apart."""
    lower = Step("lower", Lower(table), Stage.LOWERED)
    if table.region is None:
        return (lower,)
    ahead = table.compile_kernels
    return (*fusing(table.target), *((Step("compile_kernels", ahead, Stage.FUSED),) if ahead else ()), lower)


def fusing(target: str) -> tuple[Step, ...]:
    """Gather what one kernel can compute, for targets whose kernels are regions."""
    return (
        Step("fuse", fuse, Stage.FUSED),
        Step("cache_weights", cache_weights, Stage.FUSED),
        Step("fold_residual", fold_residual, Stage.FUSED),
        Step("absorb", Absorb(cost.MACHINES[target]), Stage.FUSED),
    )


def run(graph: fx.Graph, steps: Sequence[Step], title: str, observers: Sequence[Observer] = ()) -> fx.Graph:
    """Take a graph through steps; each observer sees it after every one of them."""
    log = GraphLog(title)
    log.after("input", Stage.AOT, graph)
    for step in steps:
        graph = step.run(graph)
        log.after(step.name, step.stage, graph)
        for observe in observers:
            observe(step.name, step.stage, graph)
    log.done(graph)
    return graph
