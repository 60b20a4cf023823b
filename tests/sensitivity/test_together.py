"""Blocks run whole, and pairs in those whose scores do not add up, of a loss that is made up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest

from nvfp4c.sensitivity import together as module
from nvfp4c.sensitivity.analysis import Key, Together
from nvfp4c.sensitivity.together import pair_terms, together

NOISE = (-0.1, 0.0, 0.1)
"""Of the rise of each batch; the mean is 0."""


def keys(block: int, names: str = "abc") -> list[Key]:
    return [(f"layers.{block}.{name}", "fprop") for name in names]


class Model:
    """Its loss rises by the scores, and by what some pairs do together. runs: what was run."""

    def __init__(self, scores: dict[Key, float], pairs: dict[frozenset[Key], float]) -> None:
        self.scores, self.pairs = scores, pairs
        self.runs: list[frozenset[Key]] = []

    def __call__(self, fp4: Iterable[Key]) -> Sequence[float]:
        chosen = frozenset(fp4)
        self.runs.append(chosen)
        rise = sum(self.scores[key] for key in chosen)
        rise += sum(more for pair, more in self.pairs.items() if pair <= chosen)
        return [rise + noise * len(chosen) for noise in NOISE]


SCORES = {key: 1.0 + 0.1 * block for block in range(4) for key in keys(block)} | {("head", "fprop"): 9.0}


def test_sums_are_what_blocks_do_where_nothing_interacts() -> None:
    model = Model(SCORES, {})
    backward = {("layers.0.a", "wgrad"): 5.0, ("layers.0.a", "dgrad"): 5.0}
    found = together({**SCORES, **backward}, model)
    assert [one.block for one in found] == [f"layers.{block}." for block in range(4)], "a head is no block"
    for block, one in enumerate(found):
        assert one.keys == tuple(keys(block)) and one.adds_up
        assert one.predicted == pytest.approx(3 + 0.3 * block) and one.excess == pytest.approx(0)
    assert pair_terms(found, SCORES, model) == {}
    assert len(model.runs) == 4, "nothing but the blocks"


@pytest.mark.parametrize("more", [2.0, -2.0])
def test_a_pair_that_interacts_is_found(more: float) -> None:
    first, second, third = keys(2)
    model = Model(SCORES, {frozenset((first, third)): more})
    found = together(SCORES, model)
    assert [one.adds_up for one in found] == [True, True, False, True]
    assert found[2].excess == pytest.approx(more)
    terms = pair_terms(found, SCORES, model)
    assert set(terms) == set(combinations(keys(2), 2))
    assert terms[first, third] == pytest.approx(more)
    assert terms[first, second] == pytest.approx(0, abs=1e-12) and terms[second, third] == pytest.approx(0, abs=1e-12)


def test_what_noise_explains_is_no_interaction() -> None:
    """The half interval of three batches is 4.303 * sd / sqrt(3): 0.745 for a block of three."""
    for more, adds_up in ((0.7, True), (0.8, False)):
        model = Model(SCORES, {frozenset(keys(1)[:2]): more})
        assert together(SCORES, model)[1].adds_up is adds_up
    assert Together("layers.0.", (), 0.0, (5.0,)).adds_up, "one batch tells nothing"


def test_only_the_largest_blocks_and_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCKS", 3)
    monkeypatch.setattr(module, "WORST", 1)
    monkeypatch.setattr(module, "MEMBERS", 2)
    model = Model(SCORES, {frozenset(keys(1)): 3.0, frozenset(keys(3)): -4.0})
    scores = {**SCORES, ("layers.3.b", "fprop"): -20.0}
    found = together(scores, model)
    assert [one.block for one in found] == ["layers.1.", "layers.2.", "layers.3."]
    terms = pair_terms(found, scores, model)
    assert list(terms) == [(("layers.3.b", "fprop"), ("layers.3.a", "fprop"))]
