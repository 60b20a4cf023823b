"""What the sensitivity probe costs: one of its passes over one step of plain training, in time and in peak memory.

The probe runs the model as AOTAutograd captures it, without Inductor. So there are two plain steps: the model run
eagerly, and the model compiled by Inductor. All three share the model and its optimizer, whose states are in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nvfp4c.bench.memory import Memory, on_cpu, on_gpu
from nvfp4c.bench.timing import Samples, Watch, clock_for, interleaved
from nvfp4c.errors import DataError, TargetError
from nvfp4c.quickstart.data import VOCABULARY
from nvfp4c.quickstart.model import Gpt, Size
from nvfp4c.quickstart.train import choose_device, compile_model, loss_of
from nvfp4c.recipe import DEFAULT_RECIPE
from nvfp4c.sensitivity.intercepted import observed, uncompiled
from nvfp4c.sensitivity.measure import check_sites, everywhere, measure_batch
from nvfp4c.sensitivity.probe import Probe
from nvfp4c.tasks import Loss, Task

ROUNDS = {"cuda": 9, "cpu": 9}

PASSES = {"cuda": 5, "cpu": 1}
"""Passes or steps in a row that make one sample: see `train.STEPS`."""

PROBE = "probe"
EAGER = "eager"
INDUCTOR = "inductor"
DESCRIPTIONS = {
    PROBE: "a pass of the sensitivity probe: forward and backward, every matmul compared with FP4",
    EAGER: "a plain training step, not compiled: forward, backward, fused AdamW",
    INDUCTOR: "a plain training step of the model compiled by Inductor: forward, backward, fused AdamW",
}
SEED = 0


@dataclass(frozen=True)
class Cost:
    """Of one pass or step."""

    name: str
    time: Samples
    memory: Memory


@dataclass(frozen=True)
class ProbeResult:
    """A probe pass, and the plain steps that it is compared with."""

    probe: Cost
    steps: tuple[Cost, ...]

    def time_ratio(self, step: Cost) -> float:
        """How many times as long as a plain step a probe pass takes."""
        return self.probe.time.median / step.time.median

    def memory_ratio(self, step: Cost) -> float:
        """How many times the peak memory of a plain step a probe pass needs."""
        return self.probe.memory.peak / step.memory.peak

    def to_dict(self) -> dict[str, Any]:
        found = {self.probe.name: _to_dict(self.probe)}
        for step in self.steps:
            ratios = {"probe_time_ratio": self.time_ratio(step), "probe_memory_ratio": self.memory_ratio(step)}
            found[step.name] = {**_to_dict(step), **ratios}
        return found


def _to_dict(cost: Cost) -> dict[str, Any]:
    return {"description": DESCRIPTIONS[cost.name], "time": cost.time.to_dict(), "memory": asdict(cost.memory)}


def quickstart_task(size: Size, device: str) -> Task:
    """The quickstart's GPT with its loss and a batch of random bytes: what is in them changes neither time nor size."""
    torch.manual_seed(SEED)
    model = Gpt(size).to(device)
    text = torch.randint(VOCABULARY, (size.batch, size.sequence + 1)).to(device)
    return Task(f"quickstart GPT, {size.name}", model, batches=[(text[:, :-1], text[:, 1:])], loss=loss_of)


def device_of(task: Task) -> str:
    """The kind of device that a task's model is on.

    Raises DataError for a model without parameters, and OptionError or TargetError for a device that cannot be timed.
    """
    for parameter in task.model.parameters():
        return choose_device(parameter.device.type)
    raise DataError(f"the model of {task.name} has no parameters, so there is nothing to train or measure")


def measure(task: Task, rounds: int, in_a_row: int, watch: Watch) -> ProbeResult:
    """Measure a probe pass and plain steps on the first batch of a task. in_a_row: passes or steps a sample.

    The model's weights stay as they are: the optimizer computes everything, with a learning rate of 0. Raises TaskError
    for a task that cannot be trained, DataError as `sensitivity.measure` does, TargetError where memory does not
    suffice, and whatever Inductor raises.
    """
    device, (_, loss), (batch,) = device_of(task), task.training(), task.example()
    model = uncompiled(task.model)
    try:
        watch(f"first pass of {PROBE}", 0, 1)
        calls: dict[str, Callable[[], None]] = {PROBE: _probe_pass(model, batch, loss)}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
        forwards = {EAGER: model, INDUCTOR: compile_model(model, "inductor", None)}
        for name, forward in forwards.items():
            calls[name] = partial(_step, forward, batch, loss, optimizer)
            watch(f"first step of {name}", 0, 1)
            calls[name]()
        samples = interleaved(calls, clock_for(device, in_a_row, short=False), rounds, watch=watch)
        memory = {}
        for name in samples:
            optimizer.zero_grad(set_to_none=True)
            gc.collect()  # of the probe, which is the first, no graphs are held for the others
            call = calls.pop(name)
            memory[name] = on_gpu(call) if device == "cuda" else on_cpu(call, _held(model, optimizer, batch))
            del call
    except torch.OutOfMemoryError as error:
        raise TargetError("the model and its batch do not fit into this GPU's memory; choose a smaller one") from error
    probe, *steps = (Cost(name, samples[name], memory[name]) for name in memory)
    return ProbeResult(probe, tuple(steps))


def _probe_pass(model: nn.Module, batch: Any, loss: Loss) -> Callable[[], None]:
    """A pass of a probe that has made its first, which compiles the model."""
    probe = Probe(SEED)
    watched = observed(model, everywhere(DEFAULT_RECIPE), probe)
    check_sites(measure_batch(model, watched, batch, loss, probe, 0, {}))

    def probe_pass() -> None:
        measure_batch(model, watched, batch, loss, probe, 0, {})

    return probe_pass


def _step(forward: nn.Module, batch: Any, loss: Loss, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss(forward, batch).backward()
    optimizer.step()


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Iterator[Tensor]:
    """What lies in memory between two steps."""
    yield from model.parameters()
    yield from model.buffers()
    for leaf in pytree.tree_leaves([batch, list(optimizer.state.values())]):
        if isinstance(leaf, Tensor):
            yield leaf
