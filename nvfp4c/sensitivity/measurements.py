"""What a probe measures, as plain data: for every site, every role, and every operand of it.

Sums are over all elements and batches, so measurements of several batches add up; a ratio is formed where it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nvfp4c.errors import DataError
from nvfp4c.files import write_text
from nvfp4c.sensitivity.intervals import mean_and_error

VERSION = 3
OCTAVES = 32
"""Bins of a histogram of magnitudes: bin i counts amax * 2^-(i+1) < |x| <= amax * 2^-i, the last also all below it."""

LOSS_TERMS = ("first", "diagonal", "rows", "samples")

Unit = Literal["rows", "samples"]
UNITS: tuple[Unit, ...] = ("rows", "samples")
"""What has a loss of its own, see `RoleMeasure`."""

OPERAND_SUMS = ("elements", "signal", "noise", "fourth", "vanished", "saturated", "zeros")
OPERAND_COUNTS = ("before", "after", "scales")
SCALE_BINS = 16
"""Bins of a histogram of block scales: one for each exponent of E4M3, from subnormals to 2^8."""


@dataclass(frozen=True)
class OperandMeasure:
    """One operand of one matmul, before and after quantisation, as the matmul reads it: rotated where a recipe does.

    operand: "x", "w" or "dy". elements: how many. signal: sum of x^2. noise: sum of (quantised - x)^2. fourth: sum of
    x^4. vanished: elements that became 0 and were not. saturated: elements beyond 6 block scales, which is clipped.
    zeros: elements that were 0. before, after: counts of magnitudes by OCTAVES below the amax, without zeros. scales:
    counts of block scales by exponent, without scales of 0.
    """

    operand: str
    elements: int
    signal: float
    noise: float
    fourth: float
    vanished: int
    saturated: int
    zeros: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    scales: tuple[int, ...]

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in decibels: 10 log10(sum x^2 / sum e^2)."""
        return decibels(self.signal, self.noise)

    @property
    def kurtosis(self) -> float:
        """E[x^4] / E[x^2]^2 about zero: 3 for a Gaussian, larger with outliers."""
        return self.fourth / self.signal * self.elements / self.signal if self.signal else math.nan


