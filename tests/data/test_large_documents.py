"""A document too large to be tokenized at once is cut as a text file is, and costs no more than its pieces."""

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.corpora.sources import build_loader, flat
from titan_ext.data import ByteTokenizer, TextDataLoader, open_corpus
from titan_ext.data.corpora import ranges
from titan_ext.data.corpora.ranges import pieces
from titan_ext.data.loader import open_feed
from titan_ext.data.tokenizers.counting import count_tokens


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are large from 1500 bytes on."""
    monkeypatch.setattr(ranges, "PIECE_BYTES", 1000)
    monkeypatch.setattr(ranges, "_UNCUT_BYTES", 1500)


def large(size: int, unit: str) -> str:
    return "".join(f"{n} {unit}" for n in range(size))[:size]


DOCUMENTS = [
    "short",
    large(8000, "line of text\n"),
    "漢" * 2000,
    large(5000, "é blank "),
    "short too",
    large(1400, "whole "),
]


@pytest.mark.parametrize("text", [*DOCUMENTS, "", "x" * 1500, "x" * 1501, "\ud800" * 9])
def test_pieces_are_the_document(text: str) -> None:
    found = list(pieces(text))
    size = len(text.encode("utf-8", "replace"))
    assert "".join(found) == text and (len(found) == 1) is (size <= 1500)
    assert all(len(piece.encode("utf-8", "replace")) <= 1500 for piece in found)


def test_a_record_is_cut_as_a_text_file_of_the_same_text(tmp_path: Path) -> None:
    text = DOCUMENTS[1]
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "x.txt"))
    assert list(pieces(text)) == [corpus.read(index) for index in range(len(corpus))]


@pytest.fixture(params=["jsonl", "parquet", "stream"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "corpus"
    folder.mkdir()
    if request.param == "parquet":
        parquet.write_table(pyarrow.table({"text": DOCUMENTS}), folder / "x.parquet", row_group_size=4)
    else:
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return f"hf:{folder}" if request.param == "stream" else str(folder)


class Counting(ByteTokenizer):
    """Remembers how much it was given at a time."""

    largest = 0
    total = 0

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        type(self).largest = max(self.largest, len(text.encode()))
        type(self).total += len(text.encode())
        return super().encode(text, add_bos, add_eos)


def build(dataset: str, **config: Any) -> TextDataLoader:
    Counting.largest = Counting.total = 0
    return TextDataLoader.Config(dataset=dataset, **config).build(
        dp_world_size=1, dp_rank=0, tokenizer=Counting(), seq_len=32, local_batch_size=2
    )


def test_what_is_read_is_every_piece_once_and_no_tokenizer_is_given_more(corpus: str) -> None:
    tokens = [token for batch in build(corpus, infinite=False, shuffle=False) for token in flat(batch)[0]]
    expected = [list(piece.encode()) for text in DOCUMENTS for piece in pieces(text)]
    begun = [[256, *piece] for piece in expected]
    assert Counting.largest <= 1500
    assert tokens == [token for piece in begun for token in piece][: len(tokens)]
    assert sum(map(len, begun)) - len(tokens) < 64


def test_the_beginning_of_a_large_document_costs_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "words " * 1_000_000}) + "\n")
    loader = build(str(path))
    next(iter(loader))
    assert Counting.total < 5000


def test_resume_after_every_batch_within_a_large_document(corpus: str) -> None:
    loader = build(corpus, seed=2, shuffle_buffer=4)
    batches, states = [], []
    for batch in islice(loader, 400):
        batches.append(flat(batch))
        states.append(loader.state_dict())
    state = pickle.loads(pickle.loads(states[-1]["ranks"])["dp_rank_0"])["dataset_state"]
    assert state["epoch"] >= 1 and {"piece", "place", "offset"} <= state.keys()
    for stopped in range(0, 398, 7):
        again = build(corpus, seed=2, shuffle_buffer=4)
        Counting.total = 0
        again.load_state_dict(states[stopped])
        assert [flat(batch) for batch in islice(again, 2)] == batches[stopped + 1 : stopped + 3], stopped
        assert Counting.total < 5000, "only the pieces that are read are tokenized"


def test_another_number_of_readers_goes_on_in_the_piece(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": large(6000, f"{n} words\n")}) + "\n" for n in range(4)))
    alone = build_loader(path, shuffle=False)
    seen = [flat(batch)[0] for batch in islice(alone, 40)]
    pair = [build_loader(path, shuffle=False, rank=rank, world=2) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict(alone.state_dict())
    first = flat(next(iter(pair[0])))[0]
    assert first == [flat(batch)[0] for batch in islice(build_loader(path, shuffle=False), 41)][40] and seen


def test_a_state_from_before_there_were_pieces(corpus: str) -> None:
    loader = build(corpus, shuffle=False)
    next(iter(loader))
    state = loader.state_dict()
    ranks = pickle.loads(state["ranks"])
    inner = pickle.loads(ranks["dp_rank_0"])
    del inner["dataset_state"]["piece"]
    ranks["dp_rank_0"] = pickle.dumps(inner)
    old, new = build(corpus, shuffle=False), build(corpus, shuffle=False)
    old.load_state_dict(state | {"ranks": pickle.dumps(ranks)})
    new.load_state_dict(state)
    assert flat(next(iter(old))) == flat(next(iter(new)))


def test_counts_are_those_of_the_loader(corpus: str) -> None:
    counts = count_tokens(open_feed(TextDataLoader.Config(dataset=corpus)), ByteTokenizer())
    assert int(counts[256]) == int(counts[257]) == sum(1 for text in DOCUMENTS for _ in pieces(text))


def test_the_cut_is_said_once(corpus: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    list(build(corpus, infinite=False))
    assert caplog.text.count("is read as several") == 1
