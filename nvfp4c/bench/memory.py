"""The most memory that a call holds at once, on a GPU by its allocator's own count, on a CPU by the profiler's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEFAULT_POOL = (0, 0)


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory. resident: held before a call. peak: the most held during it, that included."""

    resident: int
    peak: int


def on_gpu(call: Callable[[], object]) -> Memory:
    """What one call holds on the current GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, resident = _for_graphs(), torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return Memory(resident + before, torch.cuda.max_memory_allocated() + max(before, _for_graphs()))


def _for_graphs() -> int:
    """Bytes that are kept for what CUDA graphs compute while they are replayed: nobody allocates them then."""
    own = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != DEFAULT_POOL]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in own)


def on_cpu(call: Callable[[], object], held: Iterable[Tensor]) -> Memory:
    """What one call holds in tensors on the CPU, on top of those that are held before; it must free none of them.

    What libraries take by themselves, such as a matrix product to rearrange its operands, nobody counts.
    """
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    resident = sum(storages.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative where memory is freed
        most = max(most, live)
    return Memory(resident, resident + most)
