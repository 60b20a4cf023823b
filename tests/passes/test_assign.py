"""assign: which matmuls run in NVFP4, how their operands are quantised, and the reason of every one that stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import captured, run_step, text
from torch import Tensor, fx, nn

from nvfp4c.capture import CapturedGraph
from nvfp4c.dialect import Assignment, Quantization, Stage, assignment_of, matmul_of
from nvfp4c.formats import DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK
from nvfp4c.passes.assign import Assign
from nvfp4c.passes.classify import Classify
from nvfp4c.passes.matmul_graph import block_counts, block_of, heads, matmul_graph
from nvfp4c.pipeline import Step
from nvfp4c.plan import PrecisionPlan, from_rules
from nvfp4c.recipe import RECIPES, Recipe

NVFP4 = RECIPES["nvfp4"]
ALL = RECIPES["nvfp4-all"]


class Decoder(nn.Module):
    """An embedding, numbered blocks of one matmul, and a head."""

    def __init__(self, depth: int, router: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Sequential() for _ in range(depth))
        for block in self.layers:
            block.up = nn.Linear(16, 16, bias=False)
            if router:
                block.router = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def decoder(depth: int, router: bool = False, train: bool = True) -> CapturedGraph:
    return captured(Decoder(depth, router), torch.randint(0, 64, (2, 8)), train=train)


def assigned(found: CapturedGraph, recipe: Recipe, plan: PrecisionPlan | None = None) -> fx.Graph:
    graph = run_step(found.graph, Step("classify", Classify(found.names), Stage.CLASSIFIED), Stage.AOT)
    assign = Assign(recipe, plan or PrecisionPlan(), found.names.weights)
    return run_step(graph, Step("assign", assign, Stage.ASSIGNED), Stage.CLASSIFIED)


def decisions(graph: fx.Graph) -> dict[str, Assignment]:
    """The assignment of each `site role`."""
    found = {}
    for node in graph.nodes:
        matmul, decided = matmul_of(node), assignment_of(node)
        if matmul is not None:
            assert decided is not None
            found[f"{matmul.site} {matmul.role.value}"] = decided
    return found


def reasons(graph: fx.Graph) -> dict[str, str]:
    """The reason of each `site role`; "" runs in NVFP4."""
    found = decisions(graph)
    assert all((decided.precision == "nvfp4") == (decided.reason == "") for decided in found.values())
    return {key: decided.reason for key, decided in found.items()}


def forward_reasons(graph: fx.Graph) -> dict[str, str]:
    return {key.removesuffix(" fprop"): reason for key, reason in reasons(graph).items() if key.endswith(" fprop")}


def test_operands_of_the_three_roles() -> None:
    """The table of arXiv 2509.25149: what is rounded and rotated how in each product."""
    found = decisions(assigned(captured(Decoder(3), torch.randint(0, 64, (2, 8))), NVFP4))
    x, w = Quantization(ROW_BLOCK, "nearest", None), Quantization(TILE_BLOCK, "nearest", None)
    dy = Quantization(ROW_BLOCK, "stochastic", None)
    rotated_dy = Quantization(ROW_BLOCK, "stochastic", DEFAULT_SIGNS)
    rotated_x = Quantization(ROW_BLOCK, "nearest", DEFAULT_SIGNS)
    assert found["layers.1.up fprop"] == Assignment(x, w, "")
    assert found["layers.1.up dgrad"] == Assignment(dy, w, "")
    assert found["layers.1.up wgrad"] == Assignment(rotated_dy, rotated_x, "")


def test_only_metadata_is_written() -> None:
    found = decoder(1)
    before = text(found.graph)
    graph = assigned(found, NVFP4)
    once = decisions(graph)
    assert text(graph) == before
    assert decisions(Assign(NVFP4, model_sites=found.names.weights)(graph)) == once


# Depth, and which blocks stay in bf16: round(0.15 * depth) last ones, and the first from 8 blocks on. For 62 blocks the
# paper keeps the first 2 and the last 8; this rule keeps as many, 1 and 9.
KEPT = [
    (1, [], []),
    (3, [], []),
    (4, [], [3]),
    (7, [], [6]),
    (8, [0], [7]),
    (12, [0], [10, 11]),
    (32, [0], [27, 28, 29, 30, 31]),
    (62, [0], list(range(53, 62))),
]


@pytest.mark.parametrize(("depth", "first", "last"), KEPT)
def test_first_and_last_blocks(depth: int, first: list[int], last: list[int]) -> None:
    found = forward_reasons(assigned(decoder(depth, train=False), NVFP4))
    expected = {f"layers.{index}.up": "" for index in range(depth)}
    expected |= {f"layers.{index}.up": f"one of the first {len(first)} of {depth} blocks" for index in first}
    expected |= {f"layers.{index}.up": f"one of the last {len(last)} of {depth} blocks" for index in last}
    assert found == expected | {"head": "output head: no other matmul follows it"}


def test_all_roles_of_a_block_stay_together() -> None:
    found = reasons(assigned(decoder(8), NVFP4))
    assert {found[f"layers.7.up {role}"] for role in ("fprop", "dgrad", "wgrad")} == {"one of the last 1 of 8 blocks"}
    assert {found[f"head {role}"] for role in ("fprop", "dgrad", "wgrad")} == {
        "output head: no other matmul follows it"
    }


def test_a_model_that_ends_in_a_block_has_no_head() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16)) for _ in range(2)))
    assert forward_reasons(assigned(captured(model, torch.randn(4, 16), train=False), NVFP4)) == {"0.0": "", "1.0": ""}


def test_blocks_are_counted_in_the_whole_model() -> None:
    """A graph break leaves one graph with few of the blocks; how many there are is known from the model."""
    found = decoder(4)
    graph = Classify(found.names)(found.graph)
    whole = (*found.names.weights, *(f"layers.{index}.up" for index in range(4, 20)))
    assert forward_reasons(Assign(NVFP4, model_sites=whole)(graph)) == {
        "layers.0.up": "one of the first 1 of 20 blocks",
        "layers.1.up": "",
        "layers.2.up": "",
        "layers.3.up": "",
        "head": "output head: no other matmul follows it",
    }


def test_routers() -> None:
    found = forward_reasons(assigned(decoder(2, router=True, train=False), NVFP4))
    assert found["layers.0.up"] == ""
    assert found["layers.0.router"] == "recipe nvfp4: name matches *router"


def test_every_layer() -> None:
    """`nvfp4-all` knows no rules by place or name."""
    found = reasons(assigned(decoder(8, router=True), ALL))
    assert set(found.values()) == {""}
    assert len(found) == 3 * 17


@pytest.mark.parametrize(
    ("name", "roles"),
    [("nvfp4-forward", {"fprop"}), ("nvfp4-backward", {"dgrad", "wgrad"}), ("bf16", set())],
)
def test_recipes_limited_to_some_roles(name: str, roles: set[str]) -> None:
    found = reasons(assigned(decoder(3), RECIPES[name]))
    for role in ("fprop", "dgrad", "wgrad"):
        expected = "" if role in roles else f"recipe {name}: no {role} in NVFP4"
        assert found[f"layers.1.up {role}"] == expected


def test_weights_only() -> None:
    """Only weights are quantised; the weight gradient has none, so it stays, whatever a plan says."""
    recipe = RECIPES["nvfp4-weight-only"]
    w = Quantization(ROW_BLOCK, "nearest", None)
    found = decisions(assigned(decoder(3), recipe))
    assert found["layers.1.up fprop"] == Assignment(None, w, "")
    assert found["layers.1.up dgrad"] == Assignment(None, w, "")
    assert found["layers.1.up wgrad"].reason == "recipe nvfp4-weight-only: no wgrad in NVFP4"
    planned = decisions(assigned(decoder(3), recipe, from_rules({"*": "nvfp4"})))
    assert planned["layers.1.up wgrad"].reason == "recipe nvfp4-weight-only: quantises weights, and wgrad has none"


def test_any_field_can_be_overridden() -> None:
    recipe = replace(
        NVFP4,
        rotate=("fprop",),
        signs=(1,) * 16,
        weight_block=ROW_BLOCK,
        weight_rounding="stochastic",
        input_rounding="stochastic",
        gradient_rounding="nearest",
    )
    found = decisions(assigned(decoder(3), recipe))
    ones = (1,) * 16
    assert found["layers.1.up fprop"] == Assignment(
        Quantization(ROW_BLOCK, "stochastic", ones), Quantization(ROW_BLOCK, "stochastic", ones), ""
    )
    assert found["layers.1.up dgrad"] == Assignment(
        Quantization(ROW_BLOCK, "nearest", None), Quantization(ROW_BLOCK, "stochastic", None), ""
    )
    assert found["layers.1.up wgrad"] == Assignment(
        Quantization(ROW_BLOCK, "nearest", None), Quantization(ROW_BLOCK, "stochastic", None), ""
    )


def test_the_plan_overrides_the_recipe_both_ways() -> None:
    plan = from_rules({"layers.0.*": "bf16", "layers.2.up": {"wgrad": "bf16"}, "layers.3.up": "nvfp4", "head": "nvfp4"})
    found = reasons(assigned(decoder(4), NVFP4, plan))
    assert {key: reason for key, reason in found.items() if reason} == {
        "layers.0.up fprop": "plan: layers.0.*",
        "layers.0.up dgrad": "plan: layers.0.*",
        "layers.0.up wgrad": "plan: layers.0.*",
        "layers.2.up wgrad": "plan: layers.2.up",
    }


def test_the_plan_overrides_roles() -> None:
    """A plan reaches roles that the recipe has none of."""
    found = reasons(assigned(decoder(2), RECIPES["bf16"], from_rules({"layers.1.up": {"dgrad": "nvfp4"}})))
    assert [key for key, reason in found.items() if not reason] == ["layers.1.up dgrad"]


def test_an_obstacle_is_final() -> None:
    model = nn.Sequential(nn.Linear(16, 16).double(), nn.Linear(16, 16).double())
    for recipe, plan in ((ALL, from_rules({"*": "nvfp4"})), (NVFP4, None), (ALL, from_rules({"*": "bf16"}))):
        graph = assigned(captured(model, torch.randn(4, 16).double()), recipe, plan)
        assert set(reasons(graph).values()) == {"dtype float64"}


@pytest.mark.parametrize(
    ("site", "block"),
    [
        ("layers.3.mlp.up_proj", ("layers.", 3)),
        ("transformer.h.11.attn.c_attn", ("transformer.h.", 11)),
        ("0.fc", ("", 0)),
        ("encoder.layers.3.experts.2.w1", ("encoder.layers.", 3)),
        ("head", None),
        ("layers.3", None),
        ("block2.fc", None),
    ],
)
def test_block_of(site: str, block: tuple[str, int] | None) -> None:
    assert block_of(site) == block


def test_block_counts() -> None:
    """Each list of blocks is counted apart."""
    assert block_counts(["a.0.x", "a.3.x", "b.1.x", "head"]) == {"a.": 4, "b.": 2}


def test_matmul_graph() -> None:
    """Neighbours are joined through whatever lies between them; heads are those that nothing follows."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
            self.head = nn.Linear(16, 16)
            self.auxiliary = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.o(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))
            return self.head(y), self.auxiliary(y)

    found = captured(Branches(), torch.randn(2, 8, 16))
    sites = matmul_graph(Classify(found.names)(found.graph))
    edges = {("q", "o"), ("k", "o"), ("v", "o"), ("o", "head"), ("o", "auxiliary")}
    assert set(sites.edges) == edges
    assert heads(sites) == {"head", "auxiliary"}
