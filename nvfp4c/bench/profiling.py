"""Where the time of a call goes: its kernels by the time that the device spends in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 30
CALLS = 3


def top_kernels(call: Callable[[], object], device: str, before: Callable[[], object]) -> list[dict[str, Any]]:
    """The longest kernels of a call: name, launches and microseconds a call, and share of all; longest first.

    On a CPU, operations by the time spent in themselves. before: is called before each call, outside the profile.
    """
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    times: dict[str, tuple[int, float]] = {}
    for _ in range(CALLS):
        before()
        with profile(activities=activities) as profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize()
        for event in profiler.events() or ():
            if on_gpu and (event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False)):
                continue
            spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            count, total = times.get(event.name, (0, 0.0))
            times[event.name] = count + 1, total + spent
    total = sum(spent for _, spent in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][1])[:TOP]
    return [
        {"name": name, "launches": count / CALLS, "microseconds": spent / CALLS, "share": spent / total}
        for name, (count, spent) in longest
    ]
