"""Ending process trees."""

import subprocess
import time

from titan_ext.launcher.processes import descendants, kill_descendants


def test_those_to_be_spared_live_on() -> None:
    # An ended child that its parent has not waited for is not found any more.
    with subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"]) as shell:
        while len(found := descendants(shell.pid)) < 2:
            time.sleep(0.01)
        assert kill_descendants(shell.pid, spare=found[:1])
        assert descendants(shell.pid) == found[:1]
        assert kill_descendants(shell.pid)
