"""Manifests for Kubernetes: a lighthouse, and for each site an Indexed Job whose pods are its nodes."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ext.deploy import mesh
from titan_ext.deploy.deployment import LIGHTHOUSE_PORT, DeployedSite, Deployment, label
from titan_ext.deploy.yaml_text import to_yaml
from titan_ext.errors import UserError

_FILE = "/etc/titan_ext/run.toml"
_SECRETS = "/run/secrets/titan_ext"
# What the launchers restart does not count; this is for machines that come and go.
_POD_FAILURES = 100
_LEAVING_SECONDS = 30
_RUN, _PART = "titan-ext/run", "titan-ext/part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the run's file does not say."""

    image: str
    namespace: str
    claims: Sequence[tuple[str | None, str, str]]
    """Site or None for all, name of the claim, path."""
    peers: mesh.Peers | None


def read_options(deployment: Deployment, args: Namespace) -> Options:
    """Take them from the command line.

    Raises:
        UserError: one is missing or not of its form.
    """
    if not args.image:
        raise UserError("--image is missing: build one from launch/Dockerfile and name it")
    for site in deployment.sites:
        if label(site.name, "name") in (mesh.LIGHTHOUSE, "mesh"):
            raise UserError(
                f'site "{site.name}": something else of the run has this name in Kubernetes; choose another'
            )
    claims = [_claim(text, [site.name for site in deployment.sites]) for text in args.claim]
    peers = mesh.read_peers(args.mesh, deployment) if args.mesh else None
    return Options(image=args.image, namespace=args.namespace, claims=claims, peers=peers)


def render(deployment: Deployment, options: Options) -> dict[str, str]:
    """The manifests by the names of their files; one for each site, to be applied where the site is."""
    files = {}
    if deployment.lighthouse is None:
        comment = f"The lighthouse of {deployment.file}, in the cluster that all sites reach."
        files["lighthouse.yaml"] = to_yaml(_lighthouse(deployment, options), comment=comment)
    for site in deployment.sites:
        nodes = f"{site.nodes.count} node(s) with {site.nodes.ranks_per_node} rank(s) each"
        comment = f"Site {site.name} of {deployment.file}: {nodes}."
        files[f"{label(site.name, 'name')}.yaml"] = to_yaml(_site(deployment, options, site), comment=comment)
    return files


def notes(deployment: Deployment, options: Options) -> list[str]:
    """What a user should know of what is written."""
    return [
        f"site {site.name} writes to {site.dump_folder}, which is on no claim: it is gone when a pod is (--claim)"
        for site in deployment.sites
        if not any(Path(site.dump_folder).is_relative_to(path) for _, path in _claims(options, site))
    ]


def next_steps(deployment: Deployment, options: Options, folder: str) -> list[str]:
    """What to do with the files."""
    inside, steps = f"--namespace {options.namespace}", []
    for site in deployment.sites:
        if site.secrets:
            parts = " ".join(f"--from-file={key}={path}" for key, path in site.secrets.items())
            steps.append(f"kubectl {inside} create secret generic {_name(deployment, site)} {parts}")
    if options.peers is not None:
        keys = " ".join(f"--from-file={name}={name}.key" for name in options.peers.names)
        steps.append(
            f"kubectl {inside} create secret generic {_mesh_name(deployment)} {keys}    # each from `wg genkey`"
        )
    names = ["lighthouse"] if deployment.lighthouse is None else []
    names += [label(site.name, "name") for site in deployment.sites]
    return [*steps, *(f"kubectl apply -f {folder}/{name}.yaml" for name in names)]


def _name(deployment: Deployment, site: DeployedSite) -> str:
    return f"{deployment.name}-{label(site.name, 'name')}"


def _mesh_name(deployment: Deployment) -> str:
    return f"{deployment.name}-mesh"


def _labels(deployment: Deployment, part: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "titan-ext", _RUN: deployment.name, _PART: part}


def _metadata(deployment: Deployment, options: Options, name: str, part: str) -> dict[str, Any]:
    return {"name": name, "namespace": options.namespace, "labels": _labels(deployment, part)}


def _lighthouse(deployment: Deployment, options: Options) -> list[dict[str, Any]]:
    name, part = f"{deployment.name}-lighthouse", "lighthouse"
    metadata, labels = _metadata(deployment, options, name, part), _labels(deployment, part)
    container = {
        "name": part,
        "image": options.image,
        "command": ["titan-ext", "lighthouse", "--bind", f"[::]:{LIGHTHOUSE_PORT}", *deployment.lighthouse_flags],
        "ports": [{"name": "http", "containerPort": LIGHTHOUSE_PORT}],
        "readinessProbe": {"tcpSocket": {"port": "http"}},
        "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
    }
    pod: dict[str, Any] = {"automountServiceAccountToken": False, "containers": [container]}
    if options.peers is not None:
        mesh.join(
            pod,
            options.peers,
            options.image,
            machine=mesh.LIGHTHOUSE,
            names=[mesh.LIGHTHOUSE],
            run=deployment.name,
            part=part,
        )
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    service = {"selector": labels, "ports": [{"name": "http", "port": LIGHTHOUSE_PORT, "targetPort": "http"}]}
    documents = [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        _policy(deployment, options, name, part),
    ]
    return [*documents, *mesh.config_map(deployment.name, options.namespace, options.peers, part)]


