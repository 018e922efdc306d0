"""What several parts of the tests share."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere: many processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RUST_LOG", "error")
# torch asks for the name of every address that a store connects to. Where no name server answers, that takes
# seconds each time; after one answer that did not come it stops asking, so that should be found out soon.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

from tests.object_store import s3, s3_server  # noqa: F401


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    """The sites that a failed test leaves behind would wait for each other, and the whole run for them."""
    yield
    for process in multiprocessing.active_children():
        if not process.daemon:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory) -> Path:
    """A folder of some dozen English text files: chapters of this interpreter's own documentation strings."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("corpus")
    for name, text in sorted(pydoc_data.topics.topics.items())[:60]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    return folder
