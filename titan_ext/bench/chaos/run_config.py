"""The run that is put under faults: its configuration and its processes."""

from dataclasses import dataclass
from pathlib import Path

from titan_ext.config import load_to_start
from titan_ext.lab.real_time.derived import derive
from titan_ext.lab.real_time.run import Surroundings, jobs_between
from titan_ext.launcher.supervisor import Job

MIN_SITES = 2
GRACE_SECONDS = 30.0
"""What a site that is asked to end may take."""

_TEXT = """
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


def jobs(config: RunConfig, folder: Path, rounds: int, around: Surroundings) -> list[Job]:
    """The lighthouse and the sites of a run, whose configuration is written to ``folder``.

    Args:
        config: size of the run.
        folder: for everything it leaves.
        rounds: its length.
        around: what lies between the sites.
    """
    folder.mkdir(parents=True)
    path = folder / "run.toml"
    path.write_text(_configuration(config, rounds), encoding="utf-8")
    ranks = [1] * config.sites
    file = derive(str(path), folder, copies=None, addresses=around.addresses, ranks=ranks, streams=around.streams)
    return jobs_between(load_to_start(file, None, ()), around, file, (), GRACE_SECONDS)


def _configuration(config: RunConfig, rounds: int) -> str:
    text = _TEXT.format(
        seq_len=config.seq_len,
        batch=config.batch,
        steps=rounds * config.sync_every,
        interval=_CHECKPOINT_ROUNDS * config.sync_every,
        sync_every=config.sync_every,
        min_sites=MIN_SITES,
    )
    return text + "".join(_SITE.format(name=name, seed=config.seed + index) for index, name in enumerate(config.names))
