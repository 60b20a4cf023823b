"""Plans run for real without compiling each: a model whose matmuls look up, at every call, whether they run in FP4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from nvfp4c.dialect import Assignment
from nvfp4c.passes.intercept import site_nodes
from nvfp4c.recipe import Recipe
from nvfp4c.sensitivity.analysis import Key
from nvfp4c.sensitivity.intercepted import plain, switched
from nvfp4c.sensitivity.quantized import Quantized, Quantizer, product
from nvfp4c.sensitivity.state import as_it_was, draw_from
from nvfp4c.sites import ModelNames


@dataclass
class Switches:
    """Decide for a model, see `intercepted.switched`. fp4: what runs in FP4 from now on."""

    fp4: frozenset[Key] = frozenset()
    known: dict[Key, Assignment] = field(default_factory=dict)
    quantizer: Quantizer = field(default_factory=Quantizer)

    def captured(self, graph: fx.Graph, names: ModelNames) -> None:
        for found in site_nodes(graph).values():
            for role in found.roles:
                self.known[found.site, role.value] = found.assignment(role)

    def matmul(self, left: Tensor, right: Tensor, bias: Tensor | None, site: str, role: str) -> Tensor:
        if (site, role) not in self.fp4:
            return plain(left, right, bias)
        assignment = self.known[site, role]
        operands: list[Quantized | Tensor] = []
        for x, how in zip((left, right.mT), (assignment.left, assignment.right), strict=True):
            operands.append(x if how is None else self.quantizer(x, how))
        found = product(*operands)
        return (found if bias is None else found + bias.float()).to(left.dtype)


class SwitchedModel:
    """A model under a recipe, to be run with any choice of what is in FP4. Every run of a batch draws the same random
    numbers, so that runs differ only by that choice; the model is afterwards as it was."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._plain = model
        self._switches = Switches()
        self._model = switched(model, recipe, self._switches)

    @torch.no_grad()
    def losses(self, fp4: Iterable[Key], batches: Sequence[Any], loss: Callable[..., Tensor]) -> tuple[float, ...]:
        """The loss of each batch with these sites and roles in FP4, all others as they are."""
        self._switches.fp4 = frozenset(fp4)
        with as_it_was(self._plain):
            return tuple(float(self._loss(number, batch, loss)) for number, batch in enumerate(batches))

    def gradient(self, fp4: Iterable[Key], batch: Any, loss: Callable[..., Tensor]) -> Tensor:
        """The gradient of a batch's loss, of all parameters one after the other: float32 [parameters]. Those of the
        model itself stay as they are."""
        self._switches.fp4 = frozenset(fp4)
        parameters = [parameter for parameter in self._plain.parameters() if parameter.requires_grad]
        with as_it_was(self._plain):
            found = torch.autograd.grad(self._loss(0, batch, loss), parameters, allow_unused=True)
        return torch.cat([gradient.float().flatten() for gradient in found if gradient is not None])

    def _loss(self, number: int, batch: Any, loss: Callable[..., Tensor]) -> Tensor:
        self._switches.quantizer.begin(number)
        draw_from(self._switches.quantizer.seed + number, self._plain)
        return loss(self._model, batch)
