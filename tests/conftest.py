"""What several parts of the tests share."""

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: many processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RUST_LOG", "error")


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory) -> Path:
    """A folder of some dozen English text files: chapters of this interpreter's own documentation strings."""
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("corpus")
    for name, text in sorted(pydoc_data.topics.topics.items())[:60]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    return folder
