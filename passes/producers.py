"""Find the pointwise operations that a region's matrices are computed with, as a prologue. Reads graphs, changes none.

From each matrix that regions read, operations are taken in as long as nothing else needs their results. Casts and views
are taken in all the same, for repeating them costs nothing. Matrices whose operations share results are found together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nvfp4c import cost
from nvfp4c.dialect import REGION, arguments, is_dialect
from nvfp4c.dtypes import QUANTIZABLE_DTYPES
from nvfp4c.formats import BLOCK
from nvfp4c.prologue import Argument, Kind, Prologue, Step
from nvfp4c.region import Form, Region

aten, prims = torch.ops.aten, torch.ops.prims

CAST = prims.convert_element_type.default
OPERATIONS = {
    aten.abs.default: "abs",
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.clamp_max.default: "minimum",
    aten.clamp_min.default: "maximum",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.eq.Scalar: "eq",
    aten.eq.Tensor: "eq",
    aten.erf.default: "erf",
    aten.exp.default: "exp",
    aten.ge.Scalar: "ge",
    aten.ge.Tensor: "ge",
    aten.gt.Scalar: "gt",
    aten.gt.Tensor: "gt",
    aten.le.Scalar: "le",
    aten.le.Tensor: "le",
    aten.lt.Scalar: "lt",
    aten.lt.Tensor: "lt",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.neg.default: "neg",
    aten.reciprocal.default: "reciprocal",
    aten.relu.default: "relu",
    aten.rsqrt.default: "rsqrt",
    aten.sigmoid.default: "sigmoid",
    aten.sqrt.default: "sqrt",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.tanh.default: "tanh",
    aten.where.self: "where",
    CAST: "to",
}
COMPARISONS = frozenset({"eq", "ge", "gt", "le", "lt"})
POWERS = {2: "square", 3: "cube"}
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default})

MOST_STEPS = 48
MOST_INPUTS = 5
MOST_MATRICES = 2
"""Beyond these a kernel would run out of registers."""


@dataclass(frozen=True)
class Input:
    """What a prologue reads. stored: whether it is in memory anyway, and not only for the prologue's sake.

    shared: whether a reduction that the prologue waits for reads it as well.
    """

    node: fx.Node
    kind: Kind
    stored: bool
    shared: bool


@dataclass(frozen=True)
class Produced:
    """Matrices with their prologue.

    bases: what each matrix is only a view of. regions: the regions that read each, in order. readers: what
    else reads each.
    """

    matrices: tuple[fx.Node, ...]
    bases: tuple[fx.Node, ...]
    regions: tuple[tuple[fx.Node, ...], ...]
    readers: tuple[tuple[fx.Node, ...], ...]
    inputs: tuple[Input, ...]
    prologue: Prologue

    @property
    def kept(self) -> tuple[bool, ...]:
        """Whether each matrix is read by something else than regions."""
        return tuple(map(bool, self.readers))

    @property
    def others(self) -> tuple[fx.Node, ...]:
        return tuple(reader for readers in self.readers for reader in readers)


def producers(graph: fx.Graph) -> list[Produced]:
    """Every group of matrices of a graph that a kernel could compute, in the order of the first one."""
    readers: dict[fx.Node, dict[fx.Node, Region]] = defaultdict(dict)
    for reader in graph.find_nodes(op="call_function", target=REGION):
        region = Region.from_json(arguments(reader)[3])
        if region.prologue.is_identity:
            readers[_base(arguments(reader)[0][0])][reader] = region
    matrices = {base: matrix for base, found in readers.items() if (matrix := _matrix(found)) is not None}
    inside = _closure(graph, set(matrices))
    groups = ((group, [base for base in matrices if base in group]) for group in _components(inside, set(matrices)))
    found = [_produced({base: matrices[base] for base in bases}, readers, group) for group, bases in groups]
    return [one for one in found if one is not None]


def _matrix(readers: Mapping[fx.Node, Region]) -> fx.Node | None:
    """The one shape in which regions read a tensor, of its views; a plain amax may be taken of any."""
    found = [
        arguments(reader)[0][0]
        for reader, region in readers.items()
        if not all(output.form is Form.AMAX and output.signs is None for output in region.outputs)
    ] or [arguments(reader)[0][0] for reader in readers]
    x = found[0].meta["val"]
    if not all(_same(one.meta["val"].shape, x.shape) for one in found) or x.dtype not in QUANTIZABLE_DTYPES:
        return None
    return found[0] if x.dim() in (2, 3) and isinstance(x.shape[-1], int) and x.shape[-1] >= BLOCK else None


def _value(node: fx.Node) -> Tensor | None:
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else None


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether sizes are equal, symbolic ones by their expressions: nothing is assumed of them."""
    return list(map(str, one)) == list(map(str, other))


