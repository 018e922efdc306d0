"""What is written for Slurm and Kubernetes runs: one site as Slurm would start it, the other as Kubernetes would."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.deploy.renders import ROOT, deploy, documents, run_file, small_run
from titan_ext.launcher.placement import free_port
from titan_ext.launcher.processes import end_descendants

SRUN = """\
#!/usr/bin/env bash
# As srun: the command once at each node, in the environment of its step.
while [[ "$1" == --* ]]; do shift; done
export SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=127.0.0.1
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n
"""


@contextmanager
def started(words: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            end_descendants(process.pid, 1)
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_site_of_slurms_and_one_of_kubernetes_train_together(tmp_path, installed):
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    file = run_file(tmp_path, small_run(tmp_path / "runs", east=2, west=2))
    url = f"http://127.0.0.1:{free_port()}"
    deploy(file, "slurm", tmp_path / "slurm", "--cpu", f"--lighthouse={url}")
    manifests = deploy(file, "kubernetes", tmp_path / "kubernetes", "--cpu", f"--lighthouse={url}")
    (job,) = documents(manifests["west.yaml"], "Job")
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    local = {"my-run-west-0.my-run-west": "127.0.0.1", "/etc/titan_ext/run.toml": str(file)}
    for there, here in local.items():
        command = [word.replace(there, here) for word in command]
    with ExitStack() as running:
        start = lambda words, name, **more: running.enter_context(
            started(words, installed | more, tmp_path / f"{name}.txt")
        )
        start(["bash", str(tmp_path / "slurm" / "lighthouse.sh")], "lighthouse")
        jobs = [start(["bash", str(tmp_path / "slurm" / "east.sbatch")], "east")]
        jobs += [
            start(command, f"west{index}", JOB_COMPLETION_INDEX=str(index))
            for index in range(job["spec"]["completions"])
        ]
        codes = [each.wait() for each in jobs]
    said = "\n".join(path.read_text()[-1500:] for path in sorted(tmp_path.glob("*.txt")))
    assert codes == [0, 0, 0], said
    summaries = [json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("east", "west")]
    assert [each["steps"] for each in summaries] == [4, 4] and [each["rounds"] for each in summaries] == [2, 2]
    assert len({each["shared_state_sha256"] for each in summaries}) == 1
