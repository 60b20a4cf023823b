"""The `nvfp4c` command. Importing it is cheap: each command imports PyTorch only when it runs."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from nvfp4c.cli.bench import bench
from nvfp4c.cli.doctor import doctor
from nvfp4c.cli.emit import emit
from nvfp4c.cli.explain import explain
from nvfp4c.cli.plan import plan
from nvfp4c.cli.quickstart import quickstart
from nvfp4c.cli.sensitivity import sensitivity
from nvfp4c.errors import Nvfp4Error

USER_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT, what a shell reports for Ctrl-C."""


class Commands(TyperGroup):
    """All commands, with the errors that users can cause turned into one line and an exit code.
    A command that was interrupted says how to go on as the argument of its KeyboardInterrupt."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            print(": ".join(("interrupted", *map(str, stopped.args))), file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            reason = user_error(error)
            if reason is None:
                raise
            print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
            raise typer.Exit(USER_ERROR) from None


def user_error(error: BaseException | None) -> Nvfp4Error | None:
    """The error of this project that `error` is or was caused by, as when Dynamo wraps what a backend raises."""
    while error is not None and not isinstance(error, Nvfp4Error):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help='Train and run PyTorch models in 4-bit NVFP4, with torch.compile(model, backend="nvfp4").',
)
for command in (quickstart, doctor, explain, sensitivity, emit):
    app.command()(command)
app.add_typer(plan, name="plan")
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line."""
    app(prog_name="nvfp4c")
