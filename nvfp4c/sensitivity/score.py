"""From measurements to scores: by how much the loss is predicted to rise when a role of a site runs in FP4.

fprop. The loss of a batch changes by g e + 1/2 e^T H e + ..., with the error e of the result and g = dL/dy. The probe
measures the first term itself, sign and all, with its standard error s over batches; on other batches it comes out
differently, so it is damped as a Wiener filter damps a signal in noise: first^3 / (first^2 + s^2). For the second term
there is the empirical Fisher matrix, by rows where each has a loss of its own, as tokens have, or by samples, where a
loss is of whole sequences (`auto_quantize` of ModelOpt adds (g e)^2 over elements, which is the diagonal by rows). It
gets the one weight with which all sites together rise as much as was measured with all of them in FP4. Of the two that
one is taken whose weight is nearer to 1: by rows on GPTs, by samples on a sentence encoder.

dgrad, wgrad. These errors change gradients, not this batch's loss. A role is given what its error adds to the squared
relative error of the gradients of all parameters that it reaches, weighted by their part of the squared gradient: wgrad
reaches its own weight; dgrad all that lies before it. Their sum is set to GRADIENT_SHARE of the sum of fprop's: what
backward-only training loses beside forward-only (0.25 to 0.35% against 1.8 to 2.5% at 100 million parameters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nvfp4c.sensitivity.analysis import Key, Scores
from nvfp4c.sensitivity.measurements import UNITS, Measurements, RoleMeasure, Unit

GRADIENT_SHARE = 0.14
"""What all gradients together weigh, over what all forward matmuls do: 0.3 / 2.15."""


def scores(measurements: Measurements, everything: float | None = None) -> Scores:
    """A score for every site and role that was measured, in units of the loss.

    everything: the rise of the loss with all forward matmuls in FP4, on the same batches; None leaves the second-order
    terms out.
    """
    second = Second("rows", 0.0) if everything is None else second_order(measurements, everything)
    forward = {
        (site.site, "fprop"): rise(site.roles["fprop"], second) for site in measurements.sites if "fprop" in site.roles
    }
    backward = gradient_errors(measurements)
    total, reached = sum(max(0.0, value) for value in forward.values()), sum(backward.values())
    unit = GRADIENT_SHARE * total / reached if reached else 0.0
    return {**forward, **{key: unit * value for key, value in backward.items()}}


@dataclass(frozen=True)
class Second:
    """Of which second-order terms are taken, and what they are multiplied by."""

    unit: Unit
    weight: float


def second_order(measurements: Measurements, everything: float) -> Second:
    """The terms, by rows or by samples, whose weight is nearer to 1, with which all sites add up to the rise with
    everything in FP4. The weight is 0 where the first-order terms alone exceed it."""
    roles = [site.roles["fprop"] for site in measurements.sites if "fprop" in site.roles]
    missing = everything - math.fsum(damped(role.first or 0.0, role.first_error) for role in roles)
    found = [Second(unit, _weight(missing, [role.second(unit) for role in roles])) for unit in UNITS]
    return min(found, key=lambda second: abs(math.log(second.weight)) if second.weight else math.inf)


def _weight(missing: float, terms: Sequence[float]) -> float:
    total = math.fsum(terms)
    return max(0.0, missing / total) if total > 0 else 0.0


def rise(role: RoleMeasure, second: Second) -> float:
    """The predicted rise of the loss by the error of a forward matmul."""
    return damped(role.first or 0.0, role.first_error) + second.weight * role.second(second.unit)


def damped(mean: float, error: float | None) -> float:
    """A mean, the smaller the more of it its standard error explains; as it is where no error is known."""
    if not error or not mean:
        return mean
    return mean / (1.0 + (error / mean) ** 2)


def gradient_errors(measurements: Measurements) -> dict[Key, float]:
    """What each backward matmul adds to the squared relative error of all parameters' gradients.

    The sites are in forward order, so an error in dx of one is in the gradients of all weights before it.
    """
    squares = [site.roles["wgrad"].signal if "wgrad" in site.roles else 0.0 for site in measurements.sites]
    total = sum(squares) or 1.0
    found: dict[Key, float] = {}
    before = 0.0
    for site, own in zip(measurements.sites, squares, strict=True):
        for name, reached in (("dgrad", before), ("wgrad", own)):
            role = site.roles.get(name)
            if role is not None and role.signal:
                found[site.site, name] = role.noise / role.signal * reached / total
        before += own
    return found
