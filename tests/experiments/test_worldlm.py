"""``titan-ext bench worldlm`` at toy size."""

import json

import pytest
import torch

from tests.experiments.wrong_options import assert_one_line
from titan_ext import cli
from titan_ext.experiments.languages import training, validation
from titan_ext.experiments.worldlm.arms import ARMS, SWAPPED, WORLDLM, Settings, outer_loop, regions
from titan_ext.semi_sync.plan.resolve import resolve

COMMAND = ["bench", "worldlm", "--dim", "32", "--layers", "2", "--steps", "4", "--sync-every", "2", "--batch", "2"]
COMMAND += ["--length", "8", "--seeds", "1", "--workers", "1", "--federations", "a1,a2/b1,b2"]
SETTINGS = Settings(
    corpus="",
    federations="a1,a2/b1,b2",
    dim=32,
    layers=2,
    steps=4,
    batch=2,
    length=400,
    sync_every=2,
    device="cpu",
)


def test_a_row_for_each_arm_with_the_loss_of_each_site(capsys):
    assert cli.main([*COMMAND, "--arms", "local,centralised,fedavg,fedper,worldlm,worldlm_swapped"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = {row["arm"]: row for row in figures["rows"]}
    assert list(rows) == ["local", "centralised", "fedavg", "fedper", "worldlm", "worldlm_swapped"]
    for arm, row in rows.items():
        assert len(row["by_site"]) == 4 and all(0 < loss < 10 for loss in row["by_site"])
        assert (row["bytes_sent"] == 0) is (arm == "local")
    assert rows["fedavg"]["less"] == 0.0
    assert rows["fedper"]["bytes_sent"] < rows["fedavg"]["bytes_sent"] < rows["worldlm"]["bytes_sent"]
    assert len(figures["claims"]) == 3


def test_all_arms_are_plans():
    for arm in ARMS[2:]:
        resolve(outer_loop(arm, SETTINGS))
    assert regions(WORLDLM, SETTINGS) == ["f0", "f0", "f1", "f1"]
    assert regions(SWAPPED, SETTINGS) == ["f0", "f1", "f1", "f0"]


def test_made_up_languages_of_one_family_are_alike():
    """Of the symbols that follow each other, counted: sisters differ less than languages of two families."""

    def counts(language):
        batch = next(training(SETTINGS, language, 0))
        pairs = batch.inputs * 256 + batch.labels
        return torch.bincount(pairs.flatten(), minlength=256 * 256) / pairs.numel()

    one, sister, stranger = counts("a1"), counts("a2"), counts("b1")
    assert (one - sister).abs().sum() < 0.8 * (one - stranger).abs().sum()
    first, again = (next(training(SETTINGS, "a1", seed)).inputs for seed in (0, 0))
    assert torch.equal(first, again) and not torch.equal(first, next(training(SETTINGS, "a1", 1)).inputs)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(validation(SETTINGS, "a1"), validation(SETTINGS, "a1")))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--federations", "a1,a2"], "--federations"),
        (["--federations", "a1/a1"], "--federations"),
        (["--federations", "a1,/b"], "--federations"),
        (["--arms", "worldlm"], "--arms"),
        (["--arms", "fedavg,nonsense"], "--arms"),
        (["--steps", "5"], "--steps"),
        (["--corpus", "/no/such/folder"], "--corpus"),
    ],
)
def test_a_wrong_option_is_one_line(flags, said, capsys):
    assert_one_line([*COMMAND, *flags], said, capsys)
