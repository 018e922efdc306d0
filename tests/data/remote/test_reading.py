"""Batches from object stores and web servers, beside those from the same files on disk."""

import json
import time
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.corpora.sources import PACKERS, build_loader, documents_in, flat, write_lines
from tests.data.remote.web import web_server
from titan_ext.data import TextDataLoader
from titan_ext.data.loader import open_feed
from titan_ext.errors import UserError


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _write_all_formats(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    for place, (ending, pack) in enumerate(PACKERS.items()):
        (folder / f"{place}.jsonl.{ending}").write_bytes(pack(_lines(texts[4 * place : 4 * place + 4])))
    write_lines(folder / "a.jsonl", texts[16:20])
    (folder / "b.json").write_text(json.dumps([{"text": text} for text in texts[20:24]]))
    table = pyarrow.table({"text": texts[24:32]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=3)
    with pyarrow.ipc.new_file(folder / "d.arrow", table.schema) as file:
        file.write_table(pyarrow.table({"text": texts[32:36]}))
    below = folder / "below"
    below.mkdir()
    (below / "e.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts[36:]))


def batches(dataset: object, count: int = 60, **settings) -> list:
    return [flat(batch) for batch in islice(build_loader(dataset, **settings), count)]


def test_a_small_bucket_gives_what_a_folder_gives(tmp_path: Path, texts: list[str], upload) -> None:
    _write_all_formats(tmp_path / "corpus", texts)
    url = upload(tmp_path / "corpus")
    assert batches(url) == batches(tmp_path / "corpus")
    assert batches(f"{url}/*.jsonl*") == batches(tmp_path / "corpus" / "*.jsonl*")
    assert batches(f"{url}/c.parquet", seq_len=8) == batches(tmp_path / "corpus" / "c.parquet", seq_len=8)


@pytest.fixture
def shards(tmp_path: Path, texts: list[str], monkeypatch) -> Path:
    """Ten files of four documents, of which a window has two or three."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(10):
        write_lines(folder / f"{shard}.jsonl", texts[4 * shard : 4 * shard + 4])
    monkeypatch.setattr("titan_ext.data.remote.feed._WINDOW_BYTES", 1200)
    return folder


def test_an_epoch_of_many_windows_has_every_document_once_in_an_order_of_its_own(
    shards: Path, texts: list[str]
) -> None:
    feed = open_feed(TextDataLoader.Config(dataset=f"file://{shards}"))
    assert 3 < len(feed._windows(0)) < 10
    epochs = [[document.text for document in feed.read(epoch, None, 0, 1)] for epoch in range(2)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs) and epochs[0] != epochs[1]
    again = open_feed(TextDataLoader.Config(dataset=f"file://{shards}", seed=1))
    assert [document.text for document in again.read(0, None, 0, 1)] not in epochs


@pytest.mark.parametrize("readers", [1, 3, 7])
def test_readers_share_an_epoch_and_go_on_at_any_place(shards: Path, texts: list[str], readers: int) -> None:
    feed = open_feed(TextDataLoader.Config(dataset=f"file://{shards}"))
    found = []
    for reader in range(readers):
        documents = list(feed.read(1, None, reader, readers))
        for start in range(0, len(documents), 3):
            assert list(feed.read(1, documents[start].place, reader, readers)) == documents[start:]
        assert {document.number for document in documents} <= {document.number for document in feed.read(0, None, 0, 1)}
        found += [document.text for document in documents]
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize("cache", ["kept", "empty"])
@pytest.mark.parametrize("taken", [1, 7, 20])
def test_a_resume_goes_on_with_the_very_next_batch(shards: Path, tmp_path: Path, cache: str, taken: int) -> None:
    whole = batches(f"file://{shards}", 40, seq_len=64, batch=2)
    first = build_loader(f"file://{shards}", seq_len=64, batch=2)
    head = [flat(batch) for batch in islice(first, taken)]
    state = first.state_dict()
    folder = str(tmp_path / "empty") if cache == "empty" else ""
    second = build_loader(f"file://{shards}", seq_len=64, batch=2, cache_folder=folder)
    second.load_state_dict(state)
    assert head + [flat(batch) for batch in islice(second, 40 - taken)] == whole


def test_other_numbers_of_ranks_go_on_at_the_first_document_that_is_not_finished(
    shards: Path, texts: list[str]
) -> None:
    url, settings = f"file://{shards}", dict(seq_len=256, batch=1)
    feed = open_feed(TextDataLoader.Config(dataset=url))
    order = [document.text for document in feed.read(0, None, 0, 1)]
    first = build_loader(url, **settings)
    seen = documents_in(islice(first, 8))
    assert 8 < len(seen) < 40
    found = set()
    for rank in range(2):
        second = build_loader(url, rank=rank, world=2, **settings)
        second.load_state_dict(first.state_dict())
        found |= set(documents_in(islice(second, 8)))
    assert set(order[len(seen) + 1 :]) <= found


def test_sites_that_share_a_corpus_read_other_files_or_other_documents(shards: Path, texts: list[str]) -> None:
    def read(name: str, site: int) -> list[str]:
        feed = open_feed(TextDataLoader.Config(dataset=name, share_index=site, share_count=2))
        return [document.text for document in feed.read(0, None, 0, 1)]

    by_file = [read(f"file://{shards}", site) for site in range(2)]
    assert sorted(by_file[0]) == sorted(text for n, text in enumerate(texts) if n // 4 % 2 == 0)
    assert sorted(by_file[0] + by_file[1]) == sorted(texts)
    alone = [read(f"file://{shards}/0.jsonl", site) for site in range(2)]
    assert sorted(alone[0] + alone[1]) == sorted(texts[:4]) and len(alone[0]) == 2


def test_validation_has_what_training_never_reads_in_any_epoch(shards: Path, texts: list[str]) -> None:
    def read(split: str, seed: int, epoch: int) -> set[str]:
        feed = open_feed(
            TextDataLoader.Config(dataset=f"file://{shards}", split=split, holdout_fraction=0.3, seed=seed)
        )
        return {document.text for document in feed.read(epoch, None, 0, 1)}

    held = read("validation", 5, 0)
    assert 5 < len(held) < 20
    for epoch in range(3):
        assert read("train", 0, epoch) == set(texts) - held


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_read_remote_files(shards: Path, workers: int) -> None:
    found = batches(f"file://{shards}", 30, seq_len=64, num_workers=workers)
    assert len(found) == 30 and (workers > 1 or found == batches(f"file://{shards}", 30, seq_len=64))


def test_a_finite_pass_over_windows_is_as_long_on_all_ranks(shards: Path, texts: list[str]) -> None:
    ranks = [
        list(build_loader(f"file://{shards}", rank=rank, world=3, seq_len=16, infinite=False)) for rank in range(3)
    ]
    assert len({len(found) for found in ranks}) == 1
    tokens = sum(len(text.encode()) + 1 for text in texts)
    assert tokens - 16 * 2 * 3 < 16 * 2 * sum(map(len, ranks)) <= tokens


def test_a_mix_and_sources_are_found_behind_a_url(shards: Path) -> None:
    for name, numbers in (("wiki", range(5)), ("code", range(5, 10))):
        (shards / name).mkdir()
        for number in numbers:
            (shards / f"{number}.jsonl").rename(shards / name / f"{number}.jsonl")
    settings = {"mix": {"wiki": 0.5, "code": 0.5}}
    assert batches(f"file://{shards}", **settings) == batches(f"file://{shards}", **settings)
    config = TextDataLoader.Config(sources=f"file://{shards}/*")
    assert [(source.name, source.dataset) for source in config.all_sources()] == [
        ("code", f"file://{shards}/code"),
        ("wiki", f"file://{shards}/wiki"),
    ]
    with pytest.raises(
        UserError, match="'prose' must be one file or folder in the folder data.dataset = 'file://.*; it has: "
    ):
        TextDataLoader.Config(dataset=f"file://{shards}", mix={"prose": 1.0}).listing()


def test_what_a_web_server_has_is_read_with_and_without_ranges(tmp_path: Path, texts: list[str]) -> None:
    packed = tmp_path / "x.jsonl.zst"
    packed.write_bytes(PACKERS["zst"](_lines(texts)))
    expected = batches(packed)
    for ranges in (True, False):
        with web_server(tmp_path, ranges) as url:
            assert batches(f"{url}/x.jsonl.zst?key=secret") == expected


def test_identities_are_the_same_whoever_reads(shards: Path) -> None:
    feed = open_feed(TextDataLoader.Config(dataset=f"file://{shards}"))
    alone = {document.text: (feed.sources[document.source], document.number) for document in feed.read(0, None, 0, 1)}
    for reader in range(2):
        for document in feed.read(3, None, reader, 2):
            assert alone[document.text] == (feed.sources[document.source], document.number)


def test_no_more_is_fetched_than_the_window_and_the_next(shards: Path, own_cache: Path) -> None:
    feed = open_feed(TextDataLoader.Config(dataset=f"file://{shards}"))
    windows = feed._windows(0)
    documents = feed.read(0, None, 0, 1)
    next(documents)
    names = [{Path(feed.sources[file]).name for file in window} for window in windows]
    assert _copies(own_cache) == names[0]
    next(documents)
    deadline = time.monotonic() + 30
    while _copies(own_cache) != names[0] | names[1]:
        assert time.monotonic() < deadline
    list(islice(documents, 4 * len(windows[0]) - 3))
    assert _copies(own_cache) == names[0] | names[1]


def _copies(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in folder.glob("*-*.jsonl")}


def test_loader_workers_read_from_an_object_store_that_their_parent_has_read_from(shards: Path, upload) -> None:
    url = upload(shards)
    alone = batches(url, 30, seq_len=64)
    assert batches(url, 30, seq_len=64, num_workers=1) == alone


def test_a_corpus_that_is_dealt_to_other_numbers_of_sites_goes_on(shards: Path, caplog) -> None:
    first = build_loader(f"file://{shards}", seq_len=256, batch=1)
    list(islice(first, 8))
    second = build_loader(f"file://{shards}", seq_len=64, batch=1, share_index=1, share_count=2)
    second.load_state_dict(first.state_dict())
    assert any("going on at document" in message and "of window 1 of epoch 0" in message for message in caplog.messages)
    assert len(list(islice(second, 5))) == 5
