"""Command lines of documents and manifests, held against the programs that they call."""

from __future__ import annotations

import shlex
from typing import Any


def parse(line: str) -> None:
    """Raise where ``tilefleet`` or ``ray`` would not take ``line``; lines of other programs are left alone."""
    program, *arguments = shlex.split(line, comments=True)
    if program not in ("tilefleet", "ray"):
        return
    command = _program(program)
    name, context = program, None
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(arguments), parent=context, resilient_parsing=True)
        name, command, arguments = command.resolve_command(context, arguments)
    command.make_context(name, list(arguments), parent=context).close()


def _program(name: str) -> Any:
    if name == "ray":
        from ray.scripts.scripts import cli

        return cli
    import typer.main

    from tilefleet import app

    return typer.main.get_command(app)
