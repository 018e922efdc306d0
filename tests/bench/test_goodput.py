"""``titan-ext bench goodput``: the arms, the faults and the figures, on the smallest rehearsal."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from titan_ext import cli
from titan_ext.bench import goodput, goodput_loss
from titan_ext.config import load_site

FLAGS = (
    "--sites 3 --minutes 1.5 --seeds 1 --fault-seconds 30 --restart-seconds 20 --sync-every 8 --fragments 2 --grace 5"
)


@pytest.mark.slow
def test_inner_steps_never_stand_still_where_nobody_waits(capsys):
    assert cli.main(["bench", "goodput", "--train", *FLAGS.split()]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = {row["arm"]: row for row in found["rows"]}
    assert list(rows) == ["all at once", "fragments", "nobody waits"]
    free = rows["nobody waits"]
    assert free["stalled"] == 0.0 and rows["all at once"]["stalled"] > 1.0
    assert free["training"] > rows["fragments"]["training"] > rows["all at once"]["training"]
    assert all(0 < row["goodput"] <= 1 for row in rows.values())
    # Of 264 bytes and marks all alike a guess costs 5.6 nats.
    assert all(2 < row["loss"] < 4.5 for row in rows.values()) and rows["all at once"]["above"] == 0


def test_losses_are_compared_after_as_many_tokens():
    assert goodput_loss.loss_after([(0, 4.0), (100, 3.0), (200, 2.5)], 150) == 2.75
    assert goodput_loss.loss_after([(0, 4.0), (100, 3.0)], 100) == 3.0
    curves = {
        "all at once": [[(0, 4.0), (100, 3.0)], [(0, 4.0), (300, 1.0)]],
        "nobody waits": [[(0, 4.0), (200, 2.0)], [(0, 4.0), (200, 2.2)]],
    }
    first, other = goodput._compare(curves)
    assert (first["loss"], first["above"]) == ((3.0 + 2.0) / 2, 0.0)
    assert other["loss"] == (3.0 + 2.2) / 2 and other["above"] == pytest.approx((0.0 + 0.1) / 2)


def test_only_the_first_record_of_a_committed_round_counts():
    """The loss is measured at a round; two of three sites' records of it, and one that failed, add nothing."""
    site = load_site(str(Path(__file__).parents[2] / "train_configs" / "demo.toml"), "code")
    observed = goodput_loss.LossByTokens(site.config, goodput_loss.Text(sites=2), tokens=24)
    model = goodput_loss.SmallModel(site.config, iter(())).model
    outer = SimpleNamespace(global_parameters=lambda: {name: each.detach() for name, each in model.named_parameters()})
    for number, tokens, committed in ((1, 10, True), (1, 10, True), (2, 7, False), (2, 8, True)):
        observed(outer, SimpleNamespace(round=number, tokens=tokens, committed=committed))
    assert observed.tokens == 18 and [tokens for tokens, _ in observed.losses] == [10, 18]
    assert observed.losses[0][1] == observed.losses[1][1]


def options(**changed: object) -> argparse.Namespace:
    return argparse.Namespace(**{key: default for key, (default, _, _) in goodput._NUMBERS.items()} | changed)


def test_faults_leave_a_quorum_and_come_from_the_seed():
    drawn = goodput.draw_faults(options(minutes=600.0, fault_seconds=5.0), seed=1)
    assert drawn == goodput.draw_faults(options(minutes=600.0, fault_seconds=5.0), seed=1)
    assert {fault.kind for fault in drawn} == {"kill", "slow"}
    for fault in drawn:
        struck = {each.sites[0] for each in drawn if each.at <= fault.at < each.at + each.seconds}
        assert len(struck) <= 3, "of 8 sites 5 are always there and as fast as ever"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--fragments 5", "--fragments 5: must be a divisor of --sync-every (24)"),
        ("--delay 6", "--delay 6: must be below --sync-every / --fragments (6)"),
        ("--grace 5", "--grace 5: must be above the inner steps between two rounds (6 s)"),
        ("--slow-share 2", "--slow-share 2: must be at most 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, told, capsys):
    assert cli.main(["bench", "goodput", *flags.split()]) == 2
    assert told in capsys.readouterr().err
