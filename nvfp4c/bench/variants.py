"""The ways to make a training step that are timed against each other, and the step itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4c.bench.fake_quantized import fake_quantized, reference_quantize
from nvfp4c.bench.llama import Llama, Size
from nvfp4c.codegen import chips
from nvfp4c.errors import OptionError, nearest
from nvfp4c.quickstart.train import compile_model

RECIPE = "nvfp4-all"
"""All linear layers, with RHT, stochastic rounding of gradients and 16x16 weight blocks."""

REFERENCE = "inductor"
"""The variant that others are compared with: PyTorch's own compiler in high precision."""

SEED = 0


@dataclass(frozen=True)
class Variant:
    """One way to make the step. dtype: of parameters and activations. backend: of torch.compile, None for eager.

    fake: whether linear layers are replaced by fake-quantised ones. That model is compiled a block at a time:
    Inductor takes minutes for all blocks at once.
    """

    name: str
    description: str
    dtype: torch.dtype
    backend: str | None
    fake: bool = False


def variants(device: str, names: Sequence[str] = ()) -> tuple[Variant, ...]:
    """What can be timed on a device, the reference first; only it and the named ones where there are names.

    Raises OptionError for a name that is none of them.
    """
    all_of_them = _on_gpu() if device == "cuda" else _on_cpu()
    known = {variant.name: variant for variant in all_of_them}
    for name in names:
        if name not in known:
            raise OptionError(
                f"There is no variant {name!r} on this device: {nearest(name, known)} All variants: {', '.join(known)}."
            )
    return tuple(variant for variant in all_of_them if not names or variant.name in (REFERENCE, *names))


def _on_gpu() -> tuple[Variant, ...]:
    bf16 = torch.bfloat16
    # Triton, and so what Inductor generates, converts to E4M3 where the chip does.
    able = chips.conversions(torch.cuda.get_device_capability()) >= chips.E4M3
    fake = Variant("fake", "BF16, fake quantisation in plain torch; Inductor by blocks", bf16, "inductor", fake=True)
    return (
        Variant(REFERENCE, "BF16, Inductor", bf16, "inductor"),
        Variant("nvfp4", "NVFP4", bf16, "nvfp4"),
        *((fake,) if able else ()),
    )


def _on_cpu() -> tuple[Variant, ...]:
    fp32 = torch.float32
    return (
        Variant(REFERENCE, "FP32, Inductor", fp32, "inductor"),
        Variant("inductor-bf16", "BF16, Inductor", torch.bfloat16, "inductor"),
        Variant("nvfp4", "NVFP4", fp32, "nvfp4"),
        Variant("fake", "FP32, fake quantisation in plain torch; Inductor by blocks", fp32, "inductor", fake=True),
        Variant("eager", "FP32, fake quantisation by the reference numerics, not compiled", fp32, None, fake=True),
    )


@dataclass(frozen=True)
class Step:
    """Forward and backward passes from a fixed gradient, one for each micro-batch, and nothing else.

    A loss would add operations of its own, outside of the model and equal in all variants; a gradient that is given
    leaves exactly the model's. gradient, x: [batch, sequence, width]; x has a gradient, as the output of a layer before
    it would.
    """

    model: nn.Module
    parameters: tuple[nn.Parameter, ...]
    x: Tensor
    gradient: Tensor
    micro_batches: int = 1

    def prepare(self) -> None:
        """As an optimizer leaves it: gradients gone, parameters changed as far as anyone can tell.

        So nothing that a step derives from its parameters can be kept for the next; but for its next micro-batch.
        """
        for tensor in (*self.parameters, self.x):
            tensor.grad = None
        torch.autograd.graph.increment_version(self.parameters)

    def forward(self) -> Tensor:
        output: Tensor = self.model(self.x)
        return output

    def backward(self, output: Tensor) -> None:
        output.backward(self.gradient)

    def __call__(self) -> None:
        for _ in range(self.micro_batches):
            self.backward(self.forward())


def build_steps(chosen: Sequence[Variant], size: Size, device: str) -> dict[str, Step]:
    """The step of each variant by its name, with the same weights and data on every run.

    Steps of one dtype share parameters, input and gradients, so that memory holds what one step needs, not all.
    """
    torch.manual_seed(SEED)
    with torch.device(device):
        model = Llama(size)
    shape = (size.batch, size.sequence, size.width)
    generator = torch.Generator().manual_seed(SEED)
    data = [torch.randn(shape, generator=generator) for _ in range(2)]
    steps: dict[str, Step] = {}
    for dtype in dict.fromkeys(variant.dtype for variant in chosen):
        base = converted(model, dtype)
        x, gradient = (tensor.to(device, dtype, copy=True) for tensor in data)
        for variant in chosen:
            if variant.dtype is dtype:
                steps[variant.name] = _step(variant, twin(base), x.requires_grad_(), gradient)
    return {variant.name: steps[variant.name] for variant in chosen}


def _step(variant: Variant, model: Llama, x: Tensor, gradient: Tensor) -> Step:
    parameters = tuple(model.parameters())
    return Step(_ready(variant, model), parameters, x, gradient)


def _ready(variant: Variant, model: Llama) -> nn.Module:
    """What a variant runs; changes `model`."""
    if variant.fake:
        if variant.backend is None:
            return fake_quantized(model, reference_quantize)
        for layer in fake_quantized(model).layers:  # they share their code: compiled once, it serves all of them
            layer.compile(backend=variant.backend)
        return model
    assert variant.backend is not None
    return compile_model(model, variant.backend, {"recipe": RECIPE} if variant.backend == "nvfp4" else None)


def converted(model: Llama, dtype: torch.dtype) -> Llama:
    """A copy with parameters of `dtype`; buffers keep theirs, as rotary angles have to."""
    return _copy(model, {id(p): nn.Parameter(p.detach().to(dtype)) for p in model.parameters()})


def twin(model: Llama) -> Llama:
    """A copy that shares the parameters."""
    return _copy(model, {id(p): p for p in model.parameters()})


def _copy(model: Llama, parameters: dict[int, Any]) -> Llama:
    """A copy whose parameters are the given ones, each in place of the one with that id."""
    return copy.deepcopy(model, parameters)
