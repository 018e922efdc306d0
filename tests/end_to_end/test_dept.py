"""Sites with vocabularies of their own, of real processes: what they share, what stays, what returns."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.end_to_end.forked import lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_runs import pause_alone, start_again, wait_for
from titan_ext.config import load_site, site_cost
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.data.tokenizers.vocabulary import Vocabulary
from titan_ext.inference.checkpoint import find_checkpoint
from titan_ext.inference.model import load_model

TABLES = ("tok_embeddings.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def halves(text_corpus, tmp_path_factory) -> list[Path]:
    """The corpus in two folders, whose texts use different words."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for place, file in enumerate(sorted(text_corpus.iterdir())):
        (folders[place % 2] / file.name).symlink_to(file)
    return folders


@pytest.fixture(scope="module")
def tokenizer(text_corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer((file.read_text() for file in sorted(text_corpus.iterdir())), 700, folder)
    return folder


def dept_config(folder, variant, data, tokenizers, parallelism=None, **more) -> Path:
    config = write_config(
        folder, ["a", "b"], [f'"{each}"' for each in data], parallelism or {}, f'[dept]\nvariant = "{variant}"'
    )
    text = config.read_text().replace('method = "diloco"', more.get("method", 'method = "diloco"'))
    for name, tokenizer in zip("ab", tokenizers):
        text = text.replace(f'name = "{name}"', f'name = "{name}"\ntokenizer = "{tokenizer}"')
    config.write_text(text)
    return config


def parameters_of(config, name, weights="site"):
    site = load_site(config, name, [f"--dump_folder={config.parent}"])
    checkpoint = find_checkpoint("latest", Path(site.config.dump_folder) / "checkpoint")
    return dict(load_model(site, checkpoint, weights=weights).named_parameters())


def train(config, ranks, *flags):
    with lighthouse(2) as url:
        sites = [start_site(config, name, ranks, url, *flags) for name in "ab"]
        for site in sites:
            assert site.wait() == [0] * ranks, site.log()[-3000:]
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
    assert all(line["participants"] == 2 for site in sites for line in site.lines("round"))
    return sites


@pytest.mark.parametrize(
    "layout", ["plain", "pp2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("tp2", "fsdp2", "fsdp2_tp2"))]
)
def test_sites_of_other_tokenizers_share_the_body(layout, tmp_path, text_corpus, tokenizer):
    """SPEC-OPT: equal bodies, tables of two sizes, and no byte of them on the wire."""
    ranks, parallelism = LAYOUTS[layout]
    config = dept_config(tmp_path, "spec-opt", [text_corpus] * 2, ["byte", tokenizer], parallelism)
    sites = train(config, ranks, "--training.steps=4", "--checkpoint.enable", "--checkpoint.interval=10")
    first, second = (parameters_of(config, name) for name in "ab")
    assert (first[TABLES[0]].shape[0], second[TABLES[0]].shape[0]) == (320, 704)
    assert all(torch.equal(first[name], second[name]) for name in first if name not in TABLES)
    body = sum(value.numel() for name, value in first.items() if name not in TABLES)
    norms = sum(value.numel() for value in first.values() if value.dim() == 1)
    copies = parallelism.get("tensor_parallel_degree", 1) - 1  # a norm is on every rank of tensor parallelism
    assert sites[0].summary()["bytes_sent"] == 2 * 4 * (body + copies * norms)
    assert sites[1].summary()["bytes_sent"] == sites[0].summary()["bytes_sent"]
    cost = site_cost(load_site(config, "b", [f"--dump_folder={tmp_path}", "--training.steps=4"]))
    assert cost.run_bytes == sites[0].summary()["bytes_sent"]


@pytest.mark.parametrize(
    "layout", ["fsdp2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("plain", "pp2", "tp2"))]
)
def test_a_row_is_equal_at_the_sites_that_hold_it(layout, tmp_path, halves, tokenizer):
    """TRIM: each site has the rows of its own text; leaders exchange where ranks hold cuts of tables."""
    ranks, parallelism = LAYOUTS[layout]
    config = dept_config(tmp_path, "trim", halves, [tokenizer] * 2, parallelism)
    sites = train(config, ranks, "--training.steps=4", "--checkpoint.enable", "--checkpoint.interval=10")
    found = [parameters_of(config, name) for name in "ab"]
    held = [Vocabulary.load(tmp_path / name / "vocabulary.json").local_ids() for name in "ab"]
    common = (held[0] >= 0) & (held[1] >= 0)
    assert 0 < int(common.sum()) < len(common)
    for table in TABLES:
        rows = [found[place][table][held[place][common]] for place in range(2)]
        assert torch.equal(*rows)
    body = sum(value.numel() for name, value in found[0].items() if name not in TABLES)
    width = found[0][TABLES[0]].shape[1]
    # A row of both tables, and its weight; where the tables are on two ranks, each sends the weight.
    numbers = 2 * width + (2 if layout == "pp2" else 1)
    rows = [[(ids >= 0) & (torch.arange(len(ids)) % 2 == owner) for owner in range(2)] for ids in held]
    bitmap = -(-len(held[0]) // 32) * 4 * (1 if layout == "plain" else 2)  # leaders exchange tables, then weights
    for place, site in enumerate(sites):
        to_owner, to_holder = (int(each.sum()) for each in (rows[place][1 - place], rows[1 - place][place]))
        rounds = 2 * (4 * numbers * (to_owner + to_holder) + bitmap)
        # At the start each row comes from the first site that holds it: values, then momentum.
        first = int((rows[place][1 - place] & (held[0] < 0)).sum()) if place else to_owner
        start = 2 * (4 * numbers * (first + to_holder) + bitmap)
        assert site.summary()["bytes_sent"] == 2 * 4 * body + rounds + start


@pytest.mark.slow
def test_a_killed_site_finds_its_own_embedding_again(tmp_path, text_corpus, tokenizer):
    """SIGKILL in the middle of a SPEC run: the body comes from the peer, the embedding from the site's checkpoint.

    The site returns with learning rate 0, so what its tables hold at the end is what they held at the checkpoint.
    """
    config = dept_config(tmp_path, "spec-opt", [text_corpus] * 2, ["byte", tokenizer])
    flags = ["--training.steps=60", "--semi_sync.sync_every=6", "--replica.min_sites=1"]
    keep = ["--checkpoint.enable", "--checkpoint.interval=5"]
    saved = ["--checkpoint.enable", "--checkpoint.interval=1000"]
    with lighthouse(1) as url:
        first = start_site(config, "a", 1, url, *flags, *saved, pause=tmp_path / "pause")
        second = start_site(config, "b", 1, url, *flags, *keep)
        folder = tmp_path / "b" / "checkpoint"
        wait_for(lambda: len([*folder.glob("step-*/.metadata")]) >= 2, first, second)
        os.kill(second.ranks[0].pid, signal.SIGKILL)
        assert second.wait() == [-signal.SIGKILL]
        pause_alone(config, first)
        before = {name: value.clone() for name, value in parameters_of(config, "b").items()}
        again = start_again(config, "b", 1, url, *flags, *keep, "--optimizer.lr=0")
        for site in (first, again):
            assert site.wait() == [0], site.log()[-3000:]
    assert first.summary()["shared_state_sha256"] == again.summary()["shared_state_sha256"]
    peer, after = (parameters_of(config, name) for name in "ab")
    for name, value in after.items():
        assert torch.equal(value, before[name] if name in TABLES else peer[name]), name
    assert not torch.equal(after["norm.weight"], before["norm.weight"])


def test_rounds_of_drawn_sites_keep_one_clock(tmp_path, halves):
    """A site that sits out trains on nothing, and the learning rate goes on (models.md 1(f) 9)."""
    config = dept_config(tmp_path, "glob", halves, ["byte"] * 2, method='method = "local_sgd"\nsites_per_round = 1')
    with lighthouse(2) as url:
        sites = [start_site(config, name, 1, url, "--training.steps=12") for name in "ab"]
        for site in sites:
            assert site.wait() == [0], site.log()[-3000:]
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
    rounds = [line["contributors"] for line in sites[0].lines("round")]
    assert [len(each) for each in rounds] == [1] * 6 and {each[0] for each in rounds} == {"a", "b"}
    trained = [[line["step"] for line in site.lines("step")] for site in sites]
    for place, name in enumerate("ab"):
        assert trained[place] == [
            step for turn, each in enumerate(rounds) if each == [name] for step in (2 * turn + 1, 2 * turn + 2)
        ]
    rates = {line["step"]: line["lr"] for site in sites for line in site.lines("step")}
    assert sorted(rates) == list(range(1, 13))
    assert all(rates[step] >= rates[step + 1] for step in range(1, 12)), "one schedule, wherever a step is taken"
