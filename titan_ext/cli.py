"""The command ``titan-ext``: finds the subcommand, loads its module only, and turns errors into one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from titan_ext import __version__
from titan_ext.errors import RunError, UserError

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


@dataclass(frozen=True, slots=True)
class _Command:
    name: str
    module: str
    help: str
    takes_overrides: bool = False


_COMMANDS = (
    _Command("launch", "titan_ext.commands.launch", "train: start the sites of a file on this machine", True),
    _Command("lighthouse", "titan_ext.commands.lighthouse", "run the lighthouse at which sites find each other"),
    _Command("check", "titan_ext.commands.check", "print the resolved settings of each site and their cost", True),
    _Command("data", "titan_ext.commands.data", "look into a corpus, or train a tokenizer on one"),
    _Command("eval", "titan_ext.commands.evaluate", "perplexity and tasks of a checkpoint", True),
    _Command("generate", "titan_ext.commands.generate", "continue a text with a checkpoint", True),
    _Command("export", "titan_ext.commands.export", "a checkpoint as a Hugging Face folder", True),
    _Command("dept", "titan_ext.commands.dept", "after sites trained a body with embeddings of their own", True),
    _Command("bench", "titan_ext.commands.bench", "measure speed"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 where the run failed, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(arguments)
    except (UserError, RunError) as error:
        print(f"titan-ext: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has left; without this, Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: Sequence[str]) -> int:
    chosen = next((each for each in _COMMANDS if arguments and arguments[0] == each.name), None)
    parser, module = _build_parser(chosen)
    if not arguments:
        parser.print_help()
        return 0
    options, rest = parser.parse_known_args(arguments)
    assert chosen is not None and module is not None, "argparse has refused everything else"
    if rest and not chosen.takes_overrides:
        parser.error(f"{chosen.name} does not know {' '.join(rest)}")
    options.overrides = rest
    return module.run(options)


def _build_parser(chosen: _Command | None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """Only the chosen command's module is imported: others may take seconds."""
    listing = "\n".join(f"  {each.name:<12}{each.help}" for each in _COMMANDS)
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
    module = None
    for command in _COMMANDS:
        if command is chosen:
            module = import_module(command.module)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(command.name)
    return parser, module


if __name__ == "__main__":
    sys.exit(main())
