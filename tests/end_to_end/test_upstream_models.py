"""torchtitan's own models at two sites: every one that a CPU can train, and experts cut over ranks, stopped and resumed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from tests.end_to_end.file_runs import FileRun, train_in_turn
from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from titan_ext.config import load_site, site_cost
from titan_ext.models.held_experts import held_experts

pytestmark = pytest.mark.timeout(900)

SITES = ("a", "b")
STEPS = 6
HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "top_k": 2, "expert_dim": 16}
MODELS = {
    "qwen3": ("qwen3", "debugmodel_non_fused_qkv", HEADS | {"ffn_dim": 48}),
    "qwen3_moe": ("qwen3", "debugmodel_moe", HEADS | EXPERTS),
    "deepseek_v3": ("deepseek_v3", "debugmodel", {"n_heads": 2, "ffn_dim": 48} | EXPERTS),
    "gpt_oss": ("gpt_oss", "debugmodel", HEADS | EXPERTS),
    "fomoe": ("qwen3", "debugmodel_moe", HEADS | EXPERTS),
    "llama3": ("torchtitan.models.llama3", "debugmodel", HEADS | {"ffn_dim": 48}),
}
DILOCO = 'method = "diloco"\nsync_every = 3'
DES_LOC = (
    'method = "des_loc"\nsync_every = 2\n[semi_sync.des_loc]\nfirst_moment_sync_every = 2\nsecond_moment_sync_every = 4'
)
METHODS = {"qwen3_moe": DILOCO, "deepseek_v3": DES_LOC}
FOMOE = "[fomoe]\nsites_per_expert = 1"
TWO_RANKS = ["--parallelism.data_parallel_shard_degree=2", "--parallelism.expert_parallel_degree=2"]


def write_file(folder: Path, model: str, corpus: Path) -> Path:
    name, flavor, sizes = MODELS[model]
    keys = "".join(f"{key} = {value}\n" for key, value in (sizes | {"dim": 32, "n_layers": 2}).items())
    tables = "".join(
        f'[[site]]\nname = "{site}"\ndata = {{dataset = "{corpus}", seed = {ord(site)}}}\n' for site in SITES
    )
    path = folder / f"{model}.toml"
    path.write_text(
        f"""
[model]
name = "{name}"
flavor = "{flavor}"
{keys}
[training]
seq_len = 64
local_batch_size = 4
steps = {STEPS}
[optimizer]
name = "AdamW"
lr = 1e-2
[lr_scheduler]
warmup_steps = 1
total_steps = {STEPS}
[metrics]
enable_tensorboard = false
[replica]
min_sites = 2
[semi_sync]
{METHODS.get(model, DILOCO)}
{FOMOE if model == "fomoe" else ""}
{tables}
"""
    )
    return path


def train(folder: Path, files: list[tuple[Path, list[str]]], ranks: int) -> None:
    """Train the files one after the other, each site in the same processes."""
    train_in_turn([FileRun(path=path, sites=SITES, flags=flags) for path, flags in files], folder, ranks, timeout=600)


def sites_of(folder: Path, stem: str) -> list[SiteRun]:
    sites = [SiteRun(site, folder / stem, []) for site in SITES]
    for site in sites:
        assert not site.failure(), site.failure()
    return sites


def one_state(folder: Path, stem: str) -> str:
    (digest,) = {site.summary()["shared_state_sha256"] for site in sites_of(folder, stem)}
    return digest


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_corpus) -> Iterator[Path]:
    """Every model of ``MODELS``, at one rank a site."""
    folder = tmp_path_factory.mktemp("models")
    train(folder, [(write_file(folder, model, text_corpus), []) for model in MODELS], 1)
    yield folder


@pytest.mark.parametrize("model", MODELS)
def test_a_model_of_torchtitan_trains_at_two_sites(model, trained):
    one_state(trained, model)
    for site in sites_of(trained, model):
        losses = site.losses()
        assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3, losses
        assert all(line["committed"] and line["participants"] == 2 for line in site.lines("round"))
        routed = [line.get("routing/entropy") for line in site.lines("step")]
        assert all(0 < each <= 1 for each in routed) if "num_experts" in MODELS[model][2] else not any(routed)


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3", "fomoe"])
def test_bytes_are_those_that_check_tells(model, trained):
    """In every round but FoMoE's first, in which sites also tell each other what they hold of the experts."""
    site = load_site(trained / f"{model}.toml", "a")
    sent = [line["bytes_sent"] for line in sites_of(trained, model)[0].lines("round")]
    cost = site_cost(site)
    assert max(sent[1:]) == cost.round_bytes if model == "fomoe" else sum(sent) == cost.run_bytes


