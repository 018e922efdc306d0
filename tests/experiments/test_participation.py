"""``titan-ext bench participation`` at toy size: who trains how often, on whose text, and what is refused."""

import argparse
import json

import pytest

from tests.experiments.wrong_options import assert_one_line
from titan_ext import cli
from titan_ext.experiments.participation import command
from titan_ext.experiments.participation.arms import Settings, parse_arm
from titan_ext.experiments.participation.train import source_text, train
from titan_ext.experiments.tuning import Run

SIZES = {"dim": 32, "layers": 1, "steps": 8, "sites": 2, "batch": 2, "length": 16, "sync_every": 2}
FLAGS = [flag for key, value in SIZES.items() for flag in (f"--{key.replace('_', '-')}", str(value))]
COMMAND = ["bench", "participation", *FLAGS, "--learning-rates", "1e-2", "--workers", "1", "--corpus", "builtin:code"]


def settings(**own):
    text = {"corpus": "builtin:code", "languages": "", "source_optimizer": "stateless", "device": "cpu"}
    return Settings(**SIZES | text | own)


def test_the_figures_of_every_arm(capsys, tmp_path):
    flags = ["--arms", "2of4,4of4,2of6", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main([*COMMAND, *flags]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = {row["arm"]: row for row in figures["rows"]}
    assert list(rows) == ["2of4", "4of4", "2of6"]
    for arm, row in rows.items():
        drawn, _ = parse_arm(arm)
        assert row["tokens"] == 8 * drawn * 2 * 16 and 0 < row["loss"] < 8 and len(row["losses"]) == 2
    assert rows["4of4"]["fewest_turns"] == rows["4of4"]["most_turns"] == 4
    assert rows["2of6"]["fewest_turns"] < rows["2of6"]["most_turns"]
    assert [each["claim"].split(" ")[0] for each in figures["claims"]] == ["2of4", "2of6"]
    assert len(list(tmp_path.iterdir())) == 6
    assert cli.main([*COMMAND, *flags]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == figures, "found in --out"


def test_virtual_sites_do_not_matter():
    """All sources on one virtual site or on two come to the same, up to the order of sums."""
    losses = [
        train(settings(sites=sites, source_optimizer="stateful"), Run("4of4", 1e-2, 0)).losses for sites in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_languages_are_dealt_to_sources(corpus):
    """Five sources of three languages: the first and the fourth share one, by documents."""
    own = settings(languages=str(corpus))
    first, second, _, fourth = (next(source_text(own, 0, 5, source)).inputs for source in range(4))
    assert first.min() >= 0 and not first.equal(fourth) and not first.equal(second)
    result = train(own, Run("2of5", 1e-2, 0))
    assert 0 < result.loss < 8 and sum(result.turns) == 2 * 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "9of8"], "--arms 9of8"),
        (["--arms", "half"], "--arms half"),
        (["--arms", "1of2", "--sites", "3"], "--sites 3"),
        (["--languages", "/nowhere"], "--languages /nowhere"),
        (["--steps", "7"], "--steps 7"),
    ],
)
def test_a_wrong_option_is_one_line(flags, said, capsys):
    assert_one_line([*COMMAND, *flags], said, capsys)


def test_figures_of_languages_do_not_take_the_place_of_the_others():
    names = [command.record_name(argparse.Namespace(languages=folder)) for folder in (None, "corpus")]
    assert names == ["participation", "participation_languages"]
