"""What `titan-ext deploy` writes: from the run's file, as each scheduler wants it."""

import re
import subprocess

import pytest

from tests.deploy.renders import FLAGS, ROOT, RUN, deploy, documents, run_file, srun_words
from titan_ext import cli

PEERS = """\
# site key endpoint address
east-0    - 192.0.2.1:51820 10.88.0.1
east-1    - -               10.88.0.2
West_2-0  - -               10.88.0.3
lighthouse - 192.0.2.9:4500 fd00::9
"""


def comment_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_a_job_of_slurms_has_the_sites_nodes_and_gpus(tmp_path):
    files = deploy(run_file(tmp_path), "slurm", tmp_path / "out", "--training.steps", "9", "--grace-seconds", "45")
    assert set(files) == {"east.sbatch", "west-2.sbatch", "lighthouse.sh"}
    east, west = comment_lines(files["east.sbatch"]), comment_lines(files["west-2.sbatch"])
    assert {"--job-name=my-run-east", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--requeue"} <= set(east)
    assert {"--job-name=my-run-west-2", "--nodes=1", "--gpus-per-node=2", "--signal=TERM@60"} <= set(west)
    assert srun_words(files["east.sbatch"])[:5] == [
        "bash",
        "launch/site.sh",
        str(tmp_path / "my_run.toml"),
        "east",
        "http://login1:29510",
    ]
    assert srun_words(files["east.sbatch"])[-2:] == ["--training.steps", "9"]
    assert "--bind '[::]:29510' --min-sites 2 --join-timeout-seconds 90" in files["lighthouse.sh"]
    for name, text in files.items():
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0, name


def test_without_gpus_none_is_asked_for(tmp_path):
    assert "--gpus" not in deploy(run_file(tmp_path), "slurm", tmp_path / "slurm", "--cpu")["east.sbatch"]
    pods = documents(deploy(run_file(tmp_path), "kubernetes", tmp_path / "k8s", "--cpu")["east.yaml"], "Job")
    assert "resources" not in pods[0]["spec"]["template"]["spec"]["containers"][0]
    assert (
        "accelerators"
        not in documents(deploy(run_file(tmp_path), "skypilot", tmp_path / "sky", "--cpu")["east.yaml"])[0]["resources"]
    )


def test_an_indexed_job_whose_pods_find_the_first_of_them(tmp_path, capsys):
    files = deploy(run_file(tmp_path), "kubernetes", tmp_path / "out", "--namespace", "llm")
    assert set(files) == {"lighthouse.yaml", "east.yaml", "west-2.yaml"}
    (job,), (service,) = documents(files["east.yaml"], "Job"), documents(files["east.yaml"], "Service")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "my-run-east"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    (train,) = pod["containers"]
    words = train["command"]
    assert words[words.index("--rendezvous") + 1] == "my-run-east-0.my-run-east:29500"
    assert words[words.index("--lighthouse") + 1] == "http://my-run-lighthouse.llm:29510"
    assert train["resources"]["limits"] == {"nvidia.com/gpu": 1}
    # Bad input is not tried again.
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    # The secret is a file that only its owner reads, and is not written down.
    (secrets,) = [volume for volume in pod["volumes"] if volume["name"] == "secrets"]
    assert secrets["secret"] == {"secretName": "my-run-east", "defaultMode": 0o400}
    assert words[words.index("--replica.secret_file") + 1] == "/run/secrets/titan_ext/secret_file"
    assert not documents(files["east.yaml"], "Secret")
    assert "create secret generic my-run-east --from-file=secret_file=secrets/run" in capsys.readouterr().out
    # The file as it is.
    assert documents(files["east.yaml"], "ConfigMap")[0]["data"]["run.toml"] == RUN
    assert [volume["persistentVolumeClaim"] for volume in pod["volumes"] if volume["name"].startswith("claim")] == [
        {"claimName": "data"}
    ]


def test_only_pods_of_the_run_come_in(tmp_path):
    files = deploy(run_file(tmp_path), "kubernetes", tmp_path / "out")
    for text in files.values():
        (policy,) = documents(text, "NetworkPolicy")
        (rule,) = policy["spec"]["ingress"]
        assert rule == {"from": [{"podSelector": {"matchLabels": {"titan-ext/run": "my-run"}}}]}
        pods = [
            each["spec"]["template"]
            for each in documents(text)
            if "template" in each["spec" if "spec" in each else "data"]
        ]
        assert all(
            policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items() for pod in pods
        )
        assert len(pods) == 1


def test_a_site_that_writes_into_its_pod_alone_is_told(tmp_path, capsys):
    deploy(run_file(tmp_path), "kubernetes", tmp_path / "out", "--dump_folder", "/tmp/run")
    assert "note: site east writes to /tmp/run, which is on no claim" in capsys.readouterr().out
    deploy(run_file(tmp_path), "kubernetes", tmp_path / "out")
    assert "note:" not in capsys.readouterr().out


def test_a_lighthouse_elsewhere_is_not_written(tmp_path):
    files = deploy(run_file(tmp_path), "kubernetes", tmp_path / "out", "--lighthouse", "lighthouse.example:1234")
    assert set(files) == {"east.yaml", "west-2.yaml"}
    assert "http://lighthouse.example:1234" in files["east.yaml"]


def test_pods_join_the_mesh_before_they_train(tmp_path):
    peers = tmp_path / "peers"
    peers.write_text(PEERS)
    files = deploy(run_file(tmp_path), "kubernetes", tmp_path / "out", "--mesh", str(peers))
    pod = documents(files["east.yaml"], "Job")[0]["spec"]["template"]["spec"]
    (join,) = pod["initContainers"]
    assert join["securityContext"]["capabilities"] == {"add": ["NET_ADMIN"]}
    assert 'mesh.sh up "east-$JOB_COMPLETION_INDEX"' in join["command"][-1]
    (train,) = pod["containers"]
    assert "securityContext" not in train
    assert train["ports"] == [{"containerPort": 51820, "hostPort": 51820, "protocol": "UDP"}]
    words = train["command"]
    assert words[words.index("--lighthouse") + 1] == "http://[fd00::9]:29510"
    assert words[words.index("--replica.interface") + 1] == "wg0"
    mounted = {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
    assert mounted == {each["metadata"]["name"] for each in documents(files["east.yaml"], "ConfigMap")}
    other = documents(files["west-2.yaml"], "Job")[0]["spec"]["template"]["spec"]["containers"][0]
    assert "ports" not in other
    lighthouse = documents(files["lighthouse.yaml"], "Deployment")[0]["spec"]["template"]["spec"]
    assert 'up "lighthouse"' in lighthouse["initContainers"][0]["command"][-1]


@pytest.mark.parametrize("mesh", [False, True])
def test_manifests_are_as_kubernetes_publishes_them(mesh, tmp_path):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    peers = tmp_path / "peers"
    peers.write_text(PEERS)
    files = deploy(run_file(tmp_path), "kubernetes", tmp_path / "out", *(["--mesh", str(peers)] if mesh else []))
    kinds = set()
    for text in files.values():
        for document in documents(text):
            validate.validate(document, "1.31", strict=True)
            kinds.add(document["kind"])
            assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
    assert kinds == {"ConfigMap", "Deployment", "Job", "NetworkPolicy", "Service"}


def test_a_task_of_skypilots_runs_the_site_on_the_cloud_that_is_named(tmp_path):
    files = deploy(run_file(tmp_path), "skypilot", tmp_path / "out", "--place", "east=aws/us-east-1")
    (east,), (west,) = documents(files["east.yaml"]), documents(files["west-2.yaml"])
    assert (east["name"], east["num_nodes"], west["num_nodes"]) == ("my-run-east", 2, 1)
    assert east["resources"]["accelerators"] == "H100:1" and west["resources"]["accelerators"] == "H100:2"
    assert east["resources"]["infra"] == "aws/us-east-1"
    assert west["resources"]["any_of"] == [{"infra": cloud} for cloud in ("aws", "gcp", "azure")]
    assert east["file_mounts"] == {"~/.titan_ext/secret_file": "secrets/run"}
    assert "launch/site.sh" in east["run"] and east["run"].rstrip().endswith(
        "--replica.secret_file $HOME/.titan_ext/secret_file"
    )
    assert subprocess.run(["bash", "-n"], input=east["run"], text=True).returncode == 0


@pytest.mark.parametrize("place", ["aws/us-east-1", "gcp", "azure/westeurope", None])
def test_skypilot_reads_its_tasks(place, tmp_path):
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "run").write_text("0" * 32)
    file = run_file(tmp_path, RUN.replace('"secrets/run"', f'"{tmp_path}/secrets/run"'))
    deploy(file, "skypilot", tmp_path / "out", *([f"--place=east={place}"] if place else []))
    task = sky.Task.from_yaml(str(tmp_path / "out" / "east.yaml"))
    assert task.num_nodes == 2
    clouds = {str(each.cloud).lower() for each in task.resources}
    assert clouds == ({place.partition("/")[0]} if place else {"aws", "gcp", "azure"})


@pytest.mark.parametrize(
    ("to", "flags", "words"),
    [
        ("slurm", [], ["--lighthouse is missing"]),
        ("skypilot", ["--accelerator", "H100"], ["--lighthouse is missing"]),
        ("skypilot", ["--lighthouse", "h:1"], ["--accelerator is missing"]),
        ("skypilot", ["--lighthouse", "h:1", "--cpu", "--place", "south=aws"], ["--place south=aws", "east, West_2"]),
        ("skypilot", ["--lighthouse", "h:1", "--cpu", "--place", "east=moon"], ["--place east=moon", "aws, gcp, azure"]),
        ("kubernetes", [], ["--image is missing"]),
        ("kubernetes", ["--image", "i", "--claim", "data"], ["--claim data", "CLAIM:PATH"]),
        ("kubernetes", ["--image", "i", "--claim", "south=data:/d"], ["no site 'south'"]),
        ("kubernetes", ["--image", "i", "--mesh", "/no/file"], ["--mesh /no/file", "No such file"]),
        ("slurm", ["--lighthouse", "nowhere"], ["nowhere", "host:port"]),
        ("slurm", ["--lighthouse", "h:1", "--name", "7"], ["--name '7'"]),
        ("slurm", ["--lighthouse", "h:1", "--name", "x" * 31], ["at most 30"]),
        ("slurm", ["--lighthouse", "h:1", "--out", "/proc/nothing"], ["--out /proc/nothing"]),
        ("slurm", ["--lighthouse", "h:1", "--nodes", "3"], ["nodes = 3", "must divide"]),
        ("slurm", ["--lighthouse", "h:1", "--data_parallel_shard_degree", "2"], ["parallelism.data_parallel_shard_degree"]),
        ("slurm", ["--lighthouse", "h:1", "--parallelism.data_parallel_shard_degree", "-1", "--nodes=1"], ["nproc_per_node is missing"]),
        ("slurm", ["--lighthouse", "h:1", "--max-restarts", "-1"], ["--max-restarts"]),
    ],
)  # fmt: skip
def test_what_a_scheduler_needs_and_has_not_is_one_line(to, flags, words, tmp_path, capsys):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    file = run_file(tmp_path, RUN.replace('secret_file = "secrets/run"\n', ""))
    assert cli.main(["deploy", str(file), "--to", to, *out, *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.startswith("titan-ext: error:") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('name = "West_2"', 'name = "EAST."'), ["another site is called 'east'"]),
        (('name = "West_2"', f'name = "{"w" * 31}"'), ["at most 30 letters"]),
        (('name = "West_2"', 'name = "lighthouse"'), ["something else of the run has this name"]),
    ],
)
def test_names_that_a_scheduler_cannot_tell_apart_are_refused(change, words, tmp_path, capsys):
    file = run_file(tmp_path, RUN.replace(*change))
    assert (
        cli.main(["deploy", str(file), "--to", "kubernetes", "--out", str(tmp_path / "out"), *FLAGS["kubernetes"]]) == 2
    )
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_the_image_is_built_from_what_is_there():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / each).exists() for each in copied)
    assert "/opt/titan_ext/launch" in "\n".join(lines), "where the mesh is joined"
