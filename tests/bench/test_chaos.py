"""``titan-ext bench chaos``: the schedule, the books kept on sites, the checks, and a short run of real sites."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_ext.bench.chaos import checks
from titan_ext.bench.chaos.faults import Fault, Kind, sample_faults
from titan_ext.bench.chaos.history import Sample, SiteHistory
from titan_ext.bench.chaos.run_config import RunConfig
from titan_ext.bench.chaos.runner import ChaosRun, Outcome

SITES = ["site0", "site1", "site2"]
COMMAND = [sys.executable, "-m", "titan_ext", "bench", "chaos"]


def test_equal_seeds_give_equal_schedules() -> None:
    options = {"sites": SITES, "kinds": list(Kind), "per_hour": 100, "seconds": 7200}
    first, again, other = (sample_faults(seed, **options) for seed in (7, 7, 8))
    assert first == again != other
    assert 180 <= len(first) <= 220
    assert {fault.kind for fault in first[:5]} == set(Kind), "each kind comes once before any comes again"
    for fault in first:
        assert (fault.site is None) == (fault.kind is Kind.LIGHTHOUSE)
        assert bool(fault.seconds) == (fault.kind in (Kind.STOP, Kind.CUT))


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--sites", "2"], "--sites 2: must be at least 3"),
        (["--faults-per-hour", "0"], "--faults-per-hour 0: must be above 0"),
    ],
)
def test_bad_options_are_one_line(flags: list[str], problem: str) -> None:
    result = subprocess.run([*COMMAND, *flags], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"titan-ext: error: {problem}\n"


def append(path: Path, **line) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def commit(
    site: SiteHistory,
    number: int,
    moment: float,
    contributors: list[str],
    digest: str = "aa",
    newcomers: list[str] = [],
) -> None:
    line = {"run": "r", "generation": 0, "round": number, "contributors": contributors, "tokens": 100}
    append(site.folder / "commits.jsonl", digest=digest, time=moment, sites=contributors + newcomers, **line)


def step(site: SiteHistory, number: int, moment: float, loss: float = 1.0) -> None:
    append(site.folder / "metrics.jsonl", kind="step", step=number, loss=loss, time=moment)


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    """Three sites that have trained since time 1."""
    found = Outcome(sites={name: SiteHistory(tmp_path / name) for name in SITES})
    for site in found.sites.values():
        site.interruptions[0].over = 0.5
        step(site, 1, 1.0)
        site.poll()
    return found


def test_a_site_is_live_again_with_its_first_step_after_the_fault(tmp_path: Path) -> None:
    site = SiteHistory(tmp_path / "east")
    assert not site.is_live
    site.recover()
    step(site, 1, time.time() + 10)
    assert not site.poll() and site.is_live
    site.interrupt()
    step(site, 2, site.interruptions[-1].since + 20)
    site.poll()
    assert not site.is_live, "the cause is still there"
    site.recover()
    back = site.interruptions[-1].over + 30
    step(site, 3, back)
    site.poll()
    assert site.is_live and site.was_live(back) and not site.was_live(back - 1)


def test_a_commit_that_differs_is_found(outcome: Outcome) -> None:
    for name, site in outcome.sites.items():
        commit(site, 1, 2.0, SITES)
        commit(site, 2, 3.0, SITES, digest="bb" if name == "site1" else "aa")
        site.poll()
    check = checks.equal(outcome)
    assert not check.passed
    assert check.figure.startswith("1 of 2 commits differ between sites (6 lines)")


def test_a_site_that_commits_alone_is_found(outcome: Outcome) -> None:
    site = outcome.sites["site0"]
    commit(site, 1, 2.0, SITES)
    commit(site, 2, 3.0, ["site0"], newcomers=["site1"])
    site.poll()
    assert checks.in_company(outcome) == checks.Check(
        "no solo commit", True, "2 to 3 sites a commit, 1 to 3 contributors"
    )
    commit(site, 3, 4.0, ["site0"])
    site.poll()
    assert checks.in_company(outcome) == checks.Check(
        "no solo commit", False, "1 to 3 sites a commit, 1 to 3 contributors"
    )


def test_participation_counts_live_sites_only(outcome: Outcome) -> None:
    writer, struck = outcome.sites["site0"], outcome.sites["site2"]
    struck.interrupt()
    struck.interruptions[-1].since, struck.interruptions[-1].until = 4.5, 7.5
    for number in range(1, 10):
        # Away in rounds 4 to 6, and left out of the first one after that.
        commit(writer, number, number + 1.0, SITES[:2] if number in (4, 5, 6, 7) else SITES)
    writer.poll()
    assert checks.participation(outcome) == checks.Check("participation", True, "95.8% of 24 live sites' rounds")


def held(outcome: Outcome, memory: float, descriptors: float, rounds: int = 40) -> None:
    """Every site's process holds so much more after each round."""
    for pid, site in enumerate(outcome.sites.values()):
        site.samples = [
            Sample(2.0 + number, pid, number, round(2**29 + memory * number), round(40 + descriptors * number))
            for number in range(1, rounds + 1)
        ]


