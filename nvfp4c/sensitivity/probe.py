"""The probe: what FP4 costs at every site and role, measured in one forward and backward pass a batch.

The model runs in high precision. At a site's last backward matmul the operands of all its matmuls are at hand: there
each is quantised as the recipe says, multiplied, and compared with the exact product on the same operands. Only sums
are kept. So every site is measured with all others exact: scores of sites say nothing of how errors work together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, fx

from nvfp4c import numerics
from nvfp4c.dialect import Assignment, Matmul, Operand, Quantization, Role
from nvfp4c.errors import DataError
from nvfp4c.formats import BLOCK, E2M1_MAX, GLOBAL_MAX, TILE_BLOCK
from nvfp4c.passes.intercept import site_nodes
from nvfp4c.passes.matmul_graph import block_name, block_of
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.compared import Compared, dot
from nvfp4c.sensitivity.measurements import OCTAVES, SCALE_BINS, OperandMeasure, RoleMeasure, SiteMeasure
from nvfp4c.sensitivity.quantized import Quantized, Quantizer
from nvfp4c.sites import ModelNames

SAMPLE = 1 << 14
"""Elements of an operand that its own statistics are taken from, in strips of 16 rows spread over all: the result's
error is summed over everything."""

NO_GRADIENT = "no gradient reaches it, so what it does to the loss cannot be measured"
TILES = Quantization(TILE_BLOCK, "nearest", None)
RECENT = 4
"""Quantised operands that are kept for the next sites."""


@dataclass(frozen=True)
class Site:
    """What the graph says of a site: its place in the model, and how each role's operands are arranged. parts: the
    weight is several matrices, each the operand of a matmul of its own."""

    name: str
    weight: str
    weight_elements: int
    reads: int
    parts: bool
    roles: dict[str, tuple[Matmul, Assignment]]


@dataclass
class Probe:
    """Observes a model, see `intercepted.observed`. Call `begin` before each batch, and `take` after."""

    seed: int = 0
    sites: dict[str, Site] = field(default_factory=dict)
    _sums: dict[tuple[str, str], _Sums] = field(default_factory=dict)
    _inputs: dict[tuple[int, fx.Node], int] = field(default_factory=dict)
    _recent: list[tuple[Tensor, Quantization, Quantized]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._quantizer = Quantizer(self.seed)

    def captured(self, graph: fx.Graph, names: ModelNames) -> None:
        placeholders = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
        for found in site_nodes(graph).values():
            if found.site in self.sites and len(self.sites[found.site].roles) >= len(found.roles):
                continue
            described = names.input_of(found.weight, placeholders.get(found.weight, -1))
            reads = self._inputs.setdefault((id(graph), found.input), len(self._inputs))
            roles = {role.value: (found.matmul(role), found.assignment(role)) for role in found.roles}
            value = found.weight.meta["val"]
            weight = described.names[0] if described.names else found.site
            self.sites[found.site] = Site(found.site, weight, int(value.numel()), reads, value.dim() > 2, roles)

    def observe(
        self,
        left: Tensor,
        right: Tensor,
        fprop: Sequence[Tensor],
        other: Sequence[Tensor],
        samples: int,
        site: str,
        role: str,
    ) -> Tensor:
        with torch.no_grad():
            if fprop:
                gradient = _gradient(left, right, self.sites[site].roles[role][0])
                self._compare(site, "fprop", (fprop[0], fprop[1]), gradient, samples)
            if other:
                self._compare(site, "dgrad" if role == "wgrad" else "wgrad", (other[0], other[1]), exact=other[2])
            result = torch.matmul(left, right)
            self._compare(site, role, (left, right), exact=result)
        return result

    def _compare(
        self,
        site: str,
        role: str,
        pair: tuple[Tensor, Tensor],
        gradient: Tensor | None = None,
        samples: int = 0,
        exact: Tensor | None = None,
    ) -> None:
        """gradient, samples: of fprop. exact: the result, where it is known."""
        matmul, assignment = self.sites[site].roles[role]
        if assignment.precision == "bf16":
            return
        rows = pair[0], pair[1].mT
        quantities: list[Quantized | Tensor] = []
        sums = self._sums.setdefault((site, role), _Sums(matmul.operands))
        for place, (x, how) in enumerate(zip(rows, (assignment.left, assignment.right), strict=True)):
            if how is None:
                quantities.append(x)
                continue
            operand = self._quantized(x, how)
            sums.add_operand(place, operand, how.block)
            quantities.append(operand)
        if matmul.operands[0] is Operand.WEIGHT:  # the result has a column for each row of x: compare its transpose
            rows, quantities = rows[::-1], quantities[::-1]
            exact = None if exact is None else exact.mT
        sums.add_result(Compared(rows, quantities, exact, gradient, samples, self.sites[site].parts))

    def _quantized(self, x: Tensor, how: Quantization) -> Quantized:
        """Neighbouring sites often read the same tensor: the last ones are kept for them. A tile has the same elements
        in a weight and in its transpose."""
        for known, quantization, operand in self._recent:
            if quantization == how and _same_memory(known, x):
                return operand
            if quantization == how == TILES and _same_memory(known, x.mT):
                return operand.mT
        operand = self._quantizer(x, how)
        self._recent = [(x, how, operand), *self._recent][:RECENT]
        return operand

    def begin(self, batch: int) -> None:
        """Random numbers of a batch are its own, whatever was measured before it."""
        self._quantizer.begin(batch)

    def take(self) -> tuple[SiteMeasure, ...]:
        """Every site that was captured, in forward order, and what was measured since the last time.

        Raises DataError where a gradient or another operand was not finite.
        """
        sums, self._sums, self._recent = self._sums, {}, []
        for (site, role), found in sums.items():
            if not found.finite:
                raise DataError(
                    f"{site}, {role}: an operand or the result is infinite or NaN in high precision; look at that "
                    "batch, and with FP16 let the loss be scaled so that no gradient overflows"
                )
        return tuple(
            SiteMeasure(
                site=site.name,
                block=None if (block := block_of(site.name)) is None else block[1],
                projection=site.name.removeprefix(block_name(site.name) or ""),
                weight=site.weight,
                weight_elements=site.weight_elements,
                reads=site.reads,
                roles={role: sums[site.name, role].measure(role) for role in ROLES if (site.name, role) in sums},
                obstacle=None if any(key[0] == site.name for key in sums) else NO_GRADIENT,
            )
            for site in self.sites.values()
        )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _gradient(left: Tensor, right: Tensor, matmul: Matmul) -> Tensor:
    """dL/dy with a row for each row of x, from the operands of a backward matmul: dx = dy w, or dw = dy^T x."""
    first = matmul.operands[0] is Operand.GRADIENT
    found = left if first else right
    return found if first == (matmul.role is Role.DGRAD) else found.mT


class _Sums:
    """Running sums of one role of a site."""

    def __init__(self, kinds: tuple[Operand, Operand]) -> None:
        self._kinds = kinds
        self._shape = (0, 0, 0)
        self._operations = 0.0
        self._result = [0.0] * 7
        self._operands: dict[int, list[float]] = {}

    @property
    def finite(self) -> bool:
        """Whether no operand and no result had an infinite number or a NaN in it."""
        return all(map(math.isfinite, (*self._result, *chain.from_iterable(self._operands.values()))))

    def add_result(self, compared: Compared) -> None:
        for place, value in enumerate(compared.sums().tolist()):
            self._result[place] += value
        self._shape = compared.shape
        self._operations += 2.0 * math.prod(compared.shape)

    def add_operand(self, place: int, operand: Quantized, block: tuple[int, int]) -> None:
        found = _statistics(operand, block).tolist()
        sums = self._operands.setdefault(place, [0.0] * len(found))
        for index, value in enumerate(found):
            sums[index] += value

    def measure(self, role: str) -> RoleMeasure:
        signal, noise, aligned, *change = self._result
        m, n, k = self._shape
        loss = dict(zip(("first", "diagonal", "rows", "samples"), change, strict=True))
        return RoleMeasure(
            role=role,
            m=m,
            n=n,
            k=k,
            operations=self._operations,
            signal=signal,
            noise=noise,
            aligned=aligned,
            operands=tuple(
                _operand_measure(self._kinds[place].value, sums) for place, sums in sorted(self._operands.items())
            ),
            **(loss if role == Role.FPROP.value else {}),
        )


def _statistics(operand: Quantized, block: tuple[int, int]) -> Tensor:
    """Of a sample, float64: elements, signal, noise, fourth, vanished, saturated, zeros, then the histograms before,
    after and of scales: see `OperandMeasure`."""
    x, values = _strips(operand.source), _strips(operand.values).float()
    packed_scales = numerics.block_scales(x, operand.amax, block)
    x, scales = x.float(), packed_scales.float()
    factor = operand.amax / GLOBAL_MAX
    magnitudes = x.abs()
    squares = x.double().square()  # the fourth power of a small gradient is below what FP32 holds
    limits = (E2M1_MAX * factor * scales).repeat_interleave(BLOCK, -1)[:, : x.shape[-1]]
    error = values * factor - x
    nonzero = x.count_nonzero()
    head = (
        torch.tensor(x.numel(), device=x.device),
        squares.sum(),
        dot(error, error),
        dot(squares, squares),
        nonzero - values.count_nonzero(),
        (magnitudes > limits).sum(),
        x.numel() - nonzero,
    )
    exponents = packed_scales.view(torch.uint8) >> 3
    return torch.cat(
        [
            torch.stack([value.double() for value in head]),
            _octaves(magnitudes, operand.amax),
            _octaves(values.abs() * factor, operand.amax),
            torch.bincount(exponents[scales > 0], minlength=SCALE_BINS).double(),
        ]
    )


def _strips(x: Tensor) -> Tensor:
    """Strips of BLOCK rows of a matrix [.., M, K], evenly spread, as many as make SAMPLE elements; [*, K]."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0] // BLOCK
    wanted = max(1, SAMPLE // (BLOCK * x.shape[-1]))
    if count <= wanted:
        return rows
    every = -(-count // wanted)
    return rows[: count * BLOCK].unflatten(0, (count, BLOCK))[::every].flatten(0, 1)


def _octaves(magnitudes: Tensor, amax: Tensor) -> Tensor:
    """How many magnitudes but zeros lie in each octave below amax; float64 [OCTAVES]."""
    # The exponent of an FP32 number is floor(log2) of it; that of an infinite one is the largest, as that of a NaN of
    # either sign: so zeros come to lie in the last octave, and are taken off there.
    octave = ((amax / magnitudes).view(torch.int32) >> 23).bitwise_and_(255).sub_(127).clamp_(0, OCTAVES - 1)
    counts = torch.bincount(octave.flatten(), minlength=OCTAVES).double()
    counts[-1] -= magnitudes.numel() - magnitudes.count_nonzero()
    return counts


def _operand_measure(kind: str, sums: list[float]) -> OperandMeasure:
    elements, signal, noise, fourth, vanished, saturated, zeros = sums[:7]
    counts = [int(value) for value in sums[7:]]
    return OperandMeasure(
        operand=kind,
        elements=int(elements),
        signal=signal,
        noise=noise,
        fourth=fourth,
        vanished=int(vanished),
        saturated=int(saturated),
        zeros=int(zeros),
        before=tuple(counts[:OCTAVES]),
        after=tuple(counts[OCTAVES : 2 * OCTAVES]),
        scales=tuple(counts[2 * OCTAVES :]),
    )
