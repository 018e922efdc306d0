"""URLs, their file systems, and servers that are away for a while."""

import http.server
import logging
import threading
from typing import ClassVar

import pytest

from tests.object_store import S3
from titan_ext.error_text import may_pass
from titan_ext.errors import ReadError, UserError
from titan_ext.object_store import file_system, is_url, patiently


def test_urls_are_told_from_paths_and_names():
    for url in ("s3://bucket/prefix", "https://host/a.jsonl", "memory://x", "file:///tmp/x", "GS://b"):
        assert is_url(url)
    for path in ("data/east", "/s3/bucket", "hf:NAME", "builtin:code", "C:/data", "s3:/bucket", ""):
        assert not is_url(path)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s4://bucket/x", "no file system is known for s4://"),
        ("htps://host/x", "did you mean https://?"),
        ("dropbox://x", "a package for dropbox:// is not installed"),
    ],
)
def test_a_scheme_that_cannot_be_had_is_refused(url: str, words: str):
    with pytest.raises(UserError, match=r"^'\w+://") as raised:
        file_system(url)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_package_is_named(monkeypatch):
    import fsspec

    def missing(scheme: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match="pip install gcsfs$"):
        file_system("gs://bucket/x")


def test_a_server_that_is_away_is_waited_for_and_told_of_once(s3: S3, caplog):
    patiently("s3://bucket/x", lambda files: files.pipe("s3://bucket/x", b"1"))
    s3.cut()
    threading.Timer(4, s3.mend).start()
    found = []
    readers = [
        threading.Thread(
            target=lambda: found.append(patiently("s3://bucket/x", lambda files: files.cat("s3://bucket/x")))
        )
        for _ in range(3)
    ]
    with caplog.at_level(logging.WARNING):
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert found == [b"1"] * 3
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("s3://bucket is")]
    assert len(told) == 2 and "is away" in told[0] and "is back after" in told[1], told


def test_a_server_that_stays_away_fails_with_the_url_and_the_reason(s3: S3):
    s3.cut()
    with pytest.raises(
        ReadError, match=r"^'s3://bucket/x': the server cannot be reached, tried again for 1 s: .*[Cc]onnect"
    ):
        patiently("s3://bucket/x", lambda files: files.cat("s3://bucket/x"), retry_seconds=1)


def test_what_is_not_there_is_said_at_once(s3: S3):
    for url in ("s3://bucket/missing", "s3://no-such-bucket/x", "memory://missing"):
        with pytest.raises(UserError, match=f"'{url}': not there"):
            patiently(url, lambda files, url=url: files.cat_file(url))


def test_without_credentials_nothing_is_waited_for(s3: S3, monkeypatch):
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="'s3://bucket/x': .*credentials"):
        patiently("s3://bucket/x", lambda files: files.cat("s3://bucket/x"))


def test_a_store_that_never_answers_is_given_up_soon_also_by_torch(s3: S3, monkeypatch):
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 7}})
    for files in (file_system("s3://bucket/x"), url_to_fs("s3://bucket/x")[0]):
        assert files.config_kwargs == {"connect_timeout": 10.0, "read_timeout": 7, "retries": {"max_attempts": 1}}


class _Answers(http.server.BaseHTTPRequestHandler):
    statuses: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        self.send_response(self.statuses.pop(0) if self.statuses else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/x"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "words"), [(403, "403"), (404, "not there"), (410, "410")])
def test_a_web_server_that_refuses_is_not_asked_again(web: str, status: int, words: str):
    _Answers.statuses = [status]
    with pytest.raises(UserError, match=words):
        patiently(web, lambda files: files.cat_file(web))


def test_a_web_server_that_fails_is_asked_again(web: str):
    _Answers.statuses = [503, 429]
    assert patiently(web, lambda files: files.cat_file(web)) == b"ok"


def test_which_failures_may_pass():
    hidden = FileNotFoundError("http://x")
    hidden.__cause__ = ConnectionRefusedError(111, "refused")
    for passing in (hidden, TimeoutError(), ConnectionResetError(), OSError(5, "I/O")):
        assert may_pass(passing)
    for lasting in (FileNotFoundError("x"), PermissionError("x"), ValueError("x"), OSError(22, "bad"), KeyError("x")):
        assert not may_pass(lasting)
