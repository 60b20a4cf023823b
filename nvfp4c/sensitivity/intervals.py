"""How sure a mean over batches is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.special import stdtrit

CONFIDENCE = 0.95


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None where one value tells nothing of it."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; NaN where there are too few values."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return (fmean(values) if values else math.nan), math.nan
    mean, error = mean_and_error(values)
    assert error is not None
    return mean, float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
