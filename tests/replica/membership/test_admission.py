"""Sites that do not hold the secret, among sites that do: real processes and a real lighthouse."""

from datetime import timedelta

import pytest
from torch.distributed import TCPStore
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from tests.replica.sites import JOIN, Lighthouse, Site, context, running

INTRUDER = 1000.0
"""What an inner step of the intruder adds: it would show in any sum, and in any state that it gave."""


@pytest.fixture
def secrets(tmp_path):
    paths = {}
    for name in ("ours", "theirs"):
        path = tmp_path / name
        path.write_text(f"the secret of {name}, which is long enough")
        path.chmod(0o600)
        paths[name] = str(path)
    return paths


def honest(secrets, **options) -> list[Site]:
    settings = {"secret_file": secrets["ours"], "min_sites": 2}
    return [Site(name, rate, replica=settings, **options) for name, rate in (("east", 1.0), ("west", 3.0))]


@pytest.mark.parametrize("name", ["aaa", "zzz"])
@pytest.mark.parametrize("held", ["theirs", None])
def test_an_unauthenticated_site_never_takes_part(secrets, tmp_path, name, held):
    """Whether its store is the one at which the sites meet (``aaa``) or not."""
    sites = honest(secrets, hold_at=JOIN)
    outsider = Site(name, INTRUDER, replica={"secret_file": held and secrets[held], "min_sites": 2}, hold_at=JOIN)
    with running([*sites, outsider], Lighthouse(2), tmp_path) as run:
        run.join_together(outsider, *sites)
        found = run.outcomes(3)
    east, west, other = found["east", 0], found["west", 0], found[name, 0]
    assert east.error is west.error is None
    assert east.sha256 == west.sha256
    assert east.values == [2.0 * sites[0].steps]
    assert all(rounds[1:] == (2, True) for rounds in east.rounds)
    assert f"site {name} is refused" in east.log and f"site {name} is refused" in west.log
    assert other.error.startswith("UserError: replica.secret_file: not admitted by ")
    assert not any(committed for *_, committed in other.rounds)
    assert all(value % INTRUDER == 0 for value in other.values)


def test_the_state_of_an_unauthenticated_site_ahead_of_all_is_not_loaded(secrets, tmp_path):
    """torchft would make everybody take the state of the site with the highest step."""
    sites = honest(secrets, hold_at=JOIN)
    settings = {"secret_file": secrets["theirs"], "min_sites": 2}
    outsider = Site("aaa", INTRUDER, replica=settings, torchft_step=10**6, hold_at=JOIN)
    with running([*sites, outsider], Lighthouse(2), tmp_path) as run:
        run.join_together(outsider, *sites)
        found = run.outcomes(3)
    assert found["east", 0].error is found["west", 0].error is None
    assert found["east", 0].sha256 == found["west", 0].sha256
    assert found["east", 0].values == found["west", 0].values == [2.0 * sites[0].steps]
    assert found["aaa", 0].error.startswith("UserError: replica.secret_file")


def test_an_unauthenticated_site_that_comes_later_gives_way(secrets, tmp_path):
    alone = Site("east", replica={"secret_file": secrets["ours"], "min_sites": 1}, hold_at=4)
    outsider = Site("aaa", INTRUDER, replica={"secret_file": secrets["theirs"], "min_sites": 1})
    with running([alone], Lighthouse(1), tmp_path) as run:
        run.wait_until_held(alone)
        run.start(outsider)
        run.lighthouse.wait_for_requests(1)
        run.let_go(alone)
        found = run.outcomes(2)
    assert found["east", 0].error is None
    assert found["east", 0].values == [float(alone.steps)]
    assert found["aaa", 0].error.startswith("UserError: replica.secret_file: not admitted by east")


