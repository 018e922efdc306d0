"""Where a site's ranks are: ``nodes``, ``nproc``, ``nproc_per_node`` and ``rendezvous_port``."""

from pathlib import Path

import pytest

from titan_ext.config import load_site
from titan_ext.config.nodes import Nodes
from titan_ext.errors import UserError


def site(folder: Path, table: str, *flags: str, parallelism: str = "", top: str = ""):
    file = folder / "run.toml"
    file.write_text(f'data = "builtin:code"\n{top}\n[parallelism]\n{parallelism}\n[[site]]\nname = "a"\n{table}')
    return load_site(file, "a", list(flags))


@pytest.mark.parametrize(
    ("table", "flags", "parallelism", "nodes"),
    [
        ("", [], "", Nodes(1, 1, None, 0)),
        ("nodes = 2", [], "data_parallel_shard_degree = 8", Nodes(2, 4, 29500, 0)),
        ("nodes = 2\nnproc_per_node = 4", [], "", Nodes(2, 4, 29500, 0)),
        ("nodes = 2\nnproc = 4\nrendezvous_port = 7", [], "", Nodes(2, 2, 7, 0)),
        ("nproc_per_node = 2\nrendezvous_port = 7", [], "", Nodes(1, 2, 7, 0)),
        ("nproc_per_node = 2", ["--nodes=3"], "", Nodes(3, 2, 29500, 0)),
        # The first rank of the last stage knows the loss, but the first of all where stages go there and back.
        ("nodes = 2", [], "pipeline_parallel_degree = 2\ndata_parallel_shard_degree = 2", Nodes(2, 2, 29500, 1)),
        ("nodes = 4", [], "pipeline_parallel_degree = 2\ndata_parallel_shard_degree = 4", Nodes(4, 2, 29500, 2)),
    ],
)
def test_ranks_are_spread_evenly(table, flags, parallelism, nodes, tmp_path):
    found = site(tmp_path, table, *flags, parallelism=parallelism)
    assert found.nodes == nodes and found.nproc == nodes.count * nodes.ranks_per_node


@pytest.mark.parametrize(
    ("table", "parallelism", "words"),
    [
        ("nodes = 0", "", ["nodes = 0", "at least 1"]),
        ("nodes = 1.5", "", ["nodes = 1.5"]),
        ("nproc_per_node = 0", "", ["nproc_per_node = 0", "at least 1"]),
        ("nodes = 2", "data_parallel_shard_degree = 3", ["nodes = 2", "must divide the site's 3 rank(s)"]),
        ("nodes = 2\nnproc = 8\nnproc_per_node = 2", "", ["nproc = 8", "must be 4", "nodes (2)"]),
        ("nodes = 2\nnproc_per_node = 4", "tensor_parallel_degree = 3", ["nproc_per_node = 4", "makes 8 ranks", "multiple of"]),
        ("nodes = 2\nnproc_per_node = 4", "data_parallel_shard_degree = 4", ["nproc_per_node = 4", "makes 8 ranks", "must be 4"]),
        ("nproc = 8", "data_parallel_shard_degree = 4", ["nproc = 8", "must be 4"]),
        ("rendezvous_port = 0", "", ["rendezvous_port = 0", "1 to 65535"]),
        ("rendezvous_port = 65536", "", ["rendezvous_port = 65536"]),
        ("node = 2", "", ["node", "did you mean nodes"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_with_the_users_key(table, parallelism, words, tmp_path):
    with pytest.raises(UserError) as caught:
        site(tmp_path, table, parallelism=parallelism)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("table", "told"), [("nodes = 2", True), ("nproc = 2", False)])
def test_tensor_parallelism_over_nodes_is_told(table, told, tmp_path):
    found = site(tmp_path, table, parallelism="tensor_parallel_degree = 2\ndata_parallel_shard_degree = 1")
    assert any("spans nodes" in note for note in found.notes) is told
