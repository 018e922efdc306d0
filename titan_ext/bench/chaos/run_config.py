"""The run that is put under faults: its configuration and its processes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from titan_ext.commands import lighthouse
from titan_ext.launcher.placement import free_port, torchrun_command
from titan_ext.launcher.supervisor import Job

MIN_SITES = 2
GRACE_SECONDS = 30.0
"""What a site that is asked to end may take."""

_TEXT = """
dump_folder = "{folder}"
[model]
name = "llama3"
flavor = "tiny"
[training]
seq_len = {seq_len}
local_batch_size = {batch}
steps = {steps}
[optimizer]
lr = 2e-3
[lr_scheduler]
warmup_steps = 20
min_lr_factor = 1.0
[metrics]
log_freq = 1
enable_tensorboard = false
[checkpoint]
enable = true
interval = {interval}
keep_latest_k = 2
[semi_sync]
method = "diloco"
sync_every = {sync_every}
[replica]
lighthouse = "http://{host}:{port}"
min_sites = {min_sites}
timeout_seconds = 10
connect_timeout_seconds = 10
quorum_timeout_seconds = 120
lighthouse_retries = 10
"""
_SITE = """
[[site]]
name = "{name}"
data = {{ dataset = "builtin:code", seed = {seed} }}
"""
_JOIN_SECONDS = 60.0
_SILENCE_SECONDS = 5.0
_CHECKPOINT_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Size of the run."""

    sites: int
    seq_len: int
    batch: int
    """Sequences of a site and step."""
    sync_every: int
    seed: int

    @property
    def names(self) -> list[str]:
        """Of the sites."""
        return [f"site{index}" for index in range(self.sites)]

    @property
    def round_tokens(self) -> int:
        """What a site trains on between two rounds."""
        return self.sync_every * self.batch * self.seq_len


def folders(config: RunConfig, folder: Path) -> dict[str, Path]:
    """Name of each site -> its dump folder in a run below ``folder``."""
    return {name: folder / name for name in config.names}


def jobs(
    config: RunConfig,
    folder: Path,
    rounds: int,
    *,
    networks: Mapping[str, int],
    host: str = "127.0.0.1",
    hub: int | None = None,
) -> list[Job]:
    """The lighthouse and the sites of a run, whose configuration is written to ``folder``.

    Args:
        config: size of the run.
        folder: for everything it leaves.
        rounds: its length.
        networks: name of the site -> a process in its network namespace; empty: all in that of the caller.
        host: address of the lighthouse.
        hub: a process in the lighthouse's network namespace; None: that of the caller.
    """
    folder.mkdir(parents=True)
    path, port = folder / "run.toml", free_port()
    path.write_text(_configuration(config, folder, rounds, host, port), encoding="utf-8")
    service = lighthouse.command(
        address=f"{host}:{port}",
        min_sites=MIN_SITES,
        join_timeout_seconds=_JOIN_SECONDS,
        heartbeat_timeout_seconds=_SILENCE_SECONDS,
    )
    started = [
        Job(
            name="lighthouse",
            command=[*_inside(hub), *service],
            log=folder / "lighthouse.log",
            is_service=True,
        )
    ]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RUST_LOG": "error"}
    for name in config.names:
        command = torchrun_command(1, GRACE_SECONDS, "--config", str(path), "--site", name)
        log = folder / name / "log.txt"
        started.append(
            Job(name=name, command=[*_inside(networks.get(name)), *command], environment=environment, log=log)
        )
    return started


def _inside(network: int | None) -> list[str]:
    return [] if network is None else ["nsenter", f"--net=/proc/{network}/ns/net"]


def _configuration(config: RunConfig, folder: Path, rounds: int, host: str, port: int) -> str:
    text = _TEXT.format(
        folder=folder,
        seq_len=config.seq_len,
        batch=config.batch,
        steps=rounds * config.sync_every,
        interval=_CHECKPOINT_ROUNDS * config.sync_every,
        sync_every=config.sync_every,
        host=host,
        port=port,
        min_sites=MIN_SITES,
    )
    return text + "".join(_SITE.format(name=name, seed=config.seed + index) for index, name in enumerate(config.names))
