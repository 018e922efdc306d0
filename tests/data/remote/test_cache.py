"""The folder of copies: bounded, shared, and never with half a file."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from tests.data.corpora.sources import PACKERS
from tests.data.remote.web import web_server
from titan_ext.data.remote.cache import GIB, FileCache, Wanted
from titan_ext.data.remote.download import NoRoom
from titan_ext.data.remote.files import list_tree
from titan_ext.errors import ReadError, UserError

SIZE = 100_000


@pytest.fixture
def wanted() -> list[Wanted]:
    """Six files in memory, of 100 kB each."""
    for number in range(6):
        fsspec.filesystem("memory").pipe(f"/corpus/{number}.txt", bytes([97 + number]) * SIZE)
    return [Wanted(path.file, "text", "") for path in list_tree("memory://corpus", 0).files]


def _cache(most_bytes: float = GIB, folder: str = "") -> FileCache:
    return FileCache(folder, most_bytes / GIB, 0)


def _copies(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in folder.glob("*-*")}


def test_what_was_used_longest_ago_makes_room(wanted: list[Wanted], own_cache: Path) -> None:
    cache = _cache(3.5 * SIZE)
    for file in wanted[:3]:
        cache.lease([file])
    cache.lease([wanted[0]])
    assert cache.lease([wanted[3]]).paths[0].read_bytes() == b"d" * SIZE
    assert _copies(own_cache) == {"0.txt", "2.txt", "3.txt"}


def test_what_is_used_stays_and_each_tells_of_an_excess_once(wanted: list[Wanted], own_cache: Path, caplog) -> None:
    cache, other = _cache(2.5 * SIZE), _cache(2.5 * SIZE)
    held, elsewhere = cache.lease(wanted[:2]), other.lease(wanted[2:3])
    cache.lease(wanted[3:4])
    cache.lease(wanted[4:5])
    assert _copies(own_cache) == {"0.txt", "1.txt", "2.txt", "4.txt"}
    assert (
        sum("take" in record.getMessage() and "data.cache_gib" in record.getMessage() for record in caplog.records) == 2
    )
    del held, elsewhere, other
    cache.lease(wanted[5:6])
    assert "5.txt" in _copies(own_cache) and len(_copies(own_cache)) == 2


def test_several_who_want_a_file_fetch_it_once(wanted: list[Wanted], own_cache: Path, monkeypatch) -> None:
    fetched = []
    fill = FileCache._fill
    monkeypatch.setattr(FileCache, "_fill", lambda self, file, *rest: fetched.append(file) or fill(self, file, *rest))
    leases = []
    threads = [threading.Thread(target=lambda: leases.append(_cache().lease(wanted))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(leases) == 5 and len(fetched) == len(wanted)
    assert not list(own_cache.glob("*.part"))


_OTHER = """
import sys
from titan_ext.data.remote.cache import FileCache, Wanted
from titan_ext.data.remote.files import list_tree
files = [Wanted(path.file, "text", "") for path in list_tree(sys.argv[1], 0).files]
lease = FileCache("", float(sys.argv[2]), 0).lease(files)
print(sum(path.stat().st_size for path in lease.paths), flush=True)
sys.stdin.read()
"""


def test_processes_share_the_folder_and_what_a_dead_one_used_may_go(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_bytes(bytes([97 + number]) * SIZE)
    url, limit = f"file://{folder}", 4.5 * SIZE / GIB
    command = [sys.executable, "-c", _OTHER, url, str(limit)]
    others = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [other.stdout.readline() for other in others] == [f"{4 * SIZE}\n"] * 2
    (tmp_path / "more.txt").write_bytes(b"x" * SIZE)
    more = [Wanted(list_tree(f"file://{tmp_path}/more.txt", 0).files[0].file, "text", "")]
    _cache(4.5 * SIZE).lease(more)
    assert len(_copies(own_cache)) == 5
    for other in others:
        other.kill()
        other.communicate()
    (own_cache / next(path.name for path in own_cache.glob("*-more.txt"))).unlink()
    _cache(4.5 * SIZE).lease(more)
    assert len(_copies(own_cache)) == 4
    assert len(list((own_cache / "users").iterdir())) <= 2


def test_a_copy_that_a_killed_process_left_half_is_fetched_whole(wanted: list[Wanted], own_cache: Path) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / f"{wanted[0].name}.part").write_bytes(b"garbage")
    assert _cache().lease(wanted[:1]).paths[0].read_bytes() == b"a" * SIZE


def test_a_file_that_is_another_than_was_listed_is_refused(wanted: list[Wanted]) -> None:
    fsspec.filesystem("memory").pipe("/corpus/0.txt", b"b" * SIZE)
    with pytest.raises(UserError, match=r"'memory://.*0.txt' has changed since"):
        _cache().lease(wanted)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_is_mended_or_refused(tmp_path: Path, ranges: bool, own_cache: Path) -> None:
    (tmp_path / "x.txt").write_bytes(os.urandom(SIZE))
    with web_server(tmp_path, ranges, most_bytes=SIZE // 2) as url:
        file = Wanted(list_tree(f"{url}/x.txt", 0).files[0].file, "text", "")
        with pytest.raises(ReadError, match=f"{url}/x.txt"):
            FileCache("", 1, 0).lease([file])
        assert not _copies(own_cache)
    with web_server(tmp_path, ranges, most_bytes=SIZE // 2) as url:
        file = Wanted(list_tree(f"{url}/x.txt", 0).files[0].file, "text", "")
        lease = FileCache("", 1, 30).lease([file])
        assert lease.paths[0].read_bytes() == (tmp_path / "x.txt").read_bytes()


def test_large_files_come_in_ranges(monkeypatch) -> None:
    monkeypatch.setattr("titan_ext.data.remote.download._RANGE_BYTES", 1000)
    content = os.urandom(12_345)
    fsspec.filesystem("memory").pipe("/large/x.txt", content)
    file = Wanted(list_tree("memory://large/x.txt", 0).files[0].file, "text", "")
    assert _cache().lease([file]).paths[0].read_bytes() == content


@pytest.mark.parametrize("ending", PACKERS)
def test_copies_are_unpacked(own_cache: Path, ending: str) -> None:
    lines = json.dumps({"text": "x"}).encode()
    fsspec.filesystem("memory").pipe(f"/packed/x.jsonl.{ending}", PACKERS[ending](lines))
    path = list_tree(f"memory://packed/x.jsonl.{ending}", 0).files[0]
    kind = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd"}[ending]
    assert _cache().lease([Wanted(path.file, "lines", kind)]).paths[0].read_bytes() == lines
    assert _copies(own_cache) == {"x.jsonl"}


def test_a_full_disk_is_told_in_a_line(wanted: list[Wanted], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        cache = _cache(folder=str(small))
        held = cache.lease(wanted[:2])
        with pytest.raises(
            NoRoom, match=r"no room in '.*small' for a copy of 'memory://.*No space left.*data.cache_folder"
        ):
            cache.lease(wanted[2:3])
        del held
        # What is not used makes room on a disk smaller than the limit.
        assert cache.lease(wanted[2:3]).paths[0].stat().st_size == SIZE
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_folder = '.*file/x': cannot be used: Not a directory"):
        _cache(folder=str(tmp_path / "file" / "x"))
