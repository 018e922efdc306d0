"""What the commands ask about a run: its file, its site and its checkpoint."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titan_ext.config.load import Site
    from titan_ext.inference.checkpoint import Checkpoint


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``FILE.toml``, ``--site``, ``--checkpoint`` and ``--weights``."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--site", metavar="NAME", help="which [[site]]; not needed if the file has only one")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="PATH",
        help="a step-N folder of a run, a folder or URL of such, or a folder with Hugging Face's safetensors "
        "(default: the site's latest)",
    )
    parser.add_argument(
        "--weights",
        choices=["site", "global", "average"],
        default="site",
        help="the site's own parameters, the last ones that all sites agreed on, or the mean of those over the rounds, "
        'which weighting = "agnostic" keeps (default: site); after a round without delay the first two are the same',
    )


def open_run(options: argparse.Namespace) -> "tuple[Site, Checkpoint]":
    """The site and the checkpoint that the arguments name.

    Raises:
        UserError: the file, the site or the checkpoint cannot be used.
    """
    from titan_ext.checkpoint_place import checkpoint_folder
    from titan_ext.config.load import load_site
    from titan_ext.inference.checkpoint import LATEST, find_checkpoint

    site, folder = None, ""
    if options.checkpoint == LATEST:
        site = load_site(options.file, options.site, options.overrides)
        folder = checkpoint_folder(site.config.dump_folder, site.config.checkpoint.folder)
    checkpoint = find_checkpoint(options.checkpoint, folder)
    if site is None or checkpoint.huggingface:
        # What such a folder says of its model counts for what is measured, whatever the run started from.
        weights = Path(checkpoint.path) if checkpoint.huggingface else None
        site = load_site(options.file, options.site, options.overrides, weights=weights)
    checkpoint.check_tokenizer(site.config)
    site.notes.extend(checkpoint.changes(site.config.model_spec.model))
    return site, checkpoint
