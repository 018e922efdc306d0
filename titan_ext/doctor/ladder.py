"""The ladder of timeouts: each must outlast what it waits for. Pure: from settings, the plan's cost and what was measured."""

from dataclasses import dataclass

from titan_ext.doctor.finding import Finding, Level, ok
from titan_ext.replica import ReplicaConfig

_MARGIN = 2.0
"""Times what is expected: a link is slower at times, a step as well."""
_WORTH_TELLING = 0.2
"""Share of the time that may be lost to the wire before it is worth a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What the timeouts are measured by; None is what is not known."""

    bucket_bytes: float
    """The largest message handed to the wire at once."""
    round_bytes: float | None = None
    """What the site sends in its largest round."""
    round_steps: int | None = None
    """Inner steps from one round to the next, at most."""
    step_seconds: float | None = None
    overlaps: bool = False
    """Whether inner steps go on during an exchange."""
    bits_per_second: float | None = None
    """Of the slowest link to another site."""
    round_trip_seconds: float | None = None
    """To the lighthouse or the farthest site, whichever is longer."""

    @property
    def round_seconds(self) -> float | None:
        """Inner steps of a round."""
        return None if None in (self.round_steps, self.step_seconds) else self.round_steps * self.step_seconds

    def transfer_seconds(self, size: float | None) -> float | None:
        """What so many bytes take on the link."""
        return None if None in (size, self.bits_per_second) else 8 * size / self.bits_per_second


def check_ladder(config: ReplicaConfig, timing: Timing) -> list[Finding]:
    """Heartbeat < quorum, transfer of a bucket < timeout, inner steps of a round < quorum and join."""
    checks = (_heartbeats, _forgetting, _bucket, _rounds, _utilisation)
    found = [finding for check in checks for finding in check(config, timing)]
    serious = [each for each in found if each.level is not Level.OK]
    return serious or [ok("timeouts", "each outlasts what it waits for, as far as that is known")]


def _heartbeats(config: ReplicaConfig, timing: Timing) -> list[Finding]:
    interval, timeout = config.heartbeat_interval_seconds, config.heartbeat_timeout_seconds
    needed = 3 * interval + _MARGIN * (timing.round_trip_seconds or 0.0)
    if timeout >= needed:
        return []
    return [
        Finding(
            "heartbeats",
            Level.WARNING,
            f"heartbeat_timeout_seconds = {timeout:g} with a heartbeat every {interval:g} s"
            + (f" and {1000 * timing.round_trip_seconds:.0f} ms there and back" if timing.round_trip_seconds else ""),
            "two heartbeats that are late make a living site dead, and a round is repeated without it",
            f"[replica] heartbeat_timeout_seconds = {_up(needed)}",
        )
    ]


def _forgetting(config: ReplicaConfig, timing: Timing) -> list[Finding]:
    found = []
    for key, why in (
        ("quorum_timeout_seconds", "the quorum gives up before the lighthouse has forgotten a site that died"),
        ("timeout_seconds", "a transfer or vote gives up before the lighthouse has forgotten a site that died"),
    ):
        if getattr(config, key) <= config.heartbeat_timeout_seconds:
            what = f"{key} = {getattr(config, key):g}, heartbeat_timeout_seconds = {config.heartbeat_timeout_seconds:g}"
            mend = f"[replica] {key} = {_up(4 * config.heartbeat_timeout_seconds)}"
            found.append(Finding("timeouts", Level.PROBLEM, what, why, mend))
    return found


def _bucket(config: ReplicaConfig, timing: Timing) -> list[Finding]:
    seconds = timing.transfer_seconds(timing.bucket_bytes)
    size = f"a bucket of {timing.bucket_bytes / 2**20:.3g} MiB"
    if seconds is None:
        least = 8 * timing.bucket_bytes * _MARGIN / config.timeout_seconds
        return [ok("bucket", f"{size} needs {least / 1e6:.3g} Mbit/s to be there well within timeout_seconds")]
    if _MARGIN * seconds <= config.timeout_seconds:
        return [ok("bucket", f"{size} takes {seconds:.3g} s of timeout_seconds = {config.timeout_seconds:g}")]
    return [
        Finding(
            "bucket",
            Level.PROBLEM if seconds > config.timeout_seconds else Level.WARNING,
            f"{size} takes {seconds:.3g} s on the slowest link, timeout_seconds = {config.timeout_seconds:g}",
            "every round fails at its first bucket",
            f"[replica] timeout_seconds = {_up(2 * _MARGIN * seconds)}, or a smaller [semi_sync] bucket_mib",
        )
    ]


def _rounds(config: ReplicaConfig, timing: Timing) -> list[Finding]:
    seconds = timing.round_seconds
    if seconds is None:
        return []
    found = []
    for key, why in (
        ("quorum_timeout_seconds", "a site that comes early to a round gives up before the others are there"),
        ("join_timeout_seconds", "the lighthouse begins rounds without a site that is slower than the others"),
    ):
        if getattr(config, key) < _MARGIN * seconds:
            what = f"{timing.round_steps} inner steps take {seconds:.3g} s here, {key} = {getattr(config, key):g}"
            level = Level.PROBLEM if getattr(config, key) < seconds else Level.WARNING
            found.append(Finding("round", level, what, why, f"[replica] {key} = {_up(2 * _MARGIN * seconds)}"))
    return found


def _utilisation(config: ReplicaConfig, timing: Timing) -> list[Finding]:
    seconds, transfer = timing.round_seconds, timing.transfer_seconds(timing.round_bytes)
    if seconds is None or transfer is None:
        return []
    lost = max(0.0, transfer - seconds) if timing.overlaps else transfer
    share = lost / (lost + seconds)
    text = f"a round sends {timing.round_bytes / 1e6:.3g} MB in {transfer:.3g} s, its inner steps take {seconds:.3g} s"
    if share <= _WORTH_TELLING:
        return [ok("utilisation", f"{text}: {1 - share:.0%} of the time is left for them")]
    every = _up(transfer / _WORTH_TELLING * (1 - _WORTH_TELLING) / timing.step_seconds)
    return [
        Finding(
            "utilisation",
            Level.WARNING,
            f"{text}: {share:.0%} of the time goes to the wire",
            "accelerators stand still for so long",
            f"[semi_sync] sync_every = {every}, a narrower codec, or fragments with a delay",
        )
    ]


def _up(value: float) -> int:
    """The next of 1, 2, 3, 5, 10, 20, 30, 50, …"""
    size = 1
    while True:
        for step in (1, 2, 3, 5):
            if step * size >= value:
                return step * size
        size *= 10