def test_two_that_begin_and_differ_wait_and_name_the_key(secrets, tmp_path):
    """Neither can know which of them is wrong: a third may come."""
    sites = [
        Site(name, replica={"secret_file": path, "min_sites": 2, "quorum_timeout_seconds": 5.0}, hold_at=JOIN)
        for name, path in secrets.items()
    ]
    with running(sites, Lighthouse(2), tmp_path) as run:
        run.join_together(*sites)
        found = run.outcomes(1)  # the other waits on by itself
    for (own, _), outcome in found.items():
        other = {"ours": "theirs", "theirs": "ours"}[own]
        assert outcome.error.startswith("RunError: no quorum within replica.quorum_timeout_seconds = 5")
        assert (
            f"1 of at least 2 site(s) (replica.min_sites) here, not counting {other}: another secret "
            "(replica.secret_file)" in outcome.error
        )


def test_sites_of_two_ranks_decide_alike(secrets, tmp_path):
    sites = honest(secrets, ranks=2, hold_at=JOIN)
    settings = {"secret_file": secrets["theirs"], "min_sites": 2}
    outsider = Site("aaa", INTRUDER, ranks=2, replica=settings, hold_at=JOIN)
    with running([*sites, outsider], Lighthouse(2), tmp_path) as run:
        run.join_together(outsider, *sites)
        found = run.outcomes(6)
    ours = [found[site.name, rank] for site in sites for rank in range(2)]
    assert [each.error for each in ours] == [None] * 4
    assert len({each.sha256 for each in ours}) == 1
    assert found["aaa", 0].error == found["aaa", 1].error


def only_torchft(lighthouse: str) -> None:
    """A manager that knows nothing of admission and takes every quorum for its own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=0.5)),
        load_state_dict=lambda state: None,
        state_dict=dict,
        min_replica_size=1,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id="aaa",
        hostname="127.0.0.1",
    )
    while True:
        manager.start_quorum()
        manager.should_commit()


def test_one_that_does_not_answer_is_waited_for_and_left_out(secrets, tmp_path):
    sites = honest(secrets, steps=6)
    for site in sites:
        site.replica |= {"admission_timeout_seconds": 2.0}
    with running([], Lighthouse(3), tmp_path) as run:
        outsider = context.Process(target=only_torchft, args=[run.lighthouse.url])
        outsider.start()
        run.processes.append(outsider)
        for site in sites:
            run.start(site)
        found = run.outcomes(2)
    for outcome in found.values():
        assert outcome.error is None
        assert outcome.values == [2.0 * 6]
        assert "site aaa is refused: it gave no proof in time (replica.admission_timeout_seconds = 2)" in outcome.log
    assert found["east", 0].sha256 == found["west", 0].sha256


def test_a_new_member_gets_the_state(secrets, tmp_path):
    first = Site("east", replica={"secret_file": secrets["ours"]}, hold_at=4, steps=16)
    second = Site("west", 3.0, replica={"secret_file": secrets["ours"]}, steps=16)
    with running([first], Lighthouse(1), tmp_path) as run:
        run.wait_until_held(first)
        run.start(second)
        run.lighthouse.wait_for_requests(1)
        run.let_go(first)
        found = run.outcomes(2)
    assert found["east", 0].sha256 == found["west", 0].sha256
    assert found["west", 0].rounds[-1][1:] == (2, True)
    # Six steps alone, and from then on the mean of both.
    assert found["east", 0].values == found["west", 0].values == [6.0 + 2.0 * 10]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_member_that_is_killed_and_comes_back(secrets, tmp_path, ranks):
    east, west = honest(secrets, ranks=ranks, steps=20)
    north = Site("north", 5.0, ranks, replica=east.replica, steps=20, hold_at=5)
    with running([east, west, north], Lighthouse(3), tmp_path) as run:
        run.wait_until_held(north)
        run.kill(north)
        north.hold_at = None
        run.start(north)
        found = run.outcomes(3 * ranks)
    assert [outcome.error for outcome in found.values()] == [None] * 3 * ranks
    assert len({outcome.sha256 for outcome in found.values()}) == 1
    assert [sites for _, sites, committed in found["east", 0].rounds if committed][-1] == 3
