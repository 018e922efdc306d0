"""Tasks of SkyPilot, one for each site, for its command line."""

from collections.abc import Mapping, Sequence
from typing import Any

from titan_ext.deploy.deployment import LIGHTHOUSE_PORT, DeployedSite, Deployment, label, shell
from titan_ext.deploy.yaml_text import to_yaml
from titan_ext.errors import UserError

CLOUDS = ("aws", "gcp", "azure")
_SECRETS = "~/.titan_ext"

_NOTE = """\
Site {site} of {file}: {nodes} node(s) with {ranks} rank(s) each. From the folder of the repository:
  sky launch -c {name} {script}         sky jobs launch {script}  starts it anew where its machines are taken away

Sites reach each other and the lighthouse directly, and on any port: put their machines into one private network (peered
networks or a VPN), and name its interface with --replica.interface unless it is the one that leads to the lighthouse."""


def read_places(deployment: Deployment, given: Sequence[str]) -> dict[str, str]:
    """Where sites run, by their names.

    Raises:
        UserError: a place is not of its form.
    """
    places, names = {}, [site.name for site in deployment.sites]
    for text in given:
        site, _, place = text.partition("=")
        if site not in names:
            raise UserError(f"--place {text}: must be SITE=CLOUD[/REGION], SITE one of {', '.join(names)}")
        if place.partition("/")[0] not in CLOUDS:
            raise UserError(f"--place {text}: CLOUD must be one of {', '.join(CLOUDS)}")
        places[site] = place
    return places


def render(deployment: Deployment, places: Mapping[str, str], accelerator: str | None) -> dict[str, str]:
    """The tasks by the names of their files.

    Args:
        deployment: of the run.
        places: CLOUD or CLOUD/REGION of sites; the others go where there is room.
        accelerator: kind of GPU.

    Raises:
        UserError: the lighthouse's address is missing, or the kind of GPU.
    """
    if deployment.lighthouse is None:
        raise UserError(
            f"--lighthouse is missing: give http://HOST:{LIGHTHOUSE_PORT} of a machine that all sites reach, where "
            "`titan-ext lighthouse` runs"
        )
    if accelerator is None and any(site.gpus for site in deployment.sites):
        raise UserError("--accelerator is missing: the kind of GPU, such as H100, or --cpu")
    return {
        f"{label(site.name, 'name')}.yaml": _task(deployment, site, places.get(site.name), accelerator)
        for site in deployment.sites
    }


def next_steps(deployment: Deployment, folder: str) -> list[str]:
    """What to do with the files."""
    names = [label(site.name, "name") for site in deployment.sites]
    lighthouse = f"titan-ext lighthouse {shell(deployment.lighthouse_flags)}        # at {deployment.lighthouse}"
    return [lighthouse, *(f"sky launch -c {deployment.name}-{name} {folder}/{name}.yaml" for name in names)]


def _task(deployment: Deployment, site: DeployedSite, place: str | None, accelerator: str | None) -> str:
    assert deployment.lighthouse is not None
    resources: dict[str, Any] = {"accelerators": f"{accelerator}:{site.gpus}"} if site.gpus else {"cpus": "4+"}
    if place is not None:
        resources["infra"] = place
    else:
        resources["any_of"] = [{"infra": cloud} for cloud in CLOUDS]
    if site.ports:
        resources["ports"] = [str(port) for port in site.ports]
    secrets = [word for key in site.secrets for word in (f"--replica.{key}", f"$HOME/.titan_ext/{key}")]
    arguments = shell(deployment.launch_arguments(site, deployment.file, deployment.lighthouse))
    name = f"{deployment.name}-{label(site.name, 'name')}"
    task = {
        "name": name,
        "num_nodes": site.nodes.count,
        "resources": resources,
        "workdir": ".",
        **({"file_mounts": {f"{_SECRETS}/{key}": path for key, path in site.secrets.items()}} if site.secrets else {}),
        "setup": "bash launch/site.sh --install\n",
        "run": f"chmod -f 600 {_SECRETS}/* || true\nexec bash launch/site.sh {' '.join([arguments, *secrets])}\n",
    }
    note = _NOTE.format(
        site=site.name,
        file=deployment.file,
        nodes=site.nodes.count,
        ranks=site.nodes.ranks_per_node,
        name=name,
        script=f"{label(site.name, 'name')}.yaml",
    )
    return to_yaml([task], comment=note)
