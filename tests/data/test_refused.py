"""What cannot be meant as a corpus, or is no text, is refused in one line that names it; nothing else is read."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from titan_ext.data import open_corpus
from titan_ext.data.corpora.ranges import PIECE_BYTES
from titan_ext.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BUILDER = "import datasets\n\n\nclass Songs(datasets.GeneratorBasedBuilder):\n    pass\n"
LINE = json.dumps({"text": "a document"}) + "\n"


def fill(folder: Path, files: dict[str, str | bytes]) -> str:
    """Writes files by their names; returns the folder as a config names it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def refusal(dataset: str, **settings: object) -> str:
    with pytest.raises(UserError) as raised:
        corpus = open_corpus(dataset, **settings)
        [corpus.read(index) for index in range(len(corpus))]
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Élan, café".encode("latin-1"), ["byte 0 is 0xc9", "iconv -f LATIN1"]),
        (b"plain " * 1000 + b"caf\xe9", ["byte 6003 is 0xe9"]),
        ("öl".encode("utf-16-le"), ["NUL", "iconv -f UTF-16LE"]),
        (b"text\0text", ["byte 4 is NUL"]),
        (b"plain " * 1000 + b"\0", ["NUL"]),
        (gzip.compress(b"text", mtime=0), ["looks like gzip data"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["looks like a picture"]),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ["looks like PDF"]),
        (b"PAR1\x15\x04\x15\xff", ["looks like Parquet"]),
        (np.arange(300, dtype=np.uint16).tobytes(), ["NUL"]),
        (b"\xff\xfea\0b", ["not UTF-16 text"]),
    ],
)
def test_a_file_of_text_that_holds_none(tmp_path: Path, content: bytes, words: list[str]) -> None:
    message = refusal(fill(tmp_path, {"x.txt": content}))
    assert all(word in message for word in [*words, "x.txt"]), message


def test_a_wrong_byte_in_a_later_piece_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    content = b"line\n" * (PIECE_BYTES // 2) + b"\xe9"
    assert f"byte {len(content) - 1} is 0xe9" in refusal(fill(tmp_path, {"x.txt": content}))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["x.txt", "large.txt", "x.jsonl", "x.json", "x.csv", "x.txt.gz", "x.jsonl.gz"])
def test_text_whose_mark_says_what_it_is_is_decoded(tmp_path: Path, encoding: str, name: str) -> None:
    text = "first – 漢字\nzweite é\n" * (60_000 if name == "large.txt" else 1)
    marked = (
        text if ".txt" in name else 'text\n"' + text + '"\n' if name.endswith(".csv") else json.dumps({"text": text})
    )
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    content = (mark + marked + ("\n" if "jsonl" in name else "")).encode(encoding)
    path = fill(tmp_path, {name: gzip.compress(content) if name.endswith(".gz") else content})
    corpus = open_corpus(path)
    assert "".join(corpus.read(index) for index in range(len(corpus))) == text
    said = "" if encoding == "utf-8-sig" or name.endswith(".gz") else "decoded"
    assert said in str(corpus.listing)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.json", "a.csv", "a.parquet", "a.arrow", "b/c.md"]
)
def test_a_pointer_of_git_lfs(tmp_path: Path, name: str) -> None:
    message = refusal(fill(tmp_path, {name: POINTER, "0.txt": "text"}))
    assert "Git LFS pointer" in message and "git lfs pull" in message and name in message


