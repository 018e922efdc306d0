"""Whole rehearsals of small files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.config.conftest import GOOD
from titan_ext import cli
from titan_ext.config.load import load_run
from titan_ext.errors import UserError
from titan_ext.lab.build import Request, make_script
from titan_ext.lab.faults import Fault
from titan_ext.lab.rehearsal import Rehearsal
from titan_ext.lab.report import make_folders, write_journals
from titan_ext.lab.stand_in import StandIn, shrinking, shrunk_shapes
from titan_ext.lab.trace import Outcome
from titan_ext.planner.build import Request as PlanRequest
from titan_ext.planner.build import make_plan
from titan_ext.planner.workload import with_settings
from titan_ext.semi_sync.testing import InProcessSites

LINK = "100mbit,40ms"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lab") / "demo.toml"
    path.write_text(GOOD.replace("steps = 20", "steps = 40"))
    return path


@pytest.fixture(scope="module")
def sites(file: Path) -> list:
    return load_run(file, ["--replica.min_sites=2"], needs=()).sites


def rehearse(sites: list, settings: dict | None = None, count: int = 4, **request: object) -> Outcome:
    changed = with_settings(sites, **(settings or {}))
    options = {"sites": count, "links": [LINK], "steps": ["1s"]} | request
    return Rehearsal(make_script(changed, Request(**options))).run()


def with_sources(folder: Path, names: str, steps: int) -> list:
    """Sites that train these data sources in turn, each its part of every one."""
    table = '[[source]]\nname = "{}"\ndataset = "builtin:docs"\n'
    alone = GOOD.replace('data = "builtin:code"', "").replace('data = "builtin:docs"', "")
    file = folder / f"{names}.toml"
    file.write_text("".join(map(table.format, names)) + alone.replace("steps = 20", f"steps = {steps}"))
    return load_run(file, ["--replica.min_sites=2"], needs=()).sites


def describe(outcome: Outcome) -> str:
    return json.dumps([[each.marks, each.sent_bytes, [r.as_dict() for _, r in each.rounds]] for each in outcome.sites])


def test_a_seed_gives_one_run(sites: list) -> None:
    faults = {"faults": ["kill:site2@12s+5s", "slow:site1@20s+10s*2", "partition:site0-site1@30s+1s"]}
    first, again = (rehearse(sites, seed=7, **faults) for _ in range(2))
    other = rehearse(sites, seed=8, **faults)
    assert describe(first) == describe(again) and first.state_sha256 == again.state_sha256
    assert describe(first) != describe(other)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"codec": "int8"},
        {"sync_every": 6, "num_fragments": 2, "fragment_sync_delay": 2},
        {"method": "des_loc", "aggregation": "median"},
        {"method": "noloco"},
    ],
    ids=str,
)
def test_what_sites_come_to_is_what_they_come_to_without_a_network(settings: dict, sites: list) -> None:
    outcome = rehearse(sites, {"sync_every": 5} | settings)
    assert outcome.finished and outcome.participation == 1 and not any(site.error for site in outcome.sites)
    assert outcome.state_sha256 == without_network(sites, {"sync_every": 5} | settings)


def without_network(sites: list, settings: dict) -> str:
    config = replace(with_settings(sites[:1], **settings)[0].config.semi_sync, pairing="rank")
    shrunk = shrinking(replace(sites[0], count=4))
    config.bucket_mib = shrunk.bucket_mib
    shapes, _ = shrunk_shapes(sites[0].config, shrunk.factor)
    models = [StandIn(shapes) for _ in range(4)]
    optimizers = [sites[0].config.optimizer.build(model_parts=[model]) for model in models]
    noise = [torch.Generator().manual_seed(site) for site in range(4)]
    network = InProcessSites(4)
    outer = network.outer_loops(config, models, optimizers)
    for step in range(1, sites[0].config.training.steps + 1):
        if outer[0].plan.due(step):
            for site, model in enumerate(models):
                model.pull(noise[site], target=1.0 + 0.1 * site)
                optimizers[site].step()
        network.at_once(lambda site: outer[site].step())
    network.at_once(lambda site: outer[site].finish())
    network.close()
    return outer[0].shared_state_sha256()


def test_a_killed_site_is_missed_returns_and_is_healed(sites: list) -> None:
    outcome = rehearse(sites, faults=["kill:site2@12s+5s"])
    killed, witness = outcome.sites[2], outcome.sites[0]
    assert killed.lives == 2 and outcome.finished and killed.steps == witness.steps == 40
    assert any(record.healed for _, record in killed.rounds) and killed.away_seconds == pytest.approx(5.0)
    contributors = [record.contributors for _, record in witness.rounds if record.committed]
    assert any("site2" not in each for each in contributors) and "site2" in contributors[-1]
    assert 0.8 < outcome.participation < 1


LATE = {"method": "decoupled_diloco", "late_work": "keep", "overdue_result": "train_on"}


@pytest.mark.parametrize(
    ("sources", "settings"),
    [
        ("", {"round_box": "speed"}),
        ("", {"round_box": "tokens", "round_box_size": 256.0}),
        ("", {"sites_per_round": 3}),
        ("xy", {}),
        ("xy", {"sources_per_round": 5}),
        ("vwxyz", {"source_placement": "pollen"}),
        ("", LATE | {"sync_every": 8, "num_fragments": 2, "fragment_sync_delay": 2}),
    ],
    ids=str,
)
def test_a_killed_site_returns_to_boxes_samples_sources_and_rounds_that_wait_for_nobody(
    sources: str, settings: dict, sites: list, tmp_path: Path
) -> None:
    run = with_sources(tmp_path, sources, 40) if sources else sites
    outcome = rehearse(run, settings, faults=["kill:site2@12s+5s"])
    killed, witness = outcome.sites[2], outcome.sites[0]
    assert outcome.finished and killed.lives == 2 and killed.steps == witness.steps == 40
    assert not any(site.error for site in outcome.sites)
    back = [record for when, record in killed.rounds if when > 17 and record.committed]
    assert any("site2" in record.contributors for record in back)


def test_a_thin_link_makes_a_run_long_and_fails_no_round(sites: list) -> None:
    outcome = rehearse(sites, links=["10mbit,100ms,0.1%"])
    assert outcome.finished and outcome.utilisation < 0.5
    assert all(record.committed for site in outcome.sites for _, record in site.rounds)


def test_two_sites_that_need_each_other_wait(sites: list) -> None:
    outcome = rehearse(sites, count=2, faults=["kill:site1@12s+100s"])
    assert outcome.finished and outcome.seconds > 110 and outcome.sites[0].utilisation < 0.5


def test_the_end_may_come_before_the_last_step(sites: list) -> None:
    outcome = rehearse(sites, until="15s")
    assert not outcome.finished and outcome.seconds == 15.0 and 0 < outcome.sites[0].steps < 40


def test_a_slow_site_is_waited_for(sites: list) -> None:
    usual, slowed = rehearse(sites), rehearse(sites, faults=["slow:site1@0s+1h*3"])
    assert slowed.seconds > 2 * usual.seconds
    assert slowed.sites[1].utilisation > 1.5 * slowed.sites[0].utilisation


def test_of_a_box_the_slow_site_takes_its_part(sites: list) -> None:
    """Steps of 1 s and 3 s, rounds of 10 of 40 steps: 4 times 30 s, or, once the speeds are known, 3 times 10 s; the first has
    all steps."""
    steps = {"steps": ["1s", "site1=3s"], "jitter": 0.0, "links": ["1gbit,1ms"]}
    fixed, boxed = (
        rehearse(sites, {"method": "local_sgd", "sync_every": 10, "round_box": box}, 2, **steps)
        for box in ("steps", "speed")
    )
    assert fixed.seconds == pytest.approx(120, rel=0.02) and boxed.seconds == pytest.approx(60, rel=0.05)
    assert boxed.sites[1].training_seconds < boxed.seconds and boxed.finished
    assert all(site.steps == 40 for site in boxed.sites), "steps that are not taken count"


def test_a_site_with_several_sources_trains_them_in_turn(tmp_path: Path) -> None:
    settings = {"method": "local_sgd", "sync_every": 5}
    one, two = (
        rehearse(with_sources(tmp_path, names, 10), settings, 2, jitter=0.0, links=["1gbit,1ms"])
        for names in ("x", "xy")
    )
    assert two.seconds / one.seconds == pytest.approx(2, rel=0.02) and one.finished and two.finished
    tokens = [outcome.sites[0].rounds[0][1].tokens for outcome in (one, two)]
    assert tokens[1] == 2 * tokens[0]


def test_the_ledger_tells_waiting_for_others_from_transfer(sites: list) -> None:
    outcome = rehearse(sites, {"sync_every": 5, "codec": "int8"}, faults=["slow:site1@0s+1h*3"], jitter=0.0)
    for _, record in outcome.sites[0].rounds[1:]:
        # Five steps of a second each, for which site1 takes fifteen.
        assert (
            record.seconds_waiting == pytest.approx(10.0, abs=0.5) and record.seconds_quorum >= record.seconds_waiting
        )
        # Coding takes no virtual time, and some of the transfer passes while the lighthouse's answer is on its way.
        assert record.seconds_transfer >= record.seconds_reduce > 0.01
        assert record.seconds_transfer == pytest.approx(record.seconds_reduce, abs=0.05)


def test_a_plan_learns_from_a_rehearsal(sites: list, tmp_path: Path) -> None:
    outcome = rehearse(sites, count=2)
    for site, name in zip(outcome.sites, ("alpha", "beta"), strict=True):
        site.name = name
    make_folders(str(tmp_path), [site.name for site in outcome.sites])
    write_journals(str(tmp_path), outcome)
    plan = make_plan(sites, PlanRequest(file="demo.toml", links=[LINK], steps=["1s"], run=str(tmp_path)))
    by_name = {each.what: each for each in plan.comparisons}
    assert by_name["a sync (params/0)"].ratio == pytest.approx(1, abs=0.1)
    assert by_name["bytes of a round (params/0)"].ratio == pytest.approx(1, rel=0.01)
    assert plan.prediction.utilisation.likely == pytest.approx(outcome.utilisation, rel=0.05)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"links": []}, "--link"),
        ({"sites": 0}, "--sites 0"),
        ({"sites": 1}, "--sites 1: with replica.min_sites = 2 nothing"),
        ({"jitter": 0.5}, "--jitter"),
        ({"mtbf": "0s"}, "--mtbf"),
        ({"mtbf": "1ms", "steps": ["0.1s"]}, "--mtbf 1ms: must be at least an inner step's"),
        ({"until": "soon"}, "'soon'"),
        ({"until": "0s"}, "--until 0s: must be above 0"),
        ({"restart": "30"}, "'30'"),
        ({"faults": ["kill:site9@1s"]}, "site9"),
        ({"faults": ["kil:site1@1s"]}, "did you mean 'kill'"),
        ({"faults": ["kill:site1"]}, "must be kill:SITE"),
        ({"faults": ["kill:site1@-1s"]}, "'-1s'"),
        ({"faults": ["partition:site1@1s+1s"]}, "two sites"),
        ({"faults": ["partition:site1-site2@1s"]}, "ends"),
        ({"faults": ["slow:site1@1s+1s"]}, "needs a factor"),
        ({"faults": ["kill:site1@1s+1s*2"]}, "only slow"),
        ({"fault_log": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_flags_that_are_refused(request_: dict, told: str, sites: list) -> None:
    with pytest.raises(UserError) as refused:
        make_script(sites, Request(**{"sites": 4, "links": [LINK]} | request_))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_recorded_faults(sites: list, tmp_path: Path) -> None:
    log = tmp_path / "faults.jsonl"
    log.write_text(
        '{"time": 7, "kind": "kill", "site": "site1"}\n\n'
        '{"time": 1.5, "kind": "partition", "sites": ["site0", "site2"], "seconds": 3}\n'
    )
    script = make_script(sites, Request(sites=4, links=[LINK], fault_log=str(log), restart="9s"))
    assert script.faults == [
        Fault(kind="partition", at=1.5, sites=(0, 2), seconds=3.0),
        Fault(kind="kill", at=7.0, sites=(1,), seconds=9.0),
    ]
    for line, told in {
        "{": "line 1: is not JSON",
        "[]": "must be an object",
        '{"kind": "kill", "site": "site1"}': "time = None",
        '{"time": 1, "kind": "kill", "site": "west"}': "west",
        '{"time": 1, "kind": "kill", "sites": "site1"}': "list of names",
        '{"time": 1, "kind": "kill", "site": "site1", "secs": 3}': "did you mean 'seconds'",
        '{"time": 1, "kind": "kill", "site": "site1", "sites": ["site1"]}': "site and sites",
        '{"time": NaN, "kind": "kill", "site": "site1"}': "time = nan: must be finite",
        '{"time": 1, "kind": "kill", "site": "site1", "seconds": 1e999}': "seconds = inf: must be finite",
    }.items():
        log.write_text(line)
        with pytest.raises(UserError, match="faults.jsonl, line 1") as refused:
            make_script(sites, Request(sites=4, links=[LINK], fault_log=str(log)))
        assert told in str(refused.value)


def test_random_kills_come_from_the_seed(sites: list) -> None:
    def kills(seed: int) -> list:
        request = Request(sites=8, links=[LINK], mtbf="1h", until="24h", seed=seed)
        return make_script(sites, request).faults

    assert kills(1) == kills(1) != kills(2)
    assert 130 < len(kills(1)) < 250  # 8 sites, 24 hours, 190 expected


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["lab", str(file), "--virtual-time", "--link", LINK, "--step", "1s", "--fault", "kill:beta@12s+5s"]
    flags += ["--replica.min_sites=1", "--fault", "kill:beta@99h"]
    assert cli.main([*flags, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] and [site["starts"] for site in found["sites"]] == [1, 2]
    kept = (tmp_path / "beta" / "metrics.jsonl").read_text()
    assert cli.main(flags) == 0
    assert "1 kill; 1 more would have come after the end" in capsys.readouterr().out
    assert cli.main([*flags, "--out", str(tmp_path)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "beta" / "metrics.jsonl").read_text() == kept
    assert cli.main(["lab", str(file), "--link", LINK, "--step", "1s"]) == 2
    assert "--virtual-time" in capsys.readouterr().err


def test_sites_that_hold_back_for_a_share_of_their_slack_have_a_slower_one_with_them(file: Path) -> None:
    """The lighthouse waits 0.2 s, a slower site comes later than that, and the result is due 2 s after a round is begun."""
    run = load_run(file, ["--replica.min_sites=2", "--replica.join_timeout_seconds=0.2"], needs=()).sites
    settings = LATE | {"overdue_result": "wait", "sync_every": 8, "num_fragments": 2, "fragment_sync_delay": 2}
    steps = {"steps": ["1s", "site3=1.1s"], "jitter": 0.0, "links": ["1gbit,20ms"], "until": "38s"}
    with_it = []
    for grace in (0.0, 0.9):
        outcome = rehearse(run, settings | {"quorum_grace": grace}, **steps)
        rounds = [record for _, record in outcome.sites[0].rounds if record.committed]
        with_it.append(sum("site3" in record.contributors for record in rounds) / len(rounds))
    assert with_it[1] > 1.5 * with_it[0]
