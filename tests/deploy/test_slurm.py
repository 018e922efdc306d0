"""The jobs that are written for Slurm, under a real one on this machine."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.loopback_slurm import NODES, job_state, missing, slurm
from tests.deploy.renders import ROOT, deploy, run_file, small_run
from tests.end_to_end.forked import lighthouse
from tests.end_to_end.test_runs import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}"),
]
STEPS = 60


def lines(site: Path, kind: str) -> list[dict[str, Any]]:
    file = site / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in found if line["kind"] == kind]


def test_jobs_train_and_one_that_is_requeued_joins_again(tmp_path, installed):
    """A job of two nodes and one of one; Slurm takes the first away from its nodes and starts it anew."""
    runs = tmp_path / "runs"
    file = run_file(tmp_path, small_run(runs, east=2, west=1))
    flags = [f"--training.steps={STEPS}", "--semi_sync.sync_every=10", "--checkpoint.enable"]
    with lighthouse(2) as url, slurm(tmp_path / "slurm") as found:
        environment = installed | {"SLURM_CONF": found["SLURM_CONF"]}

        def command(*words: str) -> str:
            return subprocess.run(
                words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
            ).stdout.strip()

        deploy(file, "slurm", tmp_path / "jobs", "--cpu", f"--lighthouse={url}", "--grace-seconds=15", *flags)
        places = {"east": ",".join(NODES[:2]), "west": NODES[2]}
        jobs = {
            name: command("sbatch", "--parsable", f"--nodelist={place}", f"--output={tmp_path}/{name}.txt", f"{tmp_path}/jobs/{name}.sbatch")
            for name, place in places.items()
        }  # fmt: skip
        said = lambda: "\n".join(path.read_text()[-2000:] for path in sorted(tmp_path.glob("*.txt")))

        def has_ended(name: str) -> bool:
            state = job_state(jobs[name], environment)
            assert state not in ("FAILED", "CANCELLED", "NODE_FAIL"), said()
            return state == "COMPLETED"

        together = lambda: any(line["participants"] == 2 for line in lines(runs / "west", "round"))
        wait_for(lambda: together() or has_ended("west"), seconds=400)
        command("scontrol", "requeue", jobs["east"])
        wait_for(lambda: has_ended("west") and has_ended("east"), seconds=700)
    steps = [line["step"] for line in lines(runs / "west", "step")]
    assert steps == list(range(steps[0], STEPS + 1)), "the other site waits and loses no inner step"
    log = (runs / "east" / "log.txt").read_text()
    assert log.count("--- east, attempt 1") == 2 and (runs / "east" / "log_node1.txt").exists(), said()
    hashes = {json.loads((runs / name / "summary.json").read_text())["shared_state_sha256"] for name in places}
    assert len(hashes) == 1
