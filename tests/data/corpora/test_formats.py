"""Every format of a corpus gives the documents that were put in."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from titan_ext.data import Corpus, open_corpus
from titan_ext.data.corpora import ranges


def documents(corpus: Corpus) -> list[str]:
    return [corpus.read(index) for index in range(len(corpus))]


def test_json_lines(lines: Path, texts: list[str]) -> None:
    corpus = open_corpus(str(lines))
    assert documents(corpus) == texts
    assert corpus.size == lines.stat().st_size - len(texts)


def test_json_lines_blank_lines_no_last_newline_and_another_key(tmp_path: Path) -> None:
    path = tmp_path / "x.ndjson"
    path.write_bytes(b'\n{"body": "one"}\r\n\n   \n{"body": null}\n{"body": "t\\u0077o"}')
    assert [text for text in documents(open_corpus(str(path), "body")) if text] == ["one", "two"]


def test_half_a_surrogate_pair_becomes_text_that_can_be_encoded(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert documents(open_corpus(str(path))) == ["a\ufffdb \U0001f600"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.py", "a.TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("\ufefffirst\r\nzweite – 三\n".encode())
    assert documents(open_corpus(str(tmp_path / name))) == ["first\r\nzweite – 三\n"]


def test_a_large_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 1000)
    monkeypatch.setattr(ranges, "_UNCUT_BYTES", 1500)
    text = "".join(f"line {n} with words é\n" for n in range(400))
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    pieces = documents(open_corpus(str(tmp_path / "large.txt")))
    assert "".join(pieces) == text
    assert len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces)


def test_a_large_text_file_without_lines_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 1000)
    monkeypatch.setattr(ranges, "_UNCUT_BYTES", 1500)
    (tmp_path / "large.txt").write_text("漢" * 3000, encoding="utf-8")
    pieces = documents(open_corpus(str(tmp_path / "large.txt")))
    assert "".join(pieces) == "漢" * 3000 and len(pieces) > 3


def test_lines_that_span_the_blocks_of_a_scan(lines: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_BLOCK_BYTES", 7)
    assert documents(open_corpus(str(lines))) == texts


def test_gzip(tmp_path: Path, texts: list[str]) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("plain")
    corpus = open_corpus(str(tmp_path))
    assert documents(corpus) == [*texts, "plain"]
    assert corpus.read(3) == texts[3]


def test_parquet_in_row_groups(tmp_path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"id": range(40), "text": [*texts[:39], None]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    corpus = open_corpus(str(tmp_path / "x.parquet"), keep=8)
    assert documents(corpus) == [*texts[:39], ""]
    assert corpus.units().tolist() == [n // 7 for n in range(40)]
    assert [corpus.read(n) for n in (30, 1, 29, 0)] == [texts[n] for n in (30, 1, 29, 0)]


def test_parquet_with_large_and_dictionary_strings(tmp_path: Path) -> None:
    large = pyarrow.array(["a", "b"], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"body": large}), tmp_path / "a.parquet")
    coded = pyarrow.array(["c", "c"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"body": coded}), tmp_path / "b.parquet")
    assert documents(open_corpus(str(tmp_path), "body")) == ["a", "b", "c", "c"]


def test_a_folder_is_read_in_sorted_order_without_hidden_empty_and_unknown_files(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name in ("b/2.txt", "b/1.md", "a.txt", ".hidden.txt", ".git/x.txt", "b/.x.txt", "picture.png", "empty.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.txt" else name)
    (folder / "c.jsonl").write_text('{"text": "line"}\n')
    parquet.write_table(pyarrow.table({"text": ["row"]}), folder / "0.parquet")
    corpus = open_corpus(str(folder))
    assert documents(corpus) == ["a.txt", "line", "b/1.md", "b/2.txt", "row"]
    assert corpus.units().tolist() == [0, 1, 2, 3, 4]


def test_a_glob(tmp_path: Path) -> None:
    for name in ("x/a.txt", "x/y/b.txt", "x/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(open_corpus(str(tmp_path / "x/*.txt"))) == ["x/a.txt"]
    assert documents(open_corpus(str(tmp_path / "**/*.txt"))) == ["x/a.txt", "x/y/b.txt"]


def test_a_file_that_changed_is_indexed_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n')
    assert documents(open_corpus(str(path))) == ["one"]
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert documents(open_corpus(str(path))) == ["one", "two"]
