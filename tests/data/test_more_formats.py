"""Compressed files, JSON, tables of text and Arrow give the documents that were put in, and resume like any other."""

import csv
import io
import json
import os
import pickle
import resource
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pytest

from tests.data.corpora.sources import PACKERS, build_loader, flat
from titan_ext.data import Corpus, open_corpus
from titan_ext.data.corpora import csv_rows
from titan_ext.data.corpora.unpacked import copies
from titan_ext.errors import RunError

HARD = [
    'a "quoted" word',
    "two\nlines, and a comma",
    "tab\tand \\ backslash",
    "braces { ] [ }",
    "漢字 é \U0001f600",
    "NA",
    " padded ",
]


def documents(corpus: Corpus) -> list[str]:
    return [corpus.read(index) for index in range(len(corpus))]


def as_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def as_array(texts: list[str]) -> bytes:
    return json.dumps([{"m": {"n": [n, "]"]}, "text": text} for n, text in enumerate(texts)], indent=2).encode()


def as_objects(texts: list[str]) -> bytes:
    return "\n".join(json.dumps({"text": text}, indent=1, ensure_ascii=False) for text in texts).encode()


def as_csv(texts: list[str], dialect: str = "excel") -> bytes:
    table = io.StringIO(newline="")
    csv.writer(table, dialect).writerows([["id", "text"], *enumerate(texts)])
    return table.getvalue().encode()


def as_tsv(texts: list[str]) -> bytes:
    return as_csv(texts, "excel-tab")


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": as_lines,
    "ndjson": as_lines,
    "array.json": as_array,
    "lines.json": as_lines,
    "objects.json": as_objects,
    "csv": as_csv,
    "tsv": as_tsv,
}


@pytest.mark.parametrize("packer", ["", *PACKERS])
@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_packed_and_not(tmp_path: Path, texts: list[str], ending: str, packer: str) -> None:
    content = WRITERS[ending]([*HARD, *texts])
    name = f"x.{ending}" + (f".{packer}" if packer else "")
    (tmp_path / name).write_bytes(PACKERS[packer](content) if packer else content)
    corpus = open_corpus(str(tmp_path / name))
    assert documents(corpus) == [*HARD, *texts]
    assert corpus.read(3) == HARD[3] and documents(pickle.loads(pickle.dumps(corpus))) == [*HARD, *texts]


@pytest.mark.parametrize("packer", PACKERS)
def test_a_packed_text_is_one_document(tmp_path: Path, packer: str) -> None:
    (tmp_path / f"x.txt.{packer}").write_bytes(PACKERS[packer]("erste\nzweite – 三".encode()))
    assert documents(open_corpus(str(tmp_path))) == ["erste\nzweite – 三"]


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz", "zst"])
def test_packed_parts_one_behind_the_other(tmp_path: Path, packer: str) -> None:
    pack = PACKERS[packer]
    (tmp_path / f"x.jsonl.{packer}").write_bytes(pack(as_lines(["a"])) + pack(as_lines(["b"])))
    assert documents(open_corpus(str(tmp_path))) == ["a", "b"]


def test_more_packed_files_than_a_process_may_hold_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(100):
        (tmp_path / f"{number:03}.jsonl.gz").write_bytes(PACKERS["gz"](as_lines([str(number)])))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert documents(open_corpus(str(tmp_path))) == [str(number) for number in range(100)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_formats_side_by_side_and_empty_files(tmp_path: Path) -> None:
    for ending, write in WRITERS.items():
        (tmp_path / f"{ending}").with_suffix(f".{ending}").write_bytes(write([ending]))
        (tmp_path / f"empty.{ending}").write_bytes(b"")
    (tmp_path / "none.json").write_text("[]")
    assert sorted(documents(open_corpus(str(tmp_path)))) == sorted(WRITERS)


def test_a_cell_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_rows, "_BLOCK_BYTES", 64)
    texts = ["short", "x" * 40, "first\n" * 100, "last"]
    (tmp_path / "x.csv").write_bytes(as_csv(texts))
    copies.cache_clear()
    assert documents(open_corpus(str(tmp_path))) == texts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), "dictionary", "compressed"]
)
def test_arrow_files_and_streams(tmp_path: Path, texts: list[str], stream: bool, kind: object) -> None:
    values = pyarrow.array([*texts[:39], None])
    values = (
        values.dictionary_encode() if kind == "dictionary" else values if kind == "compressed" else values.cast(kind)
    )
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd" if kind == "compressed" else None)
    table = pyarrow.table({"id": range(40), "text": values})
    write = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with write(str(tmp_path / "x.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=7)
    corpus = open_corpus(str(tmp_path), keep=8)
    assert documents(corpus) == [*texts[:39], ""]
    assert corpus.units().tolist() == [n // 7 for n in range(40)]
    assert documents(pickle.loads(pickle.dumps(corpus))) == [*texts[:39], ""]


def test_what_the_datasets_library_saves_is_read(tmp_path: Path, texts: list[str]) -> None:
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": texts}),
        test=datasets.Dataset.from_dict({"text": ["no training text"]}),
    ).save_to_disk(tmp_path / "saved")
    corpus = open_corpus(str(tmp_path / "saved"), split="train")
    assert documents(corpus) == texts
    assert "dataset_dict.json (metadata)" in str(corpus.listing) and ".arrow (test)" in str(corpus.listing)


@pytest.mark.parametrize("ending", ["jsonl.zst", "array.json", "csv", "arrow"])
def test_resume_in_the_middle(tmp_path: Path, texts: list[str], ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    if ending == "arrow":
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=6)
    else:
        packed = PACKERS["zst"](as_lines(texts)) if ending.endswith("zst") else WRITERS[ending](texts)
        path.write_bytes(packed)
    for workers in (0, 2):
        settings = {"rank": 1, "world": 2, "shuffle_buffer": 8, "num_workers": workers}
        loader = build_loader(path, **settings)
        batches, states = [], []
        for batch in islice(loader, 30):
            batches.append(flat(batch))
            states.append(loader.state_dict())
        for stopped in (1, 7, 25):
            again = build_loader(path, **settings)
            again.load_state_dict(states[stopped - 1])
            assert [flat(batch) for batch in islice(again, 3)] == batches[stopped : stopped + 3]


def test_no_room_for_a_copy_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(PACKERS["gz"](as_lines(["a"])))

    class Full:
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("titan_ext.data.corpora.unpacked.tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(RunError, match="no room in .* No space left on device; name another folder with TMPDIR"):
        open_corpus(str(tmp_path))
