"""A site's place in its run, one site at a time: no threads, no lighthouse."""

import json
from dataclasses import replace

import pytest
import torch

from titan_ext.semi_sync import CommitLog, SiteRanks
from titan_ext.semi_sync.round.agreement import Position, SiteStatus
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.testing.simulator import InProcessManager, InProcessSites

FRESH = SiteStatus(name="east", fingerprint=0, step=0, rules=None, salt=40)

CPU = torch.device("cpu")


class Counters(InProcessManager):
    """The manager of the only site of a quorum, with torchft's counters."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(InProcessSites(1), 0)
        self.counters = {"step": step, "batches_committed": step}

    def state_dict(self) -> dict[str, int]:
        return dict(self.counters)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.counters = dict(state_dict)


def lineage(path=None, *, name="east", **options) -> Lineage:
    return Lineage(name, None if path is None else CommitLog(path), SiteRanks(alone=True), **options)


def status_of(place: Lineage) -> SiteStatus:
    return SiteStatus(fingerprint=0, step=0, rules=None, **place.status_fields())


def commit(place: Lineage, *names: str, checksum: int = 9) -> None:
    """A round with these sites, of which the first two contribute."""
    table = [
        SiteStatus(name=name, fingerprint=0, step=0, rules=[0], tokens=10 * (1 + i)) for i, name in enumerate(names)
    ]
    place.commit(table, list(range(min(2, len(names)))), step=8, checksum=checksum)


def behind(path, *names: str, commits: int = 3, checkpoint: int = 1, **options) -> Lineage:
    """A site whose checkpoint is older than its log."""
    before = lineage(path)
    before.open(Counters(), 5, Position())
    saved = None
    for round_ in range(1, commits + 1):
        commit(before, *names)
        if round_ == checkpoint:
            saved = before.state_dict()
    after = lineage(path, **options)
    after.load_state_dict(saved)
    return after


def test_a_new_run_is_named_by_all_sites_together():
    table = [FRESH, replace(FRESH, name="west", salt=2)]
    assert lineage().opening(Counters(), table, CPU) == (42, Position())
    assert lineage().opening(Counters(), [replace(FRESH, salt=0)], CPU) == (1, Position()), "0 is no run"


def test_salts_differ_and_leave_room_for_their_sum():
    salts = {lineage().status_fields()["salt"] for _ in range(20)}
    assert len(salts) == 20 and max(salts) < 2**54


def test_a_site_that_has_no_run_opens_that_of_the_others_at_their_furthest_point():
    table = [FRESH, *(replace(FRESH, run=5, position=each, known=each) for each in (Position(1, 2), Position(0, 9)))]
    assert lineage().opening(Counters(), table, CPU) == (5, Position(1, 2)), "a later generation wins over more rounds"


def test_commits_are_counted_and_logged(tmp_path):
    place = lineage(tmp_path / "commits.jsonl")
    place.open(Counters(), 255, Position())
    for _ in range(2):
        commit(place, "east", "west", "north")
    lines = [json.loads(line) for line in (tmp_path / "commits.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2] and place.position == Position(0, 2)
    assert {key: value for key, value in lines[-1].items() if key != "time"} == {
        "run": "00000000000000ff",
        "generation": 0,
        "round": 2,
        "step": 8,
        "contributors": ["east", "west"],
        "sites": ["east", "west", "north"],
        "tokens": 10 + 20,
        "digest": "0000000000000009",
    }


def test_a_method_without_a_shared_state_logs_no_digest(tmp_path):
    place = lineage(tmp_path / "commits.jsonl")
    commit(place, "", "west", checksum=0)
    line = json.loads((tmp_path / "commits.jsonl").read_text())
    assert line["digest"] is None and line["sites"] == ["#0", "west"]


def test_a_checkpoint_restores_the_place():
    place = lineage()
    place.origin = 3
    place.open(Counters(), 5, Position(2, 7))
    restored = lineage()
    restored.load_state_dict(place.state_dict())
    assert (restored.run, restored.origin, restored.position) == (5, 3, Position(2, 7))
    older = {key: value for key, value in place.state_dict().items() if key != "origin"}
    restored.load_state_dict(older)
    assert restored.origin == 0


def test_a_site_that_is_behind_says_what_it_remembers(tmp_path):
    place = behind(tmp_path / "log", "east", "west")
    fields = place.status_fields()
    assert (fields["position"], fields["known"]) == (Position(0, 1), Position(0, 3))
    assert "waiting for west, which took part in it" in place.why_waiting([status_of(place)])
    assert "--replica.allow_rollback" in place.why_waiting([status_of(place)])


def test_commits_of_another_run_in_the_log_say_nothing(tmp_path):
    behind(tmp_path / "log", "east", "west")
    other = lineage(tmp_path / "log")
    other.load_state_dict({"run": 6, "origin": 0, "generation": 0, "round": 1})
    assert other.status_fields()["known"] == Position(0, 1)


def test_who_is_behind_waits_while_a_site_of_the_last_commit_is_missing(tmp_path):
    place = behind(tmp_path / "log", "east", "west")
    assert place.opening(Counters(), [status_of(place)], CPU) is None


def test_all_of_the_last_commit_go_on_in_a_new_generation(tmp_path):
    place = behind(tmp_path / "log", "east", "west")
    table = [status_of(place), replace(FRESH, name="west", run=5, position=Position(0, 2), known=Position(0, 3))]
    assert place.opening(Counters(), table, CPU) == (5, Position(1, 2))


def test_a_later_state_of_another_site_ends_the_wait(tmp_path):
    place = behind(tmp_path / "log", "east", "west")
    table = [status_of(place), replace(FRESH, name="north", run=5, position=Position(0, 3), known=Position(0, 3))]
    assert place.opening(Counters(), table, CPU) == (5, Position(0, 3))


def test_a_rollback_that_is_allowed_waits_for_nobody(tmp_path):
    place = behind(tmp_path / "log", "east", "west", allow_rollback=True)
    assert place.opening(Counters(), [status_of(place)], CPU) == (5, Position(1, 1))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"run": 5, "generation": 0, "round": 4}, None),
        ({"run": 5, "generation": 1, "round": 0}, None),
        ({"run": 5, "generation": 0, "round": 3}, "an older state"),
        ({"run": 6, "generation": 0, "round": 9}, "another run"),
    ],
)
def test_which_state_of_a_peer_may_be_taken(state, words):
    place = lineage()
    place.open(Counters(), 5, Position(0, 4))
    refusal = place.accepts(state)
    assert refusal is None if words is None else words in refusal
    assert lineage().accepts(state) is None, "a site without a run takes any"


def test_taking_a_peers_state_is_standing_where_it_stands():
    place = lineage()
    place.take_over({"run": 5, "origin": 8, "generation": 1, "round": 6})
    brought = {"contributed": {}, "commits": {}}
    assert place.state_dict() == {"run": 5, "origin": 8, "generation": 1, "round": 6} | brought


def test_a_new_generation_puts_whoever_is_of_an_older_one_behind():
    """torchft heals whoever has the smaller step."""
    manager, place = Counters(step=1000), lineage()
    place.open(manager, 5, Position(0, 1000))
    assert manager.counters["step"] == 1000
    place.open(manager, 5, Position(1, 7))
    assert manager.counters["step"] == 2**32 + 1000
    place.open(manager, 5, Position(2, 7))
    assert manager.counters == {"step": 2 * 2**32 + 1000, "batches_committed": 1000}
