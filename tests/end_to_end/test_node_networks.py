"""Nodes with networks and disks of their own: two sites of two, each node in a network namespace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_nodes import FSDP, command, started
from tests.end_to_end.test_runs import own_data, wait_for
from titan_ext.links.namespaces import HUB, Wan, address_of, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}"),
]
STEPS = 200


def inside(network: int, *words: str) -> list[str]:
    return ["nsenter", f"--net=/proc/{network}/ns/net", *words]


def log_of(folder: Path, site: str, node: int) -> str:
    return (folder / f"{site}{node}" / site / ("log_node1.txt" if node else "log.txt")).read_text(errors="replace")


def test_a_node_whose_network_has_gone_takes_its_site_along_and_brings_it_back(tmp_path, text_corpus, monkeypatch):
    # Nobody answers to questions for names in these networks.
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), FSDP)
    flags = [
        f"--training.steps={STEPS}",
        "--semi_sync.sync_every=10",
        "--checkpoint.enable",
        "--rendezvous-seconds=300",
    ]
    flags += [
        "--max-restarts=9",
        "--grace-seconds=5",
        "--comm.train_timeout_seconds=600",
        f"--lighthouse=http://{HUB}:29510",
    ]
    places = [(site, node) for site in "ab" for node in range(2)]
    with Wan(len(places), 1000.0) as wan:
        lighthouse = [sys.executable, "-m", "titan_ext", "lighthouse", "--bind=0.0.0.0:29510", "--min-sites=2"]
        commands = [inside(wan.hub, *lighthouse)]
        for place, (site, node) in enumerate(places):
            first = address_of(place - node)
            own = ["--nodes=2", f"--only={site}", f"--node-rank={node}", f"--rendezvous={first}"]
            own += [f"--dump_folder={tmp_path / f'{site}{node}'}"]
            commands.append(inside(wan.sites[place], *command(config, *own, *flags)))
        with started(*commands) as (_, *launchers):
            b = SiteRun("b", tmp_path / "b0", [])
            wait_for(lambda: any(line["participants"] == 2 for line in b.lines("round")), seconds=400)
            lost = wan.sites[-1]
            subprocess.run(inside(lost, "ip", "link", "set", "wan0", "down"), check=True)
            wait_for(lambda: "node 1 is silent" in log_of(tmp_path, "b", 0), seconds=200)
            subprocess.run(inside(lost, "ip", "link", "set", "wan0", "up"), check=True)
            ends = [launcher.communicate()[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * 4, "\n".join(end[-1500:] for end in ends)
    assert "node 0 is gone" in log_of(tmp_path, "b", 1)
    for place, (site, node) in enumerate(places):
        addresses = ", ".join(address_of(place - node + each) for each in range(2))
        assert f"node {node} of 2 ({address_of(place)}) begins with {addresses}" in log_of(tmp_path, site, node)
    summaries = [json.loads((tmp_path / f"{site}0" / site / "summary.json").read_text()) for site in "ab"]
    assert len({each["shared_state_sha256"] for each in summaries}) == 1
    steps = [line["step"] for line in SiteRun("a", tmp_path / "a0", []).lines("step")]
    assert steps == list(range(1, STEPS + 1)), "the other site lost no inner step"
    assert not os.path.exists(tmp_path / "b1" / "b" / "metrics.jsonl")
