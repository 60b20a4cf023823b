"""Rules written by hand, such as `layers.*.mlp.down_proj: {wgrad: bf16}`: read, added to a plan, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from nvfp4c.errors import PlanError
from nvfp4c.plan import PrecisionPlan, Rule, from_rules
from nvfp4c.recipe import ROLES

FORMS = "write 'PATTERN: bf16' or 'PATTERN: {wgrad: bf16, ...}'"
WILD = "*?["


def parse_rule(text: str) -> Rule:
    """A rule from `PATTERN: PRECISION` or `PATTERN: {ROLE: PRECISION, ...}`; each word may be in quotes.

    Raises PlanError saying what is wrong with the text. Nothing in it is executed.
    """
    place = f"rule {text!r}"
    pattern, colon, value = (part.strip() for part in text.partition(":"))
    if not colon or not pattern or not value:
        raise PlanError(f"{place} is not a rule; {FORMS}")
    precision = _parse_roles(value, place) if value.startswith("{") else _unquoted(value)
    return from_rules({_unquoted(pattern): precision}, place).rules[0]


def _parse_roles(value: str, place: str) -> dict[str, str]:
    """`{ROLE: PRECISION, ...}`"""
    if not value.endswith("}"):
        raise PlanError(f"{place}: a '{{' is never closed, or something follows its '}}'; {FORMS}")
    roles: dict[str, str] = {}
    for item in value[1:-1].split(","):
        role, colon, precision = (_unquoted(part.strip()) for part in item.partition(":"))
        if not colon or not role or not precision:
            raise PlanError(f"{place}: {item.strip()!r} is not 'ROLE: PRECISION'; {FORMS}")
        if role in roles:
            raise PlanError(f"{place}: names the role {role!r} twice")
        roles[role] = precision
    return roles


def _unquoted(word: str) -> str:
    for quote in "\"'":
        if len(word) > 1 and word[0] == quote == word[-1]:
            return word[1:-1]
    return word


def rule_text(rule: Rule) -> str:
    """What `parse_rule` reads, in its shorter form where all roles are alike."""
    return f"{rule.pattern}: {precision_text(rule.precision)}"


def precision_text(precision: Mapping[str, str]) -> str:
    """`bf16`, or `{fprop: bf16, wgrad: nvfp4}`."""
    if len(precision) == len(ROLES) and len(set(precision.values())) == 1:
        return precision[ROLES[0]]
    return f"{{{', '.join(f'{role}: {precision[role]}' for role in ROLES if role in precision)}}}"


def edited(plan: PrecisionPlan, rules: Sequence[Rule]) -> PrecisionPlan:
    """The plan in which each of the rules holds, later ones first of all, and all else is as it was.

    The provenance lists the edits. Raises PlanError where a rule changes some roles of a pattern that the plan names
    already, and other rules stand between them in such a way that neither place is right.
    """
    before = plan.provenance.get("edits")
    edits = [*(before if isinstance(before, list) else []), *map(rule_text, rules)]
    for rule in rules:
        plan = PrecisionPlan(_with_rule(plan.rules, rule), plan.provenance)
    return PrecisionPlan(plan.rules, {**plan.provenance, "edits": edits})


def _with_rule(rules: Sequence[Rule], new: Rule) -> tuple[Rule, ...]:
    """A pattern stands once in a plan, and the last rule wins. So the new rule goes to the end and takes along what it
    and later rules leave of the old one, or the old one is changed where it is, whichever changes nothing else."""
    place = next((place for place, rule in enumerate(rules) if rule.pattern == new.pattern), None)
    if place is None:
        return (*rules, new)
    old, later = rules[place], [rule for rule in rules[place + 1 :] if _overlap(rule, new)]
    taken = {role for rule in later if _covers(rule, old) for role in rule.precision}
    kept = {role: precision for role, precision in old.precision.items() if role not in taken}
    joined, left = Rule(new.pattern, {**kept, **new.precision}), kept.keys() - new.precision.keys()
    if not any(left & rule.precision.keys() for rule in later):
        return (*rules[:place], *rules[place + 1 :], joined)
    if not any(new.precision.keys() & rule.precision.keys() for rule in later):
        return (*rules[:place], joined, *rules[place + 1 :])
    raise PlanError(
        f"the plan has the rule {rule_text(old)!r} already, and {rule_text(later[0])!r} comes after it, which may name "
        f"the same sites; say what all of fprop, dgrad and wgrad of {new.pattern!r} are to be"
    )


def _overlap(one: Rule, other: Rule) -> bool:
    """Whether two patterns may name the same site: exact where one of them is a plain name, else never ruled out."""
    return not (_plain(one) or _plain(other)) or one.matches(other.pattern) or other.matches(one.pattern)


def _covers(one: Rule, other: Rule) -> bool:
    """Whether a pattern surely names every site that the other does."""
    return one.pattern == "*" or (_plain(other) and one.matches(other.pattern))


def _plain(rule: Rule) -> bool:
    return not any(sign in rule.pattern for sign in WILD)


@dataclass(frozen=True)
class RuleChange:
    """A pattern that two plans do not treat alike. before, after: its precision by role; None where it has no rule."""

    pattern: str
    before: Mapping[str, str] | None
    after: Mapping[str, str] | None


@dataclass(frozen=True)
class RuleDiff:
    """What differs between the rules of two plans. reordered: whether patterns of both stand in another order."""

    changes: tuple[RuleChange, ...]
    reordered: bool

    def __bool__(self) -> bool:
        return bool(self.changes) or self.reordered

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def compare(before: PrecisionPlan, after: PrecisionPlan) -> RuleDiff:
    """What differs, rule by rule. Where plans come from is not compared."""
    old = {rule.pattern: rule.precision for rule in before.rules}
    new = {rule.pattern: rule.precision for rule in after.rules}
    changes = tuple(
        RuleChange(pattern, old.get(pattern), new.get(pattern))
        for pattern in dict.fromkeys((*old, *new))
        if old.get(pattern) != new.get(pattern)
    )
    common = [[pattern for pattern in one if pattern in other] for one, other in ((old, new), (new, old))]
    return RuleDiff(changes, common[0] != common[1])
