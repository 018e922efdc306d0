"""Every parallel layout at two sites: trains, syncs every parameter, ends with one hash."""

import re
from pathlib import Path

import pytest

from tests.end_to_end.file_runs import FileRun, train_in_turn
from tests.end_to_end.forked import lighthouse, start_site

LAYOUTS = {
    "plain": (1, {}),
    "fsdp2": (2, {"data_parallel_shard_degree": 2}),
    "tp2": (2, {"tensor_parallel_degree": 2}),
    "pp2": (2, {"pipeline_parallel_degree": 2}),
    "fsdp2_tp2": (4, {"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2}),
    "fsdp2_pp2": (4, {"data_parallel_shard_degree": 2, "pipeline_parallel_degree": 2}),
}
STEPS = 5
_LONG = ("plain", "fsdp2", "tp2", "fsdp2_pp2")  # parts of layouts that are run anyway


def write_config(folder: Path, sites: list[str], data: list[str], parallelism: dict[str, int], extra: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    degrees = {"data_parallel_shard_degree": 1} | parallelism
    tables = "".join(f'[[site]]\nname = "{name}"\ndata = {value}\n' for name, value in zip(sites, data))
    path = folder / "run.toml"
    path.write_text(
        f"""
[model]
flavor = "tiny"
[training]
seq_len = 64
local_batch_size = 4
steps = {STEPS}
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 1
[metrics]
enable_tensorboard = false
[parallelism]
{"".join(f"{key} = {value}{chr(10)}" for key, value in degrees.items())}
[semi_sync]
method = "diloco"
sync_every = 2
[replica]
min_sites = {len(sites)}
{extra}
{tables}
"""
    )
    return path


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=pytest.mark.slow) if each in _LONG else each for each in LAYOUTS]
)
def test_two_sites_with_one_corpus_equal_a_single_site(layout, tmp_path, text_corpus):
    """Identical data and seed at both sites: their mean is what either has, so they equal one site alone."""
    ranks, parallelism = LAYOUTS[layout]
    same = [f'{{dataset = "{text_corpus}", share_index = 0, share_count = 1}}'] * 2
    runs = [
        FileRun(
            path=write_config(tmp_path / "file", sites, same[: len(sites)], parallelism).rename(
                tmp_path / f"{name}.toml"
            ),
            sites=tuple(sites),
            flags=[],
        )
        for name, sites in (("two", ["a", "b"]), ("one", ["a"]))
    ]
    sites, (alone,) = train_in_turn(runs, tmp_path, ranks)
    assert not any(site.failure() for site in (*sites, alone))
    digests = {site.summary()["shared_state_sha256"] for site in sites}
    assert len(digests) == 1
    assert all(len(site.losses()) == STEPS for site in sites)
    for site in sites:
        assert site.losses() == pytest.approx(alone.losses(), rel=1e-4)
        assert [line["participants"] for line in site.lines("round")] == [2, 2]
    parameters = count_of_parameters((tmp_path / "rank_site0_0.txt").read_text())
    assert sites[0].summary()["bytes_sent"] >= 2 * 4 * parameters
    assert alone.summary()["bytes_sent"] == 0


def count_of_parameters(log: str) -> int:
    """Parameters of the model as torchtitan's log names them."""
    found = re.search(r"size: ([\d,]+) total parameters", re.sub(r"\x1b\[[\d;]*m", "", log))
    return int(found.group(1).replace(",", ""))


def test_sites_with_their_own_corpora_agree_and_learn(tmp_path, text_corpus):
    half = [f'{{dataset = "{text_corpus}", seed = {seed}}}' for seed in (1, 2)]
    with lighthouse(2) as url:
        config = write_config(tmp_path, ["a", "b"], half, {"data_parallel_shard_degree": 2})
        sites = [start_site(config, name, 2, url, "--training.steps=12", "--optimizer.lr=5e-3") for name in ("a", "b")]
        for site in sites:
            assert site.wait() == [0, 0], site.log()[-3000:]
    first, second = sites
    assert first.summary()["shared_state_sha256"] == second.summary()["shared_state_sha256"]
    assert first.losses() != second.losses()
    for site in sites:
        assert site.losses()[-1] < site.losses()[0] - 0.5
