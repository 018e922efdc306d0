"""Files to deploy, and what `titan-ext deploy` writes for them."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from titan_ext import cli
from titan_ext.launcher.placement import free_port

ROOT = Path(__file__).parents[2]
FLAGS = {
    "slurm": ["--lighthouse", "http://login1:29510"],
    "kubernetes": ["--image", "images/titan-ext:1", "--claim", "data:/data"],
    "skypilot": ["--lighthouse", "http://10.0.0.5:29510", "--accelerator", "H100"],
}

_TRAINS = """\
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
"""
RUN = f"""\
dump_folder = "/data/runs"
{_TRAINS}secret_file = "secrets/run"
join_timeout_seconds = 90.0
[[site]]
name = "east"
nodes = 2
data = "builtin:code"
[[site]]
name = "West_2"
data = "builtin:code"
"""


def run_file(folder: Path, text: str = RUN) -> Path:
    path = folder / "my_run.toml"
    path.write_text(text)
    return path


def small_run(dump_folder: Path, **nodes: int) -> str:
    """A file whose sites, with so many nodes each, train on any machine."""
    sites = "".join(
        f'[[site]]\nname = "{name}"\nnodes = {count}\nrendezvous_port = {free_port()}\ndata = "builtin:code"\n'
        for name, count in nodes.items()
    )
    return f"""\
dump_folder = "{dump_folder}"
{_TRAINS}{sites}"""


def deploy(file: Path, to: str, out: Path, *flags: str) -> dict[str, str]:
    """The files that are written, by their names."""
    assert cli.main(["deploy", str(file), "--to", to, "--out", str(out), *FLAGS[to], *flags]) == 0
    return {path.name: path.read_text() for path in out.iterdir()}


def documents(text: str, kind: str | None = None) -> list[Any]:
    return [each for each in yaml.safe_load_all(text) if kind is None or each["kind"] == kind]


def srun_words(script: str) -> list[str]:
    """What a job script lets srun start at each node."""
    (line,) = [line for line in script.splitlines() if line.startswith("exec srun ")]
    words = shlex.split(line)
    return words[words.index("bash") :]
