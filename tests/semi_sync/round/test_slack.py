"""The time for which a site holds a round back."""

import pytest

from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.round.slack import Slack


def slack(share: float) -> tuple[Slack, list[float]]:
    slept: list[float] = []
    return Slack(share, Clock(sleep=slept.append)), slept


def test_a_site_holds_back_for_its_share_of_what_the_exchange_leaves_of_the_inner_steps() -> None:
    """``tau xi_step - (xi_quorum + xi_sync)`` with steps of 2 s and an exchange of 1.5 s."""
    half, slept = slack(0.5)
    half.hold_back(3)
    assert slept == [], "nothing is known yet"
    half.learn(step=2.0, exchange=1.5)
    half.hold_back(3)
    assert slept == [pytest.approx(0.5 * (3 * 2.0 - 1.5))]


def test_times_are_moving_averages() -> None:
    own, _ = slack(1.0)
    own.learn(step=2.0, exchange=1.0)
    own.learn(step=0.0, exchange=2.0)  # a round without a step of which the time is known
    own.learn(step=4.0, exchange=2.0)
    assert own.seconds(2) == pytest.approx(2 * (0.9 * 2.0 + 0.1 * 4.0) - (0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 2.0))


@pytest.mark.parametrize(("share", "exchange"), [(0.0, 0.5), (1.0, 4.0), (1.0, 9.0)])
def test_without_slack_or_a_share_nobody_holds_back(share: float, exchange: float) -> None:
    own, slept = slack(share)
    own.learn(step=2.0, exchange=exchange)
    own.hold_back(2)
    assert slept == []
