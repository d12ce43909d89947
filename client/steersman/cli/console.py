"""What the command says: results on stdout, everything else on stderr; one clean message for an error, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from steersman.cli.supervisor import StartError
from steersman.wire.errors import Code, SteersmanError


class CommandError(Exception):
    """A failure with a message for the user."""


def out() -> Console:
    """Results. Long lines stay whole, so that they can be piped."""
    return Console(soft_wrap=True, highlight=False)


def err() -> Console:
    """Progress, notes and errors."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def explain(error: Exception) -> str:
    """The message of an error: reason, what happened, and each bad field on a line of its own."""
    if not isinstance(error, SteersmanError):
        return str(error)
    lines = [str(error)]
    if len(error.violations) > 1 or (error.violations and error.violations[0].field not in error.message):
        lines += [f"  {violation.field}: {violation.description}" for violation in error.violations]
    if error.reason is None and error.code == Code.UNAVAILABLE:
        lines.append("  Is the service up? `steersman status` tells; `--address` says where to look.")
    return "\n".join(lines)


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turns failures into one message on stderr and exit status 1."""
    try:
        yield
    except (SteersmanError, CommandError, StartError, OSError) as error:
        text = Text("error: ", style="bold red")
        text.append(explain(error), style="default")
        err().print(text)
        raise typer.Exit(1) from None


class CleanGroup(TyperGroup):
    """A group of commands whose failures end as `clean_errors` says."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with clean_errors():
            return super().invoke(ctx)


def write(text: str) -> None:
    """Writes to stdout at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()
