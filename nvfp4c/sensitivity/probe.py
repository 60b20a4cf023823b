"""The probe: what FP4 costs at every site and role, measured in one forward and backward pass a batch.

The model runs in high precision. At a site's last backward matmul the operands of all its matmuls are at hand: there
each is quantised as the recipe says, multiplied, and compared with the exact product on the same operands. Only sums
are kept. So every site is measured with all others exact: scores of sites say nothing of how errors work together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain

import torch
from torch import Tensor, fx

from nvfp4c.dialect import Assignment, Matmul, Operand, Quantization, Role
from nvfp4c.errors import DataError
from nvfp4c.formats import TILE_BLOCK
from nvfp4c.passes.intercept import site_nodes
from nvfp4c.passes.matmul_graph import block_name, block_of
from nvfp4c.recipe import ROLES
from nvfp4c.sensitivity.compared import Compared
from nvfp4c.sensitivity.intercepted import plain
from nvfp4c.sensitivity.measurements import LOSS_TERMS, OCTAVES, OperandMeasure, RoleMeasure, SiteMeasure
from nvfp4c.sensitivity.quantized import Quantized, Quantizer
from nvfp4c.sensitivity.replayed import Replays
from nvfp4c.sensitivity.samples import Samples, sampled
from nvfp4c.sites import ModelNames

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

    @cached_property
    def kinds(self) -> dict[str, _Kind]:
        """Of the roles that run in FP4."""
        return {
            role: _Kind(role, matmul.operands, (assignment.left, assignment.right), self.parts)
            for role, (matmul, assignment) in self.roles.items()
            if assignment.precision != "bf16"
        }


@dataclass(frozen=True)
class _Kind:
    """What the graph says of a matmul, beside its site. how: each operand is quantised."""

    role: str
    operands: tuple[Operand, Operand]
    how: tuple[Quantization | None, Quantization | None]
    parts: bool


@dataclass(frozen=True)
class _Case:
    """A matmul to be compared. tensors: left and right; the result's gradient, of fprop; and the result, where it is
    known. samples: of fprop."""

    kind: _Kind
    samples: int
    tensors: Sequence[Tensor | None]

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Both operands with the contraction along their last axis."""
        left, right, *_ = self.tensors
        assert left is not None and right is not None
        return left, right.mT

    @property
    def quantised(self) -> Iterator[tuple[int, Tensor, Quantization]]:
        """Place and rows of each operand that is."""
        for place, (x, how) in enumerate(zip(self.rows, self.kind.how, strict=True)):
            if how is not None:
                yield place, x, how


TENSORS = 4
"""Of a case."""


