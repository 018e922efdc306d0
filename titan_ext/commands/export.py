"""``titan-ext export``: a site's checkpoint as a Hugging Face folder."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_ext.commands.command import Command, local_path
from titan_ext.errors import UserError

if TYPE_CHECKING:
    from titan_ext.config.load import Site

_DESCRIPTION = """\
Write a site's checkpoint as a Hugging Face folder in the Llama layout: safetensors, config.json and the tokenizer.
transformers reads it with LlamaForCausalLM.from_pretrained; a run of ours starts from it, see below.
Settings can be overridden as in training; --checkpoint.export_dtype bfloat16 halves the folder.
"""

_EXAMPLES = """\
examples:
  titan-ext export FILE.toml --site east --out exported                     the latest checkpoint
  titan-ext export FILE.toml --site east --step 500 --weights global --out exported
  titan-ext export FILE.toml --site east --iterations 3 --out exported     an AbbIE without skips, its body unrolled

training from the folder:
  [checkpoint]
  enable = true
  initial_load_path = "/absolute/path/of/exported"
  initial_load_in_hf = true
  [[site]]
  tokenizer = "exported"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and where to."""
    parser.add_argument("file", metavar="FILE.toml")
    parser.add_argument("--site", metavar="NAME", help="which [[site]]; not needed if the file has only one")
    add_source_arguments(parser, weights="site")
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="write the Llama whose blocks are the model's with its body N times, where that computes the same "
        '(AbbIE with model.skip = "none"; any AbbIE for 1)',
    )


def add_source_arguments(parser: argparse.ArgumentParser, weights: str) -> None:
    """Add ``--step`` and ``--weights``, which choose among what a site has saved."""
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint after step N (default: the latest)")
    parser.add_argument(
        "--weights",
        choices=["site", "global", "average"],
        default=weights,
        help="the site's own parameters, the last ones that all sites agreed on, or the mean of those over the rounds, "
        'which weighting = "agnostic" keeps (default: %(default)s)',
    )


def run(options: argparse.Namespace) -> int:
    """Write the folder, and say how to go on from it.

    Raises:
        UserError: an argument, the checkpoint or the model cannot be used.
        RunError: the checkpoint cannot be read, or the folder not written.
    """
    from titan_ext.config.load import load_site
    from titan_ext.config.resolved import site_tokenizer
    from titan_ext.export.folder import prepare_folder, write_folder
    from titan_ext.export.llama import check_layout
    from titan_ext.export.trained import export_dtype, trained_model

    site = load_site(options.file, options.site, options.overrides)
    spec = site.config.model_spec
    check_layout(spec)
    if site.vocabulary:
        raise UserError(
            f'site "{site.name}": its vocabulary is trimmed, which no tokenizer of Hugging Face can be; '
            "titan-ext dept embed --embedding sites makes a model with the whole vocabulary"
        )
    if options.iterations is not None:
        _check_iterations(site, options.iterations)
    prepare_folder(options.out)
    model = trained_model(site, options.step, options.weights)
    if options.iterations is not None:
        from titan_ext.models.abbie.convert import unroll

        model, spec = unroll(model, spec, options.iterations)
    rows = write_folder(
        options.out,
        model,
        spec,
        tokenizer=site_tokenizer(site.config),
        assets=site.config.hf_assets_path,
        dtype=export_dtype(site),
    )
    if options.iterations is None:
        _warn_of_iterations(site)
    print_folder(options.out, model, rows)
    return 0


def _check_iterations(site: "Site", count: int) -> None:
    """Refuse iterations that no Llama computes, before the folder is made."""
    from titan_ext.inference.model import check_iterations
    from titan_ext.models.abbie.convert import decoder_config

    check_iterations(site, "--iterations", count, [count])
    decoder_config(site.config.model_spec.model, count)


def print_folder(folder: Path, model: Any, rows: int) -> None:
    """Say what is in a folder, and what a run that starts from it needs beside its path."""
    parameters = sum(each.numel() for each in model.parameters())
    print(f"{folder}: {parameters:,} parameters, {rows:,} rows a table; a run starts from it with")
    print(f'  checkpoint.initial_load_path = "{folder.absolute()}"')
    print("  checkpoint.initial_load_in_hf = true")
    print(f'  tokenizer = "{folder}"', flush=True)


def _warn_of_iterations(site: "Site") -> None:
    from titan_ext.export.llama import is_llama

    if not is_llama(site.config.model_spec):
        print("note: a Llama runs the body once and adds no skip; the site's model computes otherwise", file=sys.stderr)


COMMAND = Command(
    name="export",
    help="a checkpoint as a Hugging Face folder",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