def test_pointers_are_found_among_very_many_files(tmp_path: Path) -> None:
    message = refusal(fill(tmp_path, {f"{n}.txt": POINTER if n == 1777 else "text" for n in range(2500)}))
    assert "1777.txt" in message and "Git LFS pointer" in message


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": "---\nlicense: mit\n---\n# Songs"}, ["README.md (a dataset card)"]),
        (
            {"README.md": "# Songs", "LICENSE.txt": "MIT", "songs.py": BUILDER},
            ["a dataset card", "songs.py (a script)"],
        ),
        ({"download.py": "from huggingface_hub import snapshot_download\n"}, ["download.py (a script)"]),
        (
            {"train.bin": b"\1\0", "val.bin": b"\2\0", "prepare.py": "pass", "readme.md": "# x"},
            ["train.bin, val.bin", "tokens"],
        ),
        ({"corpus.bin": b"\1\0", "corpus.idx": b"\2\0"}, ["corpus.bin, corpus.idx", "tokens"]),
        ({"part0.npy": b"\x93NUMPY"}, ["part0.npy", "tokens or arrays"]),
        ({"a.tar": b"x", "b.tar.gz": b"x"}, ["a.tar, b.tar.gz", "unpack"]),
        ({"a.zip": b"x"}, ["unpack"]),
        ({"dataset_info.json": "{}", "state.json": "{}"}, ["dataset_info.json (metadata)"]),
        ({"part-00000": "text"}, ["no file of a known format"]),
        (
            {"a.jsonl": LINE, "a.jsonl.gz": gzip.compress(LINE.encode(), mtime=0)},
            ["a.jsonl", "a.jsonl.gz", "packed and unpacked", "twice"],
        ),
        ({"b/a.txt": "x", "b/a.txt.xz": b"x", "c.txt": "y"}, ["a.txt.xz", "packed and unpacked"]),
        ({"train.jsonl": LINE, "test.jsonl": LINE}, ["1 test, 1 train", "data.split = 'train'"]),
        ({"data/train-0.parquet": b"x", "data/validation-0.parquet": b"x"}, ["1 train, 1 validation"]),
        ({"train/0.jsonl": LINE, "dev/0.jsonl": LINE, "eval/0.jsonl": LINE}, ["1 test, 1 train, 1 validation"]),
        ({"0.jsonl": LINE, "test.jsonl": LINE}, ["several splits"]),
        ({"wiki.train.txt": "x", "wiki.valid.txt": "y"}, ["1 train, 1 validation"]),
    ],
)
def test_a_folder_that_cannot_be_meant(tmp_path: Path, files: dict[str, str | bytes], words: list[str]) -> None:
    message = refusal(fill(tmp_path, files))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("files", "read"),
    [
        ({"README.md": "# a", "guide.md": "# b"}, 2),
        (
            {
                "main.py": BUILDER,
                "lib/x.py": "pass",
                "README.md": "x",
                "package.json": '{"name": "x"}',
                "data.csv": "a,b\n1,2\n",
            },
            3,
        ),
        ({f"{n}.py": BUILDER for n in range(30)}, 30),
        ({"a.py": "x", "menu.json": '{"open": {"text": "Open"}}', "list.json": "[1, 2]", "bad.json": "{text"}, 1),
        ({"a.txt": "x", "b.json": '[{"text": "y"}, {"text": "z"}]', "c.csv": "text,id\ny,1\n"}, 4),
        ({"tests/test_a.py": "x", "train.py": "y"}, 2),
        ({f"{name}.txt": "x" for name in ("train", "test", "bus", "car", "ship", "foot")}, 6),
        ({"test/a.jsonl": LINE, "test/b.jsonl": LINE}, 2),
        ({"train/a.jsonl": LINE, "more.jsonl": LINE}, 2),
        ({"contest.jsonl": LINE, "pretrain.jsonl": LINE, "latest.jsonl": LINE}, 3),
        ({"README.md": "# Songs", "songs.py": BUILDER, "data/a.jsonl": LINE, "dataset_info.json": "{}"}, 1),
        ({"input.txt": "x", "train.bin": b"\1", "prepare.py": "pass", "readme.md": "# x"}, 1),
    ],
)
def test_folders_that_are_meant(tmp_path: Path, files: dict[str, str | bytes], read: int) -> None:
    corpus = open_corpus(fill(tmp_path, files))
    assert len(corpus) == read and all(corpus.read(index) for index in range(read))
    counted = sum(corpus.listing.left_out.values()) + len(corpus.listing.files)
    assert counted == len(files), "each file is read or said not to be"


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    fill(tmp_path, {"far/a.txt": "a", "far/deep/b.txt": "b", "corpus/c.txt": "c"})
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "far")
    (corpus / "also.txt").symlink_to(tmp_path / "far/../single.txt")
    (tmp_path / "single.txt").write_text("s")
    for name in (str(corpus), f"{corpus}/**/*.txt"):
        found = open_corpus(name)
        assert sorted(found.read(index) for index in range(len(found))) == ["a", "b", "c", "s"]


def _twice(corpus: Path) -> None:
    (corpus / "again.txt").symlink_to("a.txt")


def _folder_twice(corpus: Path) -> None:
    (corpus / "more").mkdir()
    (corpus / "more/b.txt").write_text("b")
    (corpus / "else").symlink_to("more")


def _loop(corpus: Path) -> None:
    (corpus / "up").symlink_to("..")


def _dangling(corpus: Path) -> None:
    (corpus / "b.jsonl").symlink_to("nothing")


