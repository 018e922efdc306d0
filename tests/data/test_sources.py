"""Data sources: each goes on where it stopped, whatever is read between, and what is refused."""

import json

import pytest

from titan_ext.data.loader import TextDataLoader
from titan_ext.data.sources import SourceTable
from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.errors import UserError


@pytest.fixture
def corpora(tmp_path):
    for name in "abcdefg":
        lines = [json.dumps({"text": f"{name}{number} " * (5 + number)}) for number in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def loader(**settings):
    parts = dict(dp_world_size=1, dp_rank=0, tokenizer=ByteTokenizer.Config().build(tokenizer_path=None))
    return TextDataLoader.Config(**settings).build(**parts, seq_len=16, local_batch_size=2)


def take(batches, count):
    return [next(batches)[0]["input"].tolist() for _ in range(count)]


def straight(corpora, name, count):
    return take(iter(loader(dataset=str(corpora / f"{name}.jsonl"))), count)


def test_each_source_reads_on_as_if_it_were_alone(corpora):
    """Seven sources, more than are kept open, in turns of 3 and 2 batches; with a resume in the middle."""
    pattern = str(corpora / "*.jsonl")
    both = loader(sources=pattern)
    batches, found = iter(both), {name: [] for name in "abcdefg"}
    for count in (3, 2):
        for name in found:
            both.serve(name)
            found[name] += take(batches, count)
    again = loader(sources=pattern)
    again.load_state_dict(both.state_dict())
    assert again.current == "g"
    batches = iter(again)
    found["g"] += take(batches, 1)
    for name in "abc":
        again.serve(name)
        found[name] += take(batches, 2)
    for name, batches in found.items():
        assert batches == straight(corpora, name, len(batches)), name


def test_a_source_can_begin_after_so_many_batches(corpora):
    both = loader(sources=str(corpora / "[ab].jsonl"))
    batches, expected = iter(both), straight(corpora, "a", 9)
    both.serve("a", 4)
    assert take(batches, 2) == expected[4:6]
    both.serve("a", 7)  # on
    assert take(batches, 1) == expected[7:8]
    both.serve("a", 0)  # and back
    assert take(batches, 9) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            dict(source=[SourceTable(name="a", dataset="x"), SourceTable(name="a", dataset="y")]),
            r"source\[0\].name = 'a'",
        ),
        (dict(source=[SourceTable(name="a", dataset="")]), r"source\[0\].dataset"),
        (dict(source=[SourceTable(name="a", dataset="x", weight=0.0)]), r"source\[0\].weight"),
        (dict(source=[SourceTable(name="a", dataset="x")], infinite=False), "data.infinite"),
        (dict(source=[SourceTable(name="a", dataset="x")], num_workers=2), "data.num_workers"),
        (dict(source=[SourceTable(name="a", dataset="x")], dataset="y"), "data.dataset"),
        (dict(sources="/nowhere/*.jsonl"), "no file or folder fits"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        loader(**settings)


def test_a_state_of_one_corpus_is_no_place_in_sources(corpora):
    alone = loader(dataset=str(corpora / "a.jsonl"))
    with pytest.raises(UserError, match="without data sources"):
        loader(sources=str(corpora / "[ab].jsonl")).load_state_dict(alone.state_dict())
