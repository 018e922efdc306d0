"""A job of Slurm's for each site."""

from titan_ext.deploy.deployment import LIGHTHOUSE_PORT, DeployedSite, Deployment, label, shell
from titan_ext.errors import UserError

_JOB = """\
#!/usr/bin/env bash
# Site {site} of {file}: {nodes} node(s) with {ranks} rank(s) each.
#
#   sbatch {script}      from the folder of the repository; relative paths in the file count from there too
#
# Slurm starts the job anew when a node fails or the job is preempted; the launchers inside it start the site anew when a
# rank or a launcher dies. Flags of sbatch (--partition, --account, --time …) go before the script's name.
#
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@{grace}
#SBATCH --output={name}-%j.out
set -euo pipefail

bash launch/site.sh --install
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 --label {command}
"""

_LIGHTHOUSE = """\
#!/usr/bin/env bash
# The lighthouse of {file}: leave it running at {url}, in the folder of the repository.
set -euo pipefail

exec {command}
"""


def render(deployment: Deployment) -> dict[str, str]:
    """The files by their names: a job script for each site, and one that runs the lighthouse.

    Raises:
        UserError: no address of a lighthouse is given.
    """
    if deployment.lighthouse is None:
        raise UserError(
            "--lighthouse is missing: Slurm's jobs cannot know where it runs; give http://HOST:"
            f"{LIGHTHOUSE_PORT} of a machine that all sites reach"
        )
    files = {f"{label(site.name, 'name')}.sbatch": _job(deployment, site) for site in deployment.sites}
    bind = f"[::]:{deployment.lighthouse.rpartition(':')[2]}"
    command = shell(["bash", "launch/lighthouse.sh", "--bind", bind, *deployment.lighthouse_flags])
    files["lighthouse.sh"] = _LIGHTHOUSE.format(file=deployment.file, url=deployment.lighthouse, command=command)
    return files


def next_steps(deployment: Deployment, folder: str) -> list[str]:
    """What to do with the files."""
    jobs = [f"sbatch {folder}/{label(site.name, 'name')}.sbatch" for site in deployment.sites]
    return [f"bash {folder}/lighthouse.sh        # at {deployment.lighthouse}", *jobs]


def _job(deployment: Deployment, site: DeployedSite) -> str:
    assert deployment.lighthouse is not None
    arguments = deployment.launch_arguments(site, deployment.file, deployment.lighthouse)
    return _JOB.format(
        site=site.name,
        file=deployment.file,
        script=f"{label(site.name, 'name')}.sbatch",
        name=f"{deployment.name}-{label(site.name, 'name')}",
        nodes=site.nodes.count,
        ranks=site.nodes.ranks_per_node,
        gpus=f"#SBATCH --gpus-per-node={site.gpus}\n" if site.gpus else "",
        grace=deployment.grace_seconds + 15,
        command=shell(["bash", "launch/site.sh", *arguments]),
    )
