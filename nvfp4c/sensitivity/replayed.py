"""Work on few bytes, on a GPU captured as a CUDA graph and replayed: a few launches in place of some sixty.

    tensors ── copied side by side into one buffer ── the graph of their signature ── sums, copied out of it
Whatever has the same signature shares a graph, as layers of the same shape do. Its first time is as without graphs.
Graphs share their memory, so all of them are replayed on one stream: the default one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

PART = 160
"""One of so many parts of a GPU's memory, half a GiB of 80. Work on more takes the GPU longer than Python needs to
launch it; and copies and graphs would take room that a model may need."""

GRAPHS = 512
"""That are kept at most: sizes may be dynamic."""

CAPTURE_BYTES = 1 << 30
"""Of a GPU's memory that a capture should find free: it cannot use what PyTorch keeps for other tensors."""

ALIGNED = 256
"""Bytes: a copy lies as its tensor does to a multiple of these, so the same kernels are chosen for it."""

Form = TypeVar("Form")
Work = Callable[[Sequence[Tensor | None], Tensor], tuple[list[Tensor], Form]]
"""Of tensors and a seed, an int64 scalar, that it reads where they lie: sums, of one axis each, and what depends on the
signature alone."""

_capturing = Lock()
"""There may be one capture at a time, and each device has a thread of its own for backward passes."""


@dataclass(frozen=True)
class Signature:
    """All that captured work depends on but what is in its tensors. key: of what it does. memories: the distinct ones,
    by where they lie to a multiple of ALIGNED, type and length. views: which of them each tensor is a view of, and how;
    what shares memory shares it in a graph too."""

    key: Hashable
    device: torch.device
    memories: tuple[tuple[int, torch.dtype, int], ...]
    views: tuple[tuple[int, Sequence[int], Sequence[int]] | None, ...]


def _memory(x: Tensor) -> tuple[int, torch.dtype, int]:
    """Where a tensor's first element is, and how many there are up to its last: it may be expanded, or have gaps."""
    steps = zip(x.shape, x.stride(), strict=True)
    return x.data_ptr(), x.dtype, 1 + sum((size - 1) * step for size, step in steps) if x.numel() else 0


def signed(key: Hashable, tensors: Sequence[Tensor | None], device: torch.device) -> tuple[Signature, list[Tensor]]:
    """The signature, and its memories, each of one axis: all from a tensor's first to its last element."""
    places: dict[tuple[int, torch.dtype, int], int] = {}
    memories: list[Tensor] = []
    views: list[tuple[int, Sequence[int], Sequence[int]] | None] = []
    for x in tensors:
        if x is None:
            views.append(None)
            continue
        memory = _memory(x)
        if memory not in places:
            places[memory] = len(places)
            memories.append(x.as_strided((memory[2],), (1,)))
        views.append((places[memory], x.shape, x.stride()))
    lie = tuple((address % ALIGNED, dtype, length) for address, dtype, length in places)
    return Signature(key, device, lie, tuple(views)), memories


class Graphs:
    """CUDA graphs that share memory: they are replayed one after the other, and what one finds is copied at once."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._aside: dict[torch.device, torch.cuda.Stream] = {}

    def room(self, device: torch.device) -> int:
        """Bytes of tensors, work on which can be captured and replayed there now. That is on the default stream, which
        nobody else captures, and where PyTorch keeps memory apart for graphs; elsewhere there are none."""
        if device.type != "cuda" or os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
            return 0
        if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
            return 0
        return torch.cuda.get_device_properties(device).total_memory // PART

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """What the work returns, and what fills that in."""
        with torch.cuda.device(device), _capturing:
            if torch.cuda.mem_get_info(device)[0] < CAPTURE_BYTES:
                torch.cuda.empty_cache()
            graph, pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
            # Of each Graphs its own, for cuBLAS keeps memory for a stream, in the pool of the first graph there.
            aside = self._aside.get(device) or self._aside.setdefault(device, torch.cuda.Stream(device))
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    found = work()
                except BaseException:
                    with suppress(RuntimeError):  # what is wrong is what the work raised
                        graph.capture_end()
                    raise
                graph.capture_end()
            torch.cuda.current_stream().wait_stream(aside)
            self._pool = pool
        return found, graph.replay


@dataclass(frozen=True)
class Recorded(Generic[Form]):
    """inputs: where memories are copied to. found: the sums, one after the other. sizes: of each. form: what else the
    work returned."""

    inputs: list[Tensor]
    seed: Tensor
    found: Tensor
    sizes: list[int]
    form: Form
    replay: Callable[[], None]


@dataclass
class Replays(Generic[Form]):
    """Work that is replayed where it can be. off: nothing is, for good."""

    graphs: Graphs = field(default_factory=Graphs)
    off: bool = False
    recorded: dict[Signature, Recorded[Form]] = field(default_factory=dict)
    _met: set[Signature] = field(default_factory=set)
    _buffers: dict[torch.device, Tensor] = field(default_factory=dict)

    def suit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether work on such tensors may be replayed."""
        room = 0 if self.off else self.graphs.room(tensors[0].device)
        return room > 0 and sum(length * dtype.itemsize for _, dtype, length in set(map(_memory, tensors))) <= room

    def __call__(
        self, key: Hashable, tensors: Sequence[Tensor | None], seed: int, device: torch.device, work: Work[Form]
    ) -> tuple[Sequence[Tensor], Form] | None:
        """What the work returns; the sums may be of a wider type. None for what has not been met before: let the caller
        do that as ever, which compiles its kernels. And None where memory does not suffice for another graph: then all
        graphs give theirs back. key: of all that the work depends on but its arguments."""
        signature, memories = signed(key, tensors, device)
        known = self.recorded.get(signature)
        if known is None:
            if signature not in self._met or len(self.recorded) >= GRAPHS:
                self._met.add(signature)
                return None
            try:
                known = self.recorded[signature] = self._record(signature, memories, work)
            except torch.OutOfMemoryError:
                self.off = True
                self.recorded.clear()
                self._buffers.clear()
                return None
        torch._foreach_copy_(known.inputs, memories)  # in one launch, where all are of one type
        known.seed.fill_(seed)
        known.replay()
        return known.found.clone().split(known.sizes), known.form

    def _record(self, signature: Signature, memories: list[Tensor], work: Work[Form]) -> Recorded[Form]:
        inputs, device = self._inputs(signature), signature.device
        views = [None if one is None else inputs[one[0]].as_strided(one[1], one[2]) for one in signature.views]
        seed = torch.zeros((), dtype=torch.int64, device=device)
        torch._foreach_copy_(inputs, memories)
        sums, form = work(views, seed)  # whatever is made once and kept has to be there before a capture
        found, replay = self.graphs.record(lambda: torch.cat(work(views, seed)[0]), device)
        return Recorded(inputs, seed, found, [len(one) for one in sums], form, replay)

    def _inputs(self, signature: Signature) -> list[Tensor]:
        """Places for the memories of a signature, in a buffer for all graphs of a device; larger than the last where
        that does not suffice."""
        places, end = [], 0
        for lies, dtype, length in signature.memories:
            start = -(-end // ALIGNED) * ALIGNED + lies
            end = start + length * dtype.itemsize
            places.append((start, end, dtype))
        buffer = self._buffers.get(signature.device)
        if buffer is None or len(buffer) < end:
            size = 1 << max(end - 1, 0).bit_length()  # so that outgrown ones are no more than the last
            buffer = self._buffers[signature.device] = torch.empty(size, dtype=torch.uint8, device=signature.device)
        return [buffer[start:end].view(dtype) for start, end, dtype in places]
