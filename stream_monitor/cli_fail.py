"""How a command ends that cannot do what it was asked."""

from typing import NoReturn

import typer


def fail(message: object) -> NoReturn:
    """One line on standard error, exit status 2."""
    typer.echo(f"stream-monitor: {' '.join(str(message).split())}", err=True)
    raise typer.Exit(2)
