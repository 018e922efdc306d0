"""What every subcommand of ``titan-ext`` is."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from titan_ext.object_store import is_url


def local_path(text: str) -> Path:
    """Where a command writes, as argparse's ``type``; a URL would become a folder of that name here."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text}: must be on this machine, not a URL")
    return Path(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A subcommand, or an action of one: it either has ``actions`` or can ``run``.

    All commands are imported to print a list of them, so their modules import torch and torchtitan in ``run`` only.
    """

    name: str
    help: str
    """One line for the list of commands."""

    description: str = ""
    """What ``--help`` says first, if that is more than ``help``."""

    epilog: str = ""
    """What ``--help`` says last: examples."""

    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    run: Callable[[argparse.Namespace], int] | None = None
    """Returns the exit code. Raises ``UserError`` or ``RunError``, of which the command line makes one line."""

    takes_overrides: bool = False
    """Whether flags that the command does not know override settings; they are in ``options.overrides``."""

    actions: tuple["Command", ...] = ()

    def add_to(self, subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        """Add the command with its arguments and actions; the one that is chosen will be ``options.command``."""
        parser = subparsers.add_parser(
            self.name,
            # argparse fills in what stands after a % in the lines of its lists.
            help=self.help.replace("%", "%%"),
            description=self.description or self.help,
            epilog=self.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # A shortened flag could be meant for the configuration.
            allow_abbrev=False,
        )
        parser.set_defaults(command=self)
        if self.add_arguments is not None:
            self.add_arguments(parser)
        if self.actions:
            actions = parser.add_subparsers(required=True, metavar="ACTION")
            for action in self.actions:
                action.add_to(actions)