@pytest.mark.parametrize("model", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_experts_cut_over_ranks_are_resumed_bit_for_bit(model, tmp_path, text_corpus):
    whole = write_file(tmp_path, model, text_corpus)
    halves = whole.with_stem(f"{model}_halves")
    halves.write_text(whole.read_text())
    saving = [*TWO_RANKS, "--checkpoint.enable", "--checkpoint.interval=3"]
    train(tmp_path, [(whole, TWO_RANKS), (halves, [*saving, "--training.steps=3"]), (halves, saving)], 2)
    assert one_state(tmp_path, model) == one_state(tmp_path, f"{model}_halves")
    for one, two in zip(sites_of(tmp_path, model), sites_of(tmp_path, f"{model}_halves")):
        assert one.losses() == two.losses()
        assert one.losses()[-1] < one.losses()[0] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3_moe", "fomoe"])
def test_sites_that_cut_their_experts_differently_share_them(model, tmp_path, text_corpus):
    """One site cuts its model over two ranks and the other has all on one: their leaders exchange whole experts."""
    path = write_file(tmp_path, model, text_corpus)
    tables = path.read_text().split("[[site]]")
    experts = "" if model == "fomoe" else "expert_parallel_degree = 2\n"
    cut = f"nproc = 2\n[site.parallelism]\ndata_parallel_shard_degree = 2\n{experts}"
    path.write_text("[[site]]".join([tables[0], tables[1] + cut, tables[2]]))
    with lighthouse(2) as url:
        sites = [start_site(path, name, ranks, url) for name, ranks in zip(SITES, (2, 1))]
        for site in sites:
            assert site.wait(600) == [0] * len(site.ranks), site.log()[-3000:]
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
    for site in sites:
        assert site.losses()[-1] < site.losses()[0] - 0.3
        assert all(line["committed"] and line["participants"] == 2 for line in site.lines("round"))


@pytest.mark.slow
def test_three_sites_hold_two_copies_of_each_expert_and_are_resumed(tmp_path, text_corpus):
    path = write_file(tmp_path, "fomoe", text_corpus)
    third = f'[[site]]\nname = "c"\ndata = {{dataset = "{text_corpus}", seed = 3}}\n'
    text = (
        path.read_text()
        .replace("sites_per_expert = 1", "sites_per_expert = 2")
        .replace("min_sites = 2", "min_sites = 3")
    )
    path.write_text(text.replace("num_experts = 4", "num_experts = 6") + third)

    def trained(folder, *flags):
        with lighthouse(3) as url:
            sites = [start_site(path, name, 1, url, f"--dump_folder={folder}", *flags) for name in "abc"]
            for site in sites:
                assert site.wait(600) == [0], site.log()[-3000:]
        return [SiteRun(name, folder, []) for name in "abc"]

    saving = ["--checkpoint.enable", "--checkpoint.interval=3"]
    whole = trained(tmp_path / "whole", *saving)
    trained(tmp_path / "halves", *saving, "--training.steps=3")
    halves = trained(tmp_path / "halves", *saving)
    assert len({site.summary()["shared_state_sha256"] for site in [*whole, *halves]}) == 1
    experts: dict[int, list[torch.Tensor]] = {}
    for place, (one, two) in enumerate(zip(whole, halves)):
        assert one.losses() == two.losses()
        assert one.lines("round")[-1]["bytes_sent"] == site_cost(load_site(path, one.name)).round_bytes
        (mine, theirs) = (expert_rows_of(site) for site in (one, two))
        assert torch.equal(mine, theirs)
        for row, expert in enumerate(held_experts(6, 2, place, 3)):
            experts.setdefault(expert, []).append(mine[row])
    assert all(len(copies) == 2 and torch.equal(*copies) for copies in experts.values()), "both holders have one expert"


def expert_rows_of(site: SiteRun) -> torch.Tensor:
    """One matrix of the experts in a site's last checkpoint."""
    name = "layers.0.moe.routed_experts.inner_experts.w1_EFD"
    return _load_state_dict_from_keys({name}, checkpoint_id=site.folder / site.name / "checkpoint" / f"step-{STEPS}")[
        name
    ]
