"""The same training twice, with Inductor alone and with the nvfp4 backend, and what the two say together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from nvfp4c.explanation import Explanation, explain
from nvfp4c.quickstart import environment
from nvfp4c.quickstart.data import Corpus
from nvfp4c.quickstart.model import parameter_count
from nvfp4c.quickstart.results import run_to_dict
from nvfp4c.quickstart.train import Progress, Run, Settings, build_model, loss_of, train, train_batches


@dataclass(frozen=True)
class Comparison:
    """Two runs that differ in the backend alone, with what is needed to understand and repeat them."""

    settings: Settings
    recipe: str
    parameters: int
    corpus: dict[str, str | int]
    environment: dict[str, str]
    baseline: Run
    nvfp4: Run
    explanation: Explanation

    @property
    def gap(self) -> float:
        """How far NVFP4's final validation loss lies above the baseline's, relative to it; NaN when one diverged."""
        return self.nvfp4.final_validation_loss / self.baseline.final_validation_loss - 1

    def gaps(self) -> list[tuple[int, float]]:
        """The relative validation gap after each validation pass that both runs had."""
        return [
            (step, ours / theirs - 1)
            for (step, theirs), (_, ours) in zip(self.baseline.validation, self.nvfp4.validation, strict=False)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain data; losses are in nats a byte."""
        return {
            "settings": asdict(self.settings),
            "recipe": self.recipe,
            "parameters": self.parameters,
            "corpus": self.corpus,
            "environment": self.environment,
            "relative_validation_gap": self.gap,
            "runs": {name: run_to_dict(run) for name, run in (("baseline", self.baseline), ("nvfp4", self.nvfp4))},
            "explanation": self.explanation.to_json(),
        }


def compare(
    settings: Settings,
    corpus: Corpus,
    recipe: str,
    watch: Callable[[str, Progress], None] = lambda backend, progress: None,
) -> Comparison:
    """Explain the model, then train it with Inductor and with NVFP4; `watch` also gets the backend's name.

    Raises whatever the backend raises, before any training where it can: explaining comes first.
    """
    model = build_model(settings)
    batch = next(train_batches(corpus, settings))
    explanation = explain(model, batch, loss=loss_of, recipe=recipe)
    return Comparison(
        settings=settings,
        recipe=recipe,
        parameters=parameter_count(model),
        corpus={
            "source": corpus.source,
            "files": corpus.files,
            "split": corpus.split,
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
        },
        environment=environment.describe(settings.device),
        baseline=train(settings, corpus, "inductor", watch=lambda progress: watch("inductor", progress)),
        nvfp4=train(settings, corpus, "nvfp4", {"recipe": recipe}, lambda progress: watch("nvfp4", progress)),
        explanation=explanation,
    )
