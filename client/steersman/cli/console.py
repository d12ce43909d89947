"""What the command says: results on stdout, everything else on stderr; one clean message for an error, no traceback."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from steersman.cli.supervisor import StartError
from steersman.wire.errors import Code, SteersmanError

# Columns of a pipe: more than any row has.
_PIPE_WIDTH: Final = 10_000

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

# The class of all errors in a command line; typer brings it along and gives it no public name.
_UsageError: Final = cast(type[Exception], typer.BadParameter.__mro__[2])


class CommandError(Exception):
    """A failure with a message for the user."""

    exit_code = EXIT_FAILED


class InputError(CommandError):
    """What the user gave cannot be used, whatever the services say. Counts as wrong usage."""

    exit_code = EXIT_USAGE


def out() -> Console:
    """Results. Long lines stay whole, and rows of a table are lines, so that they can be piped."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


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
        lines.append(
            "  Is the service up? `steersman status` tells; `--address` says where to look. One with TLS wants `--tls`."
        )
    return "\n".join(lines)


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turns failures into one message on stderr and exit status 1, or 2 for wrong usage."""
    try:
        yield
    except (SteersmanError, CommandError, StartError, OSError) as error:
        _print_error(explain(error))
        raise typer.Exit(getattr(error, "exit_code", EXIT_FAILED)) from None


def _print_error(message: str) -> None:
    text = Text("error: ", style="bold red")
    text.append(message, style="default")
    err().print(text)


class CleanGroup(TyperGroup):
    """A group of commands whose failures end as `clean_errors` says, and wrong usage with one line and status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line, and ends the process."""
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _UsageError as error:
            if not standalone_mode:
                raise
            message = error.format_message()  # type: ignore[attr-defined]
            if message.strip() and "\n" not in message:
                _print_error(message[0].lower() + message[1:])
            else:  # the help, where a command is missing
                error.show()  # type: ignore[attr-defined]
            sys.exit(EXIT_USAGE)
        except typer.Abort:
            status = EXIT_FAILED
        if not standalone_mode:
            return status
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with clean_errors():
            return super().invoke(ctx)


def write(text: str) -> None:
    """Writes to stdout at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()
