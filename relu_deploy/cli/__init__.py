"""The ``relu-deploy`` command: one file a command, and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import importlib
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import click

from calib.errors import ToolkitError
from relu_deploy import __version__
from relu_deploy.cli.safety import SIGNALLED, terminable
from relu_deploy.cli.screen import printable
from relu_deploy.errors import NetworkWarning

# In the order of the flow; each name is a module of this package with a click command called ``command``.
COMMANDS = (
    "demo", "distill", "export", "survey", "rewrite", "calibrate", "calib", "quantize", "lint", "build-engine",
    "bench", "inspect",
)  # fmt: skip


class _Group(click.Group):
    """Imports a command when it is used, so that ``--help`` is quick, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"relu_deploy.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminable(), _told():
                return super().invoke(ctx)
        except ToolkitError as error:
            _tell(error.message, error.hint)
            ctx.exit(error.exit_code)
        except MemoryError as error:
            _tell(
                f"out of memory: {error or 'the machine has no more'}", "smaller batches, inputs or networks need less"
            )
            ctx.exit(ToolkitError.exit_code)
        except KeyboardInterrupt:
            _tell("interrupted; what was not finished was not written", None)
            ctx.exit(SIGNALLED + signal.SIGINT)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Print what networks warn of, each warning once."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        default = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
            if not issubclass(category, NetworkWarning):
                default(message, category, *where, **how)
            elif str(message) not in seen:
                seen.add(str(message))
                click.secho(f"warning: {printable(str(message))}", err=True, fg="yellow")

        warnings.simplefilter("always", NetworkWarning)
        warnings.showwarning = show
        yield


def _tell(message: str, hint: str | None) -> None:
    """Print an error and its fix. Names in it come from files, and are shown rather than obeyed."""
    click.secho(f"Error: {printable(message)}", err=True, fg="red")
    if hint:
        click.echo(f"Fix:   {printable(hint)}", err=True)


@click.command(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="relu-deploy")
def main() -> None:
    """Take networks from smooth activations to plain ReLU and into INT8 engines, with every step measured.

    The flow: distill -> export -> rewrite -> calibrate -> quantize -> build-engine -> bench. Each step reads and
    writes files (ONNX, JSON) and works alone; build-engine runs the four before it as needed; survey says beforehand
    what a network holds; demo runs the flow.

    Exit codes: 0 done, 1 a check failed, 2 a mistake in the call or its files, 128 + N ended by signal N.
    """
