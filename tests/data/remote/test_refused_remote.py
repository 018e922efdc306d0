"""What of URLs is refused, changed or passed over, in one line each."""

from itertools import islice
from pathlib import Path

import fsspec
import pytest

from tests.data.corpora.sources import build_loader, write_lines
from tests.data.remote.web import web_server
from tests.object_store import S3
from titan_ext.data import TextDataLoader
from titan_ext.data.remote import files
from titan_ext.errors import ReadError, UserError


def _memory(name: str, **contents: bytes) -> str:
    for file, content in contents.items():
        fsspec.filesystem("memory").pipe(f"/{name}/{file.replace('_', '.')}", content)
    return f"memory://{name}"


def _listing(url: str, **settings) -> str:
    return str(TextDataLoader.Config(dataset=url, **settings).listing())


def test_what_is_read_and_what_not_is_said_as_of_a_folder() -> None:
    record = b'{"text": "x"}\n'
    url = _memory("a", x_jsonl=record, README_md=b"# x", y_bin=b"1", model_json=b"{}")
    fsspec.filesystem("memory").pipe("/a/.git/x.jsonl", record)
    fsspec.filesystem("memory").pipe("/a/b/train-00000-of-00003.jsonl", record)
    told = _listing(url)
    assert told.startswith("memory://a: reads 2 .jsonl")
    for part in ("1 .bin", "README.md (a dataset card)", "1 hidden", "of the 3 shards 'train-*-of-00003' only 1"):
        assert part in told


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"train_jsonl": b'{"text": "x"}', "test_jsonl": b'{"text": "x"}'}, "holds files of several splits"),
        ({"x_jsonl": b'{"text": "x"}', "x_jsonl_gz": b"1"}, "are one file, packed and unpacked"),
        ({"x_txt": b"\x89PNG\0\0"}, "'memory://refused/x.txt': not UTF-8 text"),
        ({"x_txt": b"version https://git-lfs.github.com/spec/v1"}, "'memory://refused/x.txt' is a Git LFS pointer"),
        ({"x_zip": b"PK"}, "archives are not read"),
        ({"README_md": b"# x", "x_zst": b"1"}, "no documents there"),
    ],
)
def test_what_cannot_be_meant_is_refused_as_of_a_folder(contents: dict[str, bytes], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _listing(_memory("refused", **contents))


def test_what_is_not_there_is_said_in_a_line(s3: S3) -> None:
    fsspec.filesystem("s3").pipe("bucket/x.bin", b"1")
    for url, words in (
        ("s3://no-such-bucket/x", "not there .*bucket does not exist"),
        ("s3://bucket/nothing", "not there"),
        ("s3://bucket/nothing/*.jsonl", "nothing is there"),
        ("s3://bucket/x.bin", "unknown format '.bin'"),
        ("s4://bucket/x", "no file system is known for s4://"),
        ("memory://nothing", "not there"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            _listing(url)
        assert str(raised.value).startswith(f"data = '{url}': ") and "\n" not in str(raised.value)


def test_a_page_of_links_is_a_folder_and_what_is_not_there_is_said(tmp_path: Path, texts: list[str]) -> None:
    write_lines(tmp_path / "x.jsonl", texts)
    write_lines(tmp_path / "y.jsonl", texts[:3])
    with web_server(tmp_path) as url:
        assert "reads 2 .jsonl" in _listing(f"{url}/")
        with pytest.raises(UserError, match="not there .404"):
            _listing(f"{url}/z.jsonl")
    with pytest.raises(ReadError, match=f"^data = '{url}/x.jsonl': the server cannot be reached"):
        files._list_tree.cache_clear()
        _listing(f"{url}/x.jsonl")


def test_a_look_fetches_no_corpus(upload, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "' + "x" * 300_000 + '"}\n')
    assert "reads 1 .jsonl" in _listing(upload(tmp_path / "x.jsonl"))
    assert not own_cache.exists()


def test_a_resume_of_changed_objects_is_refused(tmp_path: Path, texts: list[str], upload) -> None:
    url = upload(write_lines(tmp_path / "x.jsonl", texts))
    loader = build_loader(url)
    next(iter(loader))
    state = loader.state_dict()
    moved = build_loader(upload(tmp_path / "x.jsonl", "elsewhere.jsonl"))
    moved.load_state_dict(state)  # the same content
    upload(write_lines(tmp_path / "x.jsonl", texts[::-1]))
    with pytest.raises(UserError, match="content .the documents and their order. was"):
        build_loader(url).load_state_dict(state)
    build_loader(url, on_changed_data="continue").load_state_dict(state)


def test_an_object_that_changes_while_it_is_read_ends_the_site(tmp_path: Path, texts: list[str], monkeypatch) -> None:
    monkeypatch.setattr("titan_ext.data.remote.feed._WINDOW_BYTES", 1)
    for number in range(4):
        write_lines(tmp_path / f"{number}.jsonl", texts[10 * number : 10 * number + 10])
    loader = iter(build_loader(f"file://{tmp_path}", seq_len=64))
    next(loader)
    for number in range(4):
        write_lines(tmp_path / f"{number}.jsonl", texts[:10] * 2)
    with pytest.raises(UserError, match=r"'file://.*jsonl' has changed since this run began to read it"):
        list(islice(loader, 100))


def test_bad_records_name_the_url_and_may_be_left_out() -> None:
    url = _memory(
        "bad", x_jsonl=b'{"text": "a"}\nbroken\n{"text": "' + b"b" * 500 + b'"}\n', y_csv=b"text,n\na,1\nb,2,3\n"
    )
    with pytest.raises(
        UserError, match=r"'memory://.*bad/(x.jsonl', document 2: not a line of JSON|y.csv': cannot read)"
    ):
        list(islice(build_loader(url, seq_len=8), 200))
    loader = build_loader(url, seq_len=8, on_bad_record="skip")
    list(islice(loader, 60))
    assert loader.feed.bad_records.count >= 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache_gib": 0}, "data.cache_gib = 0: must be above 0"),
        ({"cache_folder": "s3://x"}, "data.cache_folder = 's3://x': must be a folder of this machine"),
        ({"dataset": "s3://"}, "data.dataset = 's3://': must be followed by what is read there: s3://BUCKET/"),
        ({"retry_seconds": -1}, "data.retry_seconds = -1: must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        TextDataLoader.Config(**{"dataset": "memory://x", **settings}).validate()


def test_a_check_tells_of_a_server_that_is_away_and_a_start_waits_for_it(s3: S3, tmp_path: Path, capsys) -> None:
    from titan_ext.cli import main
    from titan_ext.config import load_to_start

    config = tmp_path / "run.toml"
    config.write_text('data = "s3://bucket/x"\n[training]\nsteps = 4\n')
    fsspec.filesystem("s3").pipe("bucket/x/a.txt", b"text")
    assert main(["check", str(config)]) == 0
    s3.cut()
    files._list_tree.cache_clear()
    main(["check", str(config)])
    told = "".join(capsys.readouterr())
    assert "1 thing missing on this machine" in told and "the server cannot be reached" in told
    (site,) = load_to_start(str(config), None, [])
    assert [line for line in site.data if "'" not in line and "the site waits for it" in line]
