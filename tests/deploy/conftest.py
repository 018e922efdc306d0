"""A machine on which titan_ext is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.renders import ROOT


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Its environment; ``titan-ext`` is where the scripts of launch/ and a container's command look for it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "titan-ext"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m titan_ext "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "TITAN_EXT_VENV": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    mark = 'source launch/setup.sh; wanted_stamp "" >"$venv/titan-ext.installed"'
    subprocess.run(["bash", "-euc", mark], cwd=ROOT, env=environment, check=True)
    return environment
