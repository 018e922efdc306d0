"""Ending process trees."""

import os
import subprocess

from titan_ext.launcher.processes import kill_descendants


def test_those_to_be_spared_live_on() -> None:
    spared, other = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    try:
        assert kill_descendants(os.getpid(), spare=[spared.pid])
        assert other.wait(10) == -9 and spared.poll() is None
    finally:
        spared.kill()
        spared.wait()
