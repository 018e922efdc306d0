"""Configuration files for the tests of the configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest

GOOD = """
[model]
name = "llama3"
flavor = "debugmodel"
n_layers = 2

[training]
seq_len = 64
steps = 20
local_batch_size = 2

[semi_sync]
method = "diloco"
sync_every = 5

[[site]]
name = "alpha"
data = "builtin:code"

[[site]]
name = "beta"
data = "builtin:docs"
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes ``demo.toml`` into an empty working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str = GOOD) -> str:
        Path("demo.toml").write_text(text)
        return "demo.toml"

    return write_file
