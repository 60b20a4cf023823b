"""Measurements of models that do not exist, small enough to work out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from zlib import crc32

from hypothesis import strategies as st

from nvfp4c.passes.matmul_graph import block_of
from nvfp4c.plan import PrecisionPlan, Rule
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.budgets import Budget
from nvfp4c.sensitivity.constraints import Constraints
from nvfp4c.sensitivity.measurements import Measurements, OperandMeasure, RoleMeasure, SiteMeasure
from nvfp4c.sensitivity.problem import Problem


def operand(name: str, error: float) -> OperandMeasure:
    """An operand with this relative error."""
    return OperandMeasure(name, 16, 1.0, error**2, 3.0, 0, 0, 0, (), (), ())


def role(name: str, operations: float, size: tuple[int, int, int] = (1, 1, 1), error: float = 0.1) -> RoleMeasure:
    """A role with so many operations, whatever its size. error: of the weight."""
    return RoleMeasure(name, *size, operations, 1.0, 0.01, 0.0, (operand("x", 0.5), operand("w", error)))


def site(
    name: str,
    operations: float | Iterable[float] = 1.0,
    weight: str = "",
    reads: int = -1,
    elements: int = 16,
    error: float = 0.1,
    obstacle: str | None = None,
) -> SiteMeasure:
    """A site with these operations of fprop, dgrad and wgrad, or as many for each.

    Unless said, with a weight of its own and an input of its own.
    """
    each = [operations] * len(ROLES) if isinstance(operations, (int, float)) else list(operations)
    roles = {one: role(one, count, error=error) for one, count in zip(ROLES, each, strict=True) if count}
    block = block_of(name)
    index, projection = (None, name) if block is None else (block[1], name.removeprefix(f"{block[0]}{block[1]}."))
    return SiteMeasure(
        name,
        index,
        projection,
        weight or f"{name}.weight",
        elements,
        crc32(name.encode()) if reads < 0 else reads,
        roles,
        obstacle,
    )


def measurements(*sites: SiteMeasure) -> Measurements:
    """Of one batch."""
    return Measurements(sites, 3.0, 1)


def stack(blocks: int, operations: float = 1.0, head: float = 0.0) -> Measurements:
    """Blocks of two sites each, q and down, with so many operations in each role; and a head where it has some."""
    sites = [
        site(f"layers.{index}.{name}", operations, reads=2 * index + part)
        for index in range(blocks)
        for part, name in enumerate(("q", "down"))
    ]
    return measurements(*sites, *([site("head", head)] if head else []))


def sized(found: Measurements, size: int) -> Measurements:
    """The same, but every matmul is of square matrices."""
    shape = {"m": size, "n": size, "k": size, "operations": 2.0 * size**3}
    return replace(
        found,
        sites=tuple(
            replace(one, roles={name: replace(measure, **shape) for name, measure in one.roles.items()})
            for one in found.sites
        ),
    )


def rising(found: Measurements) -> dict[Key, float]:
    """Scores 1, 2, 3 and so on, in the order of sites and roles."""
    keys = [(one.site, name) for one in found.sites for name in one.roles]
    return {key: float(index) for index, key in enumerate(keys, start=1)}


UNITS = [
    st.builds(Budget, st.floats(0, 1)),
    st.builds(Budget, st.floats(4.5, 16), st.just("bits")),
    st.builds(Budget, st.floats(0.2, 4), st.just("speed"), st.sampled_from(["sm_90", "sm_100"])),
]
NUMBERS = st.one_of(st.just(0.0), st.floats(-1, 1), st.floats(1e-6, 1e-4))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Four sites in two blocks and a head, of three roles or fewer, with any constraints: at most 2^11 plans."""
    names = ("layers.0.q", "layers.0.k", "layers.1.q", "head")
    sites = []
    for name in names:
        counts = draw(st.lists(st.integers(1, 5), min_size=3, max_size=3))
        dropped = draw(st.sampled_from([(), ("dgrad",), ("dgrad", "wgrad")]))
        found = site(
            name,
            counts,
            weight=draw(st.sampled_from(["", "", "shared"])),
            reads=draw(st.integers(0, 2)),
            elements=draw(st.integers(1, 4)) * 16,
            obstacle=draw(st.sampled_from([None, None, None, "the weight is no matrix"])) if name != "head" else None,
        )
        size = draw(st.tuples(*[st.sampled_from([64, 512, 4096])] * 3))
        roles = {
            role: replace(measure, m=size[0], n=size[1], k=size[2])
            for role, measure in found.roles.items()
            if role not in dropped
        }
        sites.append(replace(found, roles=roles))
    sites = [replace(one, weight_elements=32) if one.weight == "shared" else one for one in sites]
    found = measurements(*sites)
    keys = [(one.site, role) for one in sites for role in one.roles]
    rules = draw(
        st.dictionaries(
            st.sampled_from(["layers.*", "*.q", "head"]),
            st.dictionaries(st.sampled_from(ROLES), st.sampled_from(["bf16", "nvfp4"]), min_size=1, max_size=1),
            max_size=1,
        )
    )
    stuck = {one.weight for one in sites if one.obstacle}
    tied_to_obstacle = any(one.weight in stuck for one in sites if not one.obstacle)
    shared = len({one.weight for one in sites}) < len(sites)
    joined = draw(st.booleans()), draw(st.booleans())
    # Rules for what is tied may contradict each other; test_constraints looks at that.
    must = () if tied_to_obstacle or shared or any(joined) else tuple(Rule(*rule) for rule in rules.items())
    terms = draw(st.dictionaries(st.tuples(st.sampled_from(keys), st.sampled_from(keys)), NUMBERS, max_size=4))
    scores = {key: draw(NUMBERS) for key in keys}
    constraints = Constraints(PrecisionPlan(must), *joined)
    return Problem(found, scores, draw(st.one_of(UNITS)), constraints, terms)
