"""``titan-ext launch`` with stand-ins for the sites: python -m tests.launcher.launch_stand_ins FOLDER NAME=BEHAVIOUR …"""

import sys
from dataclasses import replace
from pathlib import Path

from tests.launcher.sites import GRACE_SECONDS, PATIENCE_SECONDS, job
from titan_ext import cli
from titan_ext.commands import launch as command
from titan_ext.launcher.run import LaunchedSite, run_jobs


def launch(folder: Path, sites: dict[str, str]) -> int:
    return run_jobs(
        [job(folder, name, behaviour) for name, behaviour in sites.items()],
        [LaunchedSite(name, folder / name, 3) for name in sites],
        max_restarts=1,
        plain=True,
        complete=True,
        backoff_seconds=0.05,
        # Those that leave when they are told to need not be quick.
        grace_seconds=PATIENCE_SECONDS if "leave" in sites.values() else GRACE_SECONDS,
        poll_seconds=0.02,
    )


if __name__ == "__main__":
    folder, sites = Path(sys.argv[1]), dict(each.split("=") for each in sys.argv[2:])
    # The command line's own handling of errors, around a run that needs no configuration.
    cli.COMMANDS = (replace(command.COMMAND, run=lambda options: launch(folder, sites)),)
    sys.exit(cli.main(["launch", "unused.toml"]))
