"""The subcommands, each imported when it is called: a file a subcommand."""

from __future__ import annotations

from importlib import import_module

import click

NAMES = (
    "assign",
    "bench",
    "completion",
    "demo",
    "evaluate",
    "fit",
    "index",
    "info",
    "predict",
    "prepare",
    "report",
    "sample",
    "score",
    "verify",
)


class Commands(click.Group):
    """A group whose subcommands are `NAMES`; the module of the same name beside this one holds each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NAMES:
            return None
        command = getattr(import_module(f"streamgmm.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command
