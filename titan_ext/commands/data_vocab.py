"""``titan-ext data vocab``: the vocabulary that each site's documents use, and what it saves."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titan_ext.commands.command import Command, local_path
from titan_ext.errors import UserError

if TYPE_CHECKING:
    from titan_ext.commands.data_vocab_report import VocabularyReport
    from titan_ext.config.load import Site
    from titan_ext.data.feed import Feed
    from titan_ext.data.loader import TextDataLoader

_CORPUS_SITE = "corpus"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a site's vocabulary comes from."""

    site: str
    tokenizer: str
    train: "TextDataLoader.Config"
    held_out: "tuple[str, TextDataLoader.Config] | None"
    row_parameters: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose documents, and where the vocabularies go."""
    parser.add_argument("file", metavar="FILE.toml", nargs="?", help="a configuration; or give --corpus")
    parser.add_argument("--site", metavar="NAME", help="only this site; with --corpus, what to call it")
    parser.add_argument("--corpus", help="documents, as in data; instead of a configuration")
    parser.add_argument("--text-key", default="text", help="key or column that holds the text; with --corpus")
    parser.add_argument("--tokenizer", help='"byte", or a folder holding tokenizer.json; with --corpus')
    parser.add_argument("--min-count", type=int, default=1, help="leave out tokens that occur less often (default 1)")
    parser.add_argument(
        "--out", type=local_path, metavar="FOLDER", help="write a vocabulary file SITE.json for each site"
    )
    parser.add_argument("--force", action="store_true", help="overwrite vocabulary files that are there")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")


def run(args: argparse.Namespace) -> int:
    """Reports each site; returns 0.

    Raises:
        UserError: a flag, the configuration, a corpus or a tokenizer cannot be used.
    """
    from titan_ext.commands.data_vocab_report import render

    if args.min_count < 1:
        raise UserError(f"--min-count {args.min_count}: must be at least 1")
    sources = _sources(args)
    files = [_file(args, source.site) for source in sources]
    reports = [_report(source, file, args.min_count) for source, file in zip(sources, files, strict=True)]
    if not args.json:
        print(render(reports), end="\n\n")
    print(json.dumps({"sites": [asdict(each) for each in reports]}, ensure_ascii=False))
    return 0


def _sources(args: argparse.Namespace) -> list[_Source]:
    if (args.file is None) == (args.corpus is None):
        raise UserError("data vocab: give either FILE.toml or --corpus")
    if args.corpus is not None:
        return [_corpus_source(args)]
    if args.tokenizer is not None:
        raise UserError(f"--tokenizer {args.tokenizer!r}: only with --corpus; the sites of {args.file} name their own")
    from titan_ext.config.findings import Need
    from titan_ext.config.load import load_run, load_site

    needs = (Need.TOKENIZER, Need.DATA, Need.PACKAGE)
    if args.site is None:
        return [_site_source(site) for site in load_run(args.file, needs=needs).sites]
    return [_site_source(load_site(args.file, args.site, needs=needs))]


def _corpus_source(args: argparse.Namespace) -> _Source:
    from titan_ext.data.loader import TextDataLoader

    if args.tokenizer is None:
        raise UserError('--tokenizer is missing: "byte", or a folder holding tokenizer.json')
    name = args.site or _CORPUS_SITE
    if Path(name).name != name:
        raise UserError(f"--site {name!r}: must be a name, not a path")
    return _Source(name, args.tokenizer, TextDataLoader.Config(dataset=args.corpus, text_key=args.text_key), None, None)


def _site_source(site: "Site") -> _Source:
    model = site.config.model_spec.model
    tables = 1 if getattr(model, "enable_weight_tying", False) else 2
    return _Source(site.name, site.tokenizer, site.config.dataloader, _held_out(site), model.dim * tables)


def _held_out(site: "Site") -> "tuple[str, TextDataLoader.Config] | None":
    """The run's validation data, else the documents that training leaves out."""
    own, validator = site.config.dataloader, site.config.validator
    if validator.enable:
        return validator.dataloader.dataset, validator.dataloader
    held_out = own.held_out()
    part = f"{own.holdout_fraction:.2%} of the documents" if own.holdout_fraction else "files of validation or test"
    return None if held_out is None else (part, held_out)


def _file(args: argparse.Namespace, site: str) -> Path | None:
    if args.out is None:
        return None
    file = args.out / f"{site}.json"
    if file.exists() and not args.force:
        raise UserError(f"--out {str(args.out)!r}: holds {file.name}; give --force to overwrite it")
    return file


def _report(source: _Source, file: Path | None, min_count: int) -> "VocabularyReport":
    from titan_ext.commands.data_vocab_report import report
    from titan_ext.data.tokenizers.counting import count_tokens
    from titan_ext.data.tokenizers.tokenizer import build_tokenizer
    from titan_ext.data.tokenizers.vocabulary import find_vocabulary

    def tell(line: str) -> None:
        print(f"{source.site}: {line}", file=sys.stderr)

    tokenizer = build_tokenizer(source.tokenizer)
    vocabulary = find_vocabulary(_feed(source.train), tokenizer, min_count=min_count, progress=tell)
    if file is not None:
        vocabulary.save(file)
    held_out = None
    if source.held_out is not None:
        description, config = source.held_out
        held_out = description, count_tokens(_feed(config), tokenizer, progress=tell)
    return report(
        source.site, source.train.dataset, source.tokenizer, tokenizer, vocabulary, held_out, source.row_parameters
    )


def _feed(config: "TextDataLoader.Config") -> "Feed":
    from titan_ext.data.loader import open_feed

    config.validate()
    return open_feed(config)


COMMAND = Command(
    name="vocab",
    help="the vocabulary that each site's documents use, and what it saves",
    add_arguments=add_arguments,
    run=run,
)
