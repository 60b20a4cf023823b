"""What an analysis of a model holds beside its measurements: scores, and plans with what they are worth.

`sensitivity.json` holds all of it; the report and the terminal only show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from nvfp4c.errors import DataError
from nvfp4c.page import finite
from nvfp4c.sensitivity.intervals import mean_and_interval
from nvfp4c.sensitivity.measurements import Measurements

Key = tuple[str, str]
"""A site and a role of it."""

Scores = Mapping[Key, float]
"""By how much the loss is predicted to rise when this role of this site runs in FP4, in units of the loss."""

PairTerms = Mapping[tuple[Key, Key], float]
"""By how much more than the sum of their scores the loss rises when both run in FP4; may be negative."""

KINDS = ("solved", "paper", "weights", "random")


@dataclass(frozen=True)
class Candidate:
    """A way to divide the matmuls.

    kind: "solved", or one of the baselines: "paper" (first and last blocks), "weights" (ranked by the error of the
    weights alone), "random". bf16: what stays in high precision; everything else that can runs in FP4. budget: what
    was allowed. share: what of all matmul operations stays in high precision, 0..1. predicted: rise of the loss.
    measured: rise of the loss on each held-out batch, really run; None where it was not.
    """

    name: str
    kind: str
    bf16: tuple[Key, ...]
    budget: float
    share: float
    predicted: float
    measured: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Together:
    """A block run with all its forward matmuls in FP4. predicted: the sum of their scores. measured: rise of the loss
    of each batch that the scores are of."""

    block: str
    keys: tuple[Key, ...]
    predicted: float
    measured: tuple[float, ...]

    @property
    def name(self) -> str:
        """Of the block."""
        return self.block.removesuffix(".")

    @property
    def excess(self) -> float:
        """By how much the loss rises beyond the sum of scores, mean over batches."""
        return fmean(self.measured) - self.predicted

    @property
    def adds_up(self) -> bool:
        """Whether the sum of scores lies in the 95% interval of what was measured, or nothing is known of that."""
        _, half = mean_and_interval(self.measured)
        return not abs(self.excess) > half


@dataclass(frozen=True)
class Analysis:
    """candidates: the solved ones are the curve over budgets. chosen: the name of the one that plan.json holds.

    budget_unit: what a budget is: "operations" (share of them in high precision), "bits" (mean bits of a weight), or
    "speed" (of a step, over all in high precision) on `target`. Where they were measured, of each one: single, the
    rise of the loss with it alone in FP4; all_but, with every other forward matmul; cosine, of the angle between the
    parameters' gradients with it alone in FP4 and without FP4; cosine_all_but, with every other role of any site in
    FP4 and without. together: blocks run whole, to see whether scores add up. pairs: by how
    much the loss rises with both in FP4 beyond the sum of what it rises with each, where that was measured.
    """

    measurements: Measurements
    scores: Scores
    candidates: tuple[Candidate, ...]
    chosen: str
    budget_unit: str = "operations"
    target: str = ""
    single: Scores = field(default_factory=dict)
    all_but: Scores = field(default_factory=dict)
    cosine: Scores = field(default_factory=dict)
    cosine_all_but: Scores = field(default_factory=dict)
    together: tuple[Together, ...] = ()
    pairs: PairTerms = field(default_factory=dict)

    @property
    def plan(self) -> Candidate:
        """The plan that was chosen. Raises DataError where it is not among the candidates."""
        for candidate in self.candidates:
            if candidate.name == self.chosen:
                return candidate
        raise DataError(f"the analysis chose the plan {self.chosen!r} but does not hold it; solve again")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; scores as site: role: number, and null for what is not finite."""
        found = {
            "measurements": self.measurements.to_dict(),
            "scores": nested(self.scores),
            "single": nested(self.single),
            "all_but": nested(self.all_but),
            "cosine": nested(self.cosine),
            "cosine_all_but": nested(self.cosine_all_but),
            "together": [{**asdict(one), "adds_up": one.adds_up} for one in self.together],
            "pairs": [{"pair": pair, "rise": rise} for pair, rise in self.pairs.items()],
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "chosen": self.chosen,
            "budget_unit": self.budget_unit,
            "target": self.target,
        }
        plain: dict[str, Any] = finite(found)
        return plain


def nested(scores: Scores) -> dict[str, dict[str, float]]:
    """{(site, role): number} as {site: {role: number}}."""
    found: dict[str, dict[str, float]] = {}
    for (site, role), value in scores.items():
        found.setdefault(site, {})[role] = value
    return found
