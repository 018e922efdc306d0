"""The end of a round: what a yes and a no of the vote leave behind, without threads or a lighthouse."""

from dataclasses import replace

import pytest
import torch

from titan_ext.semi_sync import SemiSync, SiteOptions, SiteRanks
from titan_ext.semi_sync.round.agreement import Position, SiteStatus, Verdict
from titan_ext.semi_sync.round.contributions import Contributions
from titan_ext.semi_sync.round.round import Launch, Role, RoundResult, Sum
from titan_ext.semi_sync.testing.simulator import InProcessManager, InProcessSites

STEP, TOKENS = 4, 100


class VotingManager(InProcessManager):
    """One site whose vote is chosen beforehand."""

    def __init__(self, vote: bool = True, error: object | None = None) -> None:
        super().__init__(InProcessSites(1), 0)
        self.vote, self.error = vote, error
        self.counters = {"step": 3}

    def should_commit(self) -> bool:
        return self.vote

    def errored(self) -> object | None:
        return self.error

    def state_dict(self) -> dict[str, int]:
        return dict(self.counters)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.counters = dict(state_dict)


def summed(total: float, *, own: float, weights: list[float], own_is_finite: bool = True) -> Sum:
    """What came back for the one rule of one element."""
    return Sum(
        parts={0: torch.tensor([total])},
        weight=own,
        own_is_finite=own_is_finite,
        contributions=Contributions(weights, [[] for _ in weights]),
    )


class Round:
    """A site with one parameter, whose global value is 1 and whose local one is 3, at the end of a round."""

    def __init__(self, manager: VotingManager, *, keep_local_work: bool = True, **settings: object) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.model.weight.data.fill_(1.0)
        self.records = []
        outer = SemiSync.Config(method="local_sgd", sync_every=STEP, **settings).build(
            model_parts=[self.model],
            optimizers=[],
            manager=manager,
            site=SiteOptions(name="east", ranks=SiteRanks(alone=True)),
            keep_local_work=keep_local_work,
            on_round=self.records.append,
        )
        # The parts that ``step`` hands a result to, without the exchange before it.
        self.committer = outer._committer
        self.model.weight.data.fill_(3.0)
        self.committer.progress.step, self.committer.progress.tokens = STEP, TOKENS

    @property
    def weight(self) -> float:
        return self.model.weight.item()

    def result(self, **fields: object) -> RoundResult:
        """Two sites of weights 1 and 3 whose values 3 and 7 were summed: the mean is 6."""
        table = [SiteStatus(name=name, fingerprint=0, step=STEP, rules=[0], tokens=TOKENS) for name in ("east", "west")]
        role = fields.pop("role", Role.MEMBER)
        return RoundResult(
            **{
                "launch": Launch(role=role, rules=(0,), step=STEP, weight=1.0, tokens=TOKENS),
                "role": role,
                "sites": 2,
                "verdict": Verdict(table, [0], STEP),
                "sum": summed(3.0 + 3 * 7.0, own=1.0, weights=[1.0, 3.0]),
            }
            | fields
        )


def test_a_yes_applies_the_mean_and_counts():
    round_ = Round(VotingManager())
    round_.committer.schedule.again([0])
    assert round_.committer.commit(round_.result())
    assert round_.weight == 6.0
    assert round_.committer.exchange.states[0].global_flat.tolist() == [6.0]
    assert round_.committer.exchange.lineage.position == Position(0, 1)
    assert round_.committer.schedule.pending == [], "what the round brought does not wait any more"
    assert round_.committer.progress.tokens == 0
    (record,) = round_.records
    assert (record.committed, record.round, record.step, record.participants) == (True, 1, STEP, 2)
    assert record.contributors == ["east", "west"] and record.error is None
    assert (round_.committer.ledger.rounds, round_.committer.ledger.failed) == (1, 0)


def test_what_was_trained_on_during_a_flight_counts_in_the_next_round():
    round_ = Round(VotingManager())
    launch = Launch(role=Role.MEMBER, rules=(0,), step=STEP, weight=1.0, tokens=TOKENS - 30)
    round_.committer.commit(round_.result(launch=launch))
    assert round_.committer.progress.tokens == 30


def test_a_joining_site_takes_the_mean_and_has_trained_on_nothing():
    round_ = Round(VotingManager())
    launch = Launch(role=Role.JOINING, rules=(), step=STEP, weight=1.0, tokens=0)
    assert round_.committer.commit(round_.result(role=Role.JOINING, launch=launch))
    assert round_.weight == 6.0 and round_.committer.progress.tokens == 0


