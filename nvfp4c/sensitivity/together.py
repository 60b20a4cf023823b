"""Do scores add up? A block's forward matmuls are run in FP4 together; where the loss then rises by something else than
the sum of their scores, every two of them are run together, and what they do beyond each alone goes to the solver.

    blocks, run whole ── those whose scores do not add up ── pairs in the worst of them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

from nvfp4c.passes.matmul_graph import block_name
from nvfp4c.sensitivity.analysis import Key, PairTerms, Scores, Together
from nvfp4c.sensitivity.intervals import mean_and_error
from nvfp4c.sensitivity.score import damped
from nvfp4c.watch import Watch, unwatched

BLOCKS = 8
"""Run whole: those with the largest scores. One forward pass each for every batch."""

WORST = 2
"""Blocks in which pairs are run."""

MEMBERS = 7
"""Of such a block, those with the largest scores: 21 pairs."""

Rises = Callable[[Iterable[Key]], Sequence[float]]
"""Of the loss of each batch, with these in FP4."""


def together(scores: Scores, rises: Rises, watch: Watch = unwatched) -> tuple[Together, ...]:
    """The blocks with the largest scores, each run with all its forward matmuls in FP4."""
    what = "checking sums of scores"
    blocks = _largest(_blocks(scores), scores)
    found = []
    for number, (name, keys) in enumerate(blocks.items()):
        watch(what, number, len(blocks))
        found.append(Together(name, keys, math.fsum(scores[key] for key in keys), tuple(rises(keys))))
    watch(what, len(blocks), len(blocks))
    return tuple(found)


def pair_terms(checked: Sequence[Together], scores: Scores, rises: Rises, watch: Watch = unwatched) -> PairTerms:
    """For every two matmuls of the worst blocks whose scores do not add up: by how much the loss rises with both beyond
    what it rises with each alone. Means over batches, damped by their standard errors as first-order terms are."""
    failed = sorted((one for one in checked if not one.adds_up), key=lambda one: -abs(one.excess))[:WORST]
    found = {}
    for number, block in enumerate(failed):
        watch("measuring pairs", number, len(failed))
        members = sorted(block.keys, key=lambda key: -abs(scores[key]))[:MEMBERS]
        alone = {key: rises([key]) for key in members}
        for first, second in combinations(members, 2):
            both = zip(rises([first, second]), alone[first], alone[second], strict=True)
            found[first, second] = damped(*mean_and_error([one - a - b for one, a, b in both]))
    watch("measuring pairs", len(failed), len(failed))
    return found


def _blocks(scores: Scores) -> dict[str, tuple[Key, ...]]:
    """The forward matmuls of each block, of those that have several."""
    found: dict[str, list[Key]] = {}
    for site, role in scores:
        block = block_name(site)
        if block is not None and role == "fprop":
            found.setdefault(block, []).append((site, role))
    return {name: tuple(keys) for name, keys in found.items() if len(keys) > 1}


def _largest(blocks: Mapping[str, tuple[Key, ...]], scores: Scores) -> dict[str, tuple[Key, ...]]:
    """At most `BLOCKS` of them, in the model's order."""
    sizes = {name: math.fsum(abs(scores[key]) for key in keys) for name, keys in blocks.items()}
    chosen = sorted(blocks, key=lambda name: -sizes[name])[:BLOCKS]
    return {name: blocks[name] for name in blocks if name in chosen}
