"""What is read of a folder and what is not is said before it is read, by ending and with counts."""

import json
from pathlib import Path

import pytest

from tests.data.corpora.sources import PACKERS, build_loader, documents_in
from titan_ext.data import TextDataLoader
from titan_ext.data.corpora.corpus import list_corpus
from titan_ext.data.order import Split
from titan_ext.errors import UserError


def line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents of several splits, and what lies beside them."""
    for name in ("train-0.jsonl", "train-1.jsonl.gz", "valid/0.jsonl", "test.csv", "more.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = (f"text\n{name}\n" if name.endswith("csv") else line(f"{name} and enough text for a batch")).encode()
        path.write_bytes(PACKERS["gz"](content) if name.endswith("gz") else content)
    for name in ("README.md", "picture.png", "other.png", "LICENSE", ".hidden.jsonl", "shard.tar"):
        (tmp_path / name).write_text("x")
    return tmp_path


def test_the_line(folder: Path) -> None:
    said = str(TextDataLoader.Config(dataset=str(folder), split="all").listing())
    assert said == (
        f"{folder}: reads 3 .jsonl, 1 .csv, 1 .jsonl.gz; not read: 2 .png, 1 without an ending, 1 .tar, "
        "README.md (a dataset card), 1 hidden"
    )


@pytest.mark.parametrize(
    ("split", "fraction", "read"),
    [
        ("all", 0.0, {"train-0.jsonl", "train-1.jsonl.gz", "valid/0.jsonl", "test.csv", "more.jsonl"}),
        ("train", 0.0, {"train-0.jsonl", "train-1.jsonl.gz"}),
        ("train", 0.5, {"train-0.jsonl", "train-1.jsonl.gz"}),
        ("validation", 0.5, {"train-0.jsonl", "train-1.jsonl.gz"}),
        ("validation", 0.0, {"valid/0.jsonl"}),
    ],
)
def test_splits_by_name(folder: Path, split: str, fraction: float, read: set[str]) -> None:
    listing = TextDataLoader.Config(dataset=str(folder), split=split, holdout_fraction=fraction).listing()
    assert {str(file.path.relative_to(folder)) for file in listing.files} == read
    others = sum(count for what, count in listing.left_out.items() if what.startswith((".jsonl", ".csv")))
    assert others == 5 - len(read) and ("(test)" in str(listing)) is (split != "all")


def test_test_files_stand_in_for_those_of_validation(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(line(f"{name}{n}") for n in range(10)))
    for split, name in (("train", "train"), ("validation", "test")):
        found = documents_in(build_loader(tmp_path, split=split, seq_len=4, batch=1, infinite=False))
        assert len(found) > 7 and set(found) <= {f"{name}{n}" for n in range(10)}


def test_what_is_held_out_by_name(folder: Path) -> None:
    train = TextDataLoader.Config(dataset=str(folder), split="train")
    held_out = train.held_out()
    assert [file.path.name for file in held_out.listing().files] == ["0.jsonl"] and held_out.split == "validation"
    assert TextDataLoader.Config(dataset=str(folder / "more.jsonl"), split="train").held_out() is None
    assert TextDataLoader.Config(dataset="builtin:code", split="train").held_out() is None


def test_without_such_names_a_split_takes_its_part_of_everything(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(line(f"{name}{n}") for n in range(10)))
    parts = [
        set(documents_in(build_loader(tmp_path, split=split, holdout_fraction=0.2, seq_len=4, batch=1, infinite=False)))
        for split in ("train", "validation")
    ]
    assert not parts[0] & parts[1] and len(parts[0]) > 10 and parts[1]


@pytest.mark.parametrize("dataset", ["builtin:code", "hf:somewhere"])
def test_no_names_to_go_by(dataset: str) -> None:
    with pytest.raises(UserError, match="holdout_fraction = 0.0: must be above 0"):
        TextDataLoader.Config(dataset=dataset, split="validation").validate()


def test_the_log_of_a_run_says_it_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for rank in (0, 1, 0):
        build_loader(folder, split="all", seq_len=4, batch=1, rank=rank, world=2)
    said = [record.message for record in caplog.records if record.message.startswith("data: ")]
    assert len(said) == 1 and "reads 3 .jsonl" in said[0] and "not read: 2 .png" in said[0] and "5 documents" in said[0]


def test_empty_files_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / "a.jsonl").write_text(line("text that is long enough for a batch"))
    for name in ("b.jsonl", "c.txt"):
        (tmp_path / name).write_text("")
    build_loader(tmp_path, seq_len=4, batch=1)
    assert "files without a document: 2" in caplog.text


@pytest.mark.parametrize(
    ("name", "split", "word"),
    [
        ("test.jsonl", "auto", "test"),
        ("dev-00000-of-00001.jsonl", "train", "validation"),
        ("eval/a.jsonl", "auto", "test"),
        ("test.jsonl", "all", None),
        ("train.jsonl", "auto", None),
        ("latest.jsonl", "auto", None),
        ("test_binder.py", "auto", None),
    ],
)
def test_a_folder_of_nothing_but_test_data_is_told(tmp_path: Path, name: str, split: Split, word: str | None) -> None:
    file = tmp_path / "corpus" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"text": "a"}\n')
    told = str(list_corpus(str(tmp_path / "corpus"), "text", split))
    assert (f"all of it is called {word} data" in told) if word else ("is called" not in told)
    assert "is called" not in str(list_corpus(str(file), "text", split))  # who names one file means it


def test_a_copy_is_named(folder: Path) -> None:
    content = (folder / "more.jsonl").read_bytes()
    (folder / "more (1).jsonl").write_bytes(content)
    (folder / "of_equal_size.jsonl").write_bytes(content.swapcase())
    said = str(TextDataLoader.Config(dataset=str(folder), split="all").listing())
    assert said.endswith("; 'more.jsonl' holds the same as 'more (1).jsonl': read twice")
    (folder / "train-2.jsonl").write_bytes(content)
    said = str(TextDataLoader.Config(dataset=str(folder), split="all").listing())
    assert said.endswith("'more.jsonl' holds the same as 'more (1).jsonl', 1 more likewise: read twice")


def test_shards_that_are_not_there_are_counted(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        (tmp_path / f"train-{number:05d}-of-00004.jsonl").write_text(line(f"text {number}"))
    (tmp_path / "other-0-of-1.jsonl").write_text(line("whole"))
    said = str(TextDataLoader.Config(dataset=str(tmp_path), split="all").listing())
    assert said.endswith("; of the 4 shards 'train-*-of-00004' only 3 are there")


def test_what_macos_hides_is_not_read(folder: Path) -> None:
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "more.jsonl").write_bytes(b"\0\5\x16\7" * 40)
    assert ", 2 hidden" in str(TextDataLoader.Config(dataset=str(folder), split="all").listing())


@pytest.mark.parametrize(("head", "kind"), [("%PDF-1.4\n", "PDF"), ("{\\rtf1\\ansi ", "RTF")])
def test_documents_that_begin_with_text_are_refused(tmp_path: Path, head: str, kind: str) -> None:
    (tmp_path / "a.txt").write_text(head + "words " * 900)
    with pytest.raises(UserError, match=f"a.txt': it looks like {kind}, which is not read; convert it to text"):
        TextDataLoader.Config(dataset=str(tmp_path)).listing()
