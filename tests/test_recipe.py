"""Recipes: the ones known by name, their fields, and what a wrong field says."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from nvfp4c.errors import OptionError
from nvfp4c.formats import DEFAULT_SIGNS
from nvfp4c.recipe import DEFAULT_RECIPE, RECIPES, Recipe, from_dict, get

NVFP4 = RECIPES["nvfp4"]


def test_the_paper() -> None:
    """The default recipe is that of arXiv 2509.25149."""
    assert DEFAULT_RECIPE == "nvfp4"
    assert NVFP4.roles == ("fprop", "dgrad", "wgrad")
    assert (NVFP4.weight_block, NVFP4.weight_rounding) == ((16, 16), "nearest")
    assert (NVFP4.input_rounding, NVFP4.gradient_rounding) == ("nearest", "stochastic")
    assert (NVFP4.rotate, NVFP4.signs) == (("wgrad",), DEFAULT_SIGNS)
    assert NVFP4.keep_head


def test_names() -> None:
    assert set(RECIPES) == {
        "nvfp4",
        "nvfp4-all",
        "nvfp4-forward",
        "nvfp4-backward",
        "nvfp4-inference",
        "nvfp4-weight-only",
        "bf16",
    }
    assert all(recipe.name == name for name, recipe in RECIPES.items())


def test_every_layer() -> None:
    """`nvfp4-all` differs from `nvfp4` in its rules alone."""
    rules = {"name", "keep_head", "bf16_names", "bf16_last_share", "bf16_first_blocks"}
    everywhere = RECIPES["nvfp4-all"]
    assert {
        field.name for field in fields(Recipe) if getattr(everywhere, field.name) != getattr(NVFP4, field.name)
    } == rules


def test_inference_needs_no_gradients() -> None:
    """W4A4 has one role; weights only has the data gradient too, so that adapters can be trained over it."""
    assert RECIPES["nvfp4-inference"].roles == ("fprop",)
    assert RECIPES["nvfp4-weight-only"].roles == ("fprop", "dgrad")
    assert not RECIPES["nvfp4-weight-only"].quantize_activations
    assert RECIPES["bf16"].roles == ()


# Of 62 blocks the paper keeps 2 + 8 in bf16; 0.15 * 62 = 9.3 gives 1 + 9.
@pytest.mark.parametrize(
    ("count", "first", "last"),
    [(0, 0, 0), (1, 0, 0), (3, 0, 0), (4, 0, 1), (7, 0, 1), (8, 1, 1), (12, 1, 2), (32, 1, 5), (62, 1, 9)],
)
def test_first_and_last_blocks(count: int, first: int, last: int) -> None:
    assert (NVFP4.first_blocks(count), NVFP4.last_blocks(count)) == (first, last)


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip(name: str) -> None:
    """A recipe survives JSON, where tuples become lists."""
    recipe = RECIPES[name]
    assert from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_get() -> None:
    custom = replace(NVFP4, rotate=())
    assert get("nvfp4-all") is RECIPES["nvfp4-all"]
    assert get(custom) is custom


def test_lists_are_taken_as_tuples() -> None:
    assert replace(NVFP4, roles=["fprop"], rotate=[], signs=[1] * 16) == replace(
        NVFP4, roles=("fprop",), rotate=(), signs=(1,) * 16
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nvfp4-al", r"unknown recipe 'nvfp4-al'; did you mean 'nvfp4-all'\? \(recipes: nvfp4, nvfp4-all, "),
        ("int8", "unknown recipe 'int8'; valid: bf16, nvfp4, "),
        (4, "recipe must be a name or a nvfp4c.Recipe, got int"),
    ],
)
def test_an_unknown_recipe(wrong: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        get(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": ("fprob",)}, r"field roles: unknown value 'fprob', did you mean 'fprop'\?"),
        ({"roles": "fprop"}, "field roles must be a tuple, got 'fprop'"),
        ({"bf16_names": "lm_head"}, "field bf16_names must be a tuple, got 'lm_head'"),
        ({"rotate": ("weights",)}, "field rotate: unknown value 'weights', valid: dgrad, fprop, wgrad"),
        ({"weight_rounding": "up"}, "field weight_rounding: unknown value 'up', valid: nearest, stochastic"),
        ({"input_rounding": "random"}, "field input_rounding: unknown value 'random'"),
        ({"gradient_rounding": "nearst"}, "field gradient_rounding: .*did you mean 'nearest'"),
        ({"weight_block": (16, 1)}, r"field weight_block must be \(1, 16\) or \(16, 16\), got \(16, 1\)"),
        ({"signs": (1, -1)}, r"field signs must be 16 numbers, each 1 or -1, got \(1, -1\)"),
        ({"signs": (0,) * 16}, "field signs must be 16 numbers"),
        ({"bf16_last_share": 1.5}, r"field bf16_last_share must lie in 0..1, got 1.5"),
        ({"bf16_last_share": float("nan")}, r"field bf16_last_share must lie in 0..1, got nan"),
        ({"bf16_last_share": "15%"}, "field bf16_last_share must be a number, got '15%'"),
        ({"bf16_first_blocks": -1}, "field bf16_first_blocks must be 0 or more, got -1"),
        ({"quantize_activations": False}, r"quantises weights only cannot rotate: set rotate=\(\)"),
    ],
)
def test_a_wrong_field(changes: dict[str, Any], message: str) -> None:
    """The message names the field, and what it may be."""
    with pytest.raises(OptionError, match=message):
        replace(NVFP4, **changes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "rotated": []}, r"unknown recipe field 'rotated'; did you mean 'rotate'\?"),
        ({"roles": ["fprop"]}, "a recipe needs a field 'name'"),
    ],
)
def test_wrong_data(data: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        from_dict(data)
