"""What running a model changes beside its result, put back afterwards; and random numbers that can be drawn again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def as_it_was(model: nn.Module, batches: Sequence[Any] = ()) -> Iterator[None]:
    """Gradients of parameters and batches, buffers, and torch's generators, are afterwards what they were before."""
    inputs = [leaf for leaf in pytree.tree_leaves(list(batches)) if isinstance(leaf, Tensor) and leaf.is_leaf]
    gradients = [(tensor, tensor.grad) for tensor in (*model.parameters(), *inputs) if tensor.requires_grad]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    contents = [(buffer, buffer.clone()) for _, own in buffers for buffer in own.values() if buffer is not None]
    with torch.random.fork_rng(devices=_gpus(model)):
        try:
            yield
        finally:
            for tensor, gradient in gradients:
                tensor.grad = gradient
            for module, own in buffers:
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, content in contents:
                    if not torch.equal(buffer, content):
                        buffer.copy_(content)


def draw_from(seed: int, model: nn.Module) -> None:
    """Let a model draw the same random numbers, of dropout for example, whatever was drawn before. Only the generators
    that `as_it_was` puts back are touched."""
    torch.default_generator.manual_seed(seed)
    for index in _gpus(model):
        torch.cuda.default_generators[index].manual_seed(seed)


def _gpus(model: nn.Module) -> list[int]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted(device.index for device in devices if device.type == "cuda")