def test_what_grows_from_round_to_round_is_found(outcome: Outcome) -> None:
    held(outcome, memory=2**21, descriptors=1)
    assert not checks.memory(outcome, None).passed
    assert not checks.descriptors(outcome, None).passed
    held(outcome, memory=2**14, descriptors=0.01)
    assert checks.memory(outcome, outcome) == checks.Check(
        "memory",
        True,
        "+16.00 KiB a round at most, +16.00 KiB on average over 3 processes' stretches of 34 to 34 rounds, "
        "undisturbed +16.00 KiB",
    )
    assert checks.descriptors(outcome, None).passed


def test_a_slope_is_that_of_the_longest_stretch_without_a_fault_of_the_process(outcome: Outcome) -> None:
    held(outcome, memory=0, descriptors=0)
    site = outcome.sites["site0"]
    site.interrupt()
    site.interruptions[-1].since, site.interruptions[-1].until = 18.5, 21.5
    rounds = [[sample.round for sample in stretch] for stretch in checks.stretches(outcome)]
    assert [(each[0], each[-1]) for each in rounds] == [(20, 40), (6, 40), (6, 40)]
    held(outcome, memory=0, descriptors=0, rounds=9)
    assert not checks.memory(outcome, None).passed, "nothing was long enough to be judged"


def test_losses_are_those_of_the_last_rounds(outcome: Outcome, tmp_path: Path) -> None:
    config = RunConfig(sites=3, seq_len=8, batch=1, sync_every=2, seed=0)
    calm = Outcome(sites={name: SiteHistory(tmp_path / "calm" / name) for name in SITES})
    (tmp_path / "calm").mkdir()
    for index, (ours, theirs) in enumerate(zip(outcome.sites.values(), calm.sites.values())):
        for number in range(1, 61):
            early = 9.0 if number <= 48 else 0.0  # the last 6 of 30 rounds do not have it
            step(ours, number, 2.0 + number, 2.5 + early + 0.01 * index)
            step(theirs, number, 2.0 + number, 2.0 + early + 0.01 * index)
        ours.poll(), theirs.poll()
    check = checks.loss(outcome, calm, config)
    assert check.figure.startswith("2.5100 after 0 contributed tokens, undisturbed 2.0100 after 0: +0.5000, noise 0.0")
    assert not check.passed and checks.loss(calm, outcome, config).passed


def test_a_process_that_stays_or_comes_twice_is_found(outcome: Outcome) -> None:
    assert checks.orphans(outcome).passed
    outcome.left = [12345]
    assert not checks.orphans(outcome).passed
    outcome.left, outcome.most_ranks = [], 2
    assert not checks.orphans(outcome).passed


def test_nothing_strikes_who_could_not_come_back_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    conductor = ChaosRun(
        {}, [], [], cut_off=lambda site, seconds: None, keep_live=0, rounds=100, seconds=60.0, say=print
    )
    now = conductor._first_commit = time.monotonic()

    def leaves_time(rounds: int, seconds: float, lasting: float) -> bool:
        conductor._round = rounds
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
        return conductor._leaves_time(Fault(at=0.0, kind=Kind.STOP, site="east", seconds=lasting))

    # A second a round, so that 50 are left; it takes 30, and twice the time that the site stood still.
    assert leaves_time(50, 49.0, 0.0) and leaves_time(50, 49.0, 9.9) and not leaves_time(50, 49.0, 10.1)
    assert leaves_time(89, 880.0, 20.0) and not leaves_time(95, 940.0, 0.0), "less than ten rounds are left"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_short_run_under_one_fault_after_another() -> None:
    """Three sites of which two are always up; on a slow or fast machine it may come to more or fewer faults."""
    sizes = ["--sites", "3", "--rounds", "30", "--sync-every", "120", "--seed", "1", "--minutes", "15"]
    faults = ["--faults-per-hour", "360", "--keep-live", "2", "--no-compare"]
    result = subprocess.run([*COMMAND, *sizes, *faults], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["faults"]
    assert all(check["passed"] for check in figures["checks"].values())
