"""Stand-ins for sites, and what is left of their processes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan_ext.launcher.supervisor import Job

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 2.0
# Far above what anything here takes: it ends a test that hangs, and decides nothing.
PATIENCE_SECONDS = 60


def job(folder: Path, name: str, behaviour: str, *, is_service: bool = False) -> Job:
    """A site of the run in ``folder`` that behaves as named in ``stand_in.py``."""
    command = [sys.executable, str(Path(__file__).with_name("stand_in.py")), str(folder / name), behaviour]
    return Job(name=name, command=command, log=folder / name / "log.txt", is_service=is_service)


@contextmanager
def start_launch(folder: Path, **sites: str) -> Iterator[subprocess.Popen]:
    """A launcher of its own, as a terminal would start it; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.launcher.launch_stand_ins", str(folder)]
        + [f"{name}={behaviour}" for name, behaviour in sites.items()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def launch(folder: Path, **sites: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a launch."""
    with start_launch(folder, **sites) as process:
        out, err = end(process)
    return process.returncode, out, err


def wait_for(condition, what: str) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def recorded(folder: Path) -> list[int]:
    """Ids of all stand-ins that were started below the folder."""
    return [int(line) for file in folder.rglob("pids") for line in file.read_text().split()]


def alive(folder: Path) -> list[int]:
    """Those of them that still run; one that ended and was not waited for does not."""
    return [pid for pid in recorded(folder) if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end(process: subprocess.Popen) -> tuple[str, str]:
    """What a launcher that is about to end has said."""
    return process.communicate(timeout=PATIENCE_SECONDS)
