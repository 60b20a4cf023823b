"""The verifier: it passes what the pipeline makes, and names the node of every graph broken on purpose."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from graphs import SIGNS, aten, captured, nvfp4, run_until, steps_of, trace
from torch import Tensor, fx, nn

from nvfp4c.capture import CapturedGraph
from nvfp4c.dialect import (
    AMAX,
    ASSIGNMENT,
    BLOCK_SCALED_MM,
    DEQUANTIZE,
    HADAMARD,
    MATMUL,
    PRODUCT,
    QUANTIZE,
    REGION,
    SCALED_MM,
    TRANSPOSE,
    WEIGHT,
    Assignment,
    Matmul,
    Operand,
    Quantization,
    Role,
    Stage,
)
from nvfp4c.errors import VerifyError
from nvfp4c.passes.cache_weights import MARK, Trust, cache_weights
from nvfp4c.passes.fuse import fuse
from nvfp4c.passes.graph_edit import insert
from nvfp4c.passes.native import native
from nvfp4c.recipe import RECIPES, Recipe
from nvfp4c.region import Axis, Form, Layout, Output, Region
from nvfp4c.verify import ALLOWED, verify

ALL = RECIPES["nvfp4-all"]
WEIGHT_ONLY = RECIPES["nvfp4-weight-only"]
STAGE_AFTER = {step.name: step.stage for step in steps_of(ALL, captured(nn.Linear(16, 16), torch.randn(16, 16)).names)}
LONGEST_MESSAGE = 400
"""Characters: a message is read in a terminal. The longest shows two quantisations with 16 signs each."""


def mlp() -> CapturedGraph:
    return captured(nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), torch.randn(16, 32))


def after(last: str, recipe: Recipe = ALL) -> fx.Graph:
    return run_until(mlp(), last, recipe)


def calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def quantizations(graph: fx.Graph, rounding: str, block: list[int] | None = None) -> list[fx.Node]:
    found = [node for node in calls(graph, QUANTIZE) if node.args[3] == rounding]
    return [node for node in found if block is None or node.args[2] == block]


def signs_of(graph: fx.Graph, signs: list[int]) -> fx.Node:
    """Rotate the last quantisation with other signs, and its amax too."""
    node = [found for found in calls(graph, QUANTIZE) if len(found.args) > 4 and found.args[4] is not None][-1]
    node.update_arg(4, signs)
    node.args[1].update_arg(1, signs)
    (product,) = {user for item in node.users for user in item.users}
    return product


@dataclass(frozen=True)
class Broken:
    """One way to break a graph. after: whose result is broken. damage: does it, and returns the node to blame."""

    after: str
    damage: Callable[[fx.Graph], fx.Node]
    message: str
    recipe: Recipe = ALL
    stage: Stage | None = None


def insert_amax(graph: fx.Graph) -> fx.Node:
    node = calls(graph, aten.mm.default)[0]
    with graph.inserting_before(node):
        found = graph.call_function(AMAX, (node.args[0],))
    found.meta["val"] = torch.empty(())
    return found


def set_argument(target: Any, place: int, value: Any) -> Callable[[fx.Graph], fx.Node]:
    def damage(graph: fx.Graph) -> fx.Node:
        node = calls(graph, target)[-1]
        node.update_arg(place, value)
        return node

    return damage


def copy_argument(place: int, source: int, target: Any = SCALED_MM) -> Callable[[fx.Graph], fx.Node]:
    """Hand the last product one of its arguments twice."""

    def damage(graph: fx.Graph) -> fx.Node:
        node = calls(graph, target)[-1]
        node.update_arg(place, node.args[source])
        return node

    return damage


def drop(target: Any, key: str) -> Callable[[fx.Graph], fx.Node]:
    def damage(graph: fx.Graph) -> fx.Node:
        node = calls(graph, target)[0]
        del node.meta[key]
        return node

    return damage


def put(target: Any, key: str, value: object) -> Callable[[fx.Graph], fx.Node]:
    def damage(graph: fx.Graph) -> fx.Node:
        node = calls(graph, target)[0]
        node.meta[key] = value
        return node

    return damage


def wrong_value(target: Any, change: Callable[[Any], Any]) -> Callable[[fx.Graph], fx.Node]:
    def damage(graph: fx.Graph) -> fx.Node:
        node = calls(graph, target)[0]
        node.meta["val"] = change(node.meta["val"])
        return node

    return damage


def undecided(graph: fx.Graph) -> fx.Node:
    """A matmul that should have been replaced, back in the graph with its decision."""
    product = calls(graph, SCALED_MM)[0]
    with graph.inserting_after(product):
        node = graph.call_function(aten.mm.default, (product, product))
    node.meta.update(product.meta)
    return node


def use_before_definition(graph: fx.Graph) -> fx.Node:
    node = calls(graph, aten.mm.default)[0]
    node.args[0].prepend(node)
    return node.args[0]


def by_name(graph: fx.Graph) -> fx.Node:
    node = quantizations(graph, "nearest")[0]
    node.args, node.kwargs = node.args[:3], {"rounding": "nearest"}
    return node


def same_stream(graph: fx.Graph) -> fx.Node:
    first, second = quantizations(graph, "stochastic")[:2]
    second.update_arg(6, first.args[6])
    return second


def no_seed(graph: fx.Graph) -> fx.Node:
    node = quantizations(graph, "stochastic")[0]
    node.update_arg(5, None)
    return node


def amax_of_another(graph: fx.Graph) -> fx.Node:
    """Quantise with the amax of the tensor before its rotation."""
    node = next(found for found in calls(graph, QUANTIZE) if len(found.args) > 4 and found.args[4] is not None)
    node.args[1].args = node.args[1].args[:1]
    return node


def other_block(graph: fx.Graph) -> fx.Node:
    node = quantizations(graph, "nearest", [16, 16])[0]
    node.update_arg(2, [1, 16])
    return next(user for item in node.users for user in item.users if user.target is SCALED_MM)


def turned_rows(graph: fx.Graph) -> fx.Node:
    """The forward may use 1x16 blocks of a weight, but a transpose of them is no 1x16 block."""
    (turn,) = calls(graph, TRANSPOSE)
    turn.args[0].args[0].update_arg(2, [1, 16])
    for node in graph.nodes:
        node.meta.pop(ASSIGNMENT, None)
    return turn


def undo_one_operand(graph: fx.Graph) -> fx.Node:
    """Read the weight itself where its dequantised form should be."""
    node = calls(graph, aten.addmm.default)[0]
    dequantized = node.args[2].args[0]
    node.args[2].update_arg(0, dequantized.args[2].args[0])
    return node


def rotate_one_operand(graph: fx.Graph) -> fx.Node:
    node = next(found for found in calls(graph, aten.mm.default) if found.args[0].target is HADAMARD)
    node.update_arg(0, node.args[0].args[0])
    return node


def rotate_both_with(signs: list[int]) -> Callable[[fx.Graph], fx.Node]:
    def damage(graph: fx.Graph) -> fx.Node:
        node = next(found for found in calls(graph, aten.mm.default) if found.args[0].target is HADAMARD)
        node.args[0].update_arg(1, signs)
        node.args[1].args[0].update_arg(1, signs)
        return node

    return damage


def fused(damage: Callable[[fx.Graph], fx.Node]) -> Callable[[fx.Graph], fx.Node]:
    """Damage done after `fuse`, which is no pass of the joint graph."""
    return lambda graph: damage(fuse(graph))


def as_weight(graph: fx.Graph, matrix: fx.Node, outputs: tuple[Output, ...]) -> fx.Node:
    """A weight operation that nobody reads, on a fused graph."""
    with graph.inserting_before(next(iter(matrix.users))):
        return insert(graph, WEIGHT, (matrix, torch.float32, Region(outputs).to_json(), False), matrix)


def weight_of_an_activation(graph: fx.Graph) -> fx.Node:
    product = calls(fuse(graph), PRODUCT)[0]
    return as_weight(graph, product, (Output(Form.OPERAND),))


def weight_in_two_ways(graph: fx.Graph) -> fx.Node:
    weight = graph.find_nodes(op="placeholder")[0]
    return as_weight(fuse(graph), weight, (Output(Form.OPERAND), Output(Form.PACKED, Axis.COLUMNS)))


def weight_in_two_layouts(graph: fx.Graph) -> fx.Node:
    weight = graph.find_nodes(op="placeholder")[0]
    return as_weight(fuse(graph), weight, (Output(Form.OPERAND), Output(Form.PACKED, layout=Layout.NATIVE)))


def weight_dequantised_in_the_native_layout(graph: fx.Graph) -> fx.Node:
    weight = graph.find_nodes(op="placeholder")[0]
    return as_weight(fuse(graph), weight, (Output(Form.OPERAND, layout=Layout.NATIVE),))


def amax_of_another_weight(graph: fx.Graph) -> fx.Node:
    """A product of a remembered weight is given the amax of the same weight, cast to another type first."""
    for node in graph.find_nodes(op="placeholder"):
        node.meta[MARK] = Trust.NOWHERE
    product = next(node for node in calls(cache_weights(graph), BLOCK_SCALED_MM) if made_by_weight(node.args[3]))
    weight, _, text, sure = product.args[3].args[0].args
    with graph.inserting_before(product):
        other = insert(graph, WEIGHT, (weight, torch.float16, text, sure), product)
        product.update_arg(5, insert(graph, operator.getitem, (other, 0), product))
    return product


def made_by_weight(item: fx.Node) -> bool:
    return item.target is operator.getitem and item.args[0].target is WEIGHT


def packed(damage: Callable[[fx.Graph], fx.Node]) -> Callable[[fx.Graph], fx.Node]:
    """Damage done to the fused graph of a target that multiplies packed operands."""
    return lambda graph: damage(fuse(native(graph)))


def other_rounding(graph: fx.Graph) -> fx.Node:
    """Change what a region computes, not what its product was assigned."""
    product = calls(graph, BLOCK_SCALED_MM)[0]
    region = product.args[0].args[0]
    region.update_arg(3, region.args[3].replace('"nearest"', '"stochastic"'))
    return product


def half(tensor: Tensor) -> Tensor:
    return tensor[: tensor.shape[0] // 2]


ROW = Quantization((1, 16), "nearest", None)
ONES = [1] * 16
BROKEN = {
    "use before definition": Broken("classify", use_before_definition, "was used before it has been defined"),
    "dialect before its stage": Broken("assign", insert_amax, "is not allowed at this stage"),
    "dialect before its stage, rotated": Broken("insert_hadamard", insert_amax, "is not allowed at this stage"),
    "dialect after lowering": Broken(
        "place", lambda graph: calls(graph, AMAX)[0], "is not allowed at this stage", stage=Stage.LOWERED
    ),
    "not fused": Broken(
        "place", lambda graph: calls(graph, AMAX)[0], "is not allowed at this stage", stage=Stage.FUSED
    ),
    "fused too early": Broken("place", fused(lambda graph: calls(graph, REGION)[0]), "is not allowed at this stage"),
    "wrong number of results of a region": Broken(
        "place", fused(wrong_value(REGION, lambda tensors: tensors[:0])), "stored value", stage=Stage.FUSED
    ),
    "wrong shape of a product": Broken("place", fused(wrong_value(PRODUCT, half)), "stored value", stage=Stage.FUSED),
    "residual of another shape": Broken(
        "place", fused(copy_argument(5, 0, PRODUCT)), "is not of its shape", stage=Stage.FUSED
    ),
    "residual of another shape, of packed operands": Broken(
        "place", packed(copy_argument(7, 0, BLOCK_SCALED_MM)), "is not of its shape", stage=Stage.FUSED
    ),
    "weight that is no input": Broken("place", weight_of_an_activation, "is no input", stage=Stage.FUSED),
    "weight quantised in two ways": Broken("place", weight_in_two_ways, "and in one way", stage=Stage.FUSED),
    "weight in two layouts": Broken("place", weight_in_two_layouts, "and in one way", stage=Stage.FUSED),
    "weight dequantised in the native layout": Broken(
        "place", weight_dequantised_in_the_native_layout, "lies as its matrix does", stage=Stage.FUSED
    ),
    "amax of another weight": Broken(
        "place", packed(amax_of_another_weight), "right operand was quantised with another amax", stage=Stage.FUSED
    ),
    "argument by name": Broken("insert_scaling", by_name, "takes rounding by name"),
    "matmul not classified": Broken("classify", drop(aten.mm.default, MATMUL), "without a site and role"),
    "matmul not classified, later": Broken("assign", drop(aten.addmm.default, MATMUL), "without a site and role"),
    "matmul not assigned": Broken("assign", drop(aten.mm.default, ASSIGNMENT), "without an assignment"),
    "bf16 without a reason": Broken(
        "assign", put(aten.mm.default, ASSIGNMENT, Assignment(None, None, "")), "bf16 without a reason"
    ),
    "rotated on one side": Broken("insert_hadamard", rotate_one_operand, "does not cancel"),
    "rotated with other signs": Broken("insert_hadamard", rotate_both_with(ONES), "assigned the signs"),
    "not rotated": Broken(
        "insert_hadamard",
        put(aten.mm.default, ASSIGNMENT, Assignment(*[replace(ROW, signs=tuple(SIGNS))] * 2, "")),
        "assigned the signs",
    ),
    "not scaled": Broken("insert_scaling", undecided, "not scaled"),
    "one operand not quantised": Broken(
        "insert_scaling", undo_one_operand, "its right operand is assigned to NVFP4 but not quantised", WEIGHT_ONLY
    ),
    "no value": Broken("insert_scaling", drop(SCALED_MM, "val"), "no stored value"),
    "value of an argument": Broken("insert_scaling", drop(aten.relu.default, "val"), "no stored value"),
    "wrong shape": Broken("insert_scaling", wrong_value(SCALED_MM, half), "stored value torch.float32[8, 48]"),
    "wrong type": Broken("insert_scaling", wrong_value(SCALED_MM, Tensor.half), "derived torch.float32[16, 48]"),
    "wrong shape of a part": Broken("insert_scaling", wrong_value(operator.getitem, half), "stored value"),
    "wrong shape of a turn": Broken("insert_hadamard", wrong_value(HADAMARD, half), "stored value"),
    "wrong number of values": Broken("insert_scaling", wrong_value(QUANTIZE, lambda pair: pair[0]), "stored value"),
    "unknown block": Broken("insert_scaling", set_argument(QUANTIZE, 2, [1, 32]), "there are no [1, 32] blocks"),
    "unknown rounding": Broken("insert_scaling", set_argument(QUANTIZE, 3, "up"), "with up rounding"),
    "no seed": Broken("insert_scaling", no_seed, "needs a seed"),
    "one stream twice": Broken("insert_scaling", same_stream, "draws the same random bits as %quantize_default"),
    "amax of another tensor": Broken("fold_hadamard", amax_of_another, "is not the amax of what it quantises"),
    "not along the contraction axis": Broken(
        "insert_scaling",
        set_argument(SCALED_MM, 6, 64),
        "left operand is not quantised along the contraction axis of 64",
    ),
    "dequantised to another length": Broken(
        "insert_scaling", set_argument(DEQUANTIZE, 3, 64), "not quantised along the contraction axis of 64", WEIGHT_ONLY
    ),
    "codes of another operand": Broken(
        "insert_scaling", copy_argument(0, 3), "left codes and scales come from different"
    ),
    "scales of another operand": Broken(
        "fold_hadamard", copy_argument(4, 1), "right codes and scales come from different"
    ),
    "amax of another operand": Broken("share", copy_argument(2, 5), "left operand was quantised with another amax"),
    "amax of another weight, turned": Broken(
        "share", lambda graph: turned_with_another_amax(graph), "right operand was quantised with another amax"
    ),
    "quantised otherwise than assigned": Broken("share", other_block, "assigned Quantization(block=(16, 16)"),
    "product rotated on one side": Broken(
        "fold_hadamard", lambda graph: signs_of(graph, ONES), "assigned Quantization"
    ),
    "amax of another packed operand": Broken(
        "fold_hadamard",
        packed(copy_argument(2, 5, BLOCK_SCALED_MM)),
        "left operand was quantised with another amax",
        stage=Stage.FUSED,
    ),
    "scales of another packed operand": Broken(
        "fold_hadamard",
        packed(copy_argument(4, 1, BLOCK_SCALED_MM)),
        "right codes and scales come from different",
        stage=Stage.FUSED,
    ),
    "region that quantises otherwise than assigned": Broken(
        "fold_hadamard", packed(other_rounding), "assigned Quantization", stage=Stage.FUSED
    ),
    "rows turned as tiles": Broken("share", turned_rows, "only 16x16 tiles, not rotated, can be turned"),
}


def turned_with_another_amax(graph: fx.Graph) -> fx.Node:
    (turn,) = calls(graph, TRANSPOSE)
    (product,) = {user for item in turn.users for user in item.users}
    product.update_arg(5, product.args[2])
    return product


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graphs(name: str) -> None:
    """The message is one short line that names the stage, the node, and what is wrong with it."""
    case = BROKEN[name]
    graph = after(case.after, case.recipe)
    stage = case.stage or STAGE_AFTER[case.after]
    blamed = case.damage(graph)
    with pytest.raises(VerifyError) as raised:
        verify(graph, stage)
    text = str(raised.value)
    assert text.startswith(f"{stage.name}: ")
    assert blamed.name in text
    assert case.message in text
    assert len(text) <= LONGEST_MESSAGE and "\n" not in text


def test_operands_of_a_product_without_an_assignment_agree() -> None:
    """Also where nothing is known of the decision, a rotation must cancel."""
    graph = after("fold_hadamard")
    product = signs_of(graph, ONES)
    del product.meta[ASSIGNMENT]
    with pytest.raises(VerifyError, match=rf"%{product.name} .*does not cancel"):
        verify(graph, Stage.SCALED)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_the_pipeline_makes_is_legal(recipe: Recipe) -> None:
    """Every recipe, verified around every pass, for products of dequantised and of packed operands."""
    for packed in (False, True):
        graph = run_until(mlp(), "place", recipe, packed=packed)
        verify(fuse(graph), Stage.FUSED)


@pytest.mark.parametrize("stage", [Stage.SCALED, Stage.FUSED])
def test_a_native_product_reads_swizzled_scales(stage: Stage) -> None:
    def source(codes: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
        return nvfp4.block_scaled_mm(codes, scales, amax, codes, scales, amax, None, None, torch.float32)

    x, amax = torch.randn(32, 32), torch.tensor(4.0)
    swizzled, linear = (nvfp4.quantize(x, amax, [1, 16], "nearest", layout=layout) for layout in ("native", "linear"))
    verify(trace(source, *swizzled, amax), stage)
    with pytest.raises(VerifyError, match="left scales are not laid out as the FP4 tensor cores read them"):
        verify(trace(source, *linear, amax), stage)


def test_each_stage_has_a_rule() -> None:
    assert set(ALLOWED) == set(Stage)


def test_operands_from_another_graph() -> None:
    """A backward graph reads codes that it did not make: what made them is not asked."""

    def backward(codes: Tensor, scales: Tensor, amax: Tensor) -> Tensor:
        return nvfp4.scaled_mm(codes, scales, amax, *nvfp4.transpose(codes, scales, 32), amax, 32, None, torch.float32)

    codes, scales = nvfp4.quantize(torch.randn(32, 32), torch.tensor(4.0), [16, 16], "nearest")
    graph = trace(backward, codes, scales, torch.tensor(4.0))
    verify(graph, Stage.SCALED)
    verify(fuse(graph), Stage.FUSED)


def test_real_values_are_not_derived_again() -> None:
    """A graph that holds tensors instead of fakes is verified all the same, without running it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(16, 16)
    node = graph.call_function(aten.mm.default, (x, x))
    node.meta[MATMUL] = Matmul("fc", Role.FPROP, (Operand.INPUT, Operand.WEIGHT))
    graph.output(node)
    verify(graph, Stage.CLASSIFIED)
