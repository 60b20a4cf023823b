"""One matmul after the other, really run: what `--method ablate` measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from nvfp4c.sensitivity.analysis import Key, Scores
from nvfp4c.sensitivity.measurements import Measurements
from nvfp4c.sensitivity.runs import Runs
from nvfp4c.watch import Watch, unwatched


@dataclass(frozen=True)
class Ablation:
    """See `Analysis`. cosine_of_everything: with all roles of all sites in FP4."""

    single: Scores = field(default_factory=dict)
    all_but: Scores = field(default_factory=dict)
    cosine: Scores = field(default_factory=dict)
    cosine_all_but: Scores = field(default_factory=dict)
    cosine_of_everything: float | None = None


def ablate(found: Measurements, runs: Runs, watch: Watch = unwatched) -> Ablation:
    """Forward matmuls for the loss of all batches, all roles for the gradients of one batch."""
    what = "measuring one at a time"
    forward = forward_matmuls(found)
    every = [(site.site, role) for site in found.sites for role in site.roles]
    steps = len(forward) + len(every)
    single, all_but, cosine, cosine_all_but = {}, {}, {}, {}
    for number, key in enumerate(forward):
        watch(what, number, steps)
        single[key] = fmean(runs.rises([key]))
        all_but[key] = fmean(runs.rises(other for other in forward if other != key))
    for number, key in enumerate(every, len(forward)):
        watch(what, number, steps)
        cosine[key] = runs.cosine([key])
        cosine_all_but[key] = runs.cosine(other for other in every if other != key)
    watch(what, steps, steps)
    return Ablation(single, all_but, cosine, cosine_all_but, runs.cosine(every))


def forward_matmuls(found: Measurements) -> list[Key]:
    """The forward matmuls that can run in FP4."""
    return [(site.site, "fprop") for site in found.sites if "fprop" in site.roles]
