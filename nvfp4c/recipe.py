"""Recipes: what is quantised and how. A recipe is plain data; where it applies is refined by a precision plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from nvfp4c.errors import OptionError, nearest
from nvfp4c.formats import BLOCK, DEFAULT_SIGNS, ROW_BLOCK, TILE_BLOCK

ROLES = ("fprop", "dgrad", "wgrad")
ROUNDINGS = ("nearest", "stochastic")

ROUTERS = ("*router", "*router.*", "*.gate", "gate")
"""Names of mixture-of-experts routers: tiny matmuls whose output decides discretely."""


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised; the defaults are the method of arXiv 2509.25149.

    Any field can be overridden: `dataclasses.replace(recipe.get("nvfp4"), rotate=())`.
    """

    name: str
    roles: tuple[str, ...] = ROLES
    """Which products run in NVFP4: fprop, dgrad, wgrad."""
    quantize_activations: bool = True
    """False quantises weights only; the product then runs in high precision."""
    weight_block: tuple[int, int] = TILE_BLOCK
    """(16, 16): forward and data gradient see the same weight. (1, 16): finer scales."""
    weight_rounding: str = "nearest"
    input_rounding: str = "nearest"
    gradient_rounding: str = "stochastic"
    rotate: tuple[str, ...] = ("wgrad",)
    """Roles whose operands get the random Hadamard transform."""
    signs: tuple[int, ...] = DEFAULT_SIGNS
    keep_head: bool = True
    """Leave what lies last before the output, outside the numbered blocks, in bf16."""
    bf16_names: tuple[str, ...] = ROUTERS
    """Site patterns that stay in bf16."""
    bf16_last_share: float = 0.15
    """Share of the numbered blocks, counted from the last, that stay in bf16; rounded to whole blocks."""
    bf16_first_blocks: int = 1
    """First blocks that stay in bf16, in models of `bf16_first_from` blocks or more."""
    bf16_first_from: int = 8

    def __post_init__(self) -> None:
        for name in ("roles", "weight_block", "rotate", "signs", "bf16_names"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise OptionError(f"recipe field {name} must be a tuple, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("bf16_last_share", "bf16_first_blocks", "bf16_first_from"):
            if not isinstance(getattr(self, name), (int, float)):
                raise OptionError(f"recipe field {name} must be a number, got {getattr(self, name)!r}")
        _each_in("roles", self.roles, ROLES)
        _each_in("rotate", self.rotate, ROLES)
        for name in ("weight_rounding", "input_rounding", "gradient_rounding"):
            _each_in(name, (getattr(self, name),), ROUNDINGS)
        if self.weight_block not in (ROW_BLOCK, TILE_BLOCK):
            raise OptionError(f"recipe field weight_block must be (1, 16) or (16, 16), got {self.weight_block}")
        if len(self.signs) != BLOCK or any(sign not in (1, -1) for sign in self.signs):
            raise OptionError(f"recipe field signs must be {BLOCK} numbers, each 1 or -1, got {self.signs}")
        if not 0 <= self.bf16_last_share <= 1:
            raise OptionError(f"recipe field bf16_last_share must lie in 0..1, got {self.bf16_last_share}")
        if self.bf16_first_blocks < 0:
            raise OptionError(f"recipe field bf16_first_blocks must be 0 or more, got {self.bf16_first_blocks}")
        if not self.quantize_activations and self.rotate:
            raise OptionError("a recipe that quantises weights only cannot rotate: set rotate=()")

    def last_blocks(self, count: int) -> int:
        """How many of `count` blocks, from the last, stay in bf16."""
        return round(self.bf16_last_share * count)

    def first_blocks(self, count: int) -> int:
        """How many of `count` blocks, from the first, stay in bf16."""
        return self.bf16_first_blocks if count >= self.bf16_first_from else 0

    def to_dict(self) -> dict[str, object]:
        """All fields, as plain data for JSON."""
        return asdict(self)


def _each_in(field: str, values: tuple[str, ...], valid: tuple[str, ...]) -> None:
    for value in values:
        if value not in valid:
            raise OptionError(f"recipe field {field}: unknown value {value!r}, {nearest(value, valid)}")


def _everywhere(name: str, **changes: object) -> Recipe:
    """A recipe without rules that keep layers in bf16."""
    return Recipe(name, keep_head=False, bf16_names=(), bf16_last_share=0.0, bf16_first_blocks=0, **changes)  # type: ignore[arg-type]


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("nvfp4"),
        _everywhere("nvfp4-all"),
        Recipe("nvfp4-forward", roles=("fprop",)),
        Recipe("nvfp4-backward", roles=("dgrad", "wgrad")),
        Recipe(
            "nvfp4-inference",
            roles=("fprop",),
            weight_block=ROW_BLOCK,
            rotate=(),
            bf16_last_share=0.0,
            bf16_first_blocks=0,
        ),
        Recipe(
            "nvfp4-weight-only",
            roles=("fprop", "dgrad"),
            quantize_activations=False,
            weight_block=ROW_BLOCK,
            rotate=(),
            bf16_last_share=0.0,
            bf16_first_blocks=0,
        ),
        Recipe("bf16", roles=()),
    )
}
"""The recipes known by name."""

DEFAULT_RECIPE = "nvfp4"


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or the one given. Raises OptionError for a name that does not exist."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise OptionError(f"recipe must be a name or a nvfp4c.Recipe, got {type(recipe).__name__}")
    if recipe not in RECIPES:
        hint = nearest(recipe, RECIPES)
        raise OptionError(f"unknown recipe {recipe!r}; {hint} (recipes: {', '.join(RECIPES)})")
    return RECIPES[recipe]


def from_dict(data: dict[str, object]) -> Recipe:
    """A recipe from what `Recipe.to_dict` wrote. Raises OptionError for unknown fields and wrong values."""
    known = {field.name for field in fields(Recipe)}
    if "name" not in data:
        raise OptionError("a recipe needs a field 'name'")
    for key in data:
        if key not in known:
            raise OptionError(f"unknown recipe field {key!r}; {nearest(key, known)}")
    return Recipe(**data)  # type: ignore[arg-type]
