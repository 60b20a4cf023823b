"""What the kernels for a GPU compute together, and what the cost model weighed for it. No GPU is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, fx

from nvfp4c import cost
from nvfp4c.dialect import BLOCK_SCALED_MM, PRODUCT, REGION, RESIDUAL, WEIGHT, arguments
from nvfp4c.errors import OptionError, nearest
from nvfp4c.fused_graphs import Half, fused_graphs, sites
from nvfp4c.options import Options
from nvfp4c.passes.absorb import FUSION, Fusion, Way
from nvfp4c.region import Form, Output, Region, empty_outputs
from nvfp4c.tasks import Task


@dataclass(frozen=True)
class Weighed:
    """One way to compute matrices and all that is quantised from them: bytes of all its kernels, and seconds."""

    way: str
    bytes: int
    microseconds: float


@dataclass(frozen=True)
class KernelRow:
    """One region, weight, or product with a residual. computes: its outputs. operations: of a region's prologue, or of
    what was left to Inductor.

    reads: the shapes of its inputs. bytes: predicted, each input read once and each output written once. sites: the
    matmuls that it serves. decision: the way chosen, "" where there was no choice; ways: what was weighed.
    """

    graph: str
    computes: str
    operations: tuple[str, ...]
    reads: tuple[str, ...]
    bytes: int
    sites: tuple[str, ...]
    decision: str
    ways: tuple[Weighed, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        return described(self.computes, self.operations, self.decision, self.reads)


def described(computes: str, operations: Sequence[str], decision: str, reads: Sequence[str]) -> str:
    """A row in words: what a region gives, what it computes that from if it does so itself, and what it reads."""
    made = f" of {', '.join(operations)}" if operations and decision != Way.APART.value else ""
    return f"{computes}{made}; reads {', '.join(reads)}"


def kernel_plan(task: Task, options: Options, target: str) -> dict[fx.Node, KernelRow]:
    """A row for each region of the graphs of a task, each weight, and each product that took over a sum, in order.

    By their nodes. Sizes are at their example values.

    Raises OptionError for a target without regions, and what the backend would raise.
    """
    if target not in cost.MACHINES:
        valid = tuple(cost.MACHINES)
        raise OptionError(f"there is no GPU target {target!r}; {nearest(target, valid)} (valid: {', '.join(valid)})")
    halves = fused_graphs(task, options, target)
    found = {node: _row(half, node, target) for half in halves for node in half.graph.nodes}
    return {node: row for node, row in found.items() if row is not None}


def _row(half: Half, node: fx.Node, target: str) -> KernelRow | None:
    if node.target is REGION:
        return _region_row(half, node, target)
    if node.target is WEIGHT:
        return _weight_row(half, node)
    summed = node.target in (PRODUCT, BLOCK_SCALED_MM) and arguments(node)[RESIDUAL] is not None
    return _sum_row(half, node) if summed else None


def _sum_row(half: Half, node: fx.Node) -> KernelRow:
    """A product and what is added to it: nothing is written or read for the sum but the residual and the result."""
    read = [one.meta["val"] for one in node.all_input_nodes]
    bytes_moved = sum(cost.at_example_sizes(cost.size(x), read) for x in (*read, node.meta["val"]))
    matrices = tuple(_shape(x) for x in read if x.dim() > 1 and x.dtype is not torch.float8_e4m3fn)
    computes = "product, and the sum of it and a residual"
    return KernelRow(half.title, computes, (), matrices, int(bytes_moved), sites(half, node), "", ())


def _weight_row(half: Half, node: fx.Node) -> KernelRow:
    """A weight that nothing is remembered of yet: read for its amax, read again, packed to be kept, and made ready.

    An operand is made ready on the way; packed codes are copied, and so read once more. What is packed along the other
    axis of the weight finds its amax, and reads the weight but once: which comes first is not known here.
    """
    given, _, text, _ = arguments(node)
    weight, outputs = given.meta["val"], Region.from_json(text).outputs
    forms = {output.form for output in outputs}
    packed = sum(cost.size(one) for one in empty_outputs(Region((replace(outputs[0], form=Form.PACKED),)), [weight]))
    moved = 2 * cost.size(weight) + packed + sum(cost.size(one) for one in node.meta["val"])
    moved += packed if Form.PACKED in forms else 0
    bytes_moved = int(cost.at_example_sizes(moved, [weight]))
    made = "amax, packed and operand" if Form.OPERAND in forms else "amax and packed"
    computes = f"{made} by {outputs[0].axis.value} of a weight, once a version"
    return KernelRow(half.title, computes, (), (_shape(weight),), bytes_moved, sites(half, node), "", ())


def _region_row(half: Half, node: fx.Node, target: str) -> KernelRow:
    """What is predicted of a region."""
    inputs = [one.meta["val"] for one in arguments(node)[0]]
    region = Region.from_json(arguments(node)[3])
    fusion: Fusion | None = node.meta.get(FUSION)
    moved = sum(cost.at_example_sizes(cost.size(x), inputs) for x in (*inputs, *node.meta["val"]))
    return KernelRow(
        graph=half.title,
        computes=", ".join(dict.fromkeys(map(_named, region.outputs))),
        operations=fusion.operations if fusion is not None else (),
        reads=tuple(map(_shape, inputs)),
        bytes=int(moved),
        sites=sites(half, node),
        decision=fusion.way.value if fusion is not None else "",
        ways=() if fusion is None else tuple(_weighed(fusion, way, inputs, target) for way, _ in fusion.costs),
    )


def _weighed(fusion: Fusion, way: Way, inputs: Sequence[Tensor], target: str) -> Weighed:
    seconds = cost.seconds(dict(fusion.costs)[way], cost.MACHINES[target])
    return Weighed(
        way.value,
        int(cost.at_example_sizes(fusion.bytes(way), inputs)),
        round(cost.at_example_sizes(seconds, inputs) * 1e6, 2),
    )


def _named(output: Output) -> str:
    if output.form is Form.VALUE:
        return "the matrix"
    words = [output.form.value, f"by {output.axis.value}"] if output.quantised else [output.form.value]
    words += ["stochastic"] if output.stochastic else []
    return " ".join([*words, *(["rotated"] if output.signs else [])])


def _shape(x: Tensor) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{dtype} {[int(cost.at_example_sizes(cost.extent(size), [x])) for size in x.shape]}"
