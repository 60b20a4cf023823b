"""Keep the operands of products packed, for a target that multiplies FP4 itself. SCALED -> SCALED, on the joint graph.

    %xq = nvfp4.quantize(%x, %xa, [1, 16], "nearest")
    %wq = nvfp4.quantize(%w, %wa, [16, 16], "nearest")
    %wt = nvfp4.transpose(*%wq, k)
    %y  = nvfp4.scaled_mm(*%xq, %xa, *%wq, %wa, k, %bias, bf16)
    %dx = nvfp4.scaled_mm(*%dyq, %dya, *%wt, %wa, n, None, bf16)
becomes
    %xn = nvfp4.quantize(%x, %xa, [1, 16], "nearest", None, None, 0, "native")
    %wn = nvfp4.quantize(%w, %wa, [16, 16], "nearest", None, None, 0, "native")
    %wm = nvfp4.quantize(%w_t, %wa, [16, 16], "nearest", None, None, 0, "native")
    %y  = nvfp4.block_scaled_mm(*%xn, %xa, *%wn, %wa, %bias, None, bf16)
    %dx = nvfp4.block_scaled_mm(*%dyn, %dya, *%wm, %wa, None, None, bf16)

so no operand is dequantised, and none is transposed: a weight's tiles are quantised down its columns, which gives the
same codes. It runs before the partitioner, for what is saved for the backward is saved in this layout. What is read by
others than products (weights that are only stored in FP4) keeps the layout of the tensor.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx

from nvfp4c.dialect import ASSIGNMENT, BLOCK_SCALED_MM, MATMUL, QUANTIZE, SCALED_MM, TRANSPOSE, arguments
from nvfp4c.passes.fuse import DEFAULTS
from nvfp4c.passes.graph_edit import insert, transposed
from nvfp4c.region import Layout


def native(graph: fx.Graph) -> fx.Graph:
    """Replace every scaled matmul, and the quantisations that feed it."""
    packing = _Packing(graph)
    for node in graph.find_nodes(op="call_function", target=SCALED_MM):
        a_codes, _, a_amax, b_codes, _, b_amax, _, bias, dtype = arguments(node)
        a, b = packing.operand(a_codes), packing.operand(b_codes)
        with graph.inserting_before(node):
            product = insert(graph, BLOCK_SCALED_MM, (*a, a_amax, *b, b_amax, bias, None, dtype), node)
        for key in (MATMUL, ASSIGNMENT):
            if key in node.meta:
                product.meta[key] = node.meta[key]
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        made = arguments(node)[0] if node.target is operator.getitem else node
        if not node.users and made.target in (QUANTIZE, TRANSPOSE):
            graph.erase_node(node)
    return graph


@dataclass
class _Packing:
    """The work on one graph. packed: codes and scales in the native layout, by the quantisation or transpose that they
    replace."""

    graph: fx.Graph
    packed: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)

    def operand(self, codes: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Codes and scales of an operand of a product."""
        maker: fx.Node = arguments(codes)[0]
        if maker not in self.packed:
            self.packed[maker] = self._quantized(maker)
        return self.packed[maker]

    def _quantized(self, maker: fx.Node) -> tuple[fx.Node, fx.Node]:
        turned = maker.target is TRANSPOSE
        quantize: fx.Node = arguments(arguments(maker)[0])[0] if turned else maker
        given = arguments(quantize)
        with self.graph.inserting_before(maker):
            matrix = transposed(self.graph, given[0], maker) if turned else given[0]
            args = (matrix, *given[1:], *DEFAULTS[len(given) - 4 : -1], Layout.NATIVE.value)
            made = insert(self.graph, QUANTIZE, args, maker)
            codes, scales = (insert(self.graph, operator.getitem, (made, place), maker) for place in (0, 1))
        return codes, scales
