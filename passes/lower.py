"""Replace the dialect by what the target runs. FUSED (SCALED on the CPU) -> LOWERED, forward and backward graph apart.

On targets without native FP4 a scaled matmul becomes a product of dequantised operands, which is exact (code * scale
has six significant bits, and the sum is FP32):
    %y = nvfp4.scaled_mm(%ac, %as, %aa, %bc, %bs, %ba, k, None, bf16)
becomes
    %a = dequantize(%ac, %as, k)        # once for all products that use it
    %b = dequantize(%bc, %bs, k)
    %p = product(%a, %b)                # FP32
    %y = (%p * factor(%aa, %ba)).to(bf16)
An operand that is quantised in this graph, and whose packed form nobody else needs, is never packed. Transposed tiles
are read as a transpose of the dequantised operand.

An entry of the kernel table that is an operation itself takes the place of the dialect's. Others are traced with
`make_fx` once for each distinct argument shape, then copied in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Target
from torch.utils._pytree import tree_leaves

from nvfp4c import dialect
from nvfp4c.dialect import (
    AMAX,
    BLOCK_SCALED_MM,
    DEQUANTIZE,
    HADAMARD,
    PRODUCT,
    QUANTIZE,
    REGION,
    SCALED_MM,
    TRANSPOSE,
    WEIGHT,
    KernelTable,
    arguments,
    is_dialect,
)
from nvfp4c.formats import GLOBAL_MAX
from nvfp4c.passes.fuse import read_packed
from nvfp4c.passes.graph_edit import copy_origin, insert, swap_order, value
from nvfp4c.passes.share import merge_equal

aten = torch.ops.aten


@dataclass(frozen=True)
class Lower:
    """Replace every dialect operation by entries of `table`."""

    table: KernelTable

    def __call__(self, graph: fx.Graph) -> fx.Graph:
        if any(is_dialect(node) for node in graph.nodes):
            lowering = _Lowering(graph, self.table, read_packed(graph))
            for node in list(graph.nodes):
                if is_dialect(node):
                    lowering.lower(node)
            lowering.finish()
        return graph


@dataclass
class _Lowering:
    """The work on one graph.

    read_packed: quantisations and transposes that stay packed. operands: dequantised operands by the codes they came
    from and their k. traced: table entries by the shapes of their arguments. emitted: what the traces call.
    """

    graph: fx.Graph
    table: KernelTable
    read_packed: frozenset[fx.Node]
    operands: dict[tuple[fx.Node, Any], fx.Node] = field(default_factory=dict)
    traced: dict[object, fx.GraphModule] = field(default_factory=dict)
    emitted: set[object] = field(default_factory=set)

    def lower(self, node: fx.Node) -> None:
        """Replace one node. Quantisations and transposes wait until a product asks for them, or until the end."""
        entries: dict[Target, Callable[..., Any] | None] = {
            HADAMARD: self.table.hadamard,
            AMAX: self.table.amax,
            REGION: self.table.region,
            WEIGHT: self.table.weight,
            PRODUCT: self.table.product,
            BLOCK_SCALED_MM: self.table.block_scaled_mm,
        }
        entry = entries.get(node.target)
        if isinstance(entry, OpOverload):
            node.target = entry
            return
        with self.graph.inserting_before(node):
            if node.target is SCALED_MM:
                self._replace(node, self._scaled_mm(node))
            elif node.target is DEQUANTIZE:
                self._replace(node, self._dequantize(node))
            elif node.target in entries:
                self._replace(node, self._emit(entry, arguments(node), node))

    def finish(self) -> None:
        """Emit the packed forms that are needed after all, then drop what nobody reads."""
        for node in reversed(self.graph.nodes):
            if (node.target in (QUANTIZE, TRANSPOSE) and not node.users) or (
                node.target is operator.getitem and not node.users and is_dialect(arguments(node)[0])
            ):
                self.graph.erase_node(node)
        for node in list(self.graph.nodes):
            if node.target in (QUANTIZE, TRANSPOSE):
                with self.graph.inserting_before(node):
                    if node.target is QUANTIZE:
                        parts = self._emit(self.table.quantize, arguments(node), node)
                    else:
                        parts = self._emit(dialect.transpose, arguments(node), node)
                self._replace_items(node, parts)
        merge_equal(self.graph, frozenset(self.emitted))
        self.graph.eliminate_dead_code()

    def _scaled_mm(self, node: fx.Node) -> fx.Node:
        a_codes, a_scales, a_amax, b_codes, b_scales, b_amax, k, bias, dtype = arguments(node)
        a = self._operand(a_codes, a_scales, k, node)
        b = self._operand(b_codes, b_scales, k, node)
        return self._emit(self.table.product, (a, b, a_amax, b_amax, bias, None, dtype), node)

    def _dequantize(self, node: fx.Node) -> fx.Node:
        codes, scales, amax, k, dtype = arguments(node)
        operand = self._operand(codes, scales, k, node)
        if amax is None and dtype == self.table.operand_dtype:
            return operand
        return self._emit(_scale_values, (operand, amax, dtype), node)

    def _operand(self, codes: fx.Node, scales: fx.Node, k: Any, like: fx.Node) -> fx.Node:
        """code * scale of a packed operand, [.., rows, k]; emitted once for each distinct operand."""
        key = (codes, k)
        if key not in self.operands:
            self.operands[key] = self._new_operand(codes, scales, k, like)
        return self.operands[key]

    def _new_operand(self, codes: fx.Node, scales: fx.Node, k: Any, like: fx.Node) -> fx.Node:
        maker = arguments(codes)[0] if codes.target is operator.getitem else None
        if isinstance(maker, fx.Node) and maker.target is TRANSPOSE:
            source_codes, source_scales, source_k = arguments(maker)
            source = self._operand(source_codes, source_scales, source_k, like)
            return insert(self.graph, aten.permute.default, (source, swap_order(source.meta["val"].dim())), like)
        unpacked = self.table.operand if maker not in self.read_packed else None
        if isinstance(maker, fx.Node) and maker.target is QUANTIZE and unpacked is not None:
            return self._emit(unpacked, arguments(maker), like)
        return self._emit(self.table.dequantize, (codes, scales, k), like)

    def _replace(self, node: fx.Node, replacement: fx.Node) -> None:
        node.replace_all_uses_with(replacement)
        self.graph.erase_node(node)

    def _replace_items(self, node: fx.Node, parts: Sequence[fx.Node]) -> None:
        for item in list(node.users):
            self._replace(item, parts[arguments(item)[1]])
        self.graph.erase_node(node)

    def _emit(self, entry: Callable[..., Any] | None, args: Sequence[Any], like: fx.Node) -> Any:
        """Copy the traced `entry` into the graph at the insertion point; returns the node or nodes of its result."""
        assert entry is not None, f"target {self.table.target} has no such kernel"
        inputs = iter(_nodes(args))
        key = (entry, tuple(map(_signature, tree_leaves(value(tuple(args))))))
        if key not in self.traced:
            self.traced[key] = _trace(entry, args)
        module = self.traced[key]
        copies: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                return fx.map_arg(arguments(node)[0], lambda inner: copies[inner])
            else:
                copies[node] = self.graph.node_copy(node, lambda inner: copies[inner])
                copy_origin(copies[node], like)
                if node.op == "get_attr":
                    copies[node].target = self._constant(getattr(module, node.target))
                self.emitted.add(copies[node].target)
        raise AssertionError("a traced graph ends with its output")

    def _constant(self, tensor: Tensor) -> str:
        """Name under which the module that owns the graph holds a constant of a traced entry."""
        owner = self.graph.owning_module
        name = f"_nvfp4_constant{sum(key.startswith('_nvfp4_constant') for key in vars(owner))}"
        while hasattr(owner, name):
            name += "_"
        setattr(owner, name, tensor)
        return name


def _scale_values(values: Tensor, amax: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is left of nvfp4.dequantize after code * scale."""
    values = values.float()
    return (values if amax is None else values * (amax / GLOBAL_MAX)).to(dtype)


