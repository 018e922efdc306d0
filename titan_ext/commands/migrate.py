"""``titan-ext migrate OLD.toml``: a configuration of torchtitan 0.1 or 0.2 as one of ours."""

import argparse
import os
import sys
from typing import Any

from titan_ext.commands.command import Command, local_path
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.files import write_whole

_DESCRIPTION = """\
Write a configuration of torchtitan 0.1 or 0.2 (TOML) over for this version: the same model, data, tokenizer, optimizer,
schedule, batch, parallelism, checkpoints and validation. What those versions did by default and this one does otherwise
is written out; keys without a home are listed with the reason; a corpus or tokenizer that cannot be known is left blank,
and titan-ext check refuses the file until it is filled in.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which file, and where the new one goes."""
    parser.add_argument("file", metavar="OLD.toml")
    parser.add_argument(
        "-o", "--out", type=local_path, metavar="NEW.toml", help="where to write it (default: standard output)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite NEW.toml")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 0.

    Raises:
        UserError: the file is none of those versions, or the new one is there already or cannot be written.
    """
    from titan_ext.config.migration.convert import migrate
    from titan_ext.config.source import read_file

    if args.out is not None and args.out.exists() and not args.force:
        raise UserError(f"{args.out}: is there already; give --force to overwrite it")
    tables = read_file(args.file)
    if "site" in tables or not {"model", "training", "job"} & tables.keys():
        what = (
            "has [[site]] tables, as files of this version do" if "site" in tables else "has no [model] or [training]"
        )
        raise UserError(f"{args.file}: {what}: it is no configuration of torchtitan 0.1 or 0.2")
    done = migrate(tables)
    text = done.text(os.path.basename(args.file))
    if args.out is None:
        print(text, end="")
        return 0
    try:
        write_whole(args.out, text)
    except OSError as error:
        raise unwritable(f"--out {args.out}", error) from None
    print(f"{args.out}: {_summary(done)}; titan-ext check {args.out} tells what is left", file=sys.stderr)
    return 0


def _summary(done: Any) -> str:
    counts = ((done.blanks, "to fill in"), (done.homeless, "without a home"), (done.changed, "not quite the same"))
    return ", ".join(f"{len(entries)} {what}" for entries, what in counts)


COMMAND = Command(
    name="migrate",
    help="write a configuration of torchtitan 0.1 or 0.2 over for this version",
    description=_DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
)