def _pipe(corpus: Path) -> None:
    os.mkfifo(corpus / "b.jsonl")


def test_a_glob_does_not_go_round_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "corpus", {"a/b/c/x.txt": "x"})
    for name in ("up", "over", "again"):
        (tmp_path / "corpus/a/b/c" / name).symlink_to("../..")
    assert "is a link to a folder that it lies in" in refusal(f"{tmp_path}/corpus/**/*.txt")
    assert len(open_corpus(f"{tmp_path}/corpus/*/*/*/*.txt")) == 1


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (_twice, ["again.txt", "the same, by a link", "twice"]),
        (_folder_twice, ["else", "more", "twice"]),
        (_loop, ["up", "twice"]),
        (_dangling, ["b.jsonl", "a link to nothing"]),
        (_pipe, ["b.jsonl", "neither a file nor a folder"]),
    ],
)
def test_links_and_pipes_that_cannot_be_read(tmp_path: Path, add: Callable[[Path], None], words: list[str]) -> None:
    fill(tmp_path / "corpus", {"a.txt": "a"})
    add(tmp_path / "corpus")
    message = refusal(str(tmp_path / "corpus"))
    assert all(word in message for word in words), message


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a.txt": "a", "shut/b.txt": "b"})
    whole = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    message = refusal(str(tmp_path))
    assert "shut" in message and "Permission denied" in message


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip"])
def test_a_damaged_page_of_parquet(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"{n} " + "many words " * n for n in range(40)]
    parquet.write_table(
        pyarrow.table({"text": texts}), path, row_group_size=20, compression=compression, use_dictionary=False
    )
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    end, whole = column.data_page_offset + column.total_compressed_size, path.read_bytes()
    path.write_bytes(whole[: end - 60] + b"\xff" * 60 + whole[end:])
    message = refusal(str(path))
    assert "x.parquet" in message and "group 2 of its rows is damaged" in message


def test_a_cell_of_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    offsets, data = pyarrow.py_buffer(np.array([0, 2, 4], np.int32)), pyarrow.py_buffer(b"ab\xff\xfe")
    parquet.write_table(
        pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, data])}),
        tmp_path / "x.parquet",
    )
    assert "row 2 of group 1: not UTF-8" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"data": [{"text": "a"}]}', ["no key 'text'", "['data']"]),
        ('["a", "b"]', ["JSON objects are needed"]),
        ('[{"text": "a"}, 5, {"text": "b"}]', ["JSON objects are needed", "5"]),
        ('[{"text": "a"}, {"text": "b"', ["cut short"]),
        ('[{"text": "a"}] [{"text": "b"}]', ["JSON objects are needed"]),
        ('{"text": "a"} and more', ["JSON objects are needed", "and more"]),
        ("hello", ["JSON objects are needed", "hello"]),
    ],
)
def test_json_that_holds_other_than_records(tmp_path: Path, content: str, words: list[str]) -> None:
    message = refusal(fill(tmp_path, {"x.json": content}))
    assert all(word in message for word in [*words, "x.json"]), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("body,id\nx,1\n", ["no column 'text'", "['body', 'id']"]),
        ("text;id\nx;1\n", ["no column 'text'", "['text;id']"]),
        ("text,id\nx,1\ny,2,3\n", ["Expected 2 columns, got 3", "on_bad_record"]),
        ('text,id\n"open,1\nb,2\n', ["x.csv", "columns"]),
        ("text,id\ncafé,1\n".encode("latin-1"), ["invalid UTF8", "iconv"]),
    ],
)
def test_tables_of_text_that_cannot_be_read(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    message = refusal(fill(tmp_path, {"x.csv": content}))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "other", "spoilt"])
def test_packed_files_that_are_damaged(tmp_path: Path, ending: str, damage: str) -> None:
    from tests.data.corpora.sources import PACKERS

    rng = random.Random(5)
    lines = [json.dumps({"text": f"{rng.random()} " * 3}).encode() + b"\n" for _ in range(50)]
    packed = PACKERS[ending](b"".join(lines))
    half = len(packed) // 2
    spoilt = {
        "cut": packed[:-9],
        "other": b"not packed at all",
        "spoilt": packed[:half] + b"\xff" * (len(packed) - half),
    }
    message = refusal(fill(tmp_path, {f"x.jsonl.{ending}": spoilt[damage]}))
    assert f"cannot decompress '{tmp_path}/x.jsonl.{ending}'" in message
