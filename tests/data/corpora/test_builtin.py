"""The built-in corpora are there, large enough, real, and the same every time."""

import ast
from collections.abc import Iterator

import pytest

from tests.data.corpora.sources import build_loader, flat
from titan_ext.data import Corpus, open_corpus
from titan_ext.data.corpora.builtin import library_sources

MEGABYTE = 1_000_000


@pytest.fixture(scope="module", params=["builtin:code", "builtin:docs"])
def corpus(request: pytest.FixtureRequest) -> Iterator[Corpus]:
    yield open_corpus(request.param)


def test_at_least_a_megabyte_of_text(corpus: Corpus) -> None:
    read = [corpus.read(index) for index in range(len(corpus))]
    assert len(read) >= 100
    assert sum(len(text.encode()) for text in read) >= MEGABYTE
    assert max(len(text) for text in read) < MEGABYTE


def test_the_same_documents_every_time(corpus: Corpus) -> None:
    again = open_corpus(corpus.name)
    assert len(again) == len(corpus)
    assert [again.read(index) for index in range(0, len(again), 37)] == [
        corpus.read(index) for index in range(0, len(corpus), 37)
    ]


def test_it_feeds_two_ranks(corpus: Corpus) -> None:
    first, second = (flat(next(iter(build_loader(corpus.name, rank=rank, world=2, seq_len=256)))) for rank in (0, 1))
    assert first != second


def test_code_is_python_without_tests() -> None:
    files = library_sources()
    assert not [file for file in files if {"test", "tests"} & set(file.path.parts)]
    corpus = open_corpus("builtin:code")
    for index in range(0, len(corpus), 50):
        ast.parse(corpus.read(index))


def test_docs_are_prose_with_docstrings() -> None:
    corpus = open_corpus("builtin:docs")
    texts = [corpus.read(index) for index in range(len(corpus))]
    argparse_doc = next(text for text in texts if text.startswith("argparse\n"))
    assert "Command-line parsing library" in argparse_doc and "def add_argument" not in argparse_doc
