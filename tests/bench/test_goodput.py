"""``titan-ext bench goodput``: the arms, the faults and the figures, on the smallest rehearsal."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from titan_ext import cli
from titan_ext.bench import goodput, goodput_loss, goodput_runs
from titan_ext.config import load_site
from titan_ext.errors import RunError
from titan_ext.experiments.models import loss_of
from titan_ext.experiments.text import validation_text

FLAGS = (
    "--sites 3 --minutes 1.5 --seeds 1 --fault-seconds 30 --restart-seconds 20 --sync-every 8 --fragments 2 --grace 5 "
    "--trained-share 0.4"
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
    assert all(2 < row["loss"] < 5.0 for row in rows.values()) and rows["all at once"]["above"] == 0


def test_losses_are_compared_seed_by_seed():
    """1% and 3% above: 2% ± 12.706 * 1.414% / sqrt(2)."""
    found = goodput._compare([2.02, 4.12], [2.0, 4.0])
    assert found["loss"] == 3.07 and found["above"] == pytest.approx(0.02)
    assert found["above_half_width"] == pytest.approx(0.12706, rel=1e-3)
    assert goodput._compare([2.0, 4.0], [2.0, 4.0])["above"] == 0.0


def test_the_loss_is_that_after_so_many_tokens_of_committed_rounds():
    """A round counts once, though several sites tell of it, and one that failed not at all; the learning rate goes by them."""
    site = load_site(str(Path(__file__).parents[2] / "train_configs" / "demo.toml"), "code")
    end = goodput_loss.FinalLoss(site.config, goodput_loss.Text(sites=2), wanted=20, seed=0)
    trainee = goodput_loss.SmallModel(end, iter(()))
    values = {name: each.detach().clone() for name, each in trainee.model.named_parameters()}
    outer = SimpleNamespace(global_parameters=lambda: values)
    rates = []
    for number, tokens, committed in ((1, 10, True), (1, 10, True), (2, 7, False), (2, 8, True), (3, 5, True)):
        assert end.loss is None
        end(outer, SimpleNamespace(round=number, tokens=tokens, committed=committed))
        rates.append(trainee.rate)
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.1, 0.0])
    with torch.no_grad():
        batches = validation_text(goodput_loss.Text(sites=2))
        expected = sum(loss_of(trainee.model, batch).item() for batch in batches) / len(batches)
    assert end.tokens == 23 and end.loss == expected
    found = end.loss
    for value in values.values():
        value.zero_()
    end(outer, SimpleNamespace(round=4, tokens=5, committed=True))
    assert end.loss == found, "measured once"


def options(**changed: object) -> argparse.Namespace:
    return argparse.Namespace(**{key: default for key, (default, _, _) in goodput._NUMBERS.items()} | changed)


def test_a_training_that_does_not_end_in_time_is_said():
    few = options(sites=3, minutes=1.0, fault_seconds=1000.0, trained_share=0.99, train=True, link="1gbit,80ms")
    with pytest.raises(
        RunError, match=r"in committed rounds when the time is over: give a lower --trained-share \(0\.99\)"
    ):
        goodput_runs.rehearse(few, (0, "all at once"))


def test_faults_leave_a_quorum_and_come_from_the_seed():
    drawn = goodput_runs.draw_faults(options(minutes=600.0, fault_seconds=5.0), seed=1)
    assert drawn == goodput_runs.draw_faults(options(minutes=600.0, fault_seconds=5.0), seed=1)
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
        ("--trained-share 1", "--trained-share 1: must be below 1"),
        ("--workers 0", "--workers 0: must be at least 1"),
        ("--slow-share 2", "--slow-share 2: must be at most 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, told, capsys):
    assert cli.main(["bench", "goodput", *flags.split()]) == 2
    assert told in capsys.readouterr().err