def test_a_yes_to_a_round_without_contributors_applies_nothing():
    round_ = Round(VotingManager())
    nothing = summed(0.0, own=0.0, weights=[0.0, 0.0])
    assert round_.committer.commit(round_.result(sum=nothing))
    assert round_.weight == 3.0 and round_.committer.exchange.lineage.position == Position()


def test_a_site_whose_work_is_not_finite_goes_on_from_what_the_sites_share():
    round_ = Round(VotingManager())
    round_.model.weight.data.fill_(float("nan"))
    assert round_.committer.commit(round_.result(sum=summed(3 * 7.0, own=0.0, weights=[0.0, 3.0], own_is_finite=False)))
    assert round_.weight == 7.0


def test_a_no_leaves_everything_and_tries_again():
    round_ = Round(VotingManager(vote=False, error=RuntimeError("the link broke")))
    assert not round_.committer.commit(round_.result())
    assert round_.weight == 3.0 and round_.committer.exchange.states[0].global_flat.tolist() == [1.0]
    assert round_.committer.exchange.lineage.position == Position()
    assert round_.committer.schedule.pending == [0]
    assert round_.committer.progress.tokens == TOKENS, "it still counts in the round that is tried again"
    (record,) = round_.records
    assert (record.committed, record.participants, record.contributors) == (False, 0, [])
    assert record.error == "the link broke"
    assert (round_.committer.ledger.rounds, round_.committer.ledger.failed) == (0, 1)


def test_a_no_without_keeping_local_work_goes_back_and_waits_for_the_next_round():
    round_ = Round(VotingManager(vote=False), keep_local_work=False)
    assert not round_.committer.commit(round_.result())
    assert round_.weight == 1.0
    assert round_.committer.schedule.pending == []
    assert round_.records[0].error == "a rank or site of the round failed"


def test_a_no_after_which_this_site_holds_a_peers_state_is_not_tried_again():
    round_ = Round(VotingManager(vote=False))
    round_.committer.commit(round_.result(healed=True))
    assert round_.committer.schedule.pending == [] and round_.records[0].healed


@pytest.mark.parametrize(
    ("error", "problem", "resync_step", "not_before"),
    [
        ("the link broke", None, 0, STEP + 6),  # until the lighthouse has forgotten who died
        (None, None, 0, STEP),  # another rank's error: nobody died as far as this one knows
        ("reported", "at different points of the schedule", STEP + 2, STEP + 2),
        ("reported", "not that of the others", 0, STEP),
    ],
)
def test_when_a_no_is_tried_again(error, problem, resync_step, not_before):
    round_ = Round(VotingManager(vote=False, error=error))
    result = round_.result(retry_after_steps=6)
    verdict = replace(result.verdict, problem=problem, resync_step=resync_step)
    round_.committer.commit(replace(result, verdict=verdict))
    assert round_.committer.schedule.not_before == not_before
    assert round_.records[0].error == (problem or error or "a rank or site of the round failed")


def test_a_diverged_site_counts_as_behind_so_that_it_is_healed():
    manager = VotingManager(vote=False, error="reported")
    round_ = Round(manager)
    result = round_.result()
    round_.committer.commit(replace(result, verdict=replace(result.verdict, problem="diverged", diverged=True)))
    assert manager.counters == {"step": 2}


@pytest.mark.parametrize("vote", [True, False])
def test_a_run_begins_with_the_vote(vote):
    """Sites that all join exchange nothing: no record, and no round."""
    round_ = Round(VotingManager(vote=vote))
    launch = Launch(role=Role.JOINING, step=0, weight=1.0)
    opening = Verdict([SiteStatus(name="east", fingerprint=0, step=0, rules=None)], [], 0, opening=(77, Position()))
    result = RoundResult(launch=launch, role=Role.JOINING, sites=1, verdict=opening)
    assert round_.committer.commit(result) == vote
    assert round_.committer.exchange.lineage.run == (77 if vote else 0)
    assert round_.records == [] and round_.committer.ledger.rounds == round_.committer.ledger.failed == 0


def test_the_inner_optimizer_is_reset_after_a_committed_round_alone():
    for vote in (True, False):
        round_ = Round(VotingManager(vote=vote), reset_inner_optimizer=True)
        resets = []
        round_.committer.view.reset_optimizers = lambda: resets.append(1)
        round_.committer.commit(round_.result())
        assert len(resets) == vote
