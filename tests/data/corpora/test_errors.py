"""What a person can get wrong about a corpus: one line each, naming the value and what is allowed."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.corpora.sources import build_loader, write_lines
from titan_ext.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some good and some bad files."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("good.jsonl"), ["some text that is long enough for a batch of tokens, and then some more"] * 9)
    Path("number.jsonl").write_text('{"text": 3}\n')
    Path("list.jsonl").write_text("[1, 2]\n")
    Path("broken.jsonl").write_text("{'text': 1}\n")
    Path("latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    Path("empty.txt").write_text("")
    Path("blank.jsonl").write_text("\n\n")
    Path("picture.png").write_text("x")
    Path("fake.parquet").write_text("not a table")
    Path("fake.txt.gz").write_text("not gzip")
    Path("bare").mkdir()
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), "table.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("dataset", "config", "words"),
    [
        ("", {}, ["data is missing", "builtin:code"]),
        ("nowhere/x.txt", {}, ["'nowhere/x.txt'", "no such file or folder", "builtin:code"]),
        ("god.jsonl", {}, ["did you mean 'good.jsonl'?"]),
        ("allenai/c4", {}, ["write 'hf:allenai/c4'"]),
        ("*.nothing", {}, ["no file of a known format", ".jsonl"]),
        ("bare", {}, ["'bare'", "no file of a known format"]),
        ("picture.png", {}, ["unknown format '.png'", ".parquet"]),
        ("empty.txt", {}, ["no documents"]),
        ("blank.jsonl", {}, ["no documents"]),
        ("good.jsonl", {"text_key": "body"}, ["no key 'body'", "['source', 'text']"]),
        ("number.jsonl", {}, ["document 1", "holds a int, not text"]),
        ("list.jsonl", {}, ["a JSON object is needed, got a list"]),
        ("broken.jsonl", {}, ["'broken.jsonl', document 1: not a line of JSON"]),
        ("latin.jsonl", {}, ["'latin.jsonl', document 1: not a line of JSON"]),
        ("fake.parquet", {}, ["cannot read 'fake.parquet' as Parquet"]),
        ("fake.txt.gz", {}, ["cannot decompress 'fake.txt.gz'"]),
        ("table.parquet", {}, ["no column 'text'", "['body', 'n']"]),
        ("table.parquet", {"text_key": "n"}, ["column 'n' (text_key) holds int64, not text"]),
        ("builtin:cod", {}, ["no such built-in corpus", "did you mean 'builtin:code'?"]),
        ("hf:", {}, ["a Hugging Face dataset is 'hf:NAME[:config][:split]'"]),
        ("hf:a:b:c:d", {}, ["a Hugging Face dataset is 'hf:NAME[:config][:split]'"]),
        ("hf:./bare", {}, ["cannot open the dataset"]),
        pytest.param("hf:no-such-owner-here/no-such-dataset", {}, ["cannot open the dataset"], marks=pytest.mark.slow),
        ("good.jsonl", {"share_index": 2, "share_count": 2}, ["data.share_index = 2", "from 0 to share_count - 1 = 1"]),
        ("good.jsonl", {"share_count": 0}, ["data.share_count = 0", "at least 1"]),
        ("good.jsonl", {"shuffle_buffer": 0}, ["data.shuffle_buffer = 0", "at least 1"]),
        ("good.jsonl", {"holdout_fraction": 1.0}, ["data.holdout_fraction = 1.0", "from 0 to below 1"]),
        ("good.jsonl", {"split": "test"}, ["data.split = 'test'", "'train'", "'validation'"]),
        ("good.jsonl", {"split": "validation"}, ["data.holdout_fraction = 0.0", "above 0"]),
        ("good.jsonl", {"num_workers": -1}, ["data.num_workers = -1"]),
        ("hf:x", {"num_workers": 2}, ["data.num_workers = 2", "streamed"]),
        ("good.jsonl", {"dataset_path": "x"}, ["data.dataset_path = 'x'"]),
    ],
)
def test_bad_data(folder: Path, dataset: str, config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        build_loader(dataset, **config)
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_stream_without_the_column(folder: Path) -> None:
    (folder / "stream").mkdir()
    write_lines(folder / "stream/x.jsonl", ["text"] * 3, key="body")
    with pytest.raises(UserError, match="no column 'text' .*its columns are \\['body', 'source'\\]"):
        build_loader("hf:./stream")


def test_a_link_to_nothing(folder: Path) -> None:
    Path("dangling.txt").symlink_to("nothing")
    with pytest.raises(UserError, match="no such file"):
        build_loader("dangling.txt")


def test_a_file_that_is_taken_away(folder: Path) -> None:
    loader = build_loader("good.jsonl")
    Path("good.jsonl").unlink()
    with pytest.raises(UserError, match="cannot read 'good.jsonl': No such file"):
        next(iter(loader))
