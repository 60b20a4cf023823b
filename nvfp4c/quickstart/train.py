"""Train the GPT once with one backend, and measure it: the function that the quickstart and ablations share."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4c.errors import DataError, OptionError, TargetError
from nvfp4c.quickstart.data import VOCABULARY, Corpus
from nvfp4c.quickstart.model import Gpt, Size

WARMUP_SHARE = 0.1
FINAL_LR_SHARE = 0.1
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0
VALIDATIONS = 10
"""Validation passes spread over a run; one more comes before the first step."""

VALIDATION_BATCHES = 8
SMOOTHED_STEPS = 20
"""The final training loss is the mean over this many last steps: one batch alone says little."""

STEPS_BETWEEN_READS = 10
"""On a GPU the loss is read this often, so that reading it does not hold the device up."""


@dataclass(frozen=True)
class Settings:
    """Everything that fixes a run, apart from the backend and the text."""

    size: Size
    steps: int
    seed: int
    device: str

    @property
    def tokens_per_step(self) -> int:
        return self.size.batch * self.size.sequence

    @property
    def minimum_bytes(self) -> int:
        """Text that each split must have: one sample for each place in a batch, and the byte that comes next."""
        return self.tokens_per_step + 1

    @property
    def high_precision(self) -> str:
        """What the run is in where it is not NVFP4."""
        return "BF16" if self.device == "cuda" else "FP32"


@dataclass(frozen=True)
class Progress:
    """What a run is doing: stage is "compile", "train" or "validate"; step counts the finished ones."""

    stage: str
    step: int
    loss: float
    tokens_per_second: float


@dataclass(frozen=True)
class Run:
    """What one training run gave.

    train_losses: nats a byte, one for each step. validation: (steps done, loss in nats a byte) pairs.
    tokens_per_second: of the training steps alone. compile_seconds: the first forward, backward and validation pass.
    peak_memory_bytes: None on a CPU. diverged_at: the step whose loss was not finite, where the run was stopped.
    """

    backend: str
    train_losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    tokens_per_second: float
    compile_seconds: float
    train_seconds: float
    peak_memory_bytes: int | None
    diverged_at: int | None

    @property
    def final_train_loss(self) -> float:
        """Mean training loss of the last steps; NaN when the run diverged."""
        if self.diverged_at is not None or not self.train_losses:
            return math.nan
        return statistics.fmean(self.train_losses[-SMOOTHED_STEPS:])

    @property
    def final_validation_loss(self) -> float:
        """Held-out loss after the last step; NaN when the run diverged."""
        return math.nan if self.diverged_at is not None else self.validation[-1][1]


def choose_device(name: str) -> str:
    """ "cuda" or "cpu" for "auto", "cuda" or "cpu"; OptionError or TargetError when that cannot be."""
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f"There is no device {name!r}. Choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise TargetError("PyTorch finds no CUDA GPU on this machine. Choose --device cpu, or install a CUDA build.")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def build_model(settings: Settings) -> Gpt:
    """The GPT with the weights that `settings.seed` gives, the same on every device."""
    torch.manual_seed(settings.seed)
    return Gpt(settings.size).to(settings.device)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats a byte; on a GPU the model runs under BF16 autocast with FP32 parameters."""
    tokens, targets = batch
    mixed = torch.autocast("cuda", dtype=torch.bfloat16) if tokens.is_cuda else contextlib.nullcontext()
    with mixed:
        logits = model(tokens)
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.reshape(-1))


