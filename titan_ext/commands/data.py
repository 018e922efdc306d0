"""``titan-ext data``: look into a corpus, train a tokenizer on one, and find the vocabularies of sites."""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from titan_ext.commands import data_vocab
from titan_ext.commands.command import Command, local_path
from titan_ext.data.corpora.reading import with_progress
from titan_ext.errors import UserError

if TYPE_CHECKING:
    from titan_ext.data.bad_records import BadRecords
    from titan_ext.data.feed import Feed

_MIB = 1 << 20
_BAD_SHOWN = 20


def _add_show_arguments(parser: argparse.ArgumentParser) -> None:
    _add_corpus(parser, limit_mib=16)
    parser.add_argument("--tokenizer", default="byte", help='"byte", or a folder holding tokenizer.json')
    parser.add_argument("--documents", type=int, default=2, help="documents to show (default 2)")
    parser.add_argument("--width", type=int, default=400, help="characters to show of each (default 400)")
    parser.add_argument("--scan", action="store_true", help="read every document, and list those that cannot be used")


def _add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    _add_corpus(parser, limit_mib=1024)
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, with 256 bytes and 3 marks")
    parser.add_argument("--out", type=local_path, required=True, help="folder for tokenizer.json")
    parser.add_argument("--force", action="store_true", help="overwrite a tokenizer that is there")


def _add_corpus(parser: argparse.ArgumentParser, limit_mib: int) -> None:
    parser.add_argument(
        "--corpus", required=True, help="file, folder, glob, URL, builtin:code, builtin:docs or hf:NAME"
    )
    parser.add_argument("--text-key", default="text", help="key of a JSON line, or column, with the text")
    parser.add_argument("--split", default="auto", help='"train", "validation" or "all" of files called so')
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in which documents are read")
    parser.add_argument("--limit-mib", type=float, default=limit_mib, help=f"MiB to read at most (default {limit_mib})")


def _feed(args: argparse.Namespace, bad_records: "BadRecords | None" = None, **settings: Any) -> "Feed":
    from titan_ext.data.loader import TextDataLoader, open_feed

    config = TextDataLoader.Config(
        dataset=args.corpus, text_key=args.text_key, split=args.split, seed=args.seed, **settings
    )
    config.validate()
    return open_feed(config, bad_records)


def _texts(feed: "Feed", limit_mib: float) -> Iterator[str]:
    """Documents with text, in the order of the seed, until the limit is reached."""
    left = limit_mib * _MIB
    for document in feed.read(0, None, 0, 1):
        if left <= 0:
            return
        left -= len(document.text.encode())
        if document.text:
            yield document.text


def _show(args: argparse.Namespace) -> int:
    from titan_ext.data.corpora.ranges import pieces
    from titan_ext.data.feed import CorpusFeed
    from titan_ext.data.remote.feed import RemoteFeed
    from titan_ext.data.tokenizers.tokenizer import build_tokenizer, tokenizer_notes

    tokenizer = build_tokenizer(args.tokenizer)
    if args.scan:
        _scan(args)
    feed = _feed(args)
    print(f"corpus     {feed}")
    if isinstance(feed, CorpusFeed):
        print(f"documents  {len(feed.corpus):,}")
        print(f"stored     {feed.corpus.size:,} bytes")
    if isinstance(feed, RemoteFeed):
        print(f"files      {len(feed.files):,}")
        print(f"stored     {feed.size:,} bytes")
    documents = size = tokens = 0
    for text in _texts(feed, args.limit_mib):
        documents += 1
        size += len(text.encode())
        tokens += sum(len(tokenizer.encode(piece, add_bos=True, add_eos=True)) for piece in pieces(text))
    if not documents:
        raise UserError(f"data = {args.corpus!r}: no document holds any text")
    print(f"read       {documents:,} documents with text, {size:,} bytes (limit {args.limit_mib:g} MiB)")
    print(
        f"tokens     {tokens:,} of {args.tokenizer!r} ({tokenizer.get_vocab_size():,} in its vocabulary), "
        f"{size / tokens:.2f} bytes each"
    )
    for note in tokenizer_notes(args.tokenizer):
        print(f"note       {note}")
    for number, text in enumerate(islice(_texts(feed, args.limit_mib), args.documents), start=1):
        print(f"\n--- document {number} ({len(text):,} characters)\n{text[: args.width]}")
    return 0


def _scan(args: argparse.Namespace) -> None:
    """Read all documents in the order in which they lie; list those that cannot be used.

    Raises:
        UserError: there are such.
    """
    from titan_ext.data.bad_records import BadRecords

    problems: list[str] = []

    def note(_: int, problem: str) -> None:
        # All rows of a damaged group have the same.
        if len(problems) < _BAD_SHOWN and problem not in problems[-1:]:
            problems.append(problem)
            print(f"bad        {problem}", flush=True)

    bad = BadRecords("skip", note)
    feed = _feed(args, bad, shuffle=False, on_bad_record="skip")
    unnumbered = bad.count
    texts = (document.text for document in feed.read(0, None, 0, 1))
    documents = unnumbered + sum(1 for _ in with_progress(texts, partial(print, file=sys.stderr)))
    if bad.count:
        raise UserError(
            f"data = {args.corpus!r}: {bad.count:,} of {documents:,} documents cannot be used; mend them, or leave them "
            f"out with data.on_bad_record = 'skip'; the first: {problems[0]}"
        )
    print(f"scanned    {documents:,} documents, each can be used")


def _train(args: argparse.Namespace) -> int:
    from titan_ext.data.corpora.ranges import pieces
    from titan_ext.data.tokenizers.bpe import prepare_folder, train_tokenizer

    prepare_folder(args.out, args.force)
    feed = _feed(args)
    print(f"corpus  {feed}", file=sys.stderr)
    texts = _counted(piece for text in _texts(feed, args.limit_mib) for piece in pieces(text))
    size = train_tokenizer(texts, args.vocab_size, args.out, progress=sys.stderr.isatty())
    if size < args.vocab_size:
        print(f"the text yields only {size} tokens, not {args.vocab_size}", file=sys.stderr)
    print(f'{args.out}: {size:,} tokens; use it as  tokenizer = "{args.out}"')
    return 0


def _counted(texts: Iterator[str]) -> Iterator[str]:
    """The texts, with lines on stderr while they are read."""
    first = next(texts, None)
    if first is None:
        raise UserError("--corpus: no document holds any text")
    yield from with_progress(chain([first], texts), partial(print, file=sys.stderr))
    print("merging", file=sys.stderr)


COMMAND = Command(
    name="data",
    help="look into a corpus, train a tokenizer on one, find vocabularies",
    actions=(
        Command(
            name="show",
            help="documents, bytes, tokens and a sample of a corpus",
            add_arguments=_add_show_arguments,
            run=_show,
        ),
        Command(
            name="tokenizer",
            help="train a byte-level BPE tokenizer",
            add_arguments=_add_tokenizer_arguments,
            run=_train,
        ),
        data_vocab.COMMAND,
    ),
)