@dataclass(frozen=True)
class RoleMeasure:
    """One matmul in FP4 beside the same in high precision, on the same operands.

    operations: multiplications and additions of a batch, 2 m n k. signal: sum of y^2. noise: sum of e^2, with
    e = y_q - y. aligned: sum of e y, what the error shares with the result.
    For fprop also what the error does to the loss, means over batches, in units of the loss, with g = dL/dy:
    first: sum of g e, the signed first-order change; first_error: the standard error of that mean, None of one batch.
    diagonal: sum of (g e)^2 over elements. rows: n/2 times the sum over n rows of (sum of g e in the row)^2; samples:
    the same over what lies together in the first dimension. Each is the second-order change by the empirical Fisher
    matrix of a loss that is a mean over n independent rows (tokens), or samples (sequences).
    """

    role: str
    m: int
    n: int
    k: int
    operations: float
    signal: float
    noise: float
    aligned: float
    operands: tuple[OperandMeasure, ...]
    first: float | None = None
    first_error: float | None = None
    diagonal: float | None = None
    rows: float | None = None
    samples: float | None = None

    def second(self, unit: Unit) -> float:
        """The second-order change of the loss by rows or samples; 0 where it was not measured."""
        return (self.rows if unit == "rows" else self.samples) or 0.0

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio of the result in decibels."""
        return decibels(self.signal, self.noise)

    @property
    def relative_error(self) -> float:
        """sqrt(sum e^2 / sum y^2)."""
        return math.sqrt(self.noise / self.signal) if self.signal else math.nan

    @property
    def bias(self) -> float:
        """The part of the error along the result, over the result: -0.01 is a result 1% too small."""
        return self.aligned / self.signal if self.signal else math.nan

    @property
    def variance(self) -> float:
        """The part of the relative squared error that is not `bias`."""
        return max(self.noise / self.signal - self.bias * self.bias, 0.0) if self.signal else math.nan


@dataclass(frozen=True)
class SiteMeasure:
    """One site. block: number of its block, or None. projection: its name without the block, such as mlp.up_proj.

    weight: name of the parameter, shared by sites that are tied. weight_elements: of it. reads: a number that sites
    have in common where they read the same tensor. obstacle: why it cannot run in FP4 at all, or None; then there are
    no roles. unmeasured: operations, as in `RoleMeasure`, of its forward matmuls that no gradient
    reached.
    """

    site: str
    block: int | None
    projection: str
    weight: str
    weight_elements: int
    reads: int
    roles: Mapping[str, RoleMeasure]
    obstacle: str | None = None
    unmeasured: float = 0.0


@dataclass(frozen=True)
class Measurements:
    """All sites in the order in which the model runs them. loss: mean over the batches, in high precision.

    provenance: model, data, versions, recipe, method, device: whatever is needed to measure the same again.
    """

    sites: tuple[SiteMeasure, ...]
    loss: float
    batches: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unmeasured_share(self) -> float:
        """What `SiteMeasure.unmeasured` is of all operations that were counted, measured or not, 0..1."""
        measured = sum(role.operations for site in self.sites for role in site.roles.values())
        unmeasured = sum(site.unmeasured for site in self.sites)
        return unmeasured / (measured + unmeasured) if unmeasured else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def merged(parts: Sequence[Measurements]) -> Measurements:
    """Measurements of several sets of batches as one of all of them. They are of the same model and recipe."""
    found: dict[str, list[SiteMeasure]] = {}
    for part in parts:
        for site in part.sites:
            found.setdefault(site.site, []).append(site)
    batches = sum(part.batches for part in parts)
    return Measurements(
        sites=tuple(_merged_site(measured) for measured in found.values()),
        loss=sum(part.loss * part.batches for part in parts) / batches,
        batches=batches,
        provenance=parts[0].provenance,
    )


def _merged_site(parts: Sequence[SiteMeasure]) -> SiteMeasure:
    names = dict.fromkeys(role for part in parts for role in part.roles)
    roles = {name: _merged_role([part.roles[name] for part in parts if name in part.roles]) for name in names}
    unmeasured = sum(part.unmeasured for part in parts) / len(parts)
    return replace(parts[0], roles=roles, obstacle=None if roles else parts[0].obstacle, unmeasured=unmeasured)


def _merged_role(parts: Sequence[RoleMeasure]) -> RoleMeasure:
    firsts = [part.first for part in parts if part.first is not None]
    terms: dict[str, Any] = {name: _mean([getattr(part, name) for part in parts]) for name in LOSS_TERMS}
    operands = [_merged_operand(each) for each in zip(*(part.operands for part in parts), strict=True)]
    return replace(
        parts[0],
        operations=sum(part.operations for part in parts) / len(parts),
        signal=sum(part.signal for part in parts),
        noise=sum(part.noise for part in parts),
        aligned=sum(part.aligned for part in parts),
        operands=tuple(operands),
        **terms,
        first_error=mean_and_error(firsts)[1] if firsts else None,
    )


def _merged_operand(parts: Sequence[OperandMeasure]) -> OperandMeasure:
    sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in OPERAND_SUMS}
    counts: dict[str, Any] = {
        name: tuple(map(sum, zip(*(getattr(part, name) for part in parts), strict=True))) for name in OPERAND_COUNTS
    }
    return OperandMeasure(operand=parts[0].operand, **sums, **counts)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def load(path: Path) -> Measurements:
    """Read what `save` wrote. Raises DataError for a file that is none of it. Nothing in the file is executed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise DataError(f"{path}: version {data['version']!r} of measurements is not supported; measure again")
        return Measurements(
            sites=tuple(_site(one) for one in data["sites"]),
            loss=float(data["loss"]),
            batches=int(data["batches"]),
            provenance=data["provenance"],
        )
    except OSError as error:
        raise DataError(f"cannot read the measurements {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} holds no measurements of nvfp4c sensitivity ({error!r}); measure again") from error


def _site(data: dict[str, Any]) -> SiteMeasure:
    roles = {
        name: RoleMeasure(**{**role, "operands": tuple(_operand(operand) for operand in role["operands"])})
        for name, role in data["roles"].items()
    }
    return SiteMeasure(**{**data, "roles": roles})


def _operand(data: dict[str, Any]) -> OperandMeasure:
    return OperandMeasure(**{**data, **{name: tuple(data[name]) for name in OPERAND_COUNTS}})


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): infinite without noise, NaN without signal."""
    if not signal:
        return math.nan
    return 10 * (math.log10(signal) - math.log10(noise)) if noise else math.inf
