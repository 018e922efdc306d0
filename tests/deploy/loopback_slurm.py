"""A Slurm of three nodes on this machine: one controller and a daemon for each node, as root, gone at the end."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from titan_ext.launcher.placement import free_port
from titan_ext.launcher.processes import end_descendants

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "sinfo", "squeue")
# The first of a site's nodes is looked up by its name: this machine's, and Slurm sorts them.
NODES = (socket.gethostname().partition(".")[0], "zz1", "zz2")
_PATIENCE_SECONDS = 60
_CONF = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
JobRequeue=1
MinJobAge=600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)}: not installed (Debian: slurmctld, slurmd, slurm-client, munge)"
    return None if os.geteuid() == 0 else "needs root"


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which sbatch and its like find it."""
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    nodes = "\n".join(
        f"NodeName={name} NodeAddr=127.0.0.{place} Port={free_port()} CPUs=2"
        for place, name in enumerate(NODES, start=1)
    )
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, port=free_port(), nodes=nodes))
    environment = os.environ | {"SLURM_CONF": str(conf)}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as running:
        for words in (munge, ["slurmctld", "-D"], *(_daemon(name) for name in NODES)):
            running.enter_context(_running(words, environment))
            if words is munge:
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        _wait(lambda: _said("sinfo", "-h", "-o", "%t %D", environment=environment) == f"idle {len(NODES)}", folder)
        try:
            yield environment
        finally:
            # Steps outlive their daemon.
            _said("scancel", "--user=root", environment=environment)
            _wait(lambda: not _said("squeue", "-h", environment=environment), folder)


def job_state(job: str, environment: dict[str, str]) -> str:
    """Such as RUNNING or COMPLETED."""
    return _said("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", environment=environment)


def _daemon(name: str) -> list[str]:
    """Debian's slurmd believes its host's name alone."""
    return ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec slurmd -D', name]


@contextmanager
def _running(words: list[str], environment: dict[str, str]) -> Iterator[None]:
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                end_descendants(process.pid, 0)
                process.kill()


def _said(*words: str, environment: dict[str, str]) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout.strip()


def _wait(condition, folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        logs = "".join(path.read_text(errors="replace")[-1500:] for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)
