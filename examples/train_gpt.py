"""Train a GPT on real text until it predicts it, as a model to analyse that is small enough for a CPU.

python examples/train_gpt.py --out gpt.safetensors
GPT=gpt.safetensors nvfp4c sensitivity examples/train_gpt.py:task

Its tokens are bytes, its text is the source code of the Python standard library. It trains in BF16 on a GPU and in
FP32 on a CPU. The defaults are meant for a large GPU and take minutes there. On a CPU, to try it:

python examples/train_gpt.py --out gpt.safetensors --layers 2 --width 64 --steps 200 --batch 8 --sequence 64
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

from nvfp4c.errors import Nvfp4Error, OptionError
from nvfp4c.files import write_text
from nvfp4c.quickstart import checkpoint, data, environment
from nvfp4c.quickstart.model import Size, parameter_count
from nvfp4c.quickstart.results import prepared, run_to_dict, to_json
from nvfp4c.quickstart.train import (
    Progress,
    Settings,
    build_model,
    choose_device,
    fit,
    loss_of,
    validate,
    validation_batches,
)
from nvfp4c.tasks import Task

HEAD_WIDTH = 64
BATCHES, BATCH, SEQUENCE = 8, 8, 256
"""Of a task: batches to measure with, and as many held out; samples a batch; bytes a sample, or what the GPT can."""


def task() -> Task:
    """The GPT in the file that the environment variable GPT names, gpt.safetensors by default."""
    return task_of(Path(os.environ.get("GPT", "gpt.safetensors")))


def task_of(path: Path, text: Path | None = None) -> Task:
    """The GPT in `path`, with text that it has not been trained on: `text`, or the Python standard library."""
    model, size = checkpoint.load(path)
    settings = Settings(replace(size, batch=BATCH, sequence=min(SEQUENCE, size.sequence)), 0, 0, "cpu")
    corpus = data.load(text, minimum=2 * BATCHES * settings.tokens_per_step + 1)
    batches = validation_batches(corpus, settings, count=2 * BATCHES)
    return Task(str(path), model, batches[0::2], loss_of, held_out=batches[1::2])


def main() -> None:
    """Train, write the weights, and beside them a JSON file with the settings, the losses and the command."""
    arguments = parse()
    try:
        train_and_save(arguments)
    except Nvfp4Error as error:
        sys.exit(f"error: {error}")


def train_and_save(arguments: argparse.Namespace) -> None:
    """Do what the command line says; Nvfp4Error where it cannot be done."""
    device = choose_device(arguments.device)
    if arguments.out.suffix != ".safetensors":
        raise OptionError(f"--out is {arguments.out}, but must end in .safetensors")
    settings = Settings(size_of(arguments), arguments.steps, arguments.seed, device)
    prepared(arguments.out.parent)
    corpus = data.load(arguments.data, minimum=settings.minimum_bytes)
    model = build_model(settings)
    run = fit(model, settings, corpus, arguments.backend, watch=show)
    if run.diverged_at is not None:
        raise OptionError(f"the loss diverged at step {run.diverged_at}; choose a lower --learning-rate")
    checkpoint.save(model, settings.size, arguments.out)
    written, _ = checkpoint.load(arguments.out)
    loss = validate(written.to(device), validation_batches(corpus, settings))
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": environment.commit(),
        "environment": environment.describe(device),
        "settings": asdict(settings),
        "parameters": parameter_count(model),
        "text": f"{corpus.source}, {corpus.files} files, {len(corpus.train):,} + {len(corpus.validation):,} bytes",
        "held_out": corpus.split,
        "unit": "nats a byte",
        "written_validation_loss": loss,
        "run": run_to_dict(run),
    }
    write_text(arguments.out.with_suffix(".json"), to_json(results))
    print(f"held-out loss {run.final_validation_loss:.4f} nats a byte, {loss:.4f} with the weights in {arguments.out}")


def size_of(arguments: argparse.Namespace) -> Size:
    """The size that the command line asks for; OptionError where the width is no whole number of heads."""
    width = arguments.width
    if width % HEAD_WIDTH:
        raise OptionError(f"--width is {width}, but must be a multiple of {HEAD_WIDTH}, the width of a head")
    return Size(
        name="trained",
        layers=arguments.layers,
        width=width,
        heads=width // HEAD_WIDTH,
        hidden=3 * width,
        sequence=arguments.sequence,
        batch=arguments.batch,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )


def parse() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the file of weights; a JSON file comes beside it")
    parser.add_argument("--steps", type=positive, default=2000, help="training steps (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=10, help="transformer blocks (default: %(default)s)")
    parser.add_argument("--width", type=positive, default=256, help="of the residual stream (default: %(default)s)")
    parser.add_argument("--sequence", type=positive, default=512, help="bytes a sample (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="samples a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="the highest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes the first weights and the batches")
    parser.add_argument("--data", type=Path, help="a folder of text; the Python standard library by default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"], help="eager compiles nothing")
    return parser.parse_args()


def positive(text: str) -> int:
    """The whole number above 0 that `text` is."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def show(progress: Progress) -> None:
    """Print a line at each validation."""
    if progress.stage == "validate":
        speed = f"{progress.tokens_per_second:,.0f} bytes/s"
        print(f"step {progress.step}: training loss {progress.loss:.4f}, {speed}", flush=True)


if __name__ == "__main__":
    main()
