"""A document that cannot be used ends the run in one line, or is left out and counted; a scan finds all beforehand."""

import argparse
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from tests.data.corpora.sources import build_loader, documents_in
from titan_ext.commands.data import COMMAND
from titan_ext.data import TextDataLoader
from titan_ext.data.corpora.stream import StreamFeed
from titan_ext.data.loader import open_feed
from titan_ext.error_text import unreadable
from titan_ext.errors import BadRecord, ReadError, UserError

GOOD = [f"good document {number}" for number in range(30)]
BAD_LINES = {
    "cut": b'{"text": "cut of',
    "latin": '{"text": "caf\u00e9"}'.encode("latin-1"),
    "no key": b'{"content": "x"}',
    "number": b'{"text": 7}',
    "list": b"[1, 2]",
    "html": b"<p>no JSON</p>",
    "nested": b"[" * 100_000,
}


def write(folder: Path, kind: str) -> Path:
    """30 good documents with a bad one of a kind behind the twentieth."""
    path = folder / (
        "x.jsonl" if kind in BAD_LINES else "x.parquet" if kind == "parquet" else "x.csv" if kind == "csv" else "x"
    )
    if kind in BAD_LINES:
        lines = [json.dumps({"text": text}).encode() for text in GOOD]
        path.write_bytes(b"\n".join([*lines[:20], BAD_LINES[kind], *lines[20:]]) + b"\n")
    elif kind == "csv":
        rows = [f"{text},1" for text in GOOD]
        path.write_text("\n".join(["text,id", *rows[:20], "too,many,columns", *rows[20:]]) + "\n")
    elif kind == "parquet":
        offsets = pyarrow.array([*range(0, 3 * 31, 3), 93], pyarrow.int32()).buffers()[1]
        cells = b"".join(b"d%02d" % n if n != 20 else b"\xff\xfe\xfd" for n in range(31))
        column = pyarrow.Array.from_buffers(pyarrow.string(), 31, [None, offsets, pyarrow.py_buffer(cells)])
        parquet.write_table(pyarrow.table({"text": column}), path)
    else:
        path.mkdir()
        for number, text in enumerate(GOOD):
            (path / f"{number:02}.txt").write_bytes(text.encode())
        # Good at its beginning, which is all that is looked at before training.
        (path / "19b.txt").write_bytes(b"good\n" * 2000 + (b"caf\xe9" if kind == "text" else b"\0"))
    return path


KINDS = [*BAD_LINES, "csv", "parquet", "text", "nul"]


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in KINDS), ("cut", 1), ("text", 1)])
def test_it_ends_the_run_in_one_line_that_names_the_file_and_the_cure(tmp_path: Path, kind: str, workers: int) -> None:
    path = write(tmp_path, kind)
    with pytest.raises(UserError) as raised:
        list(islice(build_loader(path, seq_len=8, batch=1, shuffle=False, num_workers=workers, infinite=False), 2000))
    message = str(raised.value)
    assert str(path) in message and "data.on_bad_record = 'skip'" in message and "\n" not in message
    if kind != "csv":
        # The rank that reads it is the only one that can say so.
        assert isinstance(raised.value, BadRecord) and raised.value.exit_code == 2


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_left_out_and_counted(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    feed = open_feed(TextDataLoader.Config(dataset=str(write(tmp_path, kind)), on_bad_record="skip"))
    read = {each.text for each in feed.read(0, None, 0, 1) if each.text}
    assert len(read) == 30 and (kind == "parquet" or read == set(GOOD))
    assert feed.bad_records.count == 1 and "left out (data.on_bad_record), 1 so far" in caplog.text


def test_the_count_is_said_ever_less_often(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text" if n % 4 == 0 else "body": "x"}) + "\n" for n in range(400)))
    feed = open_feed(TextDataLoader.Config(dataset=str(path), on_bad_record="skip"))
    assert sum(bool(each.text) for each in feed.read(0, None, 0, 1)) == 100
    said = [record.message.rsplit(", ", 1)[1] for record in caplog.records if "left out" in record.message]
    assert said == [f"{2**n} so far" for n in range(9)] and feed.bad_records.count == 300


def test_other_documents_keep_their_order_and_place(tmp_path: Path) -> None:
    path = write(tmp_path, "cut")
    settings: dict[str, Any] = {"seq_len": 8, "batch": 1, "on_bad_record": "skip", "seed": 5}
    loader = build_loader(path, **settings)
    batches = list(islice(loader, 40))
    assert set(documents_in(batches)) <= set(GOOD)
    early = build_loader(path, **settings)
    list(islice(early, 15))
    again = build_loader(path, **settings)
    again.load_state_dict(early.state_dict())
    assert documents_in(islice(again, 25)) == documents_in(batches[15:])


def test_a_file_of_nothing_but_bad_records_is_refused_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in GOOD))
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n' * 500)
    with pytest.raises(UserError, match="b.jsonl', document 1: no key 'text'"):
        open_feed(TextDataLoader.Config(dataset=str(tmp_path), on_bad_record="skip"))
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n' * 5 + '{"text": "good"}\n')
    feed = open_feed(TextDataLoader.Config(dataset=str(tmp_path), on_bad_record="skip"))
    assert sum(bool(each.text) for each in feed.read(0, None, 0, 1)) == 31