@dataclass
class Probe:
    """Observes a model, see `intercepted.observed`. Call `begin` before each batch, and `take` after."""

    seed: int = 0
    sites: dict[str, Site] = field(default_factory=dict)
    _sums: dict[tuple[str, str], _Sums] = field(default_factory=dict)
    _unmeasured: dict[str, float] = field(default_factory=dict)
    _inputs: dict[tuple[int, fx.Node], int] = field(default_factory=dict)
    replays: Replays[_Form] = field(default_factory=Replays)

    def __post_init__(self) -> None:
        self._comparing = _Comparing(Quantizer(self.seed))

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

    def matmul(self, left: Tensor, right: Tensor, bias: Tensor | None, site: str, role: str) -> Tensor:
        """Of a site that no gradient reaches here: nothing but counted."""
        self._unmeasured[site] = self._unmeasured.get(site, 0.0) + 2.0 * left.numel() * right.shape[-1]
        return plain(left, right, bias)

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
        here = self.sites[site]
        opposite = "dgrad" if role == "wgrad" else "wgrad"
        earlier = []
        with torch.no_grad():
            if fprop and "fprop" in here.kinds:
                gradient = _gradient(left, right, here.roles[role][0])
                earlier.append(_Case(here.kinds["fprop"], samples, (fprop[0], fprop[1], gradient, None)))
            if other and opposite in here.kinds:
                earlier.append(_Case(here.kinds[opposite], 0, (other[0], other[1], None, other[2])))
            replayed = self.replays.suit((left, right, *fprop, *other))
            if not replayed:
                self._compare(site, earlier)
            result = torch.matmul(left, right)
            last = [_Case(here.kinds[role], 0, (left, right, None, result))] if role in here.kinds else []
            if replayed:
                self._replay(site, [*earlier, *last])
            else:
                self._compare(site, last)
        return result

    def _compare(self, site: str, cases: Sequence[_Case]) -> None:
        for case in cases:
            self._comparing(case, self._sums_of(site, case.kind))

    def _replay(self, site: str, cases: Sequence[_Case]) -> None:
        """`_compare`, replayed where that was done before."""
        if not cases:
            return
        quantizer, key = self._comparing.quantizer, tuple((case.kind, case.samples) for case in cases)
        tensors, device = [x for case in cases for x in case.tensors], cases[0].rows[0].device
        seed, random = quantizer.last, sum(how.rounding == "stochastic" for case in cases for *_, how in case.quantised)
        quantizer.drawn += random
        found = self.replays(key, tensors, seed, device, partial(_at_once, key))
        if found is None:
            quantizer.drawn -= random
            self._compare(site, cases)
            return
        sums, form = iter(found[0]), found[1]
        for case, shape in zip(cases, form.shapes, strict=True):
            into = self._sums_of(site, case.kind)
            into.add_result(next(sums), shape)
            for place, _, _ in case.quantised:
                into.operand(place).append(next(sums))

    def _sums_of(self, site: str, kind: _Kind) -> _Sums:
        return self._sums.setdefault((site, kind.role), _Sums(kind.operands))

    def begin(self, batch: int) -> None:
        """Random numbers of a batch are its own, whatever was measured before it."""
        self._comparing.quantizer.begin(batch)

    def take(self) -> tuple[SiteMeasure, ...]:
        """Every site that was captured, in forward order, and what was measured since the last time.

        Raises DataError where a gradient or another operand was not finite.
        """
        self._comparing.finish()
        sums, self._sums = self._sums, {}
        unmeasured, self._unmeasured = self._unmeasured, {}
        _fetch([found for one in sums.values() for found in one.kept])
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
                unmeasured=unmeasured.get(site.name, 0.0),
            )
            for site in self.sites.values()
        )


@dataclass
class _Comparing:
    """Compares one matmul after the other with the same in FP4."""

    quantizer: Quantizer
    _samples: Samples = field(default_factory=Samples)
    _recent: list[tuple[Tensor, Quantization, Quantized]] = field(default_factory=list)

    def __call__(self, case: _Case, sums: _Sums) -> None:
        rows: Sequence[Tensor] = case.rows
        quantities: list[Quantized | Tensor] = list(rows)
        for place, x, how in case.quantised:
            quantities[place] = operand = self._quantized(x, how)
            self._samples.add(sums.operand(place), operand, how.block)
        *_, gradient, exact = case.tensors
        if case.kind.operands[0] is Operand.WEIGHT:  # the result has a column for each row of x: compare its transpose
            rows, quantities = rows[::-1], quantities[::-1]
            exact = None if exact is None else exact.mT
        compared = Compared(rows, quantities, exact, gradient, case.samples, case.kind.parts)
        sums.add_result(compared.sums(), compared.shape)

    def _quantized(self, x: Tensor, how: Quantization) -> Quantized:
        """Neighbouring sites often read the same tensor: the last ones are kept for them, but for random ones, which
        would then depend on what came before. A tile has the same elements in a weight and in its transpose."""
        for known, quantization, operand in self._recent:
            if quantization == how and _same_memory(known, x):
                return operand
            if quantization == how == TILES and _same_memory(known, x.mT):
                return operand.mT
        operand = self.quantizer(x, how)
        if how.rounding != "stochastic":
            self._recent = [(x, how, operand), *self._recent][:RECENT]
        return operand

    def finish(self) -> None:
        """Complete all sums, and keep no operand."""
        self._samples.finish()
        self._recent = []


@dataclass(frozen=True)
class _Form:
    """What was found of cases, beside their sums. shapes: of each. held: tensors that a graph reads, and that are kept
    elsewhere only while there is room."""

    shapes: tuple[tuple[int, int, int], ...]
    held: tuple[Tensor, ...]