def _keeps_rows(view: fx.Node) -> bool:
    """Whether a view only merges or splits the axes before the last."""
    before, after = _value(arguments(view)[0]), _value(view)
    return (
        before is not None
        and after is not None
        and min(before.dim(), after.dim()) >= 1
        and _same(before.shape[-1:], after.shape[-1:])
    )


def _base(node: fx.Node) -> fx.Node:
    """What a node is a view of, by rows as long as its own."""
    while node.target in VIEWS and _keeps_rows(node):
        node = arguments(node)[0]
    return node


def _through_views(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node, or a view of it."""
    for user in node.users:
        if user.target in VIEWS and _keeps_rows(user):
            yield from _through_views(user)
        else:
            yield user


def _as_large(node: fx.Node, reader: fx.Node) -> bool:
    """Whether what reads a tensor gives as many elements: else the tensor is numbers of rows or columns to it."""
    return cost.elements(node.meta["val"]) == cost.elements(reader.meta["val"])


def _closure(graph: fx.Graph, roots: set[fx.Node]) -> set[fx.Node]:
    """The operations that can be taken in: roots, and what only they need."""
    inside: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or not _is_computable(node):
            continue
        inner = [reader in inside and _as_large(node, reader) for reader in _through_views(node)]
        needed, alone = any(inner), bool(inner) and all(inner)
        if node in roots or alone or (needed and node.target is CAST):
            inside.add(node)
    return inside


def _is_computable(node: fx.Node) -> bool:
    """Whether a node is an operation that a prologue has, on tensors that fit together."""
    x = _value(node)
    if x is None or x.dim() < 2 or node.kwargs:
        return False
    if x.dtype not in (*QUANTIZABLE_DTYPES, torch.bool):
        return False
    if node.target is aten.pow.Tensor_Scalar:
        return arguments(node)[1] in POWERS and _kind(arguments(node)[0], x) is not None
    if node.target not in OPERATIONS or not _bools_fit(node, x):
        return False
    given = arguments(node)[:1] if node.target is CAST else arguments(node)
    if len(given) > (3 if node.target is aten.where.self else 2):  # a factor of the other operand
        return False
    return all(_constant(one) is not None or (isinstance(one, fx.Node) and _kind(one, x)) for one in given)


def _bools_fit(node: fx.Node, x: Tensor) -> bool:
    """Whether bools are only what kernels handle: comparisons give them, `where`, `mul` and casts read them."""
    bools = [_is_bool(one) for one in arguments(node)]
    if node.target is aten.where.self:
        return bools == [True, False, False]
    compares = OPERATIONS[node.target] in COMPARISONS  # type: ignore[index]
    if compares is not (x.dtype is torch.bool):
        return False
    return node.target in (CAST, aten.mul.Tensor) or not any(bools)


def _is_bool(given: object) -> bool:
    """Whether an argument is a tensor of bools that is no constant."""
    found = _value(given) if isinstance(given, fx.Node) and _constant(given) is None else None
    return found is not None and found.dtype is torch.bool


def _constant(given: object) -> float | None:
    """The number that an argument is, if it is one."""
    if isinstance(given, (bool, int, float)):
        return float(given)
    if isinstance(given, fx.Node) and given.target is aten.full.default and not arguments(given)[0]:
        number, x = arguments(given)[1], _value(given)
        if isinstance(number, (bool, int, float)) and x is not None:
            return float(torch.tensor(number, dtype=x.dtype))
    return None


def _unexpanded(node: fx.Node) -> fx.Node:
    while node.target is aten.expand.default:
        node = arguments(node)[0]
    return node


def _kind(node: fx.Node, x: Tensor) -> Kind | None:
    """What an operand is to a result like x; None if it is none of these. A bool is read only where it was made."""
    given = _value(_unexpanded(node))
    if given is None or given.dtype not in (*QUANTIZABLE_DTYPES, torch.bool):
        return None
    if _same(given.shape, x.shape):
        return Kind.FULL
    if given.dtype is torch.bool:
        return None
    if given.dim() and _same(given.shape[-1:], x.shape[-1:]) and all(_same([one], [1]) for one in given.shape[:-1]):
        return Kind.COLUMN
    if given.dim() == x.dim() and _same(given.shape, (*x.shape[:-1], 1)):
        return Kind.ROW
    return None


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation reads, those of which it reads an expansion unexpanded."""
    return [_unexpanded(one) for one in node.all_input_nodes if _constant(one) is None]


def _components(inside: set[fx.Node], roots: set[fx.Node]) -> Iterator[set[fx.Node]]:
    """Groups of operations that read each other's results, each with at least one root."""
    neighbours: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in inside:
        for operand in map(_base, _operands(node)):
            if operand in inside and _as_large(operand, node):
                neighbours[node].add(operand)
                neighbours[operand].add(node)
    seen: set[fx.Node] = set()
    for root in sorted(roots & inside):
        if root in seen:
            continue
        group, waiting = {root}, [root]
        for node in waiting:
            for other in neighbours[node] - group:
                group.add(other)
                waiting.append(other)
        seen |= group
        yield group


def _produced(
    matrices: Mapping[fx.Node, fx.Node], regions: Mapping[fx.Node, Mapping[fx.Node, Region]], group: set[fx.Node]
) -> Produced | None:
    """The prologue of a group of operations; None where a kernel cannot have it. matrices: by their bases."""
    shape = next(iter(matrices.values())).meta["val"].shape
    if len(matrices) > MOST_MATRICES or not all(_same(one.meta["val"].shape, shape) for one in matrices.values()):
        return None
    places: dict[fx.Node, int] = {}
    kinds: dict[fx.Node, Kind] = {}
    for node in sorted(group):
        for operand in _operands(node):
            kind = _kind(operand, node.meta["val"])
            if _base(operand) in group or kind is None:
                continue
            kinds.setdefault(operand, kind)
    # Matrices first: the shape of the first input is that of the results.
    ordered = sorted(kinds, key=lambda node: (list(Kind).index(kinds[node]), node))
    if not ordered or kinds[ordered[0]] is not Kind.FULL or len(ordered) > MOST_INPUTS:
        return None
    if any(kinds[node] is Kind.FULL and node.meta["val"].dtype is torch.bool for node in ordered):
        return None
    places = {node: place for place, node in enumerate(ordered)}
    steps: list[Step] = []
    for node in sorted(group):
        steps.append(_step(node, places))
        places[node] = len(ordered) + len(steps) - 1
    if len(steps) > MOST_STEPS:
        return None
    behind = _behind(node for node in ordered if kinds[node] is Kind.ROW)
    own = {reader for base in matrices for reader in regions[base]}
    return Produced(
        matrices=tuple(matrices.values()),
        bases=tuple(matrices),
        regions=tuple(tuple(regions[base]) for base in matrices),
        readers=tuple(
            tuple(reader for reader in _through_views(base) if reader not in group | own) for base in matrices
        ),
        inputs=tuple(
            Input(node, kinds[node], _is_stored(node, group, behind), _base(node) in behind) for node in ordered
        ),
        prologue=Prologue(
            tuple(kinds[node] for node in ordered), tuple(steps), tuple(places[base] for base in matrices)
        ),
    )


def _step(node: fx.Node, places: dict[fx.Node, int]) -> Step:
    def place(given: object) -> Argument:
        constant = _constant(given)
        if constant is not None:
            return constant
        assert isinstance(given, fx.Node)
        operand = _unexpanded(given)
        return places[operand] if operand in places else places[_base(operand)]

    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    if node.target is aten.pow.Tensor_Scalar:
        return Step(POWERS[arguments(node)[1]], (place(arguments(node)[0]),), dtype)
    given = arguments(node)[:1] if node.target is CAST else arguments(node)
    if node.target is CAST and _is_bool(given[0]):
        return Step("where", (place(given[0]), 1.0, 0.0), dtype)
    return Step(OPERATIONS[node.target], tuple(map(place, given)), dtype)  # type: ignore[index]


def _is_inductors(node: fx.Node) -> bool:
    """Whether Inductor computes a node itself, and so may merge it with what it computes around it."""
    target = node.target
    if node.op != "call_function" or is_dialect(node) or not isinstance(target, torch._ops.OpOverload):
        return False
    reductions = (aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.any, aten.prod)
    return (
        torch.Tag.pointwise in target.tags or target is CAST or target in VIEWS or target.overloadpacket in reductions
    )


def _behind(rows: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that Inductor computes these numbers of rows from, and what that reads."""
    found: set[fx.Node] = set()
    waiting = list(rows)
    for node in waiting:
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes if _is_inductors(node) else []
    return found


def _is_stored(node: fx.Node, group: set[fx.Node], behind: set[fx.Node]) -> bool:
    """Whether a prologue's input is in memory anyway: Inductor does not compute it, or computes it for others too."""
    base = _base(node)
    if not _is_inductors(base):
        return True
    return any(reader not in group | behind for reader in _through_views(base))
