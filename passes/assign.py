"""Decide for every classified matmul whether it runs in NVFP4, and how. CLASSIFIED -> ASSIGNED.

The recipe's rules come first, then the plan, which overrides them; an obstacle found by `classify` is final. Only
metadata is written, and every bf16 decision carries its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from nvfp4c.dialect import ASSIGNMENT, Assignment, Matmul, Operand, Quantization, matmul_of
from nvfp4c.formats import ROW_BLOCK
from nvfp4c.passes.matmul_graph import block_counts, block_of, heads, matmul_graph
from nvfp4c.plan import EMPTY_PLAN, PrecisionPlan
from nvfp4c.recipe import Recipe


@dataclass(frozen=True)
class Assign:
    """Write an `Assignment` beside every `Matmul`. model_sites: names of all the model's weights, to count blocks."""

    recipe: Recipe
    plan: PrecisionPlan = EMPTY_PLAN
    model_sites: tuple[str, ...] = ()

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        sites = matmul_graph(graph)
        counts = block_counts((*self.model_sites, *sites))
        last = heads(sites)
        for node in graph.nodes:
            found = matmul_of(node)
            if found is None:
                continue
            reason = found.obstacle or self._reason(found, counts, last)
            left, right = (self._quantization(found, operand) for operand in found.operands)
            if reason is None and left is None and right is None:
                reason = f"recipe {self.recipe.name}: quantises weights, and {found.role.value} has none"
            node.meta[ASSIGNMENT] = Assignment(left, right, "") if reason is None else Assignment(None, None, reason)
        return graph

    def _reason(self, matmul: Matmul, counts: dict[str, int], last: frozenset[str]) -> str | None:
        """Why a matmul stays in bf16, or None to run it in NVFP4."""
        decision = self.plan.decide(matmul.site, matmul.role.value)
        if decision is not None:
            precision, pattern = decision
            return f"plan: {pattern}" if precision == "bf16" else None
        return self._recipe_reason(matmul, counts, last)

    def _recipe_reason(self, matmul: Matmul, counts: dict[str, int], last: frozenset[str]) -> str | None:
        recipe = self.recipe
        if matmul.role.value not in recipe.roles:
            return f"recipe {recipe.name}: no {matmul.role.value} in NVFP4"
        if recipe.keep_head and matmul.site in last:
            return "output head: no other matmul follows it"
        for pattern in recipe.bf16_names:
            if fnmatchcase(matmul.site, pattern):
                return f"recipe {recipe.name}: name matches {pattern}"
        block = block_of(matmul.site)
        if block is None:
            return None
        prefix, index = block
        count = counts[prefix]
        first_kept, last_kept = recipe.first_blocks(count), recipe.last_blocks(count)
        if index < first_kept:
            return f"one of the first {first_kept} of {count} blocks"
        if index >= count - last_kept:
            return f"one of the last {last_kept} of {count} blocks"
        return None

    def _quantization(self, matmul: Matmul, operand: Operand) -> Quantization | None:
        recipe = self.recipe
        signs = recipe.signs if matmul.role.value in recipe.rotate else None
        if operand is Operand.WEIGHT:
            return Quantization(recipe.weight_block, recipe.weight_rounding, signs)
        if not recipe.quantize_activations:
            return None
        rounding = recipe.input_rounding if operand is Operand.INPUT else recipe.gradient_rounding
        return Quantization(ROW_BLOCK, rounding, signs)
