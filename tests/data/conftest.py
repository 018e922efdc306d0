"""What every test of titan_ext.data starts from."""

import os
import random
from pathlib import Path

import pytest

# Before the datasets library is imported: nothing here may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.data.corpora.sources import write_lines


@pytest.fixture
def texts() -> list[str]:
    """40 documents of 3 to 120 characters, each different, not all ASCII."""
    rng = random.Random(7)
    alphabet = "abcdefghij klmnop.é漢\n"
    return [f"{n}:" + "".join(rng.choices(alphabet, k=rng.randint(1, 117))) for n in range(40)]


@pytest.fixture
def lines(tmp_path: Path, texts: list[str]) -> Path:
    """The documents as JSONL."""
    return write_lines(tmp_path / "corpus.jsonl", texts)
