"""A model really run with some of its matmuls in FP4: by how much the loss rises, and how far the gradient turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.kept import kept
from nvfp4c.sensitivity.measure import check_finite
from nvfp4c.sensitivity.switched import SwitchedModel


@dataclass(frozen=True)
class Runs:
    """Runs on the same batches, with any choice of what is in FP4.

    folder: where every result is kept as soon as it is found, and found again. provenance: what results depend on
    beside that choice, the batches among it. kind: what a batch is called where its loss is refused.
    """

    switched: SwitchedModel
    batches: Sequence[Any]
    loss: Callable[..., Tensor]
    folder: Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "batch"

    @cached_property
    def plain(self) -> tuple[float, ...]:
        """The loss of each batch in high precision."""
        return self.losses(())

    def check(self) -> None:
        """Raise DataError where the loss of a batch in high precision is not finite. In FP4 it need not be."""
        for number, loss in enumerate(self.plain):
            check_finite(loss, f"{self.kind} {number}")

    def losses(self, fp4: Iterable[Key]) -> tuple[float, ...]:
        """The loss of each batch with these in FP4."""
        keys = sorted(fp4)
        return self._kept("losses", keys, len(self.batches), lambda: self._run(keys))

    def rises(self, fp4: Iterable[Key]) -> tuple[float, ...]:
        """By how much the loss of each batch is above what it is without FP4."""
        return tuple(one - other for one, other in zip(self.losses(fp4), self.plain, strict=True))

    def cosine(self, fp4: Iterable[Key]) -> float:
        """Of the angle between the parameters' gradients with these in FP4 and without, on the first batch."""
        keys = sorted(fp4)
        return self._kept("cosine", keys, 1, lambda: [self._cosine(keys)])[0]

    @cached_property
    def _exact(self) -> Tensor:
        return self.switched.gradient((), self.batches[0], self.loss)

    def _cosine(self, fp4: Sequence[Key]) -> float:
        return float(cosine_similarity(self.switched.gradient(fp4, self.batches[0], self.loss), self._exact, dim=0))

    def _run(self, fp4: Sequence[Key]) -> tuple[float, ...]:
        return self.switched.losses(fp4, self.batches, self.loss)

    def _kept(
        self, kind: str, fp4: Sequence[Key], count: int, measure: Callable[[], Sequence[float]]
    ) -> tuple[float, ...]:
        return kept(self.folder, kind, {**self.provenance, "measured": kind, "fp4": fp4}, count, measure)
