"""Precision plans: which sites and roles run in NVFP4, as data a person can read and edit.

    {"version": 1,
     "rules": {"layers.*.mlp.down_proj": {"wgrad": "bf16"},
               "lm_head": "nvfp4"},
     "provenance": {"method": "by hand"}}

Patterns are shell globs over site names. Rules are read from top to bottom and the last that matches wins.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from nvfp4c.errors import PlanError, nearest
from nvfp4c.files import write_text
from nvfp4c.recipe import ROLES

VERSION = 1
PRECISIONS = ("nvfp4", "bf16")


@dataclass(frozen=True)
class Rule:
    """One line of a plan: the sites it names, and the precision of some or all of their roles."""

    pattern: str
    precision: Mapping[str, str]

    def matches(self, site: str) -> bool:
        """Whether the pattern names this site; `a.b` also names its repeated uses `a.b#1`, `a.b#2`."""
        return fnmatchcase(site, self.pattern) or fnmatchcase(site.partition("#")[0], self.pattern)


@dataclass(frozen=True)
class PrecisionPlan:
    """An ordered list of rules, and where they came from. It overrides the recipe's own choice of sites.

    Raises PlanError for two rules of the same pattern: a plan file holds a pattern once.
    """

    rules: tuple[Rule, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = Counter(rule.pattern for rule in self.rules)
        for pattern, count in counts.items():
            if count > 1:
                raise PlanError(f"the plan names {pattern!r} {count} times; join its rules into one")

    def decide(self, site: str, role: str) -> tuple[str, str] | None:
        """(precision, pattern that decided), or None where no rule speaks of this site and role."""
        decision = None
        for rule in self.rules:
            if role in rule.precision and rule.matches(site):
                decision = (rule.precision[role], rule.pattern)
        return decision

    def check_sites(self, sites: Iterable[str]) -> None:
        """Raise PlanError for a rule that names no site of the model."""
        known = tuple(sites)
        for rule in self.rules:
            if not any(rule.matches(site) for site in known):
                hint = nearest(rule.pattern, known) if known else "the model has no matmul with a weight"
                raise PlanError(f"the plan names {rule.pattern!r}, but the model has no such site; {hint}")

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        rules = {rule.pattern: dict(rule.precision) for rule in self.rules}
        return {"version": VERSION, "rules": rules, "provenance": dict(self.provenance)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")


EMPTY_PLAN = PrecisionPlan()
"""Leaves everything to the recipe."""


def from_rules(rules: Mapping[str, object], where: str = "plan", provenance: object = None) -> PrecisionPlan:
    """A plan from `{pattern: precision or {role: precision}}`. Raises PlanError saying which entry is wrong."""
    if not isinstance(rules, Mapping):
        raise PlanError(f"{where}: 'rules' must be an object of pattern: precision, got {type(rules).__name__}")
    if provenance is not None and not isinstance(provenance, Mapping):
        raise PlanError(f"{where}: 'provenance' must be an object, got {type(provenance).__name__}")
    parsed = []
    for pattern, value in rules.items():
        place = f"{where}: rules[{pattern!r}]"
        by_role = value if isinstance(value, Mapping) else dict.fromkeys(ROLES, value)
        if not by_role:
            raise PlanError(f"{place}: names no role; use one of {', '.join(ROLES)}")
        for role, precision in by_role.items():
            if role not in ROLES:
                raise PlanError(f"{place}: unknown role {role!r}; {nearest(str(role), ROLES)}")
            if precision not in PRECISIONS:
                raise PlanError(f"{place}: unknown precision {precision!r}; valid: {', '.join(PRECISIONS)}")
        parsed.append(Rule(str(pattern), {str(role): str(precision) for role, precision in by_role.items()}))
    return PrecisionPlan(tuple(parsed), dict(provenance or {}))


def load(path: str | Path) -> PrecisionPlan:
    """Read a plan file. Raises PlanError saying where it is malformed. Nothing in the file is executed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    try:
        data = json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        raise PlanError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"{path}: a plan is a JSON object with 'version' and 'rules', got {type(data).__name__}")
    if data.get("version") != VERSION:
        raise PlanError(f"{path}: plan version {data.get('version')!r} is not supported; expected {VERSION}")
    for key in data:
        if key not in ("version", "rules", "provenance"):
            raise PlanError(f"{path}: unknown key {key!r}; {nearest(key, ('version', 'rules', 'provenance'))}")
    return from_rules(data.get("rules", {}), str(path), data.get("provenance"))


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, which json would else read with the last of two equal keys, forgetting the first."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise PlanError(f"{key!r} stands {count} times in one object")
    return dict(pairs)


def get(plan: object) -> PrecisionPlan:
    """The plan given, read from a path, or made from a mapping of rules; None is the empty plan."""
    if plan is None:
        return EMPTY_PLAN
    if isinstance(plan, PrecisionPlan):
        return plan
    if isinstance(plan, (str, Path)):
        return load(plan)
    if isinstance(plan, Mapping):
        return from_rules(plan)
    raise PlanError(f"plan must be a path, a nvfp4c.PrecisionPlan or a mapping of rules, got {type(plan).__name__}")
