"""``titan-ext dept embed``: the trained body with one embedding for a global tokenizer."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from titan_ext.commands.export import print_folder
from titan_ext.config import defaults
from titan_ext.config.load import Site, load_run, load_site
from titan_ext.data.tokenizers.tokenizer import resolve_tokenizer
from titan_ext.data.tokenizers.traits import row_count
from titan_ext.dept.merging import RowMeans, tokens_of
from titan_ext.dept.tables import renew_tables, tables_of, with_rows
from titan_ext.export.folder import prepare_folder, write_folder
from titan_ext.export.llama import check_layout
from titan_ext.export.trained import export_dtype, trained_model


def embed(options: argparse.Namespace) -> int:
    """Write the folder of the whole model, from which continued pre-training starts.

    Raises:
        UserError: an argument, a checkpoint or the model cannot be used.
        RunError: a checkpoint cannot be read, or the folder not written.
    """
    source = open_sites(options, options.body_site)[0]
    check_layout(source.config.model_spec)
    config, assets = resolve_tokenizer(options.tokenizer)
    tokenizer = config.build(tokenizer_path=assets)
    multiple = defaults.VOCABULARY_MULTIPLE
    rows = -(-row_count(tokenizer) // multiple) * multiple
    prepare_folder(options.out)
    model = trained_model(source, options.step, options.weights)
    renew_tables(model, rows, seed=options.seed)
    if options.embedding == "sites":
        means = RowMeans(tokens_of(config, assets), tables_of(model))
        _add_sites(means, open_sites(options, None), options)
        means.write()
        _print_holders(means.holders[: row_count(tokenizer)])
    spec = replace(source.config.model_spec, model=with_rows(source.config.model_spec.model, rows))
    write_folder(options.out, model, spec, tokenizer=tokenizer, assets=assets, dtype=export_dtype(source))
    print_folder(options.out, model, rows)
    return 0


def open_sites(options: argparse.Namespace, name: str | None) -> list[Site]:
    """The site of that name alone, or all sites of the file where there is none.

    Raises:
        UserError: the file or the site cannot be used.
    """
    if name is not None:
        return [load_site(options.file, name, options.overrides)]
    return load_run(options.file, options.overrides).sites


def _add_sites(means: RowMeans, sites: Sequence[Site], options: argparse.Namespace) -> None:
    for site in sites:
        model = trained_model(site, options.step, options.weights)
        means.add(tokens_of(site.config.tokenizer, site.config.hf_assets_path), tables_of(model))


def _print_holders(holders: torch.Tensor) -> None:
    """How many of the tokens' rows come from how many sites."""
    print(f"{'sites':>5}{'rows':>12}")
    for count, rows in enumerate(holders.bincount().tolist()):
        if rows:
            print(f"{count:>5}{rows:>12,}" + ("  random" if count == 0 else ""))
