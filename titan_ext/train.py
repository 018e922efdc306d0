"""What torchrun starts at a site: ``torchrun … -m titan_ext.train --config FILE.toml --site NAME [--section.key value]``."""

import argparse
import contextlib
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from titan_ext.error_text import print_anything
from titan_ext.errors import UserError
from titan_ext.launcher.surroundings import check_variables, set_aside
from titan_ext.replica.shutdown.process import GracefulExit

_USAGE = """\
Train one site of a run. Start it with torchrun, or let `titan-ext launch FILE.toml` start every site.

Any setting of the file can be overridden: --training.steps 20, --semi_sync.sync_every=16 …
`titan-ext check FILE.toml` prints what a site's settings come to.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a site; bad input and failures of the surroundings end in one line and a non-zero exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m titan_ext.train",
        description=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a shortened flag could be meant for the configuration
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="the run's configuration")
    parser.add_argument("--site", metavar="NAME", help="which [[site]] this is; not needed if the file has only one")
    print_anything()
    options, overrides = parser.parse_known_args(arguments)
    try:
        check_variables()
        for note in set_aside():
            print(f"titan-ext: {note}", flush=True)
        _train(options.config, options.site, overrides)
    except (Exception, KeyboardInterrupt, GracefulExit) as error:  # noqa: BLE001 — whatever it is ends the process in a line
        from titan_ext.replica.shutdown.failure import end_with

        end_with(error)


def _train(path: str, site_name: str | None, overrides: Sequence[str]) -> None:
    import torch
    from torchtitan.observability import structured_logger
    from torchtitan.tools.logging import init_logger, logger

    from titan_ext.config import check_outputs, check_world_size, load_to_start, save_resolved
    from titan_ext.config.changed import training_settings
    from titan_ext.config.recorded import check_resumed
    from titan_ext.launcher.attempt import begin_attempt
    from titan_ext.trainer.folder_lock import in_use
    from titan_ext.trainer.log_mirror import fetch_logs

    init_logger()
    logging.raiseExceptions = False  # where no log can be written, the last line says why
    (site,) = load_to_start(path, [site_name], overrides)
    _check_launch(site)
    check_world_size(site.config, int(os.environ["WORLD_SIZE"]))
    check_outputs(site.config)
    with contextlib.ExitStack() as held:
        if os.environ["RANK"] == "0":
            held.enter_context(in_use(Path(site.config.dump_folder)))
            check_resumed(site)
            save_resolved(site)
        # Before any rank opens a log: all of them come together later on.
        for log in fetch_logs(site.config) if os.environ["LOCAL_RANK"] == "0" else ():
            logger.info("site %s: %s is longer than that of this disk, and goes on here", site.name, log)
        structured_logger.init_structured_logger(
            source="training",
            output_dir=site.config.dump_folder,
            enable=site.config.debug.enable_structured_logging,
        )
        begin_attempt(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            timedelta(seconds=site.config.comm.init_timeout_seconds),
        )
        trainer = site.config.build()
        trainer.settings = training_settings(site)
        try:
            trainer.train()
        finally:
            trainer.close()
        torch.distributed.destroy_process_group()


def _check_launch(site) -> None:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"titan_ext.train runs under torchrun: torchrun --nproc-per-node {site.nproc} -m titan_ext.train … "
            "(or use `titan-ext launch`)"
        )


if __name__ == "__main__":
    main()