def _signature(value: Any) -> object:
    """What a trace depends on: shapes, strides, types and plain values."""
    if isinstance(value, Tensor):
        return (tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype, value.device)
    return str(value) if isinstance(value, torch.SymInt) else (type(value), repr(value))


def _nodes(args: Sequence[Any]) -> list[fx.Node]:
    """The nodes among arguments, each as often as it stands there."""
    return [leaf for leaf in tree_leaves(tuple(args)) if isinstance(leaf, fx.Node)]


def _trace(entry: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
    """The aten graph of `entry`, whose inputs are those arguments that are graph nodes."""

    def call(*inputs: Any) -> Any:
        given = iter(inputs)
        return entry(*fx.map_arg(tuple(args), lambda node: next(given)))

    inputs = [node.meta["val"] for node in _nodes(args)]
    fake_mode = detect_fake_mode(inputs)
    assert fake_mode is not None, "the graph carries no fake tensors"
    # Compiling may happen under the user's autocast, which would put casts of its own into the trace.
    with fake_mode, enable_python_dispatcher(), torch._C._DisableAutocast():
        # Copies of one trace share their values, and make_fx takes one value for one input: each needs its own object.
        inputs = [given.detach() if isinstance(given, Tensor) else given for given in inputs]
        module = make_fx(call, decomposition_table=select_decomp_table(), tracing_mode="real")(*inputs)
    module.graph.eliminate_dead_code()
    return module