def train_batches(corpus: Corpus, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """One batch a step of (tokens, next tokens), int64 [batch, sequence]; fixed by the seed."""
    text = corpus.train.to(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        starts = torch.randint(len(text) - settings.size.sequence, (settings.size.batch,), generator=generator)
        yield _batch(text, starts, settings.size.sequence)


def validation_batches(
    corpus: Corpus, settings: Settings, count: int = VALIDATION_BATCHES
) -> list[tuple[Tensor, Tensor]]:
    """The same batches for every run and seed, spread evenly over the held-out text."""
    text = corpus.validation.to(settings.device)
    last = len(text) - settings.size.sequence - 1
    starts = torch.linspace(0, last, count * settings.size.batch, dtype=torch.float64).long()
    return [_batch(text, part, settings.size.sequence) for part in starts.split(settings.size.batch)]


def _batch(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    places = starts.to(text.device)[:, None] + torch.arange(length + 1, device=text.device)
    samples = text[places].long()
    return samples[:, :-1], samples[:, 1:]


def compile_model(model: nn.Module, backend: str, options: Mapping[str, Any] | None) -> nn.Module:
    """The one line that differs between two runs."""
    compiled = torch.compile(model, backend=backend, options=dict(options) if options else None)
    return cast(nn.Module, compiled)


def optimizer_for(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.size.learning_rate, betas=BETAS, fused=True)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warmup over a tenth of the steps, then a cosine down to a tenth of the highest rate."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def validate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over `batches`, in nats a byte, computed as inference: in eval mode and without gradients."""
    model.eval()
    total = torch.stack([loss_of(model, batch) for batch in batches]).mean()
    model.train()
    return float(total)


def train(
    settings: Settings,
    corpus: Corpus,
    backend: str,
    options: Mapping[str, Any] | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Train the GPT of `settings` on `corpus`, compiled with `backend` and `options`; tell `watch` how it goes.

    Two calls that differ in backend and options alone have equal initial weights and equal batches. Else as `fit`.
    """
    return fit(build_model(settings), settings, corpus, backend, options, watch)


def fit(
    model: Gpt,
    settings: Settings,
    corpus: Corpus,
    backend: str,
    options: Mapping[str, Any] | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Train `model`, which is on the device of `settings`, on `corpus`.

    A run whose loss is no longer finite is stopped there. Raises DataError when the corpus is shorter than one batch,
    and whatever the backend raises.
    """
    if min(len(corpus.train), len(corpus.validation)) < settings.minimum_bytes:
        raise DataError(f"{corpus.source} holds less than one batch of {settings.minimum_bytes} bytes in a split.")
    torch.compiler.reset()
    compiled = compile_model(model, backend, options)
    held_out = validation_batches(corpus, settings)
    with warnings.catch_warnings():
        # TF32 stays off, so that what is not quantised is the same in both runs.
        warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores.*")
        watch(Progress("compile", 0, math.nan, 0.0))
        compile_seconds = _warm_up(compiled, next(train_batches(corpus, settings)), held_out[:1])
        torch.manual_seed(settings.seed)
        if settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses, validation, seconds = _steps(settings, compiled, train_batches(corpus, settings), held_out, watch)
    finite = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
    return Run(
        backend=backend,
        train_losses=losses[:finite],
        validation=validation,
        tokens_per_second=len(losses) * settings.tokens_per_step / seconds,
        compile_seconds=compile_seconds,
        train_seconds=seconds,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if settings.device == "cuda" else None,
        diverged_at=None if finite is None else finite + 1,
    )


def _steps(
    settings: Settings,
    compiled: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    held_out: list[tuple[Tensor, Tensor]],
    watch: Callable[[Progress], None],
) -> tuple[tuple[float, ...], tuple[tuple[int, float], ...], float]:
    """Training losses, validation losses, and the seconds that the training steps took without the validations."""
    optimizer = optimizer_for(compiled, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.steps))
    validated_after = {round(settings.steps * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)}
    read_every = STEPS_BETWEEN_READS if settings.device == "cuda" else 1
    losses: list[Tensor] = []
    validation = [(0, validate(compiled, held_out))]
    seconds, began = 0.0, time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        loss = loss_of(compiled, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(compiled.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % read_every and step not in validated_after:
            continue
        latest = float(losses[-1])
        speed = step * settings.tokens_per_step / (seconds + time.perf_counter() - began)
        watch(Progress("train", step, latest, speed))
        if not math.isfinite(latest):
            break
        if step in validated_after:
            _wait(batch[0])
            seconds += time.perf_counter() - began
            watch(Progress("validate", step, latest, speed))
            validation.append((step, validate(compiled, held_out)))
            began = time.perf_counter()
    seconds += time.perf_counter() - began
    return tuple(torch.stack(losses).tolist()), tuple(validation), seconds


def _warm_up(compiled: nn.Module, batch: tuple[Tensor, Tensor], held_out: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds of the first forward, backward and validation pass; changes no weight."""
    start = time.perf_counter()
    loss_of(compiled, batch).backward()
    validate(compiled, held_out)
    compiled.zero_grad(set_to_none=True)
    _wait(batch[0])
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    """Until the device that holds `tensor` has finished what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
