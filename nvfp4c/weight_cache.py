"""What is remembered of parameters: each quantised once for every state that it is in.

When gradients are accumulated, a parameter is read many times before it is updated. What `codegen` makes of it is kept
here, packed, until PyTorch says that the parameter has changed:
- its version has, as after an operation in place, under `torch.no_grad()` too;
- an optimizer has made a step since: fused ones update parameters without a new version;
- its memory has: another storage, place, shape or device, as after an assignment to `.data`.
An edit through `.data`, or by code that PyTorch does not see, changes none of these. So a forward pass uses what an
earlier one left only once an update of its parameter was seen, or any step of an optimizer: a training loop that
updates through `.data` alone is never given an old weight. Nor is the backward after it, which may ask for another form
than the forward did: a forward that trusts nothing forgets all forms. After single such edits, call `clear`.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Packed:
    """A quantised matrix: its amax, codes and scales. These tensors are only ever read, and never handed out."""

    amax: Tensor
    codes: Tensor
    scales: Tensor

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.amax, self.codes, self.scales))


@dataclass(frozen=True)
class Info:
    """How often a packed weight was found and was not, how many are kept, and the bytes that they take."""

    hits: int
    misses: int
    entries: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    state: Hashable
    packed: Packed


@dataclass
class Record:
    """What is kept about one storage, by parameter and kind. first_version: of its parameter, when first seen."""

    first_version: int
    entries: dict[Hashable, dict[Hashable, Entry]] = field(default_factory=dict)


class WeightCache:
    """Entries by storage, which they die with, and by kind: one for each, of the state that was seen last.

    No tensor is referred to, not even weakly: `torch.utils.swap_tensors` would refuse it. Reading and writing need no
    lock, for each is one operation on a dict; two threads may both quantise, and keep equal results. What is kept while
    another thread forgets may be forgotten too.
    """

    def __init__(self) -> None:
        self._hits = self._misses = 0
        self._updated = False
        self._steps = object()
        self._records: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def state(self, parameter: Tensor) -> Hashable:
        """Equal for two moments between which a parameter did not change, as far as PyTorch knows.

        An entry is of one stream, whose order of work makes it complete before it is read.
        """
        stream = torch.cuda.current_stream(parameter.device).cuda_stream if parameter.is_cuda else 0
        return (id(parameter), parameter.data_ptr(), parameter._version, self._steps, stream)

    def find(self, parameter: Tensor, kind: Hashable, state: Hashable, sure: bool) -> Packed | None:
        """What is kept of a parameter in this state. sure: also if no update of it was ever seen.

        Else all that is kept of it is forgotten: who is sure after this must only find what was made after this.
        """
        packed = self.peek(parameter, kind, state, sure)
        if packed is not None:
            self._hits += 1
            return packed
        self._misses += 1
        record = self._records.get(parameter.untyped_storage())
        if record is not None and not (sure or self._was_updated(parameter, record)):
            record.entries.pop(_of(parameter), None)
        return None

    def peek(self, parameter: Tensor, kind: Hashable, state: Hashable, sure: bool) -> Packed | None:
        """`find`, not counted."""
        record = self._records.get(parameter.untyped_storage())
        if record is None:
            return None
        entry = record.entries.get(_of(parameter), {}).get(kind)
        trusted = sure or self._was_updated(parameter, record)
        return entry.packed if entry is not None and entry.state == state and trusted else None

    def keep(self, parameter: Tensor, kind: Hashable, state: Hashable, packed: Packed) -> None:
        """Keep what was made of a parameter. state: as it was before that was made."""
        storage = parameter.untyped_storage()
        record = self._records.get(storage)
        if record is None:
            record = self._records[storage] = Record(parameter._version)
        record.entries.setdefault(_of(parameter), {})[kind] = Entry(state, packed)

    def clear(self) -> None:
        """Forget everything."""
        self._records = WeakIdKeyDictionary()

    def info(self) -> Info:
        records = list(self._records.data.values())  # a copy, for other threads may be at work
        kinds = [entries for record in records for entries in list(record.entries.values())]
        kept = [entry.packed for entries in kinds for entry in list(entries.values())]
        return Info(self._hits, self._misses, len(kept), sum(packed.bytes for packed in kept))

    def _was_updated(self, parameter: Tensor, record: Record) -> bool:
        """Whether updates of a parameter are seen at all: one was, or any step of an optimizer."""
        return self._updated or parameter._version > record.first_version

    def after_step(self, *args: Any) -> None:
        """A hook of all optimizers. In code that Dynamo traces it only writes, so that no guard depends on it."""
        self._steps = object()
        self._updated = True


def _of(parameter: Tensor) -> Hashable:
    """A key within a storage, which several parameters may share."""
    return (parameter.storage_offset(), parameter.shape, parameter.stride(), parameter.dtype)


def cacheable(tensor: Tensor) -> bool:
    """Whether what is made of a tensor may be kept: its version counts its changes, and it is no memory of Inductor's.

    A CUDA graph that is being captured would replay what it finds here for ever.
    """
    if type(tensor) is not nn.Parameter or tensor.is_inference() or tensor._is_view():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


CACHE = WeightCache()
register_optimizer_step_post_hook(CACHE.after_step)


def clear_weight_cache() -> None:
    """Forget every quantised weight. Needed after an edit that PyTorch does not see, such as one through `.data`."""
    CACHE.clear()


def weight_cache_info() -> Info:
    """What the cache of quantised weights has done since the process started, and what it holds now."""
    return CACHE.info()