def _at_once(
    kinds: Sequence[tuple[_Kind, int]], tensors: Sequence[Tensor | None], seed: Tensor
) -> tuple[list[Tensor], _Form]:
    """Cases by their kinds, samples and tensors, with nothing shared beyond them. Of each case the sums of its result,
    then those of its operands."""
    comparing = _Comparing(Quantizer.after(seed))
    cases = [_Case(*kind, tensors[TENSORS * place :][:TENSORS]) for place, kind in enumerate(kinds)]
    found = [_Sums(case.kind.operands) for case in cases]
    for case, sums in zip(cases, found, strict=True):
        comparing(case, sums)
    comparing.finish()
    held = [sampled(x.shape, how.signs is not None, x.device) for case in cases for _, x, how in case.quantised]
    form = _Form(tuple(sums.shape for sums in found), tuple(chain(*held)))
    return [x for sums in found for kept in sums.kept for x in kept], form


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _gradient(left: Tensor, right: Tensor, matmul: Matmul) -> Tensor:
    """dL/dy with a row for each row of x, from the operands of a backward matmul: dx = dy w, or dw = dy^T x."""
    first = matmul.operands[0] is Operand.GRADIENT
    found = left if first else right
    return found if first == (matmul.role is Role.DGRAD) else found.mT


class _Sums:
    """Running sums of one role of a site. They stay where they were computed until they are asked for: a GPU that has
    to hand each over could not be given work ahead."""

    def __init__(self, kinds: tuple[Operand, Operand]) -> None:
        self._kinds = kinds
        self.shape = (0, 0, 0)
        self._operations = 0.0
        self._results: list[Tensor] = []
        self._operands: dict[int, list[Tensor]] = {}

    @property
    def finite(self) -> bool:
        """Whether no operand and no result had an infinite number or a NaN in it."""
        return all(map(math.isfinite, chain(self._result, *self._totals.values())))

    @cached_property
    def _result(self) -> list[float]:
        return _total(self._results)

    @cached_property
    def _totals(self) -> dict[int, list[float]]:
        """Of the operands, by their place."""
        return {place: _total(found) for place, found in sorted(self._operands.items())}

    def add_result(self, sums: Tensor, shape: tuple[int, int, int]) -> None:
        """See `Compared`."""
        self._results.append(sums)
        self.shape = shape
        self._operations += 2.0 * math.prod(shape)

    @property
    def kept(self) -> list[list[Tensor]]:
        """All that was collected."""
        return [self._results, *self._operands.values()]

    def operand(self, place: int) -> list[Tensor]:
        """Where statistics of the left or the right operand are collected."""
        return self._operands.setdefault(place, [])

    def measure(self, role: str) -> RoleMeasure:
        signal, noise, aligned, *change = self._result
        m, n, k = self.shape
        loss = dict(zip(LOSS_TERMS, change, strict=True)) if change else {}
        return RoleMeasure(
            role=role,
            m=m,
            n=n,
            k=k,
            operations=self._operations,
            signal=signal,
            noise=noise,
            aligned=aligned,
            operands=tuple(_operand_measure(self._kinds[place].value, sums) for place, sums in self._totals.items()),
            **loss,
        )


def _fetch(lists: Sequence[list[Tensor]]) -> None:
    """Replace all tensors in the lists, each of one axis, by the same on the CPU: one copy a device and type."""
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[list[Tensor], int]]] = {}
    for found in lists:
        for place, x in enumerate(found):
            alike.setdefault((x.device, x.dtype), []).append((found, place))
    for places in alike.values():
        tensors = [found[place] for found, place in places]
        parts = torch.cat(tensors).cpu().split([len(x) for x in tensors])
        for (found, place), part in zip(places, parts, strict=True):
            found[place] = part


def _total(sums: Sequence[Tensor]) -> list[float]:
    """The sum of each place."""
    first, *others = [found.tolist() for found in sums] or [[]]
    return [sum(values) for values in zip(first, *others, strict=True)] if others else first


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
