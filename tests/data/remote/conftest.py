"""Corpora behind URLs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from tests.object_store import S3
from titan_ext.data.remote import files


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """The folder of copies, empty; nothing is listed yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for remembered in (files._list_tree, files._head, files.names_that_fit):
        remembered.cache_clear()
    yield tmp_path / "cache" / "titan_ext"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def upload(s3: S3) -> Callable[[Path], str]:
    """Copies a file or folder into the bucket; returns its URL."""

    def put(path: Path, name: str = "") -> str:
        url = f"s3://bucket/{name or path.name}"
        fsspec.filesystem("s3").put(str(path), url, recursive=path.is_dir())
        files._list_tree.cache_clear()
        files._head.cache_clear()
        return url

    return put
