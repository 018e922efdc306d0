"""``titan-ext help [KEY]``: what a key of the configuration means."""

import argparse

from titan_ext.commands.command import Command
from titan_ext.errors import UserError

_DESCRIPTION = """\
Explain a key of the configuration (`titan-ext help semi_sync.sync_every`), list the keys of a section
(`titan-ext help semi_sync`), or, without an argument, the sections.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which key, and in what form."""
    parser.add_argument("key", nargs="?", metavar="KEY", help="a key, or a section")
    parser.add_argument(
        "--markdown", action="store_true", help="every key as a Markdown page (train_configs/README.md)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 0.

    Raises:
        UserError: there is no such key.
    """
    from titan_ext.config.load import quiet
    from titan_ext.config.reference.collect import all_keys, sections
    from titan_ext.config.reference.text import markdown, overview

    with quiet():
        if args.markdown:
            text = markdown(sections(), all_keys()).rstrip()
        elif args.key is None:
            text = overview(sections())
        else:
            text = _explained(args.key.removeprefix("--").replace("-", "_").strip("[]"))
    print(text)
    return 0


def _explained(asked: str) -> str:
    from titan_ext.config.reference.choices import choices
    from titan_ext.config.reference.collect import SITE, all_keys, sections
    from titan_ext.config.reference.text import key_text, section_text

    purposes = sections()
    if asked in purposes:
        return section_text(asked, purposes[asked], [key for key in all_keys() if key.section == asked])
    names = {key.name: key for key in all_keys()}
    found = [key for name, key in names.items() if name in (asked, f"{SITE}.{asked}")]
    found = found or [key for name, key in names.items() if name.rpartition(".")[2] == asked]
    if not found:
        raise UserError(f"help {asked}: no such key or section; {_advice(asked, list(names), list(purposes))}")
    return "\n\n".join(key_text(key, choices(key.name)) for key in found)


def _advice(asked: str, names: list[str], sections: list[str]) -> str:
    from titan_ext.config.build import keys_by_name
    from titan_ext.config.unknown import meant_by

    section, _, name = asked.rpartition(".")
    prefix = f"{section}."
    allowed = [each.removeprefix(prefix) for each in names if each.startswith(prefix)] if section else sections
    meant, advice = meant_by(section, name, allowed, keys_by_name())
    return advice if meant or len(allowed) <= len(sections) else "titan-ext help lists the sections"


COMMAND = Command(
    name="help",
    help="explain a key of the configuration, or list all",
    description=_DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
)
