"""Every command that fgsnap has, for tests that hold something of all of them."""

from __future__ import annotations

import click

from fgsnap.cli import cli


def every_command() -> dict[str, click.Command]:
    """The commands by name; those of a group are named as they are typed: ``bench serve``."""
    found = {}
    for name, command in cli.commands.items():
        if isinstance(command, click.Group):
            context = click.Context(command)
            found |= {f"{name} {own}": command.get_command(context, own) for own in command.list_commands(context)}
        else:
            found[name] = command
    return found
