"""What a language model is for: samples made of windows of text, and a loss on them.

Samples are never padded, and a loss is a mean over samples and their tokens, all of equal weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4c.tasks import Loss

MASKED_SHARE = 0.15
TEMPERATURE = 0.05
"""Cosines are divided by it. It is what sentence-transformers trains with, there called a scale of 20."""

NO_TARGET = -100
"""The target of a token that is not to be guessed: `cross_entropy` leaves it out of its mean."""

Samples = tuple[Tensor, Tensor]
"""Two int64 tensors [samples, sequence]: tokens and their targets, or passages and those that follow them."""


@dataclass(frozen=True)
class Marks:
    """Tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, rows: Tensor) -> Tensor:
        """`rows` [N, T] between the marks: [N, T + len(self)]."""
        before, after = (
            torch.tensor(part, dtype=rows.dtype).expand(len(rows), -1) for part in (self.before, self.after)
        )
        return torch.cat([before, rows, after], dim=1)


@dataclass(frozen=True)
class Objective:
    """window: tokens of text for a sample. samples: makes them of windows [N, window]. loss: of a batch of samples."""

    window: int
    samples: Callable[[Tensor], Samples]
    loss: Loss


def next_token(marks: Marks, length: int) -> Objective:
    """Each token from those before it: `length` tokens, of which the marks before the text are some."""
    start = Marks(marks.before)

    def samples(rows: Tensor) -> Samples:
        tokens = start.around(rows)
        return tokens[:, :-1], tokens[:, 1:]

    return Objective(length + 1 - len(start), samples, token_loss)


def masked_token(marks: Marks, length: int, mask: int, seed: int) -> Objective:
    """15% of the tokens, each replaced by the token `mask`, from all others (arXiv 1810.04805, whose 10% that are
    kept and 10% that are replaced at random serve training alone). Every sample has equally many; marks are left be.
    """
    window = length - len(marks)

    def samples(rows: Tensor) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(rows.shape, generator=generator).argsort(dim=1)
        places = order[:, : max(1, round(MASKED_SHARE * window))] + len(marks.before)
        tokens = marks.around(rows)
        targets = torch.full_like(tokens, NO_TARGET).scatter(1, places, tokens.gather(1, places))
        return tokens.scatter(1, places, mask), targets

    return Objective(window, samples, token_loss)


def neighbours(marks: Marks, length: int) -> Objective:
    """Which passage follows which: a sample is two passages of `length` tokens that lie side by side in the text."""
    window = length - len(marks)

    def samples(rows: Tensor) -> Samples:
        return marks.around(rows[:, :window]), marks.around(rows[:, window:])

    return Objective(2 * window, samples, neighbour_loss)


def token_loss(model: nn.Module, batch: Samples) -> Tensor:
    """Mean cross-entropy in nats of the targets given the tokens."""
    tokens, targets = batch
    logits: Tensor = model(input_ids=tokens).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def neighbour_loss(model: nn.Module, batch: Samples) -> Tensor:
    """`contrast` of passages with their neighbours. An embedding is the mean over the tokens' last hidden states."""
    passages = torch.cat(batch)
    embeddings = model(input_ids=passages).last_hidden_state.float().mean(dim=1)
    return contrast(*embeddings.chunk(2))


def contrast(first: Tensor, second: Tensor) -> Tensor:
    """InfoNCE in nats (arXiv 1807.03748): which belongs to which among all of the batch, averaged over both directions.

    first, second: embeddings float32 [batch, width], whose rows belong together; a similarity is their cosine over
    TEMPERATURE. log(batch) is what a guess gives.
    """
    similarities = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / TEMPERATURE
    own = torch.arange(len(similarities), device=similarities.device)
    return (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.T, own)) / 2
