"""The ledger of a run with joins and faults beside the counters of its sites' interfaces (root)."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from titan_ext.links.namespaces import missing

SITES = ("east", "north", "west")
PARAMETERS = 457_056
RUN = """
[model]
name = "llama3"
flavor = "tiny"
[training]
seq_len = 64
local_batch_size = 2
steps = 100000
[metrics]
log_freq = 1
enable_tensorboard = false
[semi_sync]
method = "diloco"
sync_every = 5
[replica]
min_sites = 2
timeout_seconds = 5
connect_timeout_seconds = 5
""" + "".join(f'[[site]]\nname = "{name}"\ndata = "builtin:code"\n' for name in SITES)
FAULTS = ("kill:west@8s+1s", "partition:east-north@60s+8s")


def rounds_of(site: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (site / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "round"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")
def test_the_ledger_is_within_a_percent_of_the_interfaces_counters(tmp_path: Path) -> None:
    """What is compared: bytes of frames, Ethernet headers included, that the sites put on their links, as the router
    between their namespaces counts them, with the ledger's ``wire_bytes_sent``. In the former alone are calls of the
    lighthouse, stores, and the round that a killed site was in.
    """
    (tmp_path / "run.toml").write_text(RUN)
    flags = [word for fault in FAULTS for word in ("--fault", fault)]
    command = [
        sys.executable,
        "-m",
        "titan_ext",
        "lab",
        "run.toml",
        "--namespaces",
        "--link",
        "1gbit,10ms",
        "--until",
        "2min",
        *flags,
    ]
    found = subprocess.run([*command, "--out", "out", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    rounds = {name: rounds_of(tmp_path / "out" / name) for name in SITES}
    interfaces = {site["name"]: site["sent_bytes"] for site in told["sites"]}
    ledger = {name: sum(each["wire_bytes_sent"] for each in lines) for name, lines in rounds.items()}
    assert {site["name"]: site["starts"] for site in told["sites"]} == {"east": 1, "north": 1, "west": 2}
    assert any(not each["committed"] for lines in rounds.values() for each in lines), "the partition broke no round"
    assert 0.99 * sum(interfaces.values()) < sum(ledger.values()) <= sum(interfaces.values()), (interfaces, ledger)
    # The shared state: parameters and momentum in fp32, and some headers.
    healed = sum(each["healed"] for each in rounds["west"])
    healing = sum(each["healing_bytes_sent"] for lines in rounds.values() for each in lines)
    assert healed >= 1 and healing > 2 * 4 * PARAMETERS
    by_round = defaultdict(list)
    for lines in rounds.values():
        for each in lines:
            if each["committed"]:
                by_round[each["round"]].append(each)
    whole = [each for each in by_round.values() if len(each) == each[0]["sites"]]
    assert len(whole) > 10
    for each in whole:
        # Reduce-scatter and all-gather: each site's share of the values to each other one, twice.
        exact = 2 * (len(each) - 1) * 4 * PARAMETERS
        assert sum(line["bytes_sent"] for line in each) == sum(line["bytes_received"] for line in each) == exact
    for lines in rounds.values():
        for each in lines:
            assert each["control_bytes_sent"] > 0 or not each["bytes_sent"]
