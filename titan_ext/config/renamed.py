"""Configuration keys and values that were renamed: an old one is refused with a line that names the new one."""

import re
from typing import Any

RENAMED: dict[str, str] = {
    "replica.fetch_ahead": "replica.prefetch_state",
    "replica.roll_back": "replica.allow_rollback",
    "semi_sync.demo_chunk": "semi_sync.demo.compression_chunk",
    "semi_sync.demo_kept": "semi_sync.demo.compression_topk",
    "semi_sync.first_moment_sync_every": "semi_sync.des_loc.first_moment_sync_every",
    "semi_sync.global_device": "semi_sync.outer_state_device",
    "semi_sync.gossip_gamma": "semi_sync.noloco.gossip_gamma",
    "semi_sync.half_life_periods": "semi_sync.des_loc.half_life_periods",
    "semi_sync.momentum_sync_every": "semi_sync.mt_dao.momentum_sync_every",
    "semi_sync.order": "semi_sync.sync_point",
    "semi_sync.scopes.topk_density": "semi_sync.scopes.settings.topk.density",
    "semi_sync.second_moment_sync_every": (
        "semi_sync.des_loc.second_moment_sync_every or, with method mt_dao, semi_sync.mt_dao.second_moment_sync_every"
    ),
    "semi_sync.sparta_share": "semi_sync.sparta.sparta_fraction",
    "semi_sync.topk_density": "semi_sync.topk.density",
    "semi_sync.trimmed_sites": "semi_sync.trimmed_mean.sites",
}
"""Old dotted key -> the new one, or what takes its place in words."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "semi_sync.scopes.shared": {"whole": "full", "rows": "sparse_rows", "no": "local"},
    "semi_sync.sync_point": {"paper": "before_step"},
}
"""Dotted key, as it is now -> old value -> new value."""


def renamed_key(key: str, given: Any) -> str | None:
    """What to say about an unknown key that was valid under another name; None for any other key.

    Args:
        key: dotted; ``[0]`` and the like, behind a list of tables, do not count.
        given: its value.
    """
    new = RENAMED.get(_plain(key))
    if new is None:
        return None
    value = RENAMED_VALUES.get(new, {}).get(str(given))
    return f"has been renamed to {new}" + (f', and "{given}" to "{value}"' if value else "")


def renamed_value(key: str, given: Any) -> str | None:
    """What to say about a value of ``key`` that was valid under another name; None for any other value."""
    value = RENAMED_VALUES.get(_plain(key), {}).get(str(given))
    return value and f'has been renamed to "{value}"'


def _plain(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key)