def test_a_damaged_group_of_rows_is_left_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"{n} " + "words " * n for n in range(40)]
    parquet.write_table(
        pyarrow.table({"text": texts}), path, row_group_size=10, compression="snappy", use_dictionary=False
    )
    column = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    end, whole = column.data_page_offset + column.total_compressed_size, path.read_bytes()
    path.write_bytes(whole[: end - 50] + b"\xff" * 50 + whole[end:])
    feed = open_feed(TextDataLoader.Config(dataset=str(path), on_bad_record="skip"))
    assert {each.text for each in feed.read(0, None, 0, 1) if each.text} == {*texts[:20], *texts[30:]}
    assert feed.bad_records.count == 10


def test_a_streams_record_is_left_out(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [3, 4]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="holds a int, not text; data.on_bad_record"):
        build_loader(f"hf:{tmp_path}", seq_len=4, batch=1)
    feed = open_feed(TextDataLoader.Config(dataset=f"hf:{tmp_path}", on_bad_record="skip"))
    assert not any(each.text for each in feed.read(0, None, 0, 1)) and feed.bad_records.count == 2


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    COMMAND.add_to(parser.add_subparsers())
    options = parser.parse_args(["data", "show", "--documents", "0", *arguments])
    return options.command.run(options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_finds_it(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, kind)
    with pytest.raises(UserError, match="documents cannot be used; mend them") as raised:
        call("--corpus", str(path), "--scan")
    out = capsys.readouterr().out
    assert out.count("bad  ") == 1 and str(path) in out and str(raised.value).startswith(f"data = '{path}': 1 of 31 ")


def test_a_scan_lists_the_first_of_many_and_counts_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text" if n % 2 else "body": "x"}) for n in range(100)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="50 of 100 documents"):
        call("--corpus", str(tmp_path), "--scan")
    assert capsys.readouterr().out.count("bad  ") == 20


def test_a_scan_of_good_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in GOOD))
    assert call("--corpus", str(tmp_path), "--scan") == 0
    assert "30 documents, each can be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "kind"),
    [(2, UserError), (13, UserError), (5, ReadError), (116, ReadError), (110, ReadError), (24, ReadError)],
)
def test_only_what_a_restart_can_mend_is_restarted(number: int, kind: type[Exception]) -> None:
    error = unreadable("x", OSError(number, os.strerror(number), "x"))
    assert type(error) is kind and error.exit_code == (2 if kind is UserError else 1)


@pytest.mark.parametrize(
    ("error", "offline", "kind"),
    [
        (ConnectionError("Couldn't reach the hub"), False, ReadError),
        (ConnectionError("Couldn't reach the hub"), True, UserError),
        (FileNotFoundError("doesn't exist on the hub"), False, UserError),
        (ValueError("unknown split"), False, UserError),
    ],
)
def test_a_hub_that_does_not_answer_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, offline: bool, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    with pytest.raises(kind, match="cannot open the dataset") as raised:
        open_feed(TextDataLoader.Config(dataset="hf:owner/name"))
    assert type(raised.value) is kind


def _broken_stream(error: Exception) -> Iterator[str]:
    yield "one"
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("reset"), ReadError),
        (TimeoutError("slow"), ReadError),
        (OSError(5, "Input/output error"), ReadError),
        (FileNotFoundError(2, "gone"), UserError),
        (ValueError("not JSON"), UserError),
    ],
)
def test_a_stream_that_breaks_off(tmp_path: Path, error: Exception, kind: type[Exception]) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    feed = open_feed(TextDataLoader.Config(dataset=f"hf:{tmp_path}"))
    assert isinstance(feed, StreamFeed)
    with pytest.raises(kind, match="cannot read the stream") as raised:
        list(feed._guarded(_broken_stream(error)))
    assert type(raised.value) is kind


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.csv"])
def test_records_without_a_text_are_told_and_nul_is_refused(name, tmp_path, caplog):
    path, texts = tmp_path / name, ["one", None, "two", "", "three"]

    def put(values: list[str | None]) -> None:
        if name == "x.parquet":
            parquet.write_table(pyarrow.table({"text": pyarrow.array(values, pyarrow.string())}), path)
        elif name == "x.csv":
            path.write_text("\n".join(["text,id", *(f"{value or ''},1" for value in values)]) + "\n")
        else:
            path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))

    def read(**settings: Any) -> tuple[list[str], Any]:
        feed = open_feed(TextDataLoader.Config(dataset=str(path), shuffle=False, infinite=False, **settings))
        return [document.text for document in feed.read(0, None, 0, 1)], feed.bad_records

    put(texts)
    found, records = read()
    assert [text for text in found if text] == ["one", "two", "three"] and records.empty == 2
    assert "document 2 has no text (it is empty, or null) and is passed over, 1 so far" in caplog.text
    if name == "x.csv":
        return  # a file of text, which is refused as a whole
    put(["one", "bi\0nary", "two"])
    with pytest.raises(BadRecord, match="document 2: its text has NUL characters.*on_bad_record = 'skip'"):
        read()
    found, records = read(on_bad_record="skip")
    assert found == ["one", "", "two"] and (records.count, records.empty) == (1, 0)


def test_built_in_modules_without_a_docstring_are_not_told_of(monkeypatch):
    feed = open_feed(TextDataLoader.Config(dataset="builtin:docs"))
    monkeypatch.setattr(feed.corpus, "read", lambda number: "")
    assert [document.text for document in islice(feed.read(0, None, 0, 1), 3)] == [""] * 3
    assert feed.bad_records.empty == 0