def _site(deployment: Deployment, options: Options, site: DeployedSite) -> list[dict[str, Any]]:
    name, part = _name(deployment, site), label(site.name, "name")
    metadata = _metadata(deployment, options, name, part)
    documents = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"run.toml": _read(deployment.file)}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            # Without an address of its own: it gives the pods names, also before they are ready.
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": _labels(deployment, part)},
        },
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": _job(deployment, options, site)},
        _policy(deployment, options, name, part),
    ]
    return [*documents, *mesh.config_map(deployment.name, options.namespace, options.peers, part)]


def _job(deployment: Deployment, options: Options, site: DeployedSite) -> dict[str, Any]:
    labels = _labels(deployment, label(site.name, "name"))
    return {
        "completionMode": "Indexed",
        "completions": site.nodes.count,
        "parallelism": site.nodes.count,
        "backoffLimit": _POD_FAILURES,
        "podFailurePolicy": {
            "rules": [
                # Bad input stays bad.
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "train",
                        "operator": "In",
                        "values": [UserError.exit_code],
                    },
                },
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"labels": labels}, "spec": _pod(deployment, options, site)},
    }


def _pod(deployment: Deployment, options: Options, site: DeployedSite) -> dict[str, Any]:
    name = _name(deployment, site)
    volumes: list[dict[str, Any]] = [
        {"name": "file", "configMap": {"name": name}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},  # NCCL's and the data loader's
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "file", "mountPath": str(Path(_FILE).parent)},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    if site.secrets:
        volumes.append({"name": "secrets", "secret": {"secretName": name, "defaultMode": 0o400}})
        mounts.append({"name": "secrets", "mountPath": _SECRETS, "readOnly": True})
    for place, (claim, path) in enumerate(_claims(options, site)):
        volumes.append({"name": f"claim-{place}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{place}", "mountPath": path})
    container = {
        "name": "train",
        "image": options.image,
        "command": _command(deployment, options, site),
        "volumeMounts": mounts,
        **({"resources": {"limits": {"nvidia.com/gpu": site.gpus}}} if site.gpus else {}),
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": deployment.grace_seconds + _LEAVING_SECONDS,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": volumes,
    }
    if options.peers is not None:
        names = options.peers.of_site(site.name, site.nodes.count)
        mesh.join(
            pod,
            options.peers,
            options.image,
            machine=f"{site.name}-$JOB_COMPLETION_INDEX",
            names=names,
            run=deployment.name,
            part=label(site.name, "name"),
        )
    return pod


def _command(deployment: Deployment, options: Options, site: DeployedSite) -> list[str]:
    name = _name(deployment, site)
    words = ["titan-ext", "launch", _FILE, "--only", site.name, "--lighthouse", _lighthouse_url(deployment, options)]
    if site.nodes.count > 1:
        # The Job controller calls its pods by their index; each finds its own in the environment.
        words += ["--rendezvous", f"{name}-0.{name}:{site.nodes.port}"]
    words += ["--plain", *deployment.flags]
    for key in site.secrets:
        words += [f"--replica.{key}", f"{_SECRETS}/{key}"]
    return words + (["--replica.interface", mesh.INTERFACE] if options.peers is not None else [])


def _lighthouse_url(deployment: Deployment, options: Options) -> str:
    if deployment.lighthouse is not None:
        return deployment.lighthouse
    if options.peers is not None:
        return f"http://{options.peers.address(mesh.LIGHTHOUSE)}:{LIGHTHOUSE_PORT}"
    return f"http://{deployment.name}-lighthouse.{options.namespace}:{LIGHTHOUSE_PORT}"


def _policy(deployment: Deployment, options: Options, name: str, part: str) -> dict[str, Any]:
    """Only pods of the run come in: Gloo takes ports as it finds them, and nothing of it is encrypted."""
    rules: list[dict[str, Any]] = [{"from": [{"podSelector": {"matchLabels": {_RUN: deployment.name}}}]}]
    if options.peers is not None:
        rules += [{"ports": [{"protocol": "UDP", "port": port}]} for port in options.peers.ports()]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(deployment, options, name, part),
        "spec": {
            "podSelector": {"matchLabels": _labels(deployment, part)},
            "policyTypes": ["Ingress"],
            "ingress": rules,
        },
    }


def _claims(options: Options, site: DeployedSite) -> list[tuple[str, str]]:
    """Names and paths of a site's."""
    return [(claim, path) for name, claim, path in options.claims if name in (None, site.name)]


def _claim(text: str, sites: Sequence[str]) -> tuple[str | None, str, str]:
    site, given, rest = text.partition("=")
    claim, colon, path = (rest if given else text).partition(":")
    if not colon or not claim or not path.startswith("/"):
        raise UserError(f"--claim {text}: must be CLAIM:PATH or SITE=CLAIM:PATH, the path beginning with /")
    if given and site not in sites:
        raise UserError(f"--claim {text}: no site {site!r}; the file has {', '.join(sites)}")
    return site if given else None, claim, path


def _read(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")
