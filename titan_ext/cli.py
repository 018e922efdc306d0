"""The command ``titan-ext``: runs a subcommand, and turns errors into one line."""

import argparse
import os
import sys
from collections.abc import Sequence

from titan_ext import __version__
from titan_ext.commands import (
    bench,
    check,
    data,
    deploy,
    dept,
    doctor,
    evaluate,
    export,
    generate,
    lab,
    launch,
    lighthouse,
    migrate,
    personalize,
    plan,
    report,
    selftest,
    watch,
)
from titan_ext.commands import help as help_command
from titan_ext.commands.command import Command
from titan_ext.error_text import path_error, print_anything
from titan_ext.errors import RunError, UserError
from titan_ext.launcher.surroundings import check_variables

_DESCRIPTION = "Train one language model at several sites: torchtitan inside a site, an outer loop between them."

_EXAMPLES = """\
examples:
  titan-ext check train_configs/demo.toml                          what each site will run with, and its cost
  titan-ext launch train_configs/demo.toml                         all sites of the file on this machine
  titan-ext launch train_configs/demo.toml --training.steps 20     any setting can be overridden
  titan-ext lighthouse --min-sites 2                               where the sites of several machines meet …
  titan-ext launch FILE.toml --only east --lighthouse http://host:29510        … and one site of them

`titan-ext COMMAND --help` says more.
"""


COMMANDS: tuple[Command, ...] = (
    launch.COMMAND,
    lighthouse.COMMAND,
    deploy.COMMAND,
    watch.COMMAND,
    report.COMMAND,
    check.COMMAND,
    plan.COMMAND,
    lab.COMMAND,
    doctor.COMMAND,
    help_command.COMMAND,
    migrate.COMMAND,
    data.COMMAND,
    evaluate.COMMAND,
    personalize.COMMAND,
    generate.COMMAND,
    export.COMMAND,
    dept.COMMAND,
    bench.COMMAND,
    selftest.COMMAND,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 where the run failed, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    print_anything()
    try:
        check_variables()
        return run(arguments)
    except (UserError, RunError) as error:
        print(f"titan-ext: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has left; without this, Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        known = path_error(error)
        if known is None:
            raise
        print(f"titan-ext: error: {known}", file=sys.stderr)
        return known.exit_code


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code and lets errors through."""
    parser = _build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options, rest = parser.parse_known_args(arguments)
    command: Command = options.command
    if rest and not command.takes_overrides:
        parser.error(f"{command.name} does not know {' '.join(rest)}")
    options.overrides = rest
    options.arguments = list(arguments)
    assert command.run is not None, "argparse has asked for an action"
    return command.run(options)


def _build_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {each.name:<12}{each.help}" for each in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="titan-ext",
        usage="titan-ext [--help] [--version] COMMAND …",
        description=f"{_DESCRIPTION}\n\ncommands:\n{listing}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"titan-ext {__version__}")
    subparsers = parser.add_subparsers(prog="titan-ext", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for command in COMMANDS:
        command.add_to(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
