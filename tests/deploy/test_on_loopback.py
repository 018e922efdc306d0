"""What is written for Slurm and Kubernetes runs: one site as Slurm would start it, the other as Kubernetes would."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.deploy.renders import deploy, documents, run_file
from titan_ext.launcher.placement import free_port
from titan_ext.launcher.processes import end_descendants

ROOT = Path(__file__).parents[2]
SRUN = """\
#!/usr/bin/env bash
# As srun: the command once at each node, in the environment of its step.
while [[ "$1" == --* ]]; do shift; done
export SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=127.0.0.1
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n
"""


@pytest.fixture
def installed(tmp_path) -> dict[str, str]:
    """The environment of a machine on which titan_ext is installed, by the scripts of launch/, and Slurm is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {"titan-ext": f'#!/bin/sh\nexec "{sys.executable}" -m titan_ext "$@"\n', "srun": SRUN}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "TITAN_EXT_VENV": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    mark = 'source launch/setup.sh; wanted_stamp "" >"$venv/titan-ext.installed"'
    subprocess.run(["bash", "-euc", mark], cwd=ROOT, env=environment, check=True)
    return environment


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
    sites = "".join(
        f'[[site]]\nname = "{name}"\nnodes = 2\nrendezvous_port = {free_port()}\ndata = "builtin:code"\n'
        for name in ("east", "west")
    )
    file = run_file(
        tmp_path,
        f"""\
dump_folder = "{tmp_path / "runs"}"
[model]
flavor = "tiny"
[training]
seq_len = 64
local_batch_size = 4
steps = 4
[parallelism]
data_parallel_shard_degree = 2
[semi_sync]
method = "diloco"
sync_every = 2
[replica]
min_sites = 2
{sites}""",
    )
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
