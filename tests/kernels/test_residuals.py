"""Llama blocks as they are compiled: their residual connections become parts of products, and they train."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from nvfp4c import backend
from nvfp4c.bench.llama import SIZES, Llama
from nvfp4c.codegen import operations, targets
from nvfp4c.codegen.targets import TARGETS
from nvfp4c.dialect import PRODUCT, RESIDUAL, Stage
from nvfp4c.options import parse

SIZE = replace(SIZES["tiny"], blocks=1, batch=2, sequence=8)


@dataclass
class Watch:
    """The graphs that were compiled, as `fold_residual` left them: how many products add something."""

    folded: list[int] = field(default_factory=list)

    def __call__(self, step: str, stage: Stage, graph: fx.Graph) -> None:
        if step != "fold_residual":
            return
        products = graph.find_nodes(op="call_function", target=PRODUCT)
        self.folded.append(sum(node.args[RESIDUAL] is not None for node in products))


def test_residual_connections_of_llama_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in training too."""
    if operations.INTERPRETED:
        table = targets.kernel_table(TARGETS["sm_90"])
        monkeypatch.setattr(targets, "kernel_table", lambda target, product: table)
    monkeypatch.setattr(backend.GraphPass, "uuid", lambda self: None)
    torch.manual_seed(0)
    model = Llama(SIZE).to(device, torch.bfloat16)
    x, wanted = (torch.randn(SIZE.batch, SIZE.sequence, SIZE.width).bfloat16().to(device) for _ in range(2))
    watch = Watch()
    options = parse({"recipe": "nvfp4-all"})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda gm, given: backend.compile_graph(gm, given, options, [watch]))

    def loss() -> Tensor:
        return F.mse_loss(compiled(x).float(), wanted.float())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    # In the backward of each block what q, k and v give is added up, and what gate and up give.
    assert watch.folded == [2 * SIZE.blocks, 3 * SIZE.blocks]
    assert losses[-1] < losses[0]

    with torch.no_grad():
        loss()
    assert watch.folded[2:] == [2 * SIZE.blocks]
    torch._dynamo.reset()
